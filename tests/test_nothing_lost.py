"""Runs go on, or say why not: finished, killed at every moment, stopped by Ctrl-C, changed flags, full disks, two at once, strangers."""

import json
import signal
import time

import pytest
from reliability import Run
from safetensors.torch import load_file

LENGTHS = ("--max_length", "48", "--max_target_length", "8", "--max_train_samples", "16", "--max_eval_samples", "2")
STEPS = ("--max_steps", "4", "--save_strategy", "steps", "--save_steps", "1", "--per_device_train_batch_size", "2")
SMALL = ("--use_cpu", *LENGTHS, *STEPS)
RECIPE = "recipes/lora.py"
RESUME = "--resume_from_checkpoint"
MOMENTS = 40


def run(folder, *more, codes=0, script=(RECIPE,), **settings):
    """Runs a recipe to its end; returns its output."""
    argv = (*script, *SMALL, "--output_dir", folder, *more)
    one = Run(*argv, log=folder.with_suffix(".log"), **settings)
    assert one.wait() == [codes] * len(one.ranks), one.text()
    return one.text()


def when(condition, one, seconds=120):
    """Waits until `condition()` is true, while `one` runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert one.runs and time.monotonic() < end, one.text()
        time.sleep(0.002)


def results(folder):
    """What must not depend on interruptions: the scores, the answers and the weights."""
    record = json.loads((folder / "run.json").read_text())
    assert record["finished"]
    return record["scores"], (folder / "completions.csv").read_text(), load_file(folder / "adapter_model.safetensors")


def same(one, two, within=0.0):
    (scores, answers, weights), (other_scores, other_answers, other_weights) = results(one), results(two)
    largest = max(tensor.abs().max() for tensor in weights.values())
    differ = max((tensor - other_weights[name]).abs().max() for name, tensor in weights.items()) / largest
    return (
        weights.keys() == other_weights.keys()
        and differ <= within
        and (scores, answers) == (other_scores, other_answers)
    )


def files(folder):
    """Every file of `folder`, with its content and its time."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run, and the number of its file operations."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(folder, script=("tests/killed.py", "0", str(folder.with_suffix(".count")), RECIPE))
    return folder, int(folder.with_suffix(".count").read_text())


@pytest.mark.slow
def test_a_finished_run_says_so_and_stays_as_it_is(whole, tmp_path):
    folder, _ = whole
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    before = files(folder)
    said = run(folder, RESUME)
    assert f"finished  {folder}: this run is already finished, and nothing was changed" in said
    assert "this run is already finished" in run(folder, RESUME, folder / "checkpoint-4")
    assert "its results would be overwritten" in run(folder, RESUME, folder / "checkpoint-3", codes=2)
    assert "--max_steps is 9 instead of 4" in run(folder, RESUME, "--max_steps", "9", codes=2)
    assert "is not empty; give a new folder" in run(folder, codes=2)
    assert files(folder) == before


@pytest.mark.slow
@pytest.mark.matrix(sample=2)
@pytest.mark.parametrize("moment", range(MOMENTS))
def test_a_run_that_is_killed_at_any_moment_goes_on_to_the_same_results(moment, whole, tmp_path):
    reference, operations = whole
    number = 2 + moment * (operations - 2) // (MOMENTS - 1)  # the first makes the folder
    folder = tmp_path / "run"
    argv = ("tests/killed.py", str(number), str(tmp_path / "count"), RECIPE)
    run(folder, script=argv, codes=-signal.SIGKILL)
    run(folder, RESUME)
    assert same(reference, folder), number
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
