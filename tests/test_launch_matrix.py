"""Which recipe runs under which file of launch/. A cell runs the recipe itself on real ranks: two steps, saved as a whole model,
reloaded on one process, compared with its prediction, and exit code 0 on all ranks; or it is refused with the recipe's own message.

`make matrix` runs every cell and writes benchmarks/results/launch_matrix.json, which gives a table in launch/README.md. Without
`--matrix` a few cells, different ones each day, are run and compared with that file.
"""

import csv
import datetime
import json
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, recipe
from ledgers import assert_same
from reliability import Run
from test_launch import PRESETS, SHORT, TINY, on_cpu
from tiny_models import save_with_tokenizer, tiny_config
from transformers import T5Config

from toolkit.distributed.launch_files import read_launch_file
from toolkit.files import atomic_write
from toolkit.memory.environment import stack_versions
from toolkit.memory.ledger import Ledger
from toolkit.methods import METHODS
from toolkit.runs.finished_run import FinishedRun

RESULTS = ROOT / "benchmarks" / "results" / "launch_matrix.json"
SWAP = ROOT / "runs" / "swap"  # of launch/deepspeed/zero3_nvme.json
SWAPPED = 1 << 20  # bytes: DeepSpeed keeps smaller tensors in memory
EVERYWHERE, COMMON = ("full", "lora", "qlora"), ("ddp", "zero2")  # recipes under all files, files for all recipes
MODELS = {"sequence_parallel": ("llama", "embedded"), "zero3_nvme": ("wide",)}  # what a file needs; else the default


@dataclass(frozen=True)
class Cell:
    """One recipe under one file of launch/; its `id` is its key in the results."""

    preset: str
    method: str
    model: str = "embedded"
    more: tuple[str, ...] = ()  # flags

    @property
    def id(self) -> str:
        return f"{self.preset}-{self.method}" + ("" if self.model == "embedded" else f"-{self.model}")

    @property
    def processes(self) -> int:
        return 1 if self.preset == "single" else 2


CELLS = [
    Cell(preset, method, model)
    for preset in PRESETS
    for method in sorted(METHODS)
    if method in EVERYWHERE or preset in COMMON
    for model in MODELS.get(preset, ("embedded",))
]


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A tiny Llama, and a T5 so wide that a process's shard of its embedding has more than `SWAPPED` bytes."""
    place = tmp_path_factory.mktemp("models")
    save_with_tokenizer(tiny_config("llama"), place / "llama")
    save_with_tokenizer(T5Config(d_model=1536, d_kv=16, d_ff=64, num_layers=1, num_heads=4), place / "wide")
    return place


def flags(cell: Cell, models: Path, data: Path) -> tuple[str | Path, ...]:
    model = () if cell.model == "embedded" else ("--model_name_or_path", models / cell.model)
    steps = SHORT if METHODS[cell.method].trains else TINY[:4]
    precision = ("--bf16",) if (cell.preset, cell.method) == ("zero3_nvme", "qlora") else ()  # refused without
    return ("--use_cpu", "--dataset_name", data, "--max_length", "64", *model, *steps, *precision, *cell.more)


