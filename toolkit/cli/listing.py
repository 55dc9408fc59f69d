"""The commands that list known GPUs, models and methods, and the list of what `footprint doctor` found."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TextIO

from toolkit.errors import printable

if TYPE_CHECKING:
    from rich.console import Console

    from toolkit.runs.doctor import Finding

WIDEST = 110  # columns of a finding


def gpus(args: argparse.Namespace) -> None:
    """Lists the GPUs that `footprint predict --gpu` knows. Does not import PyTorch."""
    from toolkit.memory.cuda.cards import CARDS, short_names
    from toolkit.units import format_bytes

    entries: list[dict[str, Any]] = [
        {
            "name": card.name,
            "memory_bytes": card.total_bytes,
            "memory_is_estimate": card.total_is_estimate,
            "compute_capability": "{}.{}".format(*card.capability),
            "architecture": card.architecture,
            "aliases": list(short_names(card)),
        }
        for card in CARDS
    ]
    rows = [
        [
            entry["name"],
            format_bytes(entry["memory_bytes"]) + ("~" if entry["memory_is_estimate"] else " "),
            entry["compute_capability"],
            entry["architecture"],
            *entry["aliases"][:1],
        ]
        for entry in entries
    ]
    columns = ("name", ">memory", ">compute capability", "architecture", "alias")
    caption = (
        "memory: the size that the driver reports to CUDA; ~ marks an estimate, for which no public report is cited. In a name, "
        "case, spaces, NVIDIA, GeForce and form factors such as SXM4 do not matter. A slice of a card is named with its MIG profile: "
        "'A100 80GB MIG 3g.40gb'."
    )
    _show("gpus", entries, columns, rows, caption, args.json)


def models(args: argparse.Namespace) -> None:
    """Lists the models that can be predicted without the hub."""
    from toolkit.cli.output import clean_stdout

    with clean_stdout():
        from toolkit.models import catalogue
    entries: list[dict[str, Any]] = [
        {"id": name, "architecture": entry.model_type, "parameters": entry.parameters}
        for entry in catalogue.entries()
        for name in entry.names
    ]
    rows = [[entry["id"], entry["architecture"], f"{entry['parameters']:,}"] for entry in entries]
    caption = "Other models need their config.json, from the hub or from a folder: --model_name_or_path FOLDER."
    _show("models", entries, ("id", "architecture", ">parameters"), rows, caption, args.json)


def methods(args: argparse.Namespace) -> None:
    """Lists the fine-tuning methods, each with its recipe's name."""
    from toolkit.cli.output import clean_stdout
    from toolkit.runs import api

    with clean_stdout():
        entries: list[dict[str, Any]] = [
            {"name": name, "summary": _first_paragraph(method), "paper": method.paper, "trains": method.trains}
            for name, method in api.methods().items()
        ]
    rows = [[entry["name"], _without_paper(entry), entry["paper"] or "-"] for entry in entries]
    caption = "To train: accelerate launch recipes/NAME.py. To list a recipe's flags: python recipes/NAME.py --help."
    _show("methods", entries, ("name", "what it does", "paper"), rows, caption, args.json)


def show_findings(findings: Iterable[Finding], as_json: bool, out: TextIO) -> int:
    """Prints each finding as soon as it is there, or all as one JSON object. Returns 1 if one is a problem, otherwise 0."""
    from rich.console import Console

    console = Console(file=out, highlight=False, markup=False, emoji=False)
    counts: Counter[str] = Counter()
    entries = []
    for finding in findings:
        counts[finding.verdict] += 1
        entries.append(vars(finding))
        if not as_json:
            _show_finding(console, finding)
    if as_json:
        import json

        console.out(json.dumps({"problems": counts["problem"], "findings": entries}))
    elif counts["problem"]:
        problems = counts["problem"]
        console.print(f"\n{problems} problem{'s' if problems > 1 else ''} to mend before a run")
    else:
        console.print("\nnothing stops a run")
    return int(counts["problem"] > 0)


def _show_finding(console: Console, finding: Finding) -> None:
    from textwrap import wrap

    from rich.text import Text

    styles = {"ok": "", "advice": "bold yellow", "problem": "bold red"}
    lines = [(finding.what, finding.value, "bold")]
    if finding.advice:
        lines.append((str(finding.verdict), finding.advice, styles[finding.verdict]))
    for label, text, style in lines:
        first, *more = wrap(printable(text), min(console.width, WIDEST) - 17, break_on_hyphens=False)
        console.print(Text.assemble((f"{label:>15}", style), "  ", first), soft_wrap=True)
        for line in more:
            console.print(f"{'':>15}  {line}", soft_wrap=True)
    if finding.command:
        console.print(f"{'':>15}  $ {printable(finding.command)}", soft_wrap=True)


def _first_paragraph(documented: type) -> str:
    return " ".join((documented.__doc__ or "").split("\n\n")[0].split())


def _without_paper(entry: dict[str, Any]) -> str:
    """The summary of a method, without the paper, which has its own column."""
    return entry["summary"].replace(f", {entry['paper']}", "") if entry["paper"] else entry["summary"]


def _show(
    what: str,
    entries: list[dict[str, Any]],
    columns: tuple[str, ...],
    rows: list[list[str]],
    caption: str,
    as_json: bool,
) -> None:
    """Prints `entries` as one JSON object, or `rows` as a table. Columns with a title that begins with > hold numbers."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if as_json:
        import json

        console.out(json.dumps({what: entries}))
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for number, column in enumerate(columns):
        right = column.startswith(">")
        table.add_column(column.removeprefix(">"), justify="right" if right else "left", no_wrap=not number)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(f"\n{caption}")
