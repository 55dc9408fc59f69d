"""The engine that was requested of `accelerate launch`, read from flags and environment."""

import os
from collections.abc import Mapping
from typing import Any

from toolkit.distributed.deepspeed import requested_zero
from toolkit.distributed.engine import Engine, EngineKind, Place
from toolkit.errors import UserError


def requested_engine(
    deepspeed: str | dict[str, Any] | None = None, fsdp: Any = None, env: Mapping[str, str] = os.environ
) -> Engine:
    """What `accelerate launch` was told, from what it leaves in the environment; flags of Trainer's own win.

    Raises: UserError for a DeepSpeed configuration that cannot be read.
    """
    # Without a GPU launcher accelerate starts one process, and leaves only an address to tell that several were wanted.
    alone = "WORLD_SIZE" not in env and "MASTER_ADDR" in env and "ACCELERATE_MIXED_PRECISION" in env
    processes = 2 if alone else int(env.get("WORLD_SIZE", "1"))
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


def _requested_place(zero: dict[str, Any], what: str) -> Place:
    device = (zero.get(f"offload_{what}") or {}).get("device", "none")
    return device if device in ("cpu", "nvme") else "with the model"
