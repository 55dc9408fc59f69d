"""The requested engine, the locks of DeepSpeed's builds, and which rank prints an error: without any launch."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from conftest import ROOT
from deepspeed.ops.op_builder import AsyncIOBuilder
from transformers.training_args import ParallelMode

from toolkit.config import parse_config
from toolkit.distributed import deepspeed, ranks
from toolkit.distributed.deepspeed import check_builds, check_disk, read_deepspeed
from toolkit.distributed.engine import Engine
from toolkit.distributed.request import requested_engine
from toolkit.errors import UserError
from toolkit.methods.lora import Lora
from toolkit.runs import preflight
from toolkit.runs.preflight import check_engine


def test_without_a_launcher_one_process_is_requested():
    assert requested_engine(env={}) == Engine(1, "no engine")
    assert str(requested_engine(env={})) == "no engine on 1 process"


def test_accelerates_own_yaml_sets_stage_and_offload_through_the_environment():
    env = {"WORLD_SIZE": "4", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    assert requested_engine(env=env) == Engine(4, "ZeRO-3")
    offload = {f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE": "cpu" for what in ("OPTIMIZER", "PARAM")}
    requested = requested_engine(env=env | offload)
    assert requested == Engine(4, "ZeRO-3", "cpu", "cpu")
    assert str(requested) == "ZeRO-3 on 4 processes, optimizer state on cpu, parameters on cpu"


def test_trainers_own_flag_for_deepspeed_wins_over_the_environment():
    config = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    assert requested_engine(config, env={"WORLD_SIZE": "2"}) == Engine(2, "ZeRO-2", "cpu")


def test_an_address_without_a_world_size_means_several_requested_processes():
    env = {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_MIXED_PRECISION": "no"}
    assert requested_engine(env=env).processes > 1
    with pytest.raises(UserError, match="several processes were requested, but 1 runs"):
        checked(env)


def checked(env, **training):
    """`check_engine` in an environment, without building the TrainingArguments that would start an engine."""
    usual = {"deepspeed": None, "fsdp": None, "world_size": 1, "torch_compile": False, "push_to_hub": False}
    usual |= {"optim": "adamw_torch", "device": SimpleNamespace(type="cpu")}
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_", "WORLD_SIZE", "MASTER_"))]:
            patch.delenv(name)
        for name, value in env.items():
            patch.setenv(name, value)
        check_engine(requested_engine(), SimpleNamespace(**usual | training))


def test_an_optimizer_that_deepspeed_would_replace_is_refused(tmp_path):
    env = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}
    with pytest.raises(UserError, match=r"--optim adafactor: the launch file offloads the optimizer.*adamw_torch"):
        checked(env, optim="adafactor")


def test_several_groups_that_share_rows_are_refused_on_cpus():
    env = {"ACCELERATE_USE_DEEPSPEED": "true", "WORLD_SIZE": "4", "PARALLELISM_CONFIG_SP_SIZE": "2"}
    with pytest.raises(UserError, match=r"2 sharing each row: on CPUs.*parallelism_config_sp_size: 4"):
        checked(env, world_size=4, parallel_mode=ParallelMode.DISTRIBUTED)


def test_a_configuration_that_is_missing_or_not_json_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.json, which does not exist.*repository's root"):
        read_deepspeed("nowhere.json")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(UserError, match=r"broken\.json: not valid JSON"):
        read_deepspeed(str(broken))
    broken.write_text("[]")
    with pytest.raises(UserError, match="it holds a list, not names"):
        read_deepspeed(str(broken))


@pytest.fixture
def lock(tmp_path, monkeypatch):
    """A lock of the build of cpu_adam that is ten minutes old."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = tmp_path / "py311_cpu" / "cpu_adam"
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    os.utime(folder / "lock", (time.time() - 600,) * 2)
    return folder / "lock"


OFFLOAD = Engine(2, "ZeRO-2", "cpu")


def test_a_lock_left_by_a_killed_build_is_named_instead_of_waited_for(lock):
    began = time.monotonic()
    with pytest.raises(UserError, match=rf"{lock} was left by a build of cpu_adam that was killed.*delete that file"):
        check_builds(OFFLOAD)
    assert time.monotonic() - began < 10


def test_a_lock_does_not_matter_to_an_engine_that_needs_no_build(lock):
    check_builds(Engine(2, "ZeRO-3"))


def test_a_lock_held_by_a_running_compiler_is_accepted(lock):
    compiler = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], cwd=lock.parent)
    try:
        check_builds(OFFLOAD)
    finally:
        compiler.kill()
        compiler.wait()


