"""Shared by the benchmarks that repeat two write-ups: runs with their settings, and their figures next to ours."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from toolkit.compare.command import compare
from toolkit.compare.tables import NONE, with_half
from toolkit.console import console, table
from toolkit.files import atomic_write
from toolkit.methods import METHODS
from toolkit.tasks.metrics import score_title

Flags = Mapping[str, Mapping[str, Sequence[str]]]  # method ("" for all) -> flag -> values
Figures = Mapping[str, Mapping[str, float | int]]  # method -> column -> published value


def redo(name: str, methods: Sequence[str], settings: Flags, argv: Sequence[str]) -> tuple[int, Path]:
    """`footprint compare` with the write-up's `settings`; the flags in `argv` override them.

    Returns: 1 if a run failed, otherwise 0; and the comparison's folder.
    """
    parser = argparse.ArgumentParser(
        allow_abbrev=False, epilog="All other flags are those of the recipes; they override the write-up's settings."
    )
    parser.add_argument("--methods", default=",".join(method for method in methods if method in METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output_dir", type=Path, default=Path("runs") / name)
    parser.add_argument("--launch", type=Path)
    parser.add_argument("--show", action="store_true", help="run nothing; show the results of finished runs")
    args, flags = parser.parse_known_args(argv)
    given = {token.lstrip("-").split("=")[0].replace("-", "_") for token in flags if token.startswith("--")}
    chosen = [settings[method] for method in ("", *args.methods.split(",")) if method in settings]
    own = [(flag, values) for part in chosen for flag, values in part.items() if flag not in given]
    if args.show:
        args.methods = None
    else:
        flags = [*(token for flag, values in own for token in (f"--{flag}", *values)), *flags]
    return compare(argparse.Namespace(**vars(args), flags=flags)), args.output_dir


def beside(folder: Path, published: Figures, settings: Mapping[str, Any], source: str) -> str:
    """Prints the published figures next to those in `folder` and which settings differ, and writes both to its `published.md`.

    `settings` are those of the published runs; ours are read from config.yaml and compare.json.
    """
    data = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
    ours = {entry["method"]: entry for entry in data["entries"]}
    columns = list(dict.fromkeys(column for row in published.values() for column in row))
    rows = []
    for method, row in published.items():
        rows.append([method, "published", *(_shown(row.get(column)) for column in columns)])
        rows.append(["", "here", *(_ours(ours.get(method, {}), column) for column in columns)])
    note = (
        f"published: {source}. What differs here: {'; '.join(_differing(folder, data, settings)) or 'nothing known'}."
    )
    titles = ["method", "", *map(score_title, columns)]
    table("Published figures and ours", titles, rows)
    console.print(note, soft_wrap=True)
    lines = ["| " + " | ".join(titles) + " |", "|---|---|" + "---:|" * len(columns)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    text = "\n".join(["# Published figures and ours", "", *lines, "", note, ""])
    atomic_write(folder / "published.md", text)
    return text


def _shown(value: float | int | None) -> str:
    return NONE if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _ours(entry: Mapping[str, Any], column: str) -> str:
    value = entry.get(column) or entry.get("scores", {}).get(column)
    return with_half(value) if isinstance(value, dict) else _shown(value)


def _differing(folder: Path, data: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """`model google/flan-t5-base, here ...` for each of `settings` that differs from ours."""
    here = {"model": {str(data["model"])}, "test rows": {str(data["data"]["rows"]["test"])}}
    here["training rows"] = {str(data["data"]["rows"]["train"])}
    for path in sorted((folder / "runs").glob("*/config.yaml")):
        for name, value in yaml.safe_load(path.read_text(encoding="utf-8")).items():
            here.setdefault(name, set()).add(" ".join(map(str, value)) if isinstance(value, list) else str(value))
    return [
        f"{name} {wanted}, here {', '.join(sorted(here.get(name, {NONE})))}"
        for name, wanted in settings.items()
        if here.get(name) != {str(wanted)}
    ]
