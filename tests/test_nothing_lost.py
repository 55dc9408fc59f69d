"""Runs go on, or say why not: finished, killed at every moment, stopped by Ctrl-C, changed flags, full disks, two at once, strangers."""

import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import BIN, ROOT
from reliability import Run
from safetensors.torch import load_file

from toolkit.config import parse_config
from toolkit.distributed.ranks import ONE_SIGNAL_SECONDS
from toolkit.errors import UserError
from toolkit.methods.lora import Lora
from toolkit.runs import claim
from toolkit.training import checkpoints, signatures
from toolkit.training.checkpoints import MANIFEST, check_trusted, damage, newest_first

LENGTHS = ("--max_length", "48", "--max_target_length", "8", "--max_train_samples", "16", "--max_eval_samples", "2")
STEPS = ("--max_steps", "4", "--save_strategy", "steps", "--save_steps", "1", "--per_device_train_batch_size", "2")
SMALL = ("--use_cpu", *LENGTHS, *STEPS)
RECIPE = "recipes/lora.py"
RESUME = "--resume_from_checkpoint"
MOMENTS = 40
ROOMS = 14


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
    left = {path.name for path in folder.iterdir() if path.name.startswith(".")}
    assert left <= {claim.LOCK}  # stays if the run was killed after it had finished, when it removes its lock


@pytest.fixture(scope="module")
def whole_of_two(tmp_path_factory):
    """As `whole`, by two processes under DDP."""
    folder = tmp_path_factory.mktemp("whole_of_two") / "run"
    counted = ("tests/killed.py", "0", str(folder.with_suffix(".count")), RECIPE)
    run(folder, script=counted, processes=2, preset="ddp")
    return folder, int(folder.with_suffix(".count").read_text())


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("moment", range(12))
def test_two_processes_of_which_the_first_is_killed_at_any_moment_go_on_to_the_same_results(
    moment, whole_of_two, tmp_path
):
    reference, operations = whole_of_two
    number = 2 + moment * (operations - 2) // 11
    folder = tmp_path / "run"
    argv = ("tests/killed.py", str(number), str(tmp_path / "count"), RECIPE, *SMALL, "--output_dir", folder)
    ranks = Run(*argv, log=tmp_path / "log", processes=2, preset="ddp")
    codes = ranks.wait()
    assert codes[0] == -signal.SIGKILL, ranks.text()
    run(folder, RESUME, processes=2, preset="ddp")
    assert same(reference, folder), number


# ---- signals


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_saves_and_says_the_command_that_goes_on_and_a_second_one_ends_at_once(processes, tmp_path):
    folder, more = tmp_path / "run", ("--max_steps", "100000", "--logging_steps", "1", "--save_steps", "50000")
    argv = ("tests/train_only.py", *SMALL, *more, "--output_dir", folder)
    one = Run(*argv, log=tmp_path / "log", processes=processes)
    when((folder / "metrics.jsonl").exists, one)
    one.signal(signal.SIGINT)
    one.signal(signal.SIGINT)  # as a launcher sends it too: it counts as one
    assert one.wait(60) == [130] * processes, one.text()
    said = one.text()
    assert "Traceback" not in said and said.count("stopping  after this step") == 1
    assert f"--output_dir {folder} {RESUME}" in said.split("stopped  by Ctrl-C, with checkpoint-")[1].splitlines()[0]


