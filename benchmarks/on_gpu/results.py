"""One results file for each card: rows by name and stack, written after each item, and a table of them."""

from __future__ import annotations

import datetime
import json
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from toolkit.files import atomic_write

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
DONE = ("ok", "out of memory")  # a later call retries items with any other status
PARTS = ("runs", "facts", "memory", "speed", "fits")


class Results:
    """The rows of one card. `stack` is the key of library versions and driver; only rows with this key are used."""

    def __init__(self, path: Path, content: dict[str, Any], stack: str) -> None:
        self.path, self.content, self.stack = path, content, stack
        # a folder for archives of ledgers, snapshots and logs, which are not committed
        self.artifacts = path.with_suffix("")
        self.artifacts.mkdir(parents=True, exist_ok=True)

    @classmethod
    def load(cls, path: Path) -> Results:
        """The results of the last call in `path`."""
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(path, content, content["calls"][-1]["stack"])

    @classmethod
    def of(cls, folder: Path, card: dict[str, Any], versions: dict[str, str]) -> Results:
        """The results of a card; continues those in `folder`, or otherwise the committed ones."""
        path = folder / f"{slug(card['name'])}.json"
        earlier = path if path.is_file() else RESULTS / path.name
        content: dict[str, Any] = {"card": card, "stacks": {}, "calls": [], "rows": []}
        if earlier.is_file():
            content = json.loads(earlier.read_text(encoding="utf-8")) | {"card": card}
        key = stack_key(versions)
        content["stacks"][key] = versions
        return cls(path, content, key)

    def begin(self, minutes: float, commit: str) -> None:
        """Records the start of a call."""
        now = datetime.datetime.now(datetime.UTC)
        self.content["calls"].append(
            {"date": f"{now:%Y-%m-%d %H:%M}", "minutes": minutes, "stack": self.stack, "commit": commit, "seconds": 0.0}
        )

    def elapsed(self, seconds: float) -> None:
        """Records how long the call has taken so far."""
        self.content["calls"][-1]["seconds"] = round(seconds, 1)

    def row(self, name: str) -> dict[str, Any] | None:
        """The row with this name on this stack."""
        return next((r for r in self.content["rows"] if (r["name"], r["stack"]) == (name, self.stack)), None)

    def is_done(self, name: str) -> bool:
        """Whether the row is finished and need not be measured again."""
        found = self.row(name)
        return found is not None and found["status"] in DONE

    def put(self, name: str, part: str, **found: Any) -> None:
        """Adds a row, or replaces the one with the same name and stack, and writes the file."""
        rows = [r for r in self.content["rows"] if (r["name"], r["stack"]) != (name, self.stack)]
        row = {"name": name, "part": part, "stack": self.stack, "date": datetime.date.today().isoformat(), **found}
        self.content["rows"] = [*rows, _without_folders(row)]
        self.write()

    def update(self, name: str, **more: Any) -> None:
        """Adds fields to a row, and writes the file."""
        found = self.row(name)
        assert found is not None, name
        found |= more
        self.write()

    def rows(self, part: str | None = None) -> list[dict[str, Any]]:
        """The rows of this stack, of one part or all."""
        return [r for r in self.content["rows"] if r["stack"] == self.stack and part in (None, r["part"])]

    def pack(self, work: Path) -> None:
        """Packs the ledgers, snapshots and logs in `work` into one archive each, because few files are easier to transfer."""
        for name, pattern in (("ledgers", "kept/*.json"), ("snapshots", "kept/*.pickle"), ("logs", "logs/*.log")):
            if files := sorted(work.glob(pattern)):
                temporary = self.artifacts / f"{name}.zip.partial"
                with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
                    for file in files:
                        archive.write(file, file.name)
                temporary.replace(self.artifacts / f"{name}.zip")

    def write(self) -> None:
        """Writes the file atomically, each row as one line."""
        atomic_write(self.path, rows_as_lines(self.content))


def rows_as_lines(content: dict[str, Any]) -> str:
    """`content` as JSON, each of its "rows" as one line, after everything else."""
    head = json.dumps({name: value for name, value in content.items() if name != "rows"}, indent=1)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in content["rows"])
    return head.removesuffix("\n}") + ',\n "rows": [\n' + rows + "\n ]\n}\n"


def _without_folders(found: Any) -> Any:
    """`found` without the folders of the machine: texts name the repository and the work folder relatively."""
    if isinstance(found, str):
        return re.sub(r"[\w/.-]*/footprint-gpu-\d+", "WORK", found.replace(f"{ROOT}/", ""))
    if isinstance(found, dict):
        return {name: _without_folders(value) for name, value in found.items()}
    return [_without_folders(value) for value in found] if isinstance(found, list) else found


def slug(name: str) -> str:
    """`"NVIDIA H100 80GB HBM3"` -> `"nvidia-h100-80gb-hbm3"`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def stack_key(versions: dict[str, str]) -> str:
    """`"torch 2.11.0+cu130, transformers 5.17.0, ..."`: rows with the same key are comparable."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def error_percent(predicted: float, measured: float) -> float:
    """The error of a prediction, in percent of the measured value."""
    return round(100 * (predicted / measured - 1), 3)


def summary(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Measure -> number of rows, mean and worst absolute error in percent, over rows with a prediction."""
    errors = [row["error_percent"] for row in rows if "error_percent" in row]
    result: dict[str, dict[str, float]] = {}
    for name in ("allocated_bytes", "reserved_bytes", "untraced_allocated_bytes"):
        values = [abs(error[name]) for error in errors if name in error]
        if values:
            mean = round(sum(values) / len(values), 3)
            result[name] = {"rows": len(values), "mean": mean, "worst": round(max(values), 3)}
    return result


def verdict(row: dict[str, Any]) -> str:
    """`"agrees"`, `"differs"`, `"failed"`, or `"measured"` if there is nothing to compare with yet."""
    if row["status"] == "failed":
        return "failed"
    return {True: "agrees", False: "differs", None: "measured"}[row.get("agrees")]


def table(rows: list[dict[str, Any]], left: list[str]) -> str:
    """A text table: counts of verdicts by part, a line for each row that needs attention, and the items that are left."""
    lines = []
    for part in PARTS:
        own = [row for row in rows if row["part"] == part]
        counts: dict[str, int] = {}
        for row in own:
            counts[verdict(row)] = counts.get(verdict(row), 0) + 1
        lines.append(f"{part:<7} " + (", ".join(f"{n} {what}" for what, n in sorted(counts.items())) or "nothing yet"))
        lines += [
            f"        {verdict(row):<8} {row['name']}: {row.get('says', '')}" for row in own if _needs_a_look(row)
        ]
    for name, found in summary(rows).items():
        lines.append(
            f"{name.removesuffix('_bytes').replace('_', ' ')}: {found['rows']} configurations, mean error {found['mean']} %, worst {found['worst']} %"
        )
    lines.append(
        f"left: {len(left)}" + (f" ({', '.join(left[:12])}{', ...' if len(left) > 12 else ''})" if left else "")
    )
    return "\n".join(lines)


def _needs_a_look(row: dict[str, Any]) -> bool:
    return verdict(row) in ("differs", "failed") or row["part"] == "speed"
