"""What a run needs besides the memory of its card: the host's memory and disks, line by line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

HOST, CACHE_DISK, RUN_DISK = "host memory", "disk of the caches", "disk of the run folder"
MOMENTS = ("loading", "training")


@dataclass(frozen=True)
class Line:
    """One thing that takes `nbytes`; `reason` says how they are counted. `moment`: one of `MOMENTS`, empty for all of the run."""

    name: str
    nbytes: int
    reason: str
    moment: str = ""


@dataclass(frozen=True)
class Resource:
    """A resource of one machine, all of its processes together; `budget_bytes` is what there is of it, None: unknown."""

    name: str
    lines: tuple[Line, ...]
    budget_bytes: int | None = None

    @property
    def needed_bytes(self) -> int:
        """The bytes of the moment that needs the most."""
        return max(sum(line.nbytes for line in self.lines if line.moment in ("", moment)) for moment in MOMENTS)

    @property
    def fits(self) -> bool:
        """Whether `needed_bytes` is within the budget; true without one."""
        return self.budget_bytes is None or self.needed_bytes <= self.budget_bytes

    def to_json(self) -> dict[str, Any]:
        """A plain object with all fields and `needed_bytes`."""
        return asdict(self) | {"lines": [asdict(line) for line in self.lines], "needed_bytes": self.needed_bytes}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Resource:
        """The resource that `to_json` wrote."""
        return cls(data["name"], tuple(Line(**line) for line in data["lines"]), data["budget_bytes"])


SHAPE = {  # of `Resource.to_json`, as `check_shape` takes it
    "name": str,
    "lines": [{"name": str, "nbytes": int, "reason": str, "moment": str}],
    "budget_bytes": (int, None),
}
