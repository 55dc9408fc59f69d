"""What trains a model: the number of processes, the kind of engine, and where its states live."""

from dataclasses import dataclass
from typing import Literal

Place = Literal["with the model", "cpu", "nvme"]
REPLICATED = ("DDP", "ZeRO-1", "ZeRO-2")  # engines under which every rank holds the whole model


@dataclass(frozen=True)
class Engine:
    """What trains a model."""

    processes: int
    kind: str  # "no engine", "DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP1" or "FSDP2"
    optimizer_state: Place = "with the model"
    parameters: Place = "with the model"
    sequence_parallel_size: int = 1  # sequence parallelism: how many share the tokens of one row

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
        if self.sequence_parallel_size > 1:
            parts.append(f"{self.sequence_parallel_size} sharing each row")
        return ", ".join(parts)
