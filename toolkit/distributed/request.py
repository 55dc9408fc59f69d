"""The engine that the user requested with `accelerate launch`, read from flags and environment."""

import os
from collections.abc import Mapping
from typing import Any

from toolkit.distributed.deepspeed import requested_zero
from toolkit.distributed.engine import Engine, EngineKind, Place
from toolkit.errors import UserError


def requested_engine(
    deepspeed: str | dict[str, Any] | None = None, fsdp: Any = None, env: Mapping[str, str] = os.environ
) -> Engine:
    """The engine that was requested of `accelerate launch`, from the variables that it sets. Trainer's own flags take priority.

    Raises: UserError for a DeepSpeed configuration that cannot be read.
    """
    # On a machine without GPUs accelerate can start one process where several were requested; only MASTER_ADDR shows that.
    started_one = "WORLD_SIZE" not in env and "MASTER_ADDR" in env and "ACCELERATE_MIXED_PRECISION" in env
    processes = 2 if started_one else int(env.get("WORLD_SIZE", "1"))  # 2 stands for "more than one"
    if deepspeed or env.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        zero = requested_zero(deepspeed, env)
        places = _requested_place(zero, "optimizer"), _requested_place(zero, "param")
        return Engine(processes, _stage(zero), *places, int(env.get("PARALLELISM_CONFIG_SP_SIZE", "1")))
    if fsdp or env.get("ACCELERATE_USE_FSDP", "false") == "true":
        version = "2" if fsdp else env.get("FSDP_VERSION", "1")
        offload: Place = "cpu" if env.get("FSDP_OFFLOAD_PARAMS", "false") == "true" else "with the model"
        return Engine(processes, EngineKind(f"FSDP{version}"), offload, offload)
    return Engine(processes, EngineKind.DDP if processes > 1 else EngineKind.NONE)


def _stage(zero: dict[str, Any]) -> EngineKind:
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"DeepSpeed's configuration has zero_optimization.stage {stage!r}; give 0, 1, 2 or 3")
    return EngineKind(f"ZeRO-{stage:d}")


def _requested_place(zero: dict[str, Any], part: str) -> Place:
    device = (zero.get(f"offload_{part}") or {}).get("device", "none")
    return device if device in ("cpu", "nvme") else "with the model"
