"""What a run needs besides the memory of its card: the host's memory and disks, line by line, and what this machine has."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
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


def available_host_bytes() -> int | None:
    """The memory that this process can still take: MemAvailable, or what the container's limit leaves; None where neither is known."""
    found = [*_available_in_proc(), *_left_in_container()]
    return min(found, default=None)


def _available_in_proc(file: Path = Path("/proc/meminfo")) -> list[int]:
    try:
        lines = dict(line.split(":") for line in file.read_text(encoding="utf-8").splitlines())
        return [1024 * int(lines["MemAvailable"].split()[0])]
    except (OSError, ValueError, LookupError):  # not Linux
        return []


def _left_in_container(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """The limit less what is in use and cannot be reclaimed: version 2 of cgroups, then version 1."""
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, now = (int((root / name).read_text(encoding="utf-8")) for name in (limit, used))
            stat = dict(line.split() for line in (root / limit).with_name("memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # there is none, or it is "max"
            continue
        return [max(0, most - now + int(stat.get(cache, 0)))]
    return []


def free_disk_bytes(folder: Path) -> int | None:
    """The free bytes where `folder` is or will be; None if that cannot be read."""
    try:
        return shutil.disk_usage(_existing(folder)).free
    except OSError:
        return None


def same_disk(first: Path, second: Path) -> bool:
    """Whether two folders, which need not exist yet, are in one file system."""
    try:
        return _existing(first).stat().st_dev == _existing(second).stat().st_dev
    except OSError:
        return False


def _existing(folder: Path) -> Path:
    """`folder`, or the first folder around it that exists."""
    folder = folder.expanduser().absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())
