"""What was asked of `accelerate launch`, held against what really runs: processes, engine, and where the states live.

Accelerate turns some requests silently into something else: `--cpu --num_processes 2` runs one process, an FSDP file with
`--use_cpu` runs DDP, and a world of several processes in which nothing is wrapped lets the ranks drift apart. So the
engine is looked at once it stands, and the trained parameters of all ranks are compared after the first step.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

import psutil
import torch
from torch import nn
from torch.utils.cpp_extension import CUDA_HOME, get_default_build_root
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from toolkit.checksums import checksums
from toolkit.console import say
from toolkit.errors import UserError
from toolkit.ranks import exits_cleanly

Place = Literal["with the model", "cpu", "nvme"]
REPLICATED = ("DDP", "ZeRO-1", "ZeRO-2")  # engines under which every rank holds the whole model
OFFLOADED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "lion_32bit")  # that DeepSpeed has for the CPU
_locks: list[IO] = []  # of folders that are this process's until it ends
NOT_READ_BACK = (
    "of a state on NVMe, DeepSpeed 0.19 reads back from a checkpoint only a part, and goes on with the rest as it began"
)
YOUNG_SECONDS = 20.0  # a build has its compiler running this soon after it took its lock


@dataclass(frozen=True)
class Engine:
    """What trains a model."""

    processes: int
    kind: str  # "no engine", "DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP1" or "FSDP2"
    optimizer_state: Place = "with the model"
    parameters: Place = "with the model"
    processes_a_row: int = 1  # sequence parallelism: how many share the tokens of one row

    @property
    def shards_parameters(self) -> bool:
        """Whether a process holds only its share of the model's weights."""
        return self.kind in ("ZeRO-3", "FSDP1", "FSDP2")

    def __str__(self) -> str:
        parts = [f"{self.kind} on {self.processes} process{'es' if self.processes > 1 else ''}"]
        if self.optimizer_state != "with the model":
            parts.append(f"optimizer state on {self.optimizer_state}")
        if self.parameters != "with the model":
            parts.append(f"parameters on {self.parameters}")
        if self.processes_a_row > 1:
            parts.append(f"{self.processes_a_row} sharing each row")
        return ", ".join(parts)


def asked_engine(
    deepspeed: str | dict[str, Any] | None = None, fsdp: Any = None, env: Mapping[str, str] = os.environ
) -> Engine:
    """What `accelerate launch` was told, from what it leaves in the environment; flags of Trainer's own win.

    Raises: UserError for a DeepSpeed configuration that cannot be read.
    """
    # Without a GPU launcher accelerate starts one process, and leaves only an address to tell that several were wanted.
    alone = "WORLD_SIZE" not in env and "MASTER_ADDR" in env and "ACCELERATE_MIXED_PRECISION" in env
    processes = 2 if alone else int(env.get("WORLD_SIZE", "1"))
    if deepspeed or env.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        zero = _asked_zero(deepspeed, env)
        row = int(env.get("PARALLELISM_CONFIG_SP_SIZE", "1"))
        return Engine(
            processes, f"ZeRO-{zero.get('stage', 0)}", _asked_place(zero, "optimizer"), _asked_place(zero, "param"), row
        )
    if fsdp or env.get("ACCELERATE_USE_FSDP", "false") == "true":
        version = "2" if fsdp else env.get("FSDP_VERSION", "1")
        offload: Place = "cpu" if env.get("FSDP_OFFLOAD_PARAMS", "false") == "true" else "with the model"
        return Engine(processes, f"FSDP{version}", offload, offload)
    return Engine(processes, "DDP" if processes > 1 else "no engine")


