"""Runs that are stopped in every way and resume: complete checkpoints, kills, SIGTERM, a full disk, a rank that hangs."""

import datetime
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import time
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
from conftest import ROOT
from reliability import Run
from resuming import CASES
from safetensors.torch import load_file
from same_training import save_bases

from toolkit.config import parse_config
from toolkit.distributed import ranks
from toolkit.distributed.engine import NO_ENGINE, Engine
from toolkit.embedded import MODEL_DIR
from toolkit.errors import UserError
from toolkit.files import atomic_write
from toolkit.memory.environment import stack_versions
from toolkit.methods.lora import Lora
from toolkit.runs import run_folder
from toolkit.runs.preflight import prepare
from toolkit.training import checkpoints
from toolkit.training.callbacks import MetricsFile
from toolkit.training.checkpoints import (
    MANIFEST,
    TEMPORARY,
    RunFingerprint,
    atomic_folder,
    check_resumable,
    damage,
    newest_first,
    rename_later_checkpoints,
    resume_point,
)

RESULTS = ROOT / "benchmarks" / "results" / "reliability.json"
COMMAND = "python -m pytest tests/test_survival.py -k twenty --matrix"
ORIGIN = RunFingerprint("no engine", 1, True, 4, 42, "rows")
LENGTHS = ("--max_length", "48", "--max_target_length", "8", "--max_train_samples", "16", "--max_eval_samples", "1")
STEPS = ("--max_steps", "6", "--save_strategy", "steps", "--save_steps", "1", "--per_device_train_batch_size", "2")
SMALL = ("--use_cpu", *LENGTHS, *STEPS)
TRAIN = "tests/train_only.py"
RESUME = "--resume_from_checkpoint"


# ---- checkpoints


def checkpoint(folder, step, origin=ORIGIN):
    """A checkpoint with two small files, one of them in a subfolder."""
    with atomic_folder(folder / f"checkpoint-{step}", origin, is_main=True, wait=lambda: None) as temporary:
        (temporary / "trainer_state.json").write_text("{}")
        (temporary / "shards").mkdir()
        (temporary / "shards" / "rank0.pt").write_bytes(bytes(range(100)))
    return folder / f"checkpoint-{step}"


