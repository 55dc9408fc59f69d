"""Which levers that need less memory go with which recipe and engine. A cell runs the recipe: two steps on real ranks, saved, read
back, and compared with its prediction; or it is refused with the recipe's own message, before it trains.

`make matrix` runs every cell and writes benchmarks/results/levers.json, which gives a table in recipes/README.md. Without
`--matrix` a few cells, different ones each day, are run and compared with that file.
"""

from dataclasses import dataclass
from itertools import product

import pytest
from conftest import ROOT
from test_launch_matrix import Cell, models, record, recorded, run_cell  # noqa: F401 - a fixture

from toolkit.methods import METHODS

RESULTS = ROOT / "benchmarks" / "results" / "levers.json"
LEVERS = {
    "--loss_chunk_tokens": ("10",),
    "--mlp_tile_tokens": ("20",),
    "--activation_checkpointing": (),
    "--activation_checkpointing_kwargs": ('{"every_n_layers": 2}', "--activation_checkpointing"),
    "--optimizer_in_backward": (),
    "--packing": (),
}
OWN_FLAGS = {"selective": ("--train_last_layers", "1")}  # which the method needs
METHODS_TRAINED = sorted(name for name, method in METHODS.items() if method.trains)
ENGINES, UNDER_ENGINES = ("ddp", "zero2", "zero3", "fsdp2"), ("full", "lora", "qlora")


@dataclass(frozen=True)
class LeverCell:
    """One lever with one recipe under one file of launch/; its `id` is its key in the results."""

    lever: str
    preset: str
    method: str
    model: str  # embedded (a T5) or llama

    @property
    def id(self) -> str:
        return f"{self.lever.removeprefix('--')}-{self.preset}-{self.method}-{self.model}"

    @property
    def run(self) -> Cell:
        more = (self.lever, *LEVERS[self.lever], *OWN_FLAGS.get(self.method, ()))
        return Cell(self.preset, self.method, self.model, more)


CELLS = [
    *(LeverCell(lever, "single", *where) for lever, *where in product(LEVERS, METHODS_TRAINED, ("embedded", "llama"))),
    *(LeverCell(lever, *where, "llama") for lever, *where in product(LEVERS, ENGINES, UNDER_ENGINES)),
]


@pytest.mark.slow
@pytest.mark.matrix(sample=2)
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.id)
def test_a_lever_runs_with_a_recipe_and_an_engine_or_is_refused(cell, models, small_csv, request, tmp_path):  # noqa: F811
    outcome = run_cell(cell.run, models, small_csv, tmp_path)
    assert outcome["outcome"] != "fails", outcome["said"]
    if request.config.getoption("--matrix"):
        record(cell, outcome, CELLS, RESULTS)
    elif (known := recorded(RESULTS).get(cell.id)) is not None:
        assert (outcome["outcome"], outcome.get("reason")) == (known["outcome"], known.get("reason"))


def test_every_result_belongs_to_a_cell():
    assert set(recorded(RESULTS)) <= {cell.id for cell in CELLS}