@pytest.mark.parametrize(
    ("saved", "how"), [(True, "continue with"), (False, "no checkpoint was saved yet; start again with")]
)
def test_a_second_ctrl_c_ends_at_once(saved, how, tmp_path):
    script = """
import sys, time
from pathlib import Path
from toolkit.distributed.ranks import exits_cleanly, interruption
@exits_cleanly
def main():
    interruption.continue_with, interruption.folder = "the same again", Path(sys.argv[1])
    with interruption.deferred_to_a_step():
        print("trains", flush=True)
        time.sleep(60)
main()
"""
    if saved:
        (tmp_path / "checkpoint-1").mkdir()
    one = subprocess.Popen([sys.executable, "-c", script, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert one.stdout.readline() == "trains\n"
        one.send_signal(signal.SIGINT)
        assert one.stdout.readline().startswith("   stopping  after this step")
        time.sleep(ONE_SIGNAL_SECONDS + 0.1)
        assert one.poll() is None
        one.send_signal(signal.SIGINT)
        assert one.wait(10) == 130
        assert one.stdout.read() == f"    stopped  by Ctrl-C; {how}: the same again\n"
    finally:
        one.kill()
        one.wait()


def test_ctrl_c_while_libraries_load_ends_a_recipe_without_a_traceback(tmp_path):
    command = [sys.executable, "recipes/lora.py", "--output_dir", tmp_path / "run", "--use_cpu"]
    one = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert "loading PyTorch" in one.stdout.readline()
    one.send_signal(signal.SIGINT)
    rest, _ = one.communicate(timeout=60)
    assert (rest, one.returncode) == ("", -signal.SIGINT) and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["single", pytest.param("ddp", marks=pytest.mark.long)])
def test_a_launcher_that_is_killed_takes_its_ranks_with_it_after_a_checkpoint(preset, tmp_path):
    folder, more = tmp_path / "run", ("--max_steps", "100000", "--logging_steps", "1", "--save_steps", "50000")
    argv = ["--config_file", f"launch/{preset}.yaml", "tests/train_only.py", *SMALL, *more, "--output_dir", folder]
    port = ["--main_process_port", "0"] if preset == "ddp" else []
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen([BIN / "accelerate", "launch", *port, *argv], cwd=ROOT, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 200
        while not (folder / "metrics.jsonl").exists():
            assert launcher.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.1)
        ranks = psutil.Process(launcher.pid).children(recursive=True)
        launcher.kill()
        _, late = psutil.wait_procs(ranks, timeout=60)
        assert not late and newest_first(folder), (tmp_path / "log").read_text()
        assert "stopped  by SIGTERM, with checkpoint-" in (tmp_path / "log").read_text()
    finally:
        launcher.kill()
        launcher.wait()


# ---- full disks


@pytest.fixture
def disk(tmp_path):
    """A small disk, and a function that gives it another size in bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk is a tmpfs, which only root can mount")
    yield folder, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.matrix(sample=2)
@pytest.mark.parametrize("room", range(ROOMS))
def test_a_full_disk_is_one_line_leaves_no_part_of_a_file_and_the_run_goes_on_later(room, whole, disk):
    reference, _ = whole
    (place, resize), folder = disk, disk[0] / "run"
    largest = (
        sum(file.stat().st_blocks * 512 for file in reference.rglob("*")) * 3 // 2
    )  # 3 checkpoints while one is written
    resize(4096 + largest * room // ROOMS)
    one = Run(RECIPE, *SMALL, "--output_dir", folder, log=place.parent / "log")
    (code,) = one.wait()
    said = one.text()
    assert code in (0, 2) and "Traceback" not in said, said
    if code == 0:
        assert same(reference, folder)
        return
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert str(folder) in line and ("No space left" in line or "could not be written" in line), line
    parts = [path for path in folder.rglob("*") if path.name.startswith(".") and path.name != ".lock"]
    assert not parts, parts
    for kept in folder.glob("checkpoint-*"):
        assert damage(kept) is None
    resize(10 * largest)
    run(folder, *((RESUME,) if folder.exists() else ()))
    assert same(reference, folder)


@pytest.mark.slow
@pytest.mark.matrix(sample=1)
@pytest.mark.parametrize("moment", range(ROOMS))
def test_a_disk_that_is_full_from_any_file_on_is_one_line(moment, whole, tmp_path):
    reference, operations = whole
    folder = tmp_path / "run"
    number = 2 + moment * (operations - 2) // ROOMS
    argv = ("tests/killed.py", f"-{number}", str(tmp_path / "count"), RECIPE)
    said = run(folder, script=argv, codes=2)
    assert said.count("error: ") == 1 and "Traceback" not in said, said
    parts = [path for path in folder.rglob("*") if path.name.startswith(".") and path.name != ".lock"]
    assert not parts, parts
    run(folder, *((RESUME,) if folder.exists() else ()))
    assert same(reference, folder)


# ---- two at once


@pytest.mark.slow
def test_runs_that_start_in_the_same_second_take_the_next_free_names(tmp_path):
    argv = (ROOT / "tests" / "train_only.py", *SMALL)
    place = {"FOOTPRINT_TEST_CWD": str(tmp_path)}
    runs = [Run("tests/elsewhere.py", *argv, log=tmp_path / f"log{n}", settings=place) for n in range(3)]
    for one in runs:
        assert one.wait() == [0], one.text()
    folders = {folder for one in runs for folder in re.findall(r"folder  (\S+)", one.text())}
    assert len(folders) == 3
    for folder in folders:
        assert damage(tmp_path / folder / "checkpoint-4") is None


@pytest.mark.slow
def test_a_second_run_in_a_folder_that_is_being_written_is_refused_and_a_dead_one_leaves_no_lock(tmp_path):
    folder, more = tmp_path / "run", ("--max_steps", "100000", "--logging_steps", "1")
    argv = ("tests/train_only.py", *SMALL, *more, "--output_dir", folder)
    first = Run(*argv, log=tmp_path / "first")
    when((folder / "checkpoint-2").exists, first)
    refused = (
        rf"error: {folder}: this run is being written by process {first.ranks[0].pid} on \S+ since \d\d:\d\d; wait"
    )
    for flags in ((RESUME,), ()):
        second = Run(*argv, *flags, log=tmp_path / "second")
        assert second.wait() == [2] and re.search(refused, second.text()), second.text()
    assert first.runs
    first.signal(signal.SIGKILL)
    first.wait()
    third = Run(*argv, RESUME, log=tmp_path / "third")
    when(lambda: "resuming  from" in third.text(), third)
    third.signal(signal.SIGTERM)
    assert third.wait() == [143], third.text()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["renamed", "deleted"])
def test_a_folder_that_is_renamed_or_deleted_while_a_run_writes_to_it_is_one_line(how, tmp_path):
    folder, more = tmp_path / "run", ("--max_steps", "100000", "--logging_steps", "1")
    one = Run("tests/train_only.py", *SMALL, *more, "--output_dir", folder, log=tmp_path / "log")
    when((folder / "checkpoint-2").exists, one)
    gone = tmp_path / "renamed"
    folder.rename(gone)
    if how == "deleted":
        shutil.rmtree(gone)
    assert one.wait(60) == [2], one.text()
    assert f"{folder} was renamed or deleted while the run wrote to it" in one.text() and "Traceback" not in one.text()
    assert not folder.exists()


@pytest.mark.slow
def test_the_best_checkpoint_is_found_after_the_folder_was_renamed_and_early_stopping_counts_on(tmp_path):
    chooses = ("--load_best_model_at_end", "--eval_strategy", "steps", "--eval_steps", "1", "--learning_rate", "1e-2")
    worst = ("--metric_for_best_model", "eval_loss", "--greater_is_better", "true", "--early_stopping_patience", "2")
    more = (*chooses, *worst, "--max_steps", "9", "--save_total_limit", "9")
    never, renamed = tmp_path / "never", tmp_path / "renamed"
    (best,) = re.findall(r"chosen  (checkpoint-\d): best", run(never, *more, script=("tests/train_only.py",)))
    last = newest_first(never)[0].name
    assert best < last < "checkpoint-9"  # it stopped early
    weights = (never / "adapter_model.safetensors").read_bytes()
    never.rename(renamed)
    resumed = run(renamed, RESUME, *more, script=("tests/train_only.py",))
    assert f"chosen  {best}: best" in resumed and newest_first(renamed)[0].name == last
    assert (renamed / "adapter_model.safetensors").read_bytes() == weights
    shutil.rmtree(renamed / best)
    resumed = run(renamed, RESUME, *more, script=("tests/train_only.py",))
    assert f"{best}, the best checkpoint so far, is gone" in resumed and "Traceback" not in resumed


# ---- flags of a resumed run, and checkpoints from strangers


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run that did not finish."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    run(folder, script=("tests/train_only.py",))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--learning_rate", "1e-3"),
        ("--weight_decay", "0.3"),
        ("--adam_beta2", "0.9"),
        ("--lr_scheduler_type", "cosine"),
        ("--warmup_steps", "2"),
        ("--optim", "adafactor"),
        ("--max_steps", "9"),
        ("--lora_r", "4"),
        ("--lora_dropout", "0.5"),
        ("--load_in_8bit", "true"),
        ("--seed", "3", "--data_seed", "42"),
        ("--train_sampling_strategy", "sequential"),
        ("--load_best_model_at_end", "--eval_strategy", "steps", "--eval_steps", "1"),
    ],
    ids=lambda flags: flags[0][2:],
)
def test_flags_that_a_resumed_run_cannot_use_are_refused(flags, begun):
    config = parse_config(Lora, [*map(str, SMALL), "--output_dir", str(begun), RESUME, *flags])
    with pytest.raises(
        UserError,
        match=rf"cannot go on with changed flags: .*--{flags[0][2:]} is .* instead of .*; give them as before",
    ):
        claim._changes(begun, config, "checkpoint-4")


@pytest.mark.slow
def test_other_flags_of_a_resumed_run_are_used_and_recorded(begun):
    flags = ("--max_grad_norm", "0.5", "--logging_steps", "1", "--per_device_eval_batch_size", "1", "--seed", "3")
    config = parse_config(Lora, [*map(str, SMALL), "--output_dir", str(begun), RESUME, *flags, "--allow_changed_data"])
    expected = {
        "logging_steps": [10, 1],
        "max_grad_norm": [1.0, 0.5],
        "per_device_eval_batch_size": [50, 1],
        "seed": [42, 3],
    }
    assert claim._changes(begun, config, "checkpoint-4") == expected
    same = parse_config(Lora, [*map(str, SMALL), "--output_dir", str(begun), RESUME])
    assert claim._changes(begun, same, "checkpoint-4") == {}


class Pickled:
    """Runs code where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


def reforge(checkpoint):
    """Makes the manifest of `checkpoint` anew, as whoever knows this code can, but not this user's key."""
    kept = json.loads((checkpoint / MANIFEST).read_text())
    content = {"run": kept["run"], "files": {}}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST):
        content["files"][path.relative_to(checkpoint).as_posix()] = {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
    seals = {"sha256": checkpoints._sha256_of(content), "signature": kept["signature"]}
    (checkpoint / MANIFEST).write_text(json.dumps(content | seals))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_checkpoint_whose_manifest_this_user_did_not_sign_is_refused_before_it_is_read(name, begun, tmp_path):
    folder, mark = tmp_path / "run", tmp_path / "code_ran"
    shutil.copytree(begun, folder)
    (folder / "checkpoint-4" / name).write_bytes(pickle.dumps(Pickled(mark)))
    reforge(folder / "checkpoint-4")
    assert damage(folder / "checkpoint-4") is None
    said = run(folder, RESUME, codes=2, script=("tests/train_only.py",))
    assert "was not signed with your key" in said and "--trust_checkpoint" in said and "Traceback" not in said
    assert not mark.exists()


@pytest.mark.slow
def test_only_what_this_user_wrote_is_trusted(begun, tmp_path, monkeypatch):
    kept = tmp_path / "checkpoint-4"
    shutil.copytree(begun / "checkpoint-4", kept)
    check_trusted(kept, trust=False)
    (kept / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"holds pytorch_model.bin, which was added after.*--trust_checkpoint"):
        check_trusted(kept, trust=False)
    check_trusted(kept, trust=True)
    (kept / "pytorch_model.bin").unlink()
    content = json.loads((kept / MANIFEST).read_text())
    del content["signature"]
    (kept / MANIFEST).write_text(json.dumps(content))
    assert damage(kept) is None
    with pytest.raises(UserError, match=r"has no signature .*may run code.*add --trust_checkpoint"):
        check_trusted(kept, trust=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "another_user"))
    for _ in range(2):
        with pytest.raises(UserError, match="was not signed with your key"):
            check_trusted(begun / "checkpoint-4", trust=False)
        signatures.signature(b"")  # makes the other user's key
    assert signatures.key_file().stat().st_mode & 0o777 == 0o600
    assert signatures.is_signed(b"a", signatures.signature(b"a")) and not signatures.is_signed(
        b"b", signatures.signature(b"a")
    )


@pytest.mark.slow
@pytest.mark.long
def test_a_forged_checkpoint_of_zero_is_refused_before_deepspeed_unpickles_it(tmp_path):
    folder, mark = tmp_path / "run", tmp_path / "code_ran"
    run(folder, script=("tests/train_only.py",), processes=2, preset="zero2")
    states = next((folder / "checkpoint-4").rglob("mp_rank_*_model_states.pt"))
    states.write_bytes(pickle.dumps(Pickled(mark)))
    reforge(folder / "checkpoint-4")
    said = run(folder, RESUME, codes=2, script=("tests/train_only.py",), processes=2, preset="zero2")
    assert "was not signed with your key" in said and not mark.exists()