def test_a_checkpoint_gets_its_name_only_when_it_is_complete(tmp_path):
    final = tmp_path / "checkpoint-2"
    with atomic_folder(final, ORIGIN, is_main=True, wait=lambda: None) as temporary:
        (temporary / "weights").write_bytes(b"1234")
        assert temporary.is_dir() and not final.exists() and not newest_first(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    kept = json.loads((final / MANIFEST).read_text())
    # echo -n 1234 | sha256sum
    sha256 = "03ac674216f3e15c761ee1a5e255f067953623c8b388b4459e13f978d7c846f4"
    assert kept["files"] == {"weights": {"bytes": 4, "sha256": sha256}} and kept["run"]["data"] == "rows"
    with (
        pytest.raises(KeyboardInterrupt),
        atomic_folder(tmp_path / "checkpoint-4", ORIGIN, is_main=True, wait=lambda: None) as temporary,
    ):
        (temporary / "weights").touch()
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_other_ranks_than_the_first_wait_and_rename_nothing(tmp_path):
    waited = []

    def first_rank_renames():
        waited.append(True)
        if len(waited) == 2:
            (tmp_path / TEMPORARY / "checkpoint-2").rename(tmp_path / "checkpoint-2")

    with atomic_folder(tmp_path / "checkpoint-2", ORIGIN, is_main=False, wait=first_rank_renames) as temporary:
        (temporary / "rank1.pt").touch()
    assert len(waited) == 2 and not (tmp_path / TEMPORARY).exists()
    assert [path.name for path in (tmp_path / "checkpoint-2").iterdir()] == ["rank1.pt"]


def test_a_truncated_an_altered_and_a_missing_file_are_named(tmp_path):
    whole = checkpoint(tmp_path, 1)
    file = whole / "shards" / "rank0.pt"
    content = file.read_bytes()
    assert damage(whole) is None
    file.write_bytes(content[:99])
    assert damage(whole) == "shards/rank0.pt has 99 bytes instead of 100"
    file.write_bytes(content[:50] + b"\xff" + content[51:])
    assert damage(whole).startswith("shards/rank0.pt was altered")
    file.unlink()
    assert damage(whole) == "shards/rank0.pt is missing"
    manifest = (whole / MANIFEST).read_text()
    (whole / MANIFEST).write_text(manifest.replace('"seed": 42', '"seed": 43'))
    assert damage(whole) == "manifest.json is missing or was altered"
    (whole / MANIFEST).write_text(manifest[:-9])
    assert damage(whole) == "manifest.json is missing or was altered"


def test_the_newest_complete_checkpoint_is_found_and_damaged_ones_are_named_and_moved(tmp_path, capsys):
    for step in (2, 4, 10):
        checkpoint(tmp_path, step)
    (tmp_path / TEMPORARY / "checkpoint-12").mkdir(parents=True)
    assert resume_point("true", tmp_path) == tmp_path / "checkpoint-10" and not (tmp_path / TEMPORARY).exists()
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text("{}}")
    with pytest.raises(UserError, match=r"checkpoint-10: trainer_state.json has 3 bytes instead of 2; give another"):
        resume_point(str(tmp_path / "checkpoint-10"), tmp_path)
    capsys.readouterr()
    assert resume_point("true", tmp_path) == tmp_path / "checkpoint-4"
    said = " ".join(capsys.readouterr().out.split())
    assert "checkpoint-10: trainer_state.json has 3 bytes instead of 2; renamed to damaged-checkpoint-10" in said
    assert newest_first(tmp_path) == [tmp_path / "checkpoint-4", tmp_path / "checkpoint-2"]
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").unlink()
    with pytest.raises(UserError, match=r"is complete \(checkpoint-4: trainer_state.json is missing\)"):
        resume_point("true", tmp_path)
    assert len(newest_first(tmp_path)) == 2
    with pytest.raises(UserError, match="no checkpoint there"):
        resume_point(str(tmp_path / "checkpoint-3"), tmp_path)


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(tmp_path):
    (tmp_path / "config.yaml").touch()
    (tmp_path / TEMPORARY / "checkpoint-1").mkdir(parents=True)
    assert resume_point("true", tmp_path) is None and not (tmp_path / TEMPORARY).exists()
    (tmp_path / "empty").mkdir()
    assert resume_point("true", tmp_path / "empty") is None


def test_a_run_that_cannot_resume_is_refused_before_a_model_is_loaded(tmp_path):
    kept = checkpoint(tmp_path, 2)
    check_resumable(kept, ORIGIN, allow_changed_data=False)
    check_resumable(kept, replace(ORIGIN, engine="DDP", processes=4), allow_changed_data=False)
    for change, said in (
        ({"data": "others"}, "the training rows"),
        ({"seed": 1}, "--seed or --data_seed 1 instead of 42"),
        ({"rows_a_step": 8}, "a step has 8 rows instead of 4"),
    ):
        with pytest.raises(UserError, match=f"{said}.*--allow_changed_data"):
            check_resumable(kept, replace(ORIGIN, **change), allow_changed_data=False)
        check_resumable(kept, replace(ORIGIN, **change), allow_changed_data=True)
    with pytest.raises(UserError, match="was written by no engine on 1 processes, and cannot be read by FSDP2 on 2"):
        check_resumable(kept, replace(ORIGIN, engine="FSDP2", processes=2), allow_changed_data=True)
    zero = replace(ORIGIN, engine="ZeRO-2", processes=2)
    kept = checkpoint(tmp_path, 4, zero)
    for change in ({"processes": 4}, {"engine": "ZeRO-3"}, {"engine": "DDP"}):
        with pytest.raises(UserError, match="was written by ZeRO-2 on 2 processes"):
            check_resumable(kept, replace(zero, **change), allow_changed_data=True)
    fsdp = replace(ORIGIN, engine="FSDP2", processes=2)
    kept = checkpoint(tmp_path, 6, fsdp)
    for processes in (2, 4):
        check_resumable(kept, replace(fsdp, processes=processes), allow_changed_data=False)
    with pytest.raises(UserError, match="was written by FSDP2 on 2 processes, and cannot be read by DDP on 2"):
        check_resumable(kept, replace(fsdp, engine="DDP"), allow_changed_data=True)
    kept = checkpoint(tmp_path, 7, replace(fsdp, engine="FSDP1"))
    with pytest.raises(UserError, match="FSDP1, and FSDP1's checkpoints cannot be resumed"):
        check_resumable(kept, replace(fsdp, engine="FSDP1"), allow_changed_data=True)
    nvme = replace(ORIGIN, engine="ZeRO-3", processes=2, state_on_disk=True)
    kept = checkpoint(tmp_path, 9, nvme)
    for now in (nvme, replace(nvme, state_on_disk=False)):
        with pytest.raises(
            UserError, match=r"reads back from a checkpoint only a part.*checkpoint-9 was written with it on a disk"
        ):
            check_resumable(kept, now, allow_changed_data=True)
    kept = checkpoint(tmp_path, 10, replace(nvme, state_on_disk=False))
    with pytest.raises(UserError, match="this launch file puts it on a disk"):
        check_resumable(kept, nvme, allow_changed_data=True)
    kept = checkpoint(tmp_path, 8, replace(ORIGIN, whole_state=False))
    with pytest.raises(UserError, match="--save_only_model"):
        check_resumable(kept, ORIGIN, allow_changed_data=True)


def test_a_manifest_of_another_version_is_refused(tmp_path, monkeypatch):
    kept = checkpoint(tmp_path, 2)
    monkeypatch.setattr(checkpoints, "_manifest", lambda folder: {"run": asdict(ORIGIN) | {"phase_of_the_moon": 3}})
    with pytest.raises(UserError, match="written by another version of footprint"):
        check_resumable(kept, ORIGIN, allow_changed_data=False)


def test_checkpoints_later_than_the_resumed_one_are_renamed(tmp_path, capsys):
    for step in (2, 4, 6):
        checkpoint(tmp_path, step)
    rename_later_checkpoints(tmp_path / "checkpoint-6", tmp_path)
    rename_later_checkpoints(tmp_path / "checkpoint-2", tmp_path / "another")
    assert [path.name for path in newest_first(tmp_path)] == ["checkpoint-6", "checkpoint-4", "checkpoint-2"]
    rename_later_checkpoints(tmp_path / "checkpoint-4", tmp_path)
    assert "checkpoint-6 renamed to abandoned-checkpoint-6" in " ".join(capsys.readouterr().out.split())
    assert resume_point("true", tmp_path) == tmp_path / "checkpoint-4"
    assert (tmp_path / "abandoned-checkpoint-6" / MANIFEST).is_file()


def test_a_folder_that_only_some_machines_see_is_refused_if_all_need_it(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    mark = tmp_path / ".claimed"

    def check(engine, best=False):
        training = SimpleNamespace(load_best_model_at_end=best, save_strategy="epoch")
        run_folder._check_shared(mark, SimpleNamespace(training=training, engine=engine), resumes=False)

    check(NO_ENGINE)
    with pytest.raises(UserError, match=r"is not the folder that rank 1 sees, and --load_best_model_at_end must"):
        check(NO_ENGINE, best=True)
    zero = Engine(2, "ZeRO-2")
    with pytest.raises(UserError, match="checkpoints under ZeRO-2 must be"):
        check(zero)
    mark.touch()
    check(zero)


def test_metrics_continue_after_a_run_was_killed_while_writing_them(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
    state = SimpleNamespace(is_world_process_zero=True, global_step=2, num_input_tokens_seen=0)
    MetricsFile(file).on_train_begin(None, state, None)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2]


def test_the_flags_of_resuming_that_have_no_effect_are_refused():
    assert parse_config(Lora, ["--output_dir", "x", RESUME]).training.resume_from_checkpoint == "true"
    assert parse_config(Lora, [RESUME, "1", "--output_dir", "x"]).training.resume_from_checkpoint == "true"
    assert parse_config(Lora, [RESUME, "false"]).training.resume_from_checkpoint is None
    assert parse_config(Lora, [RESUME, "a/checkpoint-2"]).training.output_dir == "a"
    with pytest.raises(UserError, match="--allow_changed_data has no effect without --resume_from_checkpoint"):
        parse_config(Lora, ["--allow_changed_data"])
    with pytest.raises(UserError, match="--enable_jit_checkpoint has no effect here: SIGTERM and Ctrl-C always"):
        parse_config(Lora, ["--enable_jit_checkpoint"])


def test_the_fingerprint_of_the_rows_sees_tokens_and_order():
    rows = prepare(parse_config(Lora, ["--max_train_samples", "4", "--max_eval_samples", "1"])).data
    same = prepare(parse_config(Lora, ["--max_train_samples", "4", "--max_eval_samples", "2", "--seed", "3"])).data
    cut = prepare(
        parse_config(Lora, ["--max_train_samples", "4", "--max_eval_samples", "1", "--max_length", "40"])
    ).data
    assert rows.train_fingerprint == same.train_fingerprint != cut.train_fingerprint
    turned = replace(rows, train=rows.train.select([1, 0, 2, 3]))
    assert turned.train_fingerprint != rows.train_fingerprint


@pytest.mark.parametrize(
    "said",
    [
        "[/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 25000ms for recv operation to complete",
        "Application timeout caused pair closure",
        "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3, OpType=ALLREDUCE, Timeout(ms)=25000) ran for 25001 ms",
    ],
)
def test_a_timeout_is_recognized_by_each_backends_message(said, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    lost = ranks._time_out(RuntimeError(said))
    assert lost.startswith("the rank or launcher that keeps the store did not answer within --ddp_timeout")
    assert ranks._time_out(RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer")) is None


# ---- real processes


def weights(folder):
    adapter = folder / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else folder / "model.safetensors")


def furthest(one, two):
    """The largest difference between two sets of weights, relative to the largest weight."""
    one, two = weights(one), weights(two)
    assert one.keys() == two.keys()
    largest = max(tensor.abs().max() for tensor in one.values())
    return float(max((one[name] - two[name]).abs().max() for name in one) / largest)


def started(folder, *more, processes=1, preset="ddp", method="lora"):
    """Starts a run."""
    script = ("tests/fsdp_on_cpu.py", TRAIN) if preset.startswith("fsdp") else (TRAIN,)
    argv = (*script, method, *SMALL, "--output_dir", folder, *more)
    return Run(*argv, log=folder.with_suffix(".log"), processes=processes, preset=preset)


def trained(folder, *more, codes=0, **settings):
    """Runs to the end; returns the output."""
    run = started(folder, *more, **settings)
    assert run.wait() == [codes] * len(run.ranks), run.text()
    return run.text()


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """The initial models of tests/resuming.py."""
    folder = tmp_path_factory.mktemp("bases")
    save_bases(folder)
    return folder


def resumed_from(preset, bases, out, *begun, processes=2):
    """Runs tests/resuming.py."""
    script = ("tests/fsdp_on_cpu.py",) if preset.startswith("fsdp") else ()
    argv = (*script, "tests/resuming.py", bases, out, *begun)
    run = Run(*argv, log=out.with_suffix(".log"), processes=processes, preset=preset)
    assert run.wait(1500) == [0] * processes, run.text()


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Uninterrupted runs by number of processes and launch file: the folder, and the seconds from its first to its last file."""
    runs = {}

    def run_of(processes, preset="ddp"):
        if (processes, preset) not in runs:
            folder = tmp_path_factory.mktemp("whole") / f"{processes}-{preset}"
            trained(folder, processes=processes, preset=preset)
            times = [path.stat().st_mtime for path in folder.rglob("*")]
            runs[processes, preset] = folder, max(times) - min(times)
        return runs[processes, preset]

    return run_of


def when(condition, run, seconds=300):
    """Waits until `condition()` is true, while `run` runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert run.runs and time.monotonic() < end, run.text()
        time.sleep(0.002)


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_143_and_the_resumed_run_ends_with_the_same_weights(whole, tmp_path):
    folder = tmp_path / "run"
    run = Run("recipes/lora.py", *SMALL, "--output_dir", folder, log=tmp_path / "log")
    when((folder / "checkpoint-2").exists, run)
    run.signal(signal.SIGTERM)
    assert run.wait(120) == [143], run.text()
    last = newest_first(folder)[0]
    assert f"stopped  by SIGTERM, with {last.name}" in run.text() and "Traceback" not in run.text()
    assert damage(last) is None and not (folder / TEMPORARY).exists()
    if last.name != "checkpoint-6":
        assert not (folder / "adapter_model.safetensors").exists()
    assert "resuming  from" in trained(folder, RESUME)
    assert furthest(whole(1)[0], folder) == 0


@pytest.mark.slow
def test_a_full_disk_is_a_one_line_error_and_earlier_checkpoints_stay(whole, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk is a tmpfs, which only root can mount")
    try:
        folder = disk / "run"
        said = trained(folder, "--save_total_limit", "9", codes=2)
        lines = [line for line in said.splitlines() if line.startswith("error:")]
        assert len(lines) == 1 and "Traceback" not in said, said
        kept = newest_first(folder)
        assert f"could not be written to {folder}" in lines[0] and "are free there, and a checkpoint takes" in lines[0]
        assert f"resume from {kept[0].name} with --resume_from_checkpoint true" in lines[0]
        assert len(kept) == 2 and [damage(one) for one in kept] == [None, None] and not (folder / TEMPORARY).exists()
        subprocess.run(["mount", "-o", "remount,size=60m", str(disk)], check=True)
        trained(folder, RESUME)
        assert furthest(whole(1)[0], folder) == 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.long
def test_a_rank_that_does_not_answer_is_named_and_all_end(tmp_path):
    stopped = tmp_path / "stopped"
    limit = ("--ddp_timeout", "25", "--output_dir", tmp_path / "run")
    run = Run("tests/failing_rank.py", "hang", stopped, TRAIN, *SMALL, *limit, log=tmp_path / "log", processes=2)
    when(stopped.exists, run)
    run.ranks[0].join(120)
    run.signal(signal.SIGTERM, [1])  # as the launcher does where a rank has failed
    assert run.wait(30) == [1, 1], run.text()
    assert time.time() - float(stopped.read_text()) < 25 + 30
    assert run.text().count("error: ") == 1 and "Traceback" not in run.text(), run.text()
    assert "error: rank 1 did not answer within --ddp_timeout, so all ranks end" in run.text()


def killed_and_resumed(folder, processes, seconds, chance, while_saving, damages, preset="ddp"):
    """Kills a run at a random moment of its `seconds` or while it saves, damages a file if `damages` says so, and resumes it.

    Returns: which ranks were killed and when, whether a checkpoint was being written, the damaged file, and the bytes of
    complete checkpoints that the kill itself damaged.
    """
    run = started(folder, processes=processes, preset=preset)
    when(folder.exists, run)
    began = time.monotonic()
    if while_saving:
        step = chance.randint(1, 6)
        temporary = folder / TEMPORARY / f"checkpoint-{step}"
        when(lambda: temporary.exists() or (folder / f"checkpoint-{step}").exists(), run)
        time.sleep(chance.uniform(0, 0.1))
    else:
        time.sleep(chance.uniform(0, seconds))
    ranks = chance.choice([[rank] for rank in range(processes)] + [list(range(processes))])
    run.signal(signal.SIGKILL, ranks)
    moment = time.monotonic() - began
    codes = run.wait(120)
    saving = (folder / TEMPORARY).exists()
    found = newest_first(folder)
    lost = sum(file.stat().st_size for one in found if damage(one) for file in one.rglob("*") if file.is_file())
    spoilt = None
    if damages and len(found) > 1:
        file = chance.choice(sorted(path for path in found[0].rglob("*") if path.is_file() and path.stat().st_size))
        content = file.read_bytes()
        place = chance.randrange(len(content))
        file.write_bytes(
            content[:place] + (bytes([content[place] ^ 1]) + content[place + 1 :] if damages == "alter" else b"")
        )
        spoilt = f"{damages} {found[0].name}/{file.name}"
    said = trained(folder, RESUME, processes=processes, preset=preset)
    if spoilt:
        assert f"{found[1].name} is used" in said, said
    return {
        "processes": processes,
        "launch": preset if processes > 1 else None,
        "killed_ranks": ranks if -9 in codes else [],
        "after_seconds": round(moment, 2),
        "while_saving": saving,
        "checkpoints_there": len(found),
        "damaged": spoilt,
        "bytes_lost": lost,
    }


@pytest.mark.slow
def test_a_killed_process_resumes_from_the_checkpoint_before_a_truncated_one(whole, tmp_path):
    reference, seconds = whole(1)
    case = killed_and_resumed(tmp_path / "run", 1, seconds, random.Random(4), while_saving=True, damages="truncate")
    assert case["bytes_lost"] == 0 and furthest(reference, tmp_path / "run") == 0, case


@pytest.mark.slow
def test_two_processes_resume_to_the_same_weights_after_some_were_killed(whole, tmp_path):
    reference, seconds = whole(2)
    case = killed_and_resumed(tmp_path / "run", 2, seconds, random.Random(5), while_saving=True, damages=None)
    assert case["bytes_lost"] == 0 and furthest(reference, tmp_path / "run") <= 1e-6, case


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(5400)
def test_twenty_kills_lose_nothing_and_every_run_resumes_to_the_same_weights(whole, tmp_path, request):
    chance = random.Random(datetime.date.today().toordinal())
    cases: list[dict] = []
    while len(cases) < 20:
        number = len(cases)
        processes, preset = ((1, "ddp"), (1, "ddp"), (2, "ddp"), (2, "zero3"), (2, "fsdp2"))[number % 5]
        reference, seconds = whole(processes, preset)
        damages = (None, "alter", None, "truncate", None)[number % 5]
        folder = tmp_path / f"{number}"
        case = killed_and_resumed(folder, processes, seconds, chance, number % 2 == 0, damages, preset)
        if not case["killed_ranks"]:  # the run had already ended
            shutil.rmtree(folder)
            continue
        case["equal"] = furthest(reference, folder) <= (0.0 if processes == 1 else 1e-6)
        cases.append(case)
        shutil.rmtree(folder)
        figures = {
            "runs": len(cases),
            "kills": sum(bool(case["killed_ranks"]) for case in cases),
            "while_saving": sum(case["while_saving"] for case in cases),
            "damaged_files": sum(bool(case["damaged"]) for case in cases),
            "resumes_equal": sum(case["equal"] for case in cases),
            "bytes_lost": sum(case["bytes_lost"] for case in cases),
        }
        if request.config.getoption("--matrix"):
            machine = {"cores": os.cpu_count(), "python": platform.python_version(), "versions": stack_versions()}
            content = {"command": COMMAND, "date": datetime.date.today().isoformat(), **machine, "figures": figures}
            atomic_write(RESULTS, json.dumps(content | {"cases": cases}, indent=1) + "\n")
    assert figures["resumes_equal"] == figures["kills"] == 20 and figures["bytes_lost"] == 0, cases


@pytest.mark.slow
@pytest.mark.long
def test_one_process_resumes_from_a_checkpoint_of_two(tmp_path):
    """Without dropout, because each process has its own random numbers; the rows of a step are the same."""
    model = tmp_path / "model"
    shutil.copytree(MODEL_DIR, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"dropout_rate": 0.0}))
    plain = ("--model_name_or_path", model, "--lora_dropout", "0")
    two, one = tmp_path / "two", tmp_path / "one"
    trained(two, *plain, "--save_total_limit", "9", processes=2)
    more = ("--output_dir", one, RESUME, two / "checkpoint-3", "--gradient_accumulation_steps", "2")
    trained(two, *plain, *more)
    assert furthest(two, one) <= 1e-6
    refused = trained(two, *plain, "--output_dir", one, RESUME, codes=2)
    assert "a step has 2 rows instead of 4" in refused


@pytest.mark.slow
@pytest.mark.long
def test_zero2_resumes_to_the_same_weights_after_sigterm_on_one_rank_but_not_under_another_engine(tmp_path):
    never, stopped = tmp_path / "never", tmp_path / "stopped"
    trained(never, processes=2, preset="zero2")
    run = Run(TRAIN, *SMALL, "--output_dir", stopped, log=tmp_path / "log", processes=2, preset="zero2")
    when((stopped / "checkpoint-2").exists, run)
    run.signal(signal.SIGTERM, [1])
    assert run.wait(120) == [143, 143], run.text()
    trained(stopped, RESUME, processes=2, preset="zero2")
    assert furthest(never, stopped) <= 1e-6
    said = trained(stopped, RESUME, "--per_device_train_batch_size", "4", codes=2)
    assert "was written by ZeRO-2 on 2 processes, and cannot be read by no engine on 1" in said


@pytest.mark.slow
@pytest.mark.matrix(sample=1)
@pytest.mark.parametrize("preset", ["ddp", "zero2", "zero3", "fsdp2"])
def test_two_processes_keep_the_weights_of_the_checkpoint_that_the_validation_split_selects(preset, tmp_path):
    chooses = ("--load_best_model_at_end", "--metric_for_best_model", "eval_loss", "--eval_strategy", "steps")
    worst = (
        "--greater_is_better",
        "true",
        "--learning_rate",
        "1e-2",
        "--max_steps",
        "3",
    )  # so that the first is chosen
    folder = tmp_path / "run"
    more = ("--eval_steps", "1", "--save_total_limit", "9")
    said = trained(folder, *chooses, *worst, *more, processes=2, preset=preset)
    assert re.findall(r"chosen  (checkpoint-\d): best eval_loss", said) == ["checkpoint-1"], said
    assert furthest(folder, folder / "checkpoint-1") == 0 < furthest(folder, folder / "checkpoint-3")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("preset", ["zero1", "zero2", "zero2_offload", "zero3", "zero3_offload", "fsdp2"])
def test_full_and_lora_of_t5_and_llama_resume_to_the_same_weights_under(preset, bases, tmp_path):
    if preset.endswith("offload") and shutil.which("c++") is None:
        pytest.skip("offloading compiles C++ code, and there is no compiler")
    resumed_from(preset, bases, tmp_path / "two")
    for kind, method in CASES:
        case = f"{kind}-{method}"
        # DeepSpeed's Adam for the CPU multiplies powers of its betas step by step, and computes them directly after a resume
        # (csrc, cpu_adam.h, IncrementStep). The rounding differs, and a ReLU of T5 close to 0 magnifies it.
        limit = 1e-3 if preset.endswith("offload") and case == "t5-full" else 1e-6
        assert furthest(tmp_path / "two" / case, tmp_path / "two" / f"{case}-again") <= limit, case


@pytest.mark.slow
@pytest.mark.long
def test_four_processes_resume_from_a_checkpoint_of_fsdp2_on_two(bases, tmp_path):
    resumed_from("fsdp2", bases, tmp_path / "two")
    resumed_from("fsdp2", bases, tmp_path / "four", tmp_path / "two", processes=4)
    for kind, method in CASES:
        case = f"{kind}-{method}"
        assert furthest(tmp_path / "two" / case, tmp_path / "four" / f"{case}-again") <= 1e-6, case


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("preset", "method"), [("zero2", "lora"), ("zero3", "full"), ("fsdp2", "lora")])
def test_two_killed_processes_resume_to_the_same_weights_under(preset, method, tmp_path):
    settings = {"processes": 2, "preset": preset, "method": method}
    never, killed = tmp_path / "never", tmp_path / "killed"
    trained(never, **settings)
    run = started(killed, **settings)
    when((killed / "checkpoint-2").exists, run)
    run.signal(signal.SIGKILL)
    assert run.wait(60) == [-signal.SIGKILL] * 2, run.text()
    assert "resuming  from" in trained(killed, RESUME, **settings)
    assert furthest(never, killed) <= 1e-6
