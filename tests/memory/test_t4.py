"""The accuracy of predictions on 36 third-party measurements on a Tesla T4."""

import csv
import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("FOOTPRINT_TEST_DATA", ROOT / "../shared/data")) / "memory" / "t4_lora_measured.csv"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("t4_accuracy", ROOT / "benchmarks" / "t4_accuracy.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def committed(benchmark):
    return json.loads(benchmark.RESULTS.read_text(encoding="utf-8"))


def test_the_committed_summary_matches_the_committed_rows(benchmark, committed):
    assert benchmark.summary(committed["rows"]) == committed["summary_percent"]


def test_allocated_peaks_have_the_documented_accuracy(committed):
    allocated = committed["summary_percent"]["all"]["peak_allocated"]
    assert allocated["mean"] <= 0.1
    assert allocated["worst"] <= 0.6


def test_every_phases_allocated_peak_is_within_0_6_percent(benchmark, committed):
    for phase in benchmark.PHASES:
        assert committed["summary_percent"]["all"][phase]["worst"] <= 0.6, phase


def test_reserved_peaks_of_unquantized_runs_have_the_documented_accuracy(committed):
    for group, columns in committed["summary_percent"].items():
        if group.startswith("none"):
            assert columns["peak_reserved"]["mean"] <= 1
            assert columns["peak_reserved"]["worst"] <= 3


def test_predictions_are_more_accurate_than_those_of_all_peers_in_the_table(committed):
    columns = committed["summary_percent"]["all"]
    for peer in ("fitcheck_process", "accelerate", "deepspeed"):
        assert columns["process"]["mean"] < columns[peer]["mean"]


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.skipif(not DATA.is_file(), reason=f"the measured runs are not at {DATA}")
@pytest.mark.parametrize("index", [11, 10])  # the smallest model: float16, then NF4
def test_the_committed_prediction_of_a_run_is_reproduced(benchmark, committed, index):
    row = list(csv.DictReader(DATA.open(encoding="utf-8")))[index]
    entries = [entry for entry in committed["rows"] if entry["index"] == index]
    if not entries:
        pytest.skip("this run is not among the committed results")
    predicted = benchmark.predict(row)
    for name, value in entries[0]["predicted_mib"].items():
        assert predicted[name] == pytest.approx(value, rel=0.005), name
