"""The running engine is checked against the requested one.

accelerate sometimes runs another engine than requested, without a warning: `--cpu --num_processes 2` runs one process, an FSDP
file with `--use_cpu` runs DDP, and several processes whose model is not wrapped train different weights. So the engine is read
from the wrapped model before the first step, and after it the trained parameters of all ranks are compared.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from toolkit.console import say
from toolkit.distributed.checksums import checksums
from toolkit.distributed.engine import Engine, EngineKind, Place
from toolkit.errors import UserError


def running_engine(trainer: Trainer) -> Engine:
    """The engine of `trainer`, read from the wrapped model, its parameters and its optimizer."""
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
        return Engine(processes, EngineKind.FSDP2, place, place)
    if type(wrapped).__name__ == "FullyShardedDataParallel":
        return Engine(processes, EngineKind.FSDP1)
    is_ddp = isinstance(wrapped, nn.parallel.DistributedDataParallel)
    return Engine(processes, EngineKind.DDP if is_ddp else EngineKind.NONE)


def _place(devices: list[torch.device], trainer: Trainer) -> Place:
    """Where tensors on `devices` are stored: "cpu" only if training does not run on the CPU itself."""
    away = trainer.args.device.type != "cpu" and bool(devices) and all(device.type == "cpu" for device in devices)
    return "cpu" if away else "with the model"


def _running_zero(trainer: Trainer, processes: int) -> Engine:
    """DeepSpeed's engine; the stage is read from what is partitioned, not from its configuration."""
    engine, zero = trainer.model_wrapped, trainer.model_wrapped.optimizer
    shards = [p.ds_tensor for p in trainer.model.parameters() if hasattr(p, "ds_tensor")]
    if shards:
        stage = 3
        masters = zero.fp32_partitioned_groups_flat
        state: Place = "nvme" if zero.swap_optimizer else _place([master.device for master in masters], trainer)
        where: Place = "nvme" if zero.params_in_nvme_and_cpu else _place([shard.device for shard in shards], trainer)
    else:
        # ZeRO-1 in bf16 with gradients in fp32 has another optimizer class, with another attribute name.
        masters = getattr(zero, "single_partition_of_fp32_groups", getattr(zero, "fp32_groups_flat_partition", []))
        stage = 0 if not masters else 2 if getattr(zero, "partition_gradients", False) else 1
        state, where = _place([master.device for master in masters], trainer), "with the model"
    mpu = getattr(engine, "mpu", None)
    row = mpu.get_sequence_parallel_world_size() if mpu is not None else 1
    return Engine(processes, EngineKind(f"ZeRO-{stage}"), state, where, row)


class EngineCheck(TrainerCallback):
    """Stops a run whose engine is not the requested one, or whose ranks hold different parameters.

    Raises: UserError, before the first step or after it.
    """

    def __init__(self, trainer: Trainer, requested: Engine) -> None:
        self.trainer = trainer
        self.requested = requested
        self.checked = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        requested = self.requested
        self.running = running_engine(self.trainer)
        if args.device.type == "cpu":  # offloading to CPU memory has no effect there
            places = [p if p != "cpu" else "with the model" for p in (requested.optimizer_state, requested.parameters)]
            requested = replace(requested, optimizer_state=places[0], parameters=places[1])
        if requested != self.running:
            raise UserError(
                f"the launch requested {requested}, but {self.running} is running; {_advice(requested, self.running)}"
            )
        if self.running.kind is not EngineKind.NONE:
            say("engine", str(self.running))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.checked or self.running.processes == 1 or not self.running.kind.replicates_parameters:
            return
        self.checked = True
        name = first_that_differs(self.trainer.model)
        if name:
            raise UserError(
                f"after the first step the ranks hold different values of {name}: under {self.running} they must be the "
                "same, so the result of this run would be wrong"
            )


def _advice(requested: Engine, running: Engine) -> str:
    if requested.processes > running.processes:
        return (
            "start several processes with a file of launch/ (for a trial without GPUs, append --use_cpu to the recipe)"
        )
    return "use a file of launch/ without changes"


def first_that_differs(model: nn.Module) -> str | None:
    """The name of the first trained parameter that is not bit for bit the same on all ranks, or None. All ranks must call it.

    It compares checksums, so only one number per parameter is sent.
    """
    found = checksums(model, trainable=True)
    sums = torch.tensor(list(found.values()), dtype=torch.long, device=next(model.parameters()).device)
    lowest, highest = sums.clone(), sums.clone()
    torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN)
    torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
    return next((name for name, same in zip(found, (lowest == highest).tolist(), strict=True) if not same), None)
