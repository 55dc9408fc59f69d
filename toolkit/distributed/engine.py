"""The engine that trains a model: the number of processes, the kind, and where its states are stored."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

Place = Literal["with the model", "cpu", "nvme"]


class EngineKind(StrEnum):
    """How training is distributed among processes. The value is the name in messages and run folders."""

    NONE = "no engine"
    DDP = "DDP"
    ZERO_0 = "ZeRO-0"
    ZERO_1 = "ZeRO-1"
    ZERO_2 = "ZeRO-2"
    ZERO_3 = "ZeRO-3"
    FSDP1 = "FSDP1"
    FSDP2 = "FSDP2"

    @property
    def is_zero(self) -> bool:
        """Whether it is DeepSpeed."""
        return self.name.startswith("ZERO")

    @property
    def is_fsdp(self) -> bool:
        """Whether it is PyTorch's FSDP, in either version."""
        return self in (EngineKind.FSDP1, EngineKind.FSDP2)

    @property
    def shards_parameters(self) -> bool:
        """Whether a process holds only its shard of the model's weights."""
        return self is EngineKind.ZERO_3 or self.is_fsdp

    @property
    def replicates_parameters(self) -> bool:
        """Whether several processes each hold the whole model, whose values must then be the same on all of them."""
        return self in (EngineKind.DDP, EngineKind.ZERO_1, EngineKind.ZERO_2)

    @property
    def replicates_checkpoints(self) -> bool:
        """Whether its checkpoints do not depend on the number of processes: they are the files of a single process."""
        return self in (EngineKind.NONE, EngineKind.DDP)


@dataclass(frozen=True)
class Engine:
    """An engine, its number of processes, and where optimizer state and parameters are stored."""

    processes: int = 1
    kind: EngineKind = EngineKind.NONE
    optimizer_state: Place = "with the model"
    parameters: Place = "with the model"
    sequence_parallel_size: int = 1  # how many processes share the tokens of one row

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", EngineKind(self.kind))

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the optimizer state is in host memory or on a disk."""
        return self.optimizer_state != "with the model"

    @property
    def offloads(self) -> bool:
        """Whether optimizer state or parameters are in host memory or on a disk."""
        return self.offloads_optimizer or self.parameters != "with the model"

    def __str__(self) -> str:
        parts = [f"{self.kind} on {self.processes} process{'es' if self.processes > 1 else ''}"]
        if self.offloads_optimizer:
            parts.append(f"optimizer state on {self.optimizer_state}")
        if self.parameters != "with the model":
            parts.append(f"parameters on {self.parameters}")
        if self.sequence_parallel_size > 1:
            parts.append(f"{self.sequence_parallel_size} sharing each row")
        return ", ".join(parts)


NO_ENGINE = Engine()