def run_cell(cell: Cell, models: Path, data: Path, place: Path) -> dict:
    """Returns the ranks' exit codes and the outcome: `runs` if every check of a cell passes, or `refused`."""
    folder, began = place / "run", time.time()
    script, *argv = on_cpu(cell.preset, f"recipes/{cell.method}.py")
    argv += [*flags(cell, models, data), "--output_dir", folder]
    run = Run(script, *argv, log=place / "log", processes=cell.processes, preset=cell.preset)
    codes = run.wait(600)
    said, found = run.text(), {"processes": cell.processes, "codes": codes}
    if set(codes) == {2} and "guard" not in said:
        (reason,) = re.findall(r"^error: (.*)$", said, re.M)
        assert not (folder / "metrics.jsonl").exists(), f"refused after it had begun to train: {reason}"
        return found | {"outcome": "refused", "reason": reason.replace(f"{models}/", "")}
    if any(codes):
        return found | {"outcome": "fails", "said": said[-3000:]}
    assert "FutureWarning" not in said, said
    left = json.loads((folder / "run.json").read_text())
    assert left["finished"] and left["processes"] == cell.processes
    if not METHODS[cell.method].trains:
        alone = recipe(cell.method, *flags(cell, models, data), "--output_dir", place / "alone")
        assert alone.returncode == 0, alone.stderr
        assert (folder / "completions.csv").read_text() == (place / "alone" / "completions.csv").read_text()
        return found | {"outcome": "runs"}
    if cell.processes > 1:
        engine = read_launch_file(cell.preset, cell.processes).engine
        moved = {"optimizer_state": engine.optimizer_state, "parameters": engine.parameters}
        home = {what: "with the model" for what, where in moved.items() if where == "cpu"}  # of a CPU, the same memory
        engine = replace(engine, **home)
        assert re.findall(r"^ +engine  (.*)$", said, re.M) == [str(engine)], said
    # rank 0's; gloo's threads free their buffers with a delay
    ledgers = (Ledger.load(folder / name) for name in ("predicted_memory.json", "memory.json"))
    assert_same(*ledgers, peaks=0.03)
    alone = FinishedRun(folder)  # loaded on this process
    with (folder / "completions.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert alone.generate([row["text"] for row in rows]) == [row["tuned"].strip() for row in rows]
    if "nvme" in cell.preset:
        files = [path for path in SWAP.rglob("*") if path.is_file() and path.stat().st_mtime > began]
        found["swapped_bytes"] = sum(path.stat().st_size for path in files)
        assert found["swapped_bytes"] >= cell.processes * SWAPPED
        for path in files:
            path.unlink()
    return found | {"outcome": "runs"}


def recorded(results: Path = RESULTS) -> dict[str, dict]:
    """The committed outcomes by cell."""
    return json.loads(results.read_text(encoding="utf-8"))["cells"] if results.is_file() else {}


def record(cell: Any, outcome: dict, cells: Sequence[Any] = CELLS, results: Path = RESULTS) -> None:
    """Writes the outcome of one of `cells` into the results and keeps the others."""
    known = recorded(results) | {cell.id: outcome | {"date": datetime.date.today().isoformat()}}
    content = {
        "what": "each cell is two steps of the recipe on CPU ranks with the launcher's environment, saved and read back on one",
        "command": "make matrix",
        "stack": stack_versions(),
        "cells": {cell.id: known[cell.id] for cell in cells if cell.id in known},
    }
    atomic_write(results, json.dumps(content, indent=1) + "\n")


@pytest.mark.slow
@pytest.mark.matrix(sample=1)
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.id)
def test_a_recipe_runs_under_a_launch_file_on_real_ranks_or_is_refused(cell, models, small_csv, request, tmp_path):
    if "offload" in cell.preset and shutil.which("c++") is None:
        pytest.skip("offloading compiles C++ code, and there is no compiler")
    try:
        outcome = run_cell(cell, models, small_csv, tmp_path)
    except AssertionError as error:
        outcome = {"processes": cell.processes, "codes": [], "outcome": "fails", "said": str(error)}
    if request.config.getoption("--matrix"):
        record(cell, outcome)
    elif (known := recorded().get(cell.id)) is not None:
        assert (outcome["outcome"], outcome.get("reason")) == (known["outcome"], known.get("reason"))
    assert outcome["outcome"] != "fails", outcome["said"]


def test_every_result_belongs_to_a_cell_and_no_rank_failed():
    cells = recorded()
    assert set(cells) <= {cell.id for cell in CELLS}
    for name, cell in cells.items():
        assert cell["codes"] == [{"runs": 0, "refused": 2}[cell["outcome"]]] * cell["processes"], name
