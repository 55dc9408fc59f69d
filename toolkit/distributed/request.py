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
    processes = 2 if started_one else _number(env, "WORLD_SIZE")  # 2 stands for "more than one"
    if deepspeed or env.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        zero = requested_zero(deepspeed, env)
        places = _requested_place(zero, "optimizer"), _requested_place(zero, "param")
        return Engine(processes, _stage(zero), *places, _number(env, "PARALLELISM_CONFIG_SP_SIZE"))
    if fsdp or env.get("ACCELERATE_USE_FSDP", "false") == "true":
        version = "2" if fsdp else env.get("FSDP_VERSION", "1")
        if version not in ("1", "2"):
            raise UserError(f"the launch file has fsdp_version {version}; give 2")
        offload: Place = "cpu" if env.get("FSDP_OFFLOAD_PARAMS", "false") == "true" else "with the model"
        return Engine(processes, EngineKind(f"FSDP{version}"), offload, offload)
    return Engine(processes, EngineKind.DDP if processes > 1 else EngineKind.NONE)


def _number(env: Mapping[str, str], name: str) -> int:
    text = env.get(name, "1")
    if not text.isdecimal() or not 1 <= len(text) <= 6 or int(text) < 1:
        raise UserError(
            f"the launch sets {name} to {text!r}, which is no number of processes; see the files of launch/"
        )
    return int(text)


def _stage(zero: dict[str, Any]) -> EngineKind:
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise UserError(f"DeepSpeed's configuration has zero_optimization.stage {stage!r}; give 0, 1, 2 or 3")
    return EngineKind(f"ZeRO-{stage:d}")


def _requested_place(zero: dict[str, Any], part: str) -> Place:
    device = (zero.get(f"offload_{part}") or {}).get("device", "none")
    return device if device in ("cpu", "nvme") else "with the model"
