"""What trains a model: the number of processes, the kind of engine, and where its states live."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

Place = Literal["with the model", "cpu", "nvme"]


class EngineKind(StrEnum):
    """What shares a model's training out among processes; its value is the name that people read and run folders keep."""

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
        """Whether it is one of PyTorch's FSDP."""
        return self in (EngineKind.FSDP1, EngineKind.FSDP2)

    @property
    def shards_parameters(self) -> bool:
        """Whether a process holds only its share of the model's weights."""
        return self is EngineKind.ZERO_3 or self.is_fsdp

    @property
    def replicates_parameters(self) -> bool:
        """Whether each of several processes holds the whole model, so that all must hold the same values."""
        return self in (EngineKind.DDP, EngineKind.ZERO_1, EngineKind.ZERO_2)

    @property
    def replicates_checkpoints(self) -> bool:
        """Whether its checkpoints are the same files for any number of processes, and those of one process."""
        return self in (EngineKind.NONE, EngineKind.DDP)


@dataclass(frozen=True)
class Engine:
    """What trains a model, and where."""

    processes: int = 1
    kind: EngineKind = EngineKind.NONE
    optimizer_state: Place = "with the model"
    parameters: Place = "with the model"
    sequence_parallel_size: int = 1  # how many processes share the tokens of one row

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", EngineKind(self.kind))

    @property
    def offloads(self) -> bool:
        """Whether anything of it lives in the host's memory or on a disk."""
        return {self.optimizer_state, self.parameters} != {"with the model"}

    def __str__(self) -> str:
        parts = [f"{self.kind} on {self.processes} process{'es' if self.processes > 1 else ''}"]
        if self.optimizer_state != "with the model":
            parts.append(f"optimizer state on {self.optimizer_state}")
        if self.parameters != "with the model":
            parts.append(f"parameters on {self.parameters}")
        if self.sequence_parallel_size > 1:
            parts.append(f"{self.sequence_parallel_size} sharing each row")
        return ", ".join(parts)


NO_ENGINE = Engine()
