"""The GPU benchmark, as far as a machine without a GPU can try it."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "memory_accuracy.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("memory_accuracy", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_grid_has_at_least_40_configurations_with_names_of_their_own(benchmark):
    grid = benchmark.grid()
    assert len({c.name for c in grid}) == len(grid) >= 40
    assert {c.model for c in grid} == set(benchmark.MODELS.values())
    assert {c.method for c in grid} == {"full", "lora", "ia3"}


def test_errors_are_percent_of_the_measured_peak(benchmark):
    predicted = {"peak": {"allocated_bytes": 101, "reserved_bytes": 190}}
    measured = {"peak": {"allocated_bytes": 100, "reserved_bytes": 200}}
    assert benchmark.errors(predicted, measured) == {"allocated_bytes": 1.0, "reserved_bytes": -5.0}


def test_a_configuration_that_fails_says_why_and_stops_nothing(benchmark):
    entry = benchmark.measure(benchmark.Configuration("nothing", "no_such_recipe", "nobody/nothing"), "T4", 60)
    assert entry["failed"].startswith("exit code 2")


def test_what_failed_counts_in_no_mean(benchmark):
    good = {"error_percent": {"allocated_bytes": -0.5, "reserved_bytes": 2.0}}
    assert benchmark.summary([good, {"failed": "out of memory"}]) == {
        "allocated_bytes": {"mean": 0.5, "worst": 0.5},
        "reserved_bytes": {"mean": 2.0, "worst": 2.0},
    }


def test_without_a_gpu_the_results_say_that_nothing_was_measured(benchmark, tmp_path):
    benchmark.write([], tmp_path / "results.json", None)
    written = json.loads((tmp_path / "results.json").read_text())
    assert (written["status"], written["rows"]) == ("not measured yet", [])


def test_the_committed_results_are_readable(benchmark):
    committed = json.loads(benchmark.RESULTS.read_text())
    assert committed["status"] in ("measured", "not measured yet")
    assert bool(committed["rows"]) == (committed["status"] == "measured")