def _asked_zero(deepspeed: str | dict[str, Any] | None, env: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """`zero_optimization` of DeepSpeed's configuration; where accelerate's own YAML holds the settings, in the same form."""
    if source := deepspeed or env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        return read_deepspeed(source).get("zero_optimization", {})
    names = {
        "optimizer": "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
        "param": "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
    }
    offload = {f"offload_{what}": {"device": env.get(name, "none")} for what, name in names.items()}
    return {"stage": int(env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")), **offload}


def _asked_place(zero: dict[str, Any], what: str) -> Place:
    device = (zero.get(f"offload_{what}") or {}).get("device", "none")
    return device if device in ("cpu", "nvme") else "with the model"


def read_deepspeed(source: str | dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's configuration from a JSON file.

    Raises: UserError where there is no such file, or it holds no JSON object.
    """
    if isinstance(source, dict):
        return source
    try:
        content = json.loads(Path(source).read_text(encoding="utf-8"))
    except OSError:
        raise UserError(
            f"the launch file names DeepSpeed's configuration {source}, which is not there; paths in launch/ are read from "
            "the repository's root: start the run there"
        ) from None
    except ValueError as error:
        raise UserError(f"DeepSpeed's configuration {source} is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(
            f"DeepSpeed's configuration {source} holds a {type(content).__name__}; it must be a JSON object"
        )
    return content


def running_engine(trainer: Trainer) -> Engine:
    """What `trainer` has made of its model: read from the wrapped model, its parameters and its optimizer."""
    distributed = torch.distributed
    ready = distributed.is_available() and distributed.is_initialized()
    processes = distributed.get_world_size() if ready else 1
    wrapped = trainer.model_wrapped
    if hasattr(wrapped, "zero_optimization_stage"):
        return _running_zero(trainer, processes)
    from torch.distributed.tensor import DTensor

    shards = [p.to_local() for p in trainer.model.parameters() if isinstance(p, DTensor)]
    if shards:
        place = _place([shard.device for shard in shards], trainer)
        return Engine(processes, "FSDP2", place, place)
    if type(wrapped).__name__ == "FullyShardedDataParallel":
        return Engine(processes, "FSDP1")
    return Engine(processes, "DDP" if isinstance(wrapped, nn.parallel.DistributedDataParallel) else "no engine")


def _place(devices: list[torch.device], trainer: Trainer) -> Place:
    """Where tensors on `devices` are, seen from the device that computes: on a CPU, its memory is with the model."""
    away = trainer.args.device.type != "cpu" and bool(devices) and all(device.type == "cpu" for device in devices)
    return "cpu" if away else "with the model"


def _running_zero(trainer: Trainer, processes: int) -> Engine:
    """The stage by what is partitioned, not by what the engine was told."""
    engine, zero = trainer.model_wrapped, trainer.model_wrapped.optimizer
    shards = [p.ds_tensor for p in trainer.model.parameters() if hasattr(p, "ds_tensor")]
    if shards:
        stage = 3
        masters = zero.fp32_partitioned_groups_flat
        state: Place = "nvme" if zero.swap_optimizer else _place([master.device for master in masters], trainer)
        where: Place = "nvme" if zero.params_in_nvme_and_cpu else _place([shard.device for shard in shards], trainer)
    else:
        # ZeRO-1 in bf16 with gradients in fp32 has an optimizer class, and so a name, of its own.
        masters = getattr(zero, "single_partition_of_fp32_groups", getattr(zero, "fp32_groups_flat_partition", []))
        stage = 0 if not masters else 2 if getattr(zero, "partition_gradients", False) else 1
        state, where = _place([master.device for master in masters], trainer), "with the model"
    mpu = getattr(engine, "mpu", None)
    row = mpu.get_sequence_parallel_world_size() if mpu is not None else 1
    return Engine(processes, f"ZeRO-{stage}", state, where, row)


class SharedRows:
    """Collates rows whose tokens `processes` ranks share (Ulysses): a batch is (rows, length), right-padded for an even cut.

    The length is that of the `longest` row, in tokens, for ranks gather each other's batches, and must agree on it.
    Positions are those in the whole row, and there is no mask: what follows the text is seen by none of its tokens.
    """

    def __init__(self, collator: Any, processes: int, longest: int) -> None:
        collator.padding, collator.max_length = "max_length", shared_length(longest, processes)
        self.collator = collator

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        tokenizer = self.collator.tokenizer
        side, tokenizer.padding_side = tokenizer.padding_side, "right"
        try:
            return self.with_positions(self.collator(rows))
        finally:
            tokenizer.padding_side = side

    @staticmethod
    def with_positions(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`batch` with the positions (rows, length) of its tokens, and without a mask."""
        shape = batch["input_ids"].shape
        kept = {name: tensor for name, tensor in batch.items() if name != "attention_mask"}
        return kept | {"position_ids": torch.arange(shape[1]).expand(shape).contiguous()}


def shared_length(length: int, processes: int) -> int:
    """The tokens of a row that `processes` can share evenly: no less than `length`."""
    return -(-length // processes) * processes


class EngineCheck(TrainerCallback):
    """Stops a run whose engine is not the one that was asked for, or whose ranks hold different parameters.

    Raises: UserError, before the first step and after it.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.checked = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        asked = asked_engine(args.deepspeed, args.fsdp)
        self.running = running_engine(self.trainer)
        if args.device.type == "cpu":  # where offloading to its memory leaves everything where it is
            home = [p if p != "cpu" else "with the model" for p in (asked.optimizer_state, asked.parameters)]
            asked = replace(asked, optimizer_state=home[0], parameters=home[1])
        if asked != self.running:
            raise UserError(
                f"the launch asked for {asked}, but what runs is {self.running}; {_advice(asked, self.running)}"
            )
        if self.running.kind != "no engine":
            say("engine", str(self.running))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.checked or self.running.processes == 1 or self.running.kind not in REPLICATED:
            return
        self.checked = True
        name = first_that_differs(self.trainer.model)
        if name:
            raise UserError(
                f"after the first step the ranks hold different values of {name}: under {self.running} they must be the "
                "same; nothing that this run would give can be trusted"
            )


def _advice(asked: Engine, running: Engine) -> str:
    if asked.processes > running.processes:
        return (
            "start several processes with a file of launch/ (for a trial without GPUs, append --use_cpu to the recipe)"
        )
    return "use a file of launch/ as it stands"


def first_that_differs(model: nn.Module) -> str | None:
    """The name of the first trained parameter that is not bit for bit the same on all ranks, or None. Called by all ranks.

    Compared are checksums, so that no more than a number for each parameter is sent.
    """
    found = checksums(model, trainable=True)
    sums = torch.tensor(list(found.values()), dtype=torch.long, device=next(model.parameters()).device)
    lowest, highest = sums.clone(), sums.clone()
    torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN)
    torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
    return next((name for name, same in zip(found, (lowest == highest).tolist(), strict=True) if not same), None)


def join_deepspeed() -> None:
    """Tells DeepSpeed of the process group: accelerate does that on GPUs, and not with --use_cpu.

    A run on CPUs is a rehearsal: it uses gloo alone, not the shared memory that DeepSpeed would compile code for (minutes).
    """
    import deepspeed

    if not deepspeed.comm.is_initialized():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        backend = torch.distributed.get_backend() if torch.distributed.is_initialized() else None
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False)


@contextmanager
def without_partitioning() -> Iterator[None]:
    """Within, a model is built whole: under ZeRO-3 transformers would partition it while it is made."""
    from transformers.integrations import deepspeed as integration

    kept = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if kept is not None and (settings := kept()) is not None:
            integration.set_hf_deepspeed_config(settings)


def share_tied_tables(model: nn.Module) -> None:
    """Makes embeddings that are tied by their weight one module, as FSDP2 wants it (torch 2.13 refuses T5 and BART else)."""
    table = model.get_input_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is not table and type(child) is type(table) and child.weight is table.weight:
                setattr(parent, name, table)


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds only a share of `model`'s weights, so that it computes on all ranks or on none."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) or hasattr(p, "ds_tensor") for p in model.parameters())


@contextmanager
def gathered_in_use(model: nn.Module) -> Iterator[None]:
    """Within, a model that ZeRO-3 partitioned while it was loaded can compute: each layer's weights are gathered for it.

    DeepSpeed's engine does the same from when training begins; before that, and for the base model's scores, its hooks
    are set here and taken away again. Does nothing to any other model.
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
        param_persistence_threshold=0,  # so that every parameter is let go again
        offload_param_config=DeepSpeedZeroOffloadParamConfig(**offload) if offload else None,
        **limits,
    )
    try:
        yield
    finally:
        hooks.partition_all_parameters()
        hooks.destroy()
        del model.ds_inflight_param_registry
        # Else the engine's backward passes would run those of `hooks`, with their limits.
        for module in model.modules():
            for name in ("pre_bwd_fn", "post_bwd_fn"):
                vars(module).pop(name, None)


def check_disk(engine: Engine, deepspeed: str | dict[str, Any] | None = None) -> None:
    """Takes the folder that DeepSpeed swaps to for this run, until its process ends; called by one process of a machine.

    Raises: UserError where reading and writing the disk cannot be compiled here, or another run swaps to that folder, which
    each run empties as it begins.
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
            f"{engine}: DeepSpeed compiles async_io against CUDA's headers, and there is no CUDA toolkit here: install it, or set "
            "CUDA_HOME to its folder"
        )
    import fcntl  # Linux alone, as DeepSpeed is

    zero = _asked_zero(deepspeed)
    parts = [zero.get(name) or {} for name in ("offload_optimizer", "offload_param")]
    for path in {part["nvme_path"] for part in parts if part.get("nvme_path")}:
        Path(path).mkdir(parents=True, exist_ok=True)
        lock = (Path(path) / "in_use").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another run swaps to {path}; wait for its end, or give this one another nvme_path in a JSON of its own"
            ) from None
        _locks.append(lock)


def check_builds(engine: Engine) -> None:
    """Raises UserError where what DeepSpeed compiles for `engine` is locked by a build that is no longer running.

    A build takes a lock file in its folder, and one that is killed leaves it there: whoever needs the same library then
    waits without end. A lock that some compiler works under is somebody's, and is waited for.
    """
    names = ["cpu_adam", "cpu_lion"] if engine.optimizer_state != "with the model" else []
    names += ["async_io"] if "nvme" in (engine.optimizer_state, engine.parameters) else []
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in (lock for name in names for lock in root.glob(f"**/{name}/lock")):
        while (age := _age(lock)) is not None and age < YOUNG_SECONDS and not _is_built(lock.parent):
            time.sleep(1)
        if age is not None and age >= YOUNG_SECONDS and not _is_built(lock.parent):
            raise UserError(
                f"{lock} was left by a build of {lock.parent.name} that was killed, and DeepSpeed would wait for it without "
                f"end; delete that file and start again"
            )


def _age(lock: Path) -> float | None:
    """Seconds since `lock` was taken, or None where it is gone."""
    try:
        return time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return None


def _is_built(folder: Path) -> bool:
    """Whether some process works in `folder`, as ninja and the compilers that it starts do."""
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()) == folder.resolve():
                return True
        except (psutil.Error, OSError):
            continue
    return False


def build_extensions() -> None:
    """Compiles what DeepSpeed would compile at its first use: its Adam for the CPU, and reading and writing of NVMe disks."""
    import deepspeed

    check_builds(Engine(1, "ZeRO-3", "nvme", "nvme"))
    for name in ("CPUAdamBuilder", "AsyncIOBuilder"):
        builder = deepspeed.accelerator.get_accelerator().create_op_builder(name)
        if not builder.is_compatible(verbose=False):
            say(
                "skipped",
                f"{builder.NAME}: this machine lacks what it needs" + (" (libaio)" if "aio" in builder.NAME else ""),
            )
            continue
        began = time.monotonic()
        builder.load(verbose=False)
        say("compiled", f"{builder.NAME} in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    exits_cleanly(build_extensions)()
