"""DeepSpeed: its configuration, the disk that it swaps to, its compiled extensions, and models that ZeRO-3 partitions."""

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import psutil
import torch
from torch import nn
from torch.utils.cpp_extension import CUDA_HOME, get_default_build_root

from toolkit.console import say
from toolkit.distributed.engine import Engine, EngineKind
from toolkit.distributed.ranks import exits_cleanly
from toolkit.errors import UserError
from toolkit.errors.reading import read_json

OFFLOADED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "lion_32bit")  # that DeepSpeed has for the CPU
NOT_READ_BACK = (
    "DeepSpeed 0.19 reads back from a checkpoint only a part of a state on NVMe; the rest keeps its initial values"
)
LOCK_GRACE_SECONDS = 20.0  # within this time of taking its lock, a build starts its compiler
_locks: list[IO] = []  # on folders that this process keeps until it ends


def requested_zero(deepspeed: str | dict[str, Any] | None, env: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """`zero_optimization` of DeepSpeed's configuration, or the same settings from accelerate's own YAML."""
    if source := deepspeed or env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        zero = read_deepspeed(source).get("zero_optimization", {})
        if not isinstance(zero, dict):
            raise UserError(f"DeepSpeed's configuration has zero_optimization {zero!r}; give an object with a stage")
        for name in ("offload_optimizer", "offload_param"):
            if not isinstance(zero.get(name) or {}, dict):
                raise UserError(
                    f"DeepSpeed's configuration has zero_optimization.{name} {zero[name]!r}; give an object with a device"
                )
        return zero
    names = {
        "optimizer": "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
        "param": "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
    }
    offload = {f"offload_{part}": {"device": env.get(name, "none")} for part, name in names.items()}
    stage = env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    return {"stage": int(stage) if stage.isdecimal() else stage, **offload}


def read_deepspeed(source: str | dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's configuration from a JSON file.

    Raises: UserError if the file does not exist or does not hold a JSON object.
    """
    if isinstance(source, dict):
        return source
    what = f"the launch file names DeepSpeed's configuration {source}"
    if not Path(source).exists():
        raise UserError(
            f"{what}, which does not exist; paths in launch/ are relative to the repository's root: start the run there"
        )
    return read_json(Path(source), what, "see launch/deepspeed/ for examples")


def join_deepspeed() -> None:
    """Initializes DeepSpeed with the process group. accelerate does so on GPUs, but not with --use_cpu.

    A run on CPUs is a rehearsal: it uses only gloo. For communication by shared memory, DeepSpeed would compile code for minutes.
    """
    import deepspeed

    if not deepspeed.comm.is_initialized():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        backend = torch.distributed.get_backend() if torch.distributed.is_initialized() else None
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False)


@contextmanager
def without_partitioning() -> Iterator[None]:
    """While open, models are built whole: under ZeRO-3 transformers would partition them during construction."""
    from transformers.integrations import deepspeed as integration

    kept = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if kept is not None and (settings := kept()) is not None:
            integration.set_hf_deepspeed_config(settings)


@contextmanager
def gathered_in_use(model: nn.Module) -> Iterator[None]:
    """While open, a model that ZeRO-3 partitioned during loading can compute: each layer's weights are gathered when it runs.

    DeepSpeed's engine does this once training begins. Before that, and for the base model's scores, its hooks are set here and
    removed afterwards. Other models are not changed.
    """
    partitioned = any(hasattr(p, "ds_tensor") for p in model.parameters())
    if not partitioned or hasattr(model, "ds_inflight_param_registry"):
        yield
        return
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadParamConfig
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.utils.timer import NoopTimer
    from transformers.integrations.deepspeed import deepspeed_config

    settings = deepspeed_config() or {}
    zero = settings.get("zero_optimization", {})
    offload = zero.get("offload_param")
    limits = {
        name: zero[f"stage3_{name}"]
        for name in ("max_live_parameters", "max_reuse_distance")
        if f"stage3_{name}" in zero
    }
    hooks = DeepSpeedZeRoOffload(
        model,
        timers=NoopTimer(),
        ds_config=settings,
        param_persistence_threshold=0,  # so that every parameter is freed again
        offload_param_config=DeepSpeedZeroOffloadParamConfig(**offload) if offload else None,
        **limits,
    )
    try:
        yield
    finally:
        hooks.partition_all_parameters()
        hooks.destroy()
        del model.ds_inflight_param_registry
        # Otherwise the engine's backward passes would run those of `hooks`, with their limits.
        for module in model.modules():
            for name in ("pre_bwd_fn", "post_bwd_fn"):
                vars(module).pop(name, None)


def check_disk(engine: Engine, deepspeed: str | dict[str, Any] | None = None) -> None:
    """Locks the folder that DeepSpeed swaps to until this process ends. Called by one process on each machine.

    Raises: UserError if DeepSpeed's disk access cannot be compiled here, or if another run swaps to that folder, which every run
    empties when it starts.
    """
    if "nvme" not in (engine.optimizer_state, engine.parameters):
        return
    from deepspeed.ops.op_builder import AsyncIOBuilder

    builder = AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        raise UserError(
            f"{engine}: DeepSpeed's async_io cannot be compiled without libaio (Debian, Ubuntu: apt install libaio-dev)"
        )
    if torch.cuda.is_available() and CUDA_HOME is None:
        raise UserError(
            f"{engine}: DeepSpeed compiles async_io with CUDA's headers, and no CUDA toolkit was found: install it, or set "
            "CUDA_HOME to its folder"
        )
    import fcntl  # only on Linux, like DeepSpeed

    zero = requested_zero(deepspeed)
    parts = [zero.get(name) or {} for name in ("offload_optimizer", "offload_param")]
    for path in {part["nvme_path"] for part in parts if part.get("nvme_path")}:
        Path(path).mkdir(parents=True, exist_ok=True)
        lock = (Path(path) / "in_use").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another run swaps to {path}; wait for its end, or give this one another nvme_path in its own JSON file"
            ) from None
        _locks.append(lock)


def check_builds(engine: Engine) -> None:
    """Raises UserError if a build that is no longer running left a lock on an extension that DeepSpeed compiles for `engine`.

    A build creates a lock file in its folder. If the build is killed, the file stays, and everyone who needs the same extension
    waits for ever. A lock under which a compiler is still running is waited for.
    """
    names = ["cpu_adam", "cpu_lion"] if engine.offloads_optimizer else []
    names += ["async_io"] if "nvme" in (engine.optimizer_state, engine.parameters) else []
    for lock in left_locks(names):
        raise UserError(
            f"{lock} was left by a build of {lock.parent.name} that was killed, and DeepSpeed would wait for it for "
            f"ever; delete that file and start again"
        )


def left_locks(names: Iterable[str]) -> Iterator[Path]:
    """The locks on the extensions `names` that builds left which are no longer running; waits until a young lock is old enough."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in (lock for name in names for lock in root.glob(f"**/{name}/lock")):
        while (age := _age(lock)) is not None and age < LOCK_GRACE_SECONDS and not _is_building(lock.parent):
            time.sleep(1)
        if age is not None and age >= LOCK_GRACE_SECONDS and not _is_building(lock.parent):
            yield lock


def _age(lock: Path) -> float | None:
    """Seconds since `lock` was created, or None if it no longer exists."""
    try:
        return time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return None


def _is_building(folder: Path) -> bool:
    """Whether a build is running in `folder`: a process whose working directory it is, such as ninja or a compiler."""
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()) == folder.resolve():
                return True
        except (psutil.Error, OSError):
            continue
    return False


def build_extensions() -> None:
    """Compiles the extensions that DeepSpeed compiles at first use: its CPU Adam, and reading and writing of NVMe disks."""
    import deepspeed

    check_builds(Engine(1, EngineKind.ZERO_3, "nvme", "nvme"))
    for name in ("CPUAdamBuilder", "AsyncIOBuilder"):
        builder = deepspeed.accelerator.get_accelerator().create_op_builder(name)
        if not builder.is_compatible(verbose=False):
            say(
                "skipped",
                f"{builder.NAME}: this machine lacks a requirement" + (" (libaio)" if "aio" in builder.NAME else ""),
            )
            continue
        began = time.monotonic()
        builder.load(verbose=False)
        say("compiled", f"{builder.NAME} in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    exits_cleanly(build_extensions)()
