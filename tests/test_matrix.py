"""Which options combine: each method with each architecture and quantization, with and without checkpointing, for text and for a
classification head. A cell runs the recipe itself: two steps, saved, reloaded, and compared with its prediction.

`make matrix` runs every cell and writes benchmarks/results/matrix.json, which gives the table in recipes/README.md. Without
`--matrix` a few cells, different ones each day, are run and compared with that file.
"""

import csv
import datetime
import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
from conftest import ROOT, recipe
from ledgers import assert_same
from tiny_models import save_with_tokenizer, tiny_config

from toolkit.files import atomic_write
from toolkit.memory.environment import stack_versions
from toolkit.memory.ledger import Ledger
from toolkit.methods import METHODS
from toolkit.runs import prediction

RESULTS = ROOT / "benchmarks" / "results" / "matrix.json"
ARCHITECTURES = ("t5", "bart", "llama", "gpt2", "qwen2")
WEIGHTS = {
    "unquantized": (),
    "int8": ("--load_in_8bit",),
    "nf4": ("--load_in_4bit",),
}
TASKS = {"generation": "summarization", "head": "sequence_classification"}
OWN_FLAGS = {  # flags of methods that need some
    "selective": ("--train_last_layers", "1"),
}


@dataclass(frozen=True)
class Cell:
    """One combination; its `id` is its key in the results."""

    method: str
    weights: str
    architecture: str
    checkpointing: bool
    task: str

    @property
    def id(self) -> str:
        return "-".join(
            [
                self.method,
                self.weights,
                self.architecture,
                "checkpointing" if self.checkpointing else "plain",
                self.task,
            ]
        )


CELLS = [
    Cell(*values)
    for values in product(
        sorted(name for name, method in METHODS.items() if method.trains), WEIGHTS, ARCHITECTURES, (False, True), TASKS
    )
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Tiny models of each architecture with random weights and the embedded model's tokenizer, and two data sets."""
    place = tmp_path_factory.mktemp("matrix")
    for name in ARCHITECTURES:
        save_with_tokenizer(tiny_config(name), place / name)
    texts = [f"#Person1#: I saw {n} cats.\n#Person2#: Really, {n} cats?" for n in range(2, 14)]
    for task, names, answers in (
        ("generation", ("dialogue", "summary"), [f"Person1 saw {n} cats." for n in range(2, 14)]),
        ("head", ("sentence", "label"), ["few", "some", "many"] * 4),
    ):
        (place / task).mkdir()
        for split, part in (("train", slice(0, 4)), ("validation", slice(4, 8)), ("test", slice(8, 12))):
            with (place / task / f"{split}.csv").open("w", newline="", encoding="utf-8") as stream:
                csv.writer(stream).writerows([names, *zip(texts[part], answers[part], strict=True)])
    return place


@pytest.fixture(autouse=True)
def one_prediction_a_cell(monkeypatch) -> None:
    """Skips the prediction before the run, which takes half of a cell's time and is for other batches than the compared one."""
    monkeypatch.setattr(prediction, "say_prediction", lambda config: None)


def run_cell(cell: Cell, folder: Path, output: Path) -> dict[str, str]:
    """Returns `trains` if every check of a cell passes, or `refused` with the recipe's own message."""
    done = recipe(
        cell.method,
        *("--model_name_or_path", folder / cell.architecture, "--dataset_name", folder / cell.task),
        *("--task", TASKS[cell.task], "--max_length", "64", "--output_dir", output, "--use_cpu", "--max_steps", "2"),
        *(("--max_target_length", "8") if cell.task == "generation" else ()),
        *(
            "--per_device_train_batch_size",
            "2",
            "--max_eval_samples",
            "2",
            "--save_strategy",
            "no",
            "--optim",
            "adamw_torch",
        ),
        *WEIGHTS[cell.weights],
        *(("--gradient_checkpointing",) if cell.checkpointing else ()),
        *OWN_FLAGS.get(cell.method, ()),
    )
    if done.returncode == 2 and "guard" not in done.stderr:
        *_, reason = done.stderr.strip().splitlines()
        assert reason.startswith("error: "), done.stderr
        assert not (output / "metrics.jsonl").exists(), f"refused after it had begun to train: {reason}"
        return {"outcome": "refused", "reason": reason.removeprefix("error: ").replace(str(folder), "")}
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((output / "run.json").read_text())["finished"]  # its guards have read back what was saved
    assert_same(Ledger.load(output / "predicted_memory.json"), Ledger.load(output / "memory.json"))
    return {"outcome": "trains"}


@pytest.fixture(scope="session")
def results(request) -> dict:
    """The committed outcomes by cell; with `--matrix` this session's outcomes are written to the file at its end."""
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"cells": {}}
    yield known
    if request.config.getoption("--matrix"):
        cells = {cell.id: known["cells"][cell.id] for cell in CELLS if cell.id in known["cells"]}
        what = "each cell is two steps of the recipe on a tiny model on a CPU, saved, read back, and held to its prediction"
        content = {"what": what, "command": "make matrix", "stack": stack_versions(), "cells": cells}
        atomic_write(RESULTS, json.dumps(content, indent=1) + "\n")


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.id)
def test_a_cell_trains_is_read_back_and_matches_its_prediction_or_is_refused(cell, folder, results, request, tmp_path):
    outcome = run_cell(cell, folder, tmp_path / "run")
    if request.config.getoption("--matrix"):
        results["cells"][cell.id] = outcome | {"date": datetime.date.today().isoformat()}
    elif (known := results["cells"].get(cell.id)) is not None:
        assert outcome == {name: value for name, value in known.items() if name != "date"}


def test_every_result_belongs_to_a_cell(results):
    assert set(results["cells"]) <= {cell.id for cell in CELLS}