def test_a_new_lock_gets_time_and_may_disappear(lock, monkeypatch):
    monkeypatch.setattr(deepspeed, "LOCK_GRACE_SECONDS", 1.5)
    os.utime(lock)
    with pytest.raises(UserError, match="was left by a build"):
        check_builds(OFFLOAD)
    os.utime(lock)
    monkeypatch.setattr(deepspeed.time, "sleep", lambda seconds: lock.unlink())
    check_builds(OFFLOAD)


def test_only_the_first_rank_that_fails_prints_its_error(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "RANK0_HEAD_START_SECONDS", 0.0)
    speaks = []
    for rank in ("1", "0", "2"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / rank / "error.json"))
        speaks.append(ranks._claims_error_output())
    assert speaks == [True, False, False]


@pytest.mark.parametrize(("rank", "who"), [(None, ""), ("0", ""), ("3", "rank 3: ")])
def test_without_a_launchers_folder_each_rank_prints_its_errors(rank, who, monkeypatch, capsys):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)

    @ranks.exits_cleanly
    def main():
        raise UserError("no such thing")

    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: {who}no such thing\n"


def test_a_full_gpu_is_one_line_that_says_how_to_need_less(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)

    @ranks.exits_cleanly
    def main():
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of 7.62 GiB"
        )

    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: the GPU's memory is full (CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0")
    assert said.count("\n") == 1 and "--activation_checkpointing" in said


@pytest.mark.slow
def test_a_rank_that_handles_no_signals_ends_soon_after_another_has_printed_an_error(tmp_path):
    """Like a rank that waits for a GPU: Python runs signal handlers only between its own instructions."""
    mark = tmp_path / "1" / "error.json"
    script = """
import signal, time
from toolkit.distributed import ranks
ranks.SHUTDOWN_GRACE_SECONDS = 0.2
@ranks.exits_cleanly
def main():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    print("waits", flush=True)
    time.sleep(60)
main()
"""
    env = {**os.environ, "RANK": "1", "TORCHELASTIC_ERROR_FILE": str(mark)}
    rank = subprocess.Popen([sys.executable, "-c", script], env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert rank.stdout.readline() == "waits\n"
        time.sleep(1)  # until it does
        rank.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            rank.wait(3)
        (tmp_path / "error_was_said").touch()
        assert rank.wait(20) == 1
    finally:
        rank.kill()
        rank.wait()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"2 processes .* has 1 GPU: launch with --num_processes 1"):
        parse_config(Lora, [])
    parse_config(Lora, ["--use_cpu"])


def test_processes_that_would_compute_in_different_precisions_are_refused(monkeypatch):
    chosen = ["bf16: compute capability 8.6", "fp32: compute capability 7.5"]
    monkeypatch.setattr(preflight, "gather_object", lambda own: chosen)
    config = SimpleNamespace(precision_reason=chosen[0], training=SimpleNamespace(world_size=2))
    with pytest.raises(UserError, match=r"different precisions \(bf16: .*8.6; fp32: .*7.5\); give --bf16"):
        preflight._check_same_precision(config)
    chosen[1] = "bf16: compute capability 8.9"
    preflight._check_same_precision(config)


NVME = Engine(2, "ZeRO-3", "nvme", "nvme")


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """DeepSpeed's configuration of a swap folder; async_io can be compiled."""
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: True)
    monkeypatch.setattr(deepspeed, "_locks", [])
    part = {"device": "nvme", "nvme_path": str(tmp_path / "swap")}
    return {"zero_optimization": {"stage": 3, "offload_optimizer": part, "offload_param": part}}


def test_only_one_run_at_a_time_may_swap_to_a_folder(disk):
    check_disk(NVME, disk)
    with pytest.raises(
        UserError, match=r"another run swaps to .*swap; wait for its end, or give this one another nvme_path"
    ):
        check_disk(NVME, disk)
    for lock in deepspeed._locks:
        lock.close()
    check_disk(NVME, disk)


def test_swapping_to_a_disk_needs_libaio_and_on_a_gpu_the_cuda_toolkit(disk, monkeypatch):
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    with pytest.raises(UserError, match="without libaio"):
        check_disk(NVME, disk)
    check_disk(Engine(2, "ZeRO-3", "cpu", "cpu"), disk)
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(deepspeed, "CUDA_HOME", None)
    with pytest.raises(UserError, match="no CUDA toolkit was found"):
        check_disk(NVME, disk)


def test_an_error_on_one_rank_is_raised_on_all(monkeypatch):
    def check():
        raise UserError("this machine is too small")

    with pytest.raises(UserError, match="too small"):
        ranks.raise_on_all_ranks(check)
    monkeypatch.setattr(PartialState(), "num_processes", 2)
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: [*own, "the other one is"])
    with pytest.raises(UserError, match="the other one is"):
        ranks.raise_on_all_ranks(lambda: None)
