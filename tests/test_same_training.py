"""Two processes train like one, under every engine: the gradient, the loss of 20 steps, the saved model and its generated text.

`make matrix` runs every cell and writes the differences to benchmarks/results/engines_equal.json, which gives a table in
launch/README.md.
"""

import datetime
import json
from itertools import product
from pathlib import Path

import pytest
import same_training as same
import torch
import yaml
from conftest import ROOT
from reliability import Run
from safetensors.torch import load_file

from toolkit.distributed.launch_files import read_launch_file
from toolkit.files import atomic_write
from toolkit.memory.environment import stack_versions

RESULTS = ROOT / "benchmarks" / "results" / "engines_equal.json"
COMMAND = "python -m pytest tests/test_same_training.py --matrix"
CELLS = [(preset, *case) for preset, case in product(("ddp", "zero1", "zero2", "zero3", "fsdp2"), same.CASES)]
ALWAYS = ("zero3", "llama", "lora")  # in every day's sample: engines that shard parameters may save an empty adapter
FIRST, LATER = 1e-5, 1e-4  # relative, in fp32: for the first step's gradient and loss, and for any of the 20 losses
SHARDED = ("zero3", "fsdp2")  # engines that shard parameters, and therefore need floating-point ones


def weights(folder: Path) -> dict[str, torch.Tensor]:
    name = "adapter_model.safetensors" if (folder / "adapter_model.safetensors").exists() else "model.safetensors"
    return load_file(folder / name)


def relative(found: float, expected: float) -> float:
    return abs(found / expected - 1)


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """Runs a case on this process, once: returns the folder of the initial models, the folder of its output, and its results."""
    bases, out = tmp_path_factory.mktemp("bases"), tmp_path_factory.mktemp("one")
    same.save_bases(bases)
    found: dict[tuple[str, str], same.Found] = {}

    def run(kind, method):
        if (kind, method) not in found:
            one = same.run_case(kind, method, bases, out / f"{kind}-{method}", same.GLOBAL_BATCH)
            assert len(one.losses) == same.STEPS and one.losses[-1] < 0.9 * one.losses[0]  # it does train
            found[kind, method] = one
        return bases, out / f"{kind}-{method}", found[kind, method]

    return run


@pytest.fixture(scope="session")
def together(request, alone, tmp_path_factory):
    """Runs an engine on two processes, once, with all its cells in this session: returns the folder of their output."""
    folders: dict[str, Path] = {}

    def run(preset):
        if preset not in folders:
            ours = [item for item in request.session.items if item.path == Path(__file__)]
            cells = [item.callspec.params["cell"] for item in ours if hasattr(item, "callspec")]
            cases = [f"{kind}-{method}" for engine, kind, method in cells if engine == preset]
            out = folders[preset] = tmp_path_factory.mktemp(preset)
            bases = alone(*cases[0].split("-"))[0]
            script = ("tests/fsdp_on_cpu.py",) if preset == "fsdp2" else ()
            argv = (*script, "tests/same_training.py", bases, out, *cases)
            begun = Run(*argv, log=out / "log", processes=2, preset=preset)
            assert begun.wait(550) == [0, 0], begun.text()[-6000:]
        return folders[preset]

    return run


@pytest.fixture(scope="session")
def results(request):
    """The committed differences by cell; with `--matrix` this session's differences are written to the file at its end."""
    cells = json.loads(RESULTS.read_text(encoding="utf-8"))["cells"] if RESULTS.is_file() else {}
    yield cells
    if request.config.getoption("--matrix") and cells:
        write_results(cells)


def write_results(cells: dict[str, dict]) -> None:
    what = (
        "relative differences between two processes and one of the same global batch, for tiny models in fp32 on CPUs: of the "
        "gradient of the first step (norm of the difference), of its loss, and the largest of any loss of "
        f"{same.STEPS} steps of AdamW"
    )
    cells = {name: cells[name] for name in map("-".join, CELLS) if name in cells}
    content = {"what": what, "command": COMMAND, "stack": stack_versions(), "cells": cells}
    atomic_write(RESULTS, json.dumps(content, indent=1) + "\n")


def gradient_difference(kind: str, method: str, bases: Path, one: Path, two: Path) -> float:
    """||g2 - g1|| / ||g1||, from weights after one step of plain SGD (w - rate x g) in the folders `one` and `two`."""
    first, second = weights(one), weights(two)
    start = same.attach(same.load(bases / kind, method, same.arguments(one, 1)), kind, method)
    start.save_pretrained(one / "before")
    before = weights(one / "before")
    assert before.keys() == first.keys() == second.keys()
    off = torch.cat([(second[name] - first[name]).flatten() for name in first]).norm()
    step = torch.cat([(before[name] - first[name]).flatten() for name in first]).norm()
    assert step > 0.1
    return float(off / step)


def differences(
    kind: str, method: str, bases: Path, one: Path, two: Path, losses: tuple[list[float], list[float]]
) -> dict:
    """The differences between two processes and one: of the gradient, the first loss, and the loss of any step."""
    curve = [relative(*pair) for pair in zip(*losses, strict=True)]
    gradient = gradient_difference(kind, method, bases, one / "gradient", two / "gradient")
    return {"gradient": gradient, "first_loss": curve[0], "loss": max(curve)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "cell",
    [pytest.param(cell, marks=[] if cell == ALWAYS else [pytest.mark.matrix]) for cell in CELLS],
    ids=map("-".join, CELLS),
)
def test_two_processes_train_like_one_and_save_a_model_that_one_process_loads(cell, alone, together, results, request):
    preset, kind, method = cell
    folder = together(preset) / f"{kind}-{method}"
    bases, one, expected = alone(kind, method)
    ranks = [same.Found(**torch.load(folder.with_name(f"{folder.name}.{rank}.pt"))) for rank in (0, 1)]
    assert ranks[0].losses == ranks[1].losses
    found = differences(kind, method, bases, one, folder, (ranks[0].losses, expected.losses))
    assert found["gradient"] < FIRST and found["first_loss"] < FIRST and found["loss"] < LATER, found

    many = sum(expected.packed.values())  # 4-bit weights, which transformers loads whole also under ZeRO-3
    assert expected.packed == ({"uint8, whole": many} if method == "qlora" else {})
    stored = "float32" if preset in SHARDED else "uint8"
    for rank in ranks:
        assert rank.packed == ({f"{stored}, whole": many} if method == "qlora" else {})

    model = same.reload(kind, method, bases, folder / "curve").eval()
    with torch.no_grad():
        logits = model(**same.batch(kind)).logits
    for rank in ranks:
        torch.testing.assert_close(rank.logits, logits, rtol=1e-5, atol=1e-5)
        assert rank.texts == same.written(model, kind)
    if request.config.getoption("--matrix"):
        results["-".join(cell)] = found | {"date": datetime.date.today().isoformat()}


def test_the_files_fsdp2_and_fsdp2_qlora_have_the_same_settings():
    plain, qlora = (yaml.safe_load((ROOT / "launch" / f"{name}.yaml").read_text()) for name in ("fsdp2", "fsdp2_qlora"))
    assert plain == qlora


def test_each_file_of_zero3_shards_the_model_while_loading():
    stages = {
        path.stem: read_launch_file(path.stem, 2) for path in (ROOT / "launch").glob("*.yaml") if path.stem != "single"
    }
    three = [launch for launch in stages.values() if launch.engine.kind == "ZeRO-3"]
    assert len(three) == 4
    assert {launch.env.get("ACCELERATE_DEEPSPEED_ZERO3_INIT") for launch in three} == {"true"}


def test_every_difference_belongs_to_a_cell_and_is_within_its_bound(results):
    assert set(results) <= {"-".join(cell) for cell in CELLS}
    for found in results.values():
        assert found["gradient"] < FIRST and found["first_loss"] < FIRST and found["loss"] < LATER
