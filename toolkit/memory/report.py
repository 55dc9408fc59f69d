"""Ledgers in the terminal: one as a table and a bar, predicted next to measured, and several side by side.

This module only renders: every figure comes from a ledger. `units.format_bytes` formats sizes in GiB, MiB or KiB.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from toolkit.errors import printable
from toolkit.memory.ledger import BESIDE_STEPS, CATEGORIES, Ledger, PhaseUse
from toolkit.memory.risk import SPILLS, Risk
from toolkit.memory.trace import PHASES
from toolkit.units import format_bytes

# Groups of categories, each with its colour in all bars.
GROUPS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "weights": ("blue", ("parameters_frozen", "parameters_trainable", "parameters_quantization_state", "buffers")),
    "gradients": ("magenta", ("gradients",)),
    "optimizer state": ("red", ("optimizer_state",)),
    "activations": ("green", ("activations_saved", "activations_logits_loss", "inputs")),
    "temporaries": ("yellow", ("temporaries", "workspaces")),
    "communication": ("cyan", ("communication",)),
    "slack and cache": ("bright_black", ("allocator_slack", "cached_unused")),
}


def grouped(categories: Mapping[str, int]) -> dict[str, int]:
    """Bytes by group, in the order of `GROUPS`."""
    return {name: sum(categories.get(one, 0) for one in parts) for name, (_, parts) in GROUPS.items()}


def bar(groups: Mapping[str, int], total: int, width: int = 60) -> Text:
    """A stacked bar of `width` cells for `total` bytes. Groups smaller than half a cell can be invisible."""
    text, done, cells = Text(), 0, 0
    for name, nbytes in groups.items():
        done += nbytes
        upto = round(width * done / max(1, total))
        text.append("█" * (upto - cells), style=GROUPS[name][0])
        cells = upto
    return text


def legend(groups: Mapping[str, int]) -> Text:
    """`■ weights 1.2 GiB  ■ gradients ...`, without empty groups."""
    text = Text()
    for name, nbytes in groups.items():
        if nbytes:
            text.append("■\N{NO-BREAK SPACE}", style=GROUPS[name][0])
            text.append(f"{name} {format_bytes(nbytes)}".replace(" ", "\N{NO-BREAK SPACE}") + "   ")
    return text


def print_ledger(console: Console, ledger: Ledger) -> None:
    """Prints the peak as a bar, and a table of categories by phase at each phase's own peak."""
    console.print(_headline(ledger))
    for warning in ledger.warnings:
        console.print(warning, markup=False)
    groups = grouped(ledger.categories_at_peak)
    console.print(bar(groups, ledger.reserved_bytes, width=min(60, console.width)), legend(groups), sep="\n")
    table = Table(title=f"Memory by phase ({ledger.source}, {ledger.device})", title_justify="left")
    table.add_column("at each phase's peak")
    columns: list[tuple[str, PhaseUse]] = [(name, ledger.phases[name]) for name in PHASES if name in ledger.phases]
    for name, _ in columns:
        table.add_column(name.replace("_", " "), justify="right")
    for category, meaning in CATEGORIES.items():
        sizes = [use.categories[category] for _, use in columns]
        if any(sizes):
            table.add_row(_label(category, meaning), *[format_bytes(size) if size else "" for size in sizes])
    table.add_section()
    table.add_row("allocated, peak", *[format_bytes(use.allocated_peak_bytes) for _, use in columns], style="bold")
    table.add_row("allocated, at the end", *[format_bytes(use.allocated_end_bytes) for _, use in columns])
    console.print(table)
    if beside := [(name, ledger.phases[name]) for name in BESIDE_STEPS if name in ledger.phases]:
        peaks = ", ".join(f"{name} {format_bytes(use.allocated_peak_bytes)}" for name, use in beside)
        console.print(f"beside the steps: {peaks}")
    for resource in ledger.resources:
        parts = "; ".join(f"{line.name} {format_bytes(line.nbytes)}" for line in resource.lines)
        console.print(
            f"{resource.name}: {_of_budget(resource.needed_bytes, resource.budget_bytes)} ({parts or 'nothing'})"
        )
    if ledger.assumed:
        console.print(f"assumed: {assumptions(ledger.assumed)}", markup=False)
    for note in ledger.notes:
        console.print(f"note: {note}")


def assumptions(assumed: Mapping[str, Any]) -> str:
    """`Ledger.assumed` in words: `4 rows of 512 tokens, 2 times a step; bf16, weights bfloat16; no activation checkpointing; ...`."""
    target = f" and targets of {assumed['target_tokens']}" if assumed["target_tokens"] else ""
    times = assumed["gradient_accumulation_steps"]
    return "; ".join(
        (
            f"{assumed['rows']} rows of {assumed['tokens']} tokens{target}"
            + (f", {times} times a step" if times > 1 else ""),
            f"{assumed['precision']}, weights {assumed['weights']}",
            f"{'' if assumed['gradient_checkpointing'] else 'no '}activation checkpointing",
            assumed["data"],
        )
    )


def print_comparison(console: Console, predicted: Ledger, measured: Ledger) -> None:
    """Prints predicted next to measured bytes, with the error in percent of the measured bytes."""
    table = Table(
        title=f"Memory, predicted for the rows of the first steps and measured ({measured.device})",
        title_justify="left",
    )
    for name in ("", "predicted", "measured", "error"):
        table.add_column(name, justify="left" if not name else "right")
    for name, before, after in comparison_rows(predicted, measured):
        table.add_row(name, format_bytes(before), format_bytes(after), format_error(before, after))
    console.print(table)


def comparison_rows(predicted: Ledger, measured: Ledger) -> list[tuple[str, int, int]]:
    """Rows (name, predicted bytes, measured bytes): peaks, offloaded bytes, phases, then categories at the peak."""
    rows = [("allocated, peak", predicted.allocated_bytes, measured.allocated_bytes)]
    if measured.reserved_bytes != measured.allocated_bytes:
        rows.append(("reserved, peak", predicted.reserved_bytes, measured.reserved_bytes))
    if predicted.process_bytes is not None and measured.process_bytes is not None:
        rows.append(("process", predicted.process_bytes, measured.process_bytes))
    for name in ("host", "nvme"):
        before_bytes, after_bytes = (getattr(ledger, f"{name}_bytes") for ledger in (predicted, measured))
        if before_bytes or after_bytes:
            rows.append((f"offloaded to the {'host' if name == 'host' else 'disk'}", before_bytes, after_bytes))
    for phase in PHASES:
        if phase in predicted.phases and phase in measured.phases:
            before, after = predicted.phases[phase], measured.phases[phase]
            rows.append((phase.replace("_", " "), before.allocated_peak_bytes, after.allocated_peak_bytes))
    both = predicted.categories_at_peak, measured.categories_at_peak
    rows += [(_label(name), both[0][name], both[1][name]) for name in CATEGORIES if both[0][name] or both[1][name]]
    return rows


def format_error(predicted: int, measured: int) -> str:
    """The error of a prediction in percent of the measured value, such as `"+0.12 %"`, in bytes below 1 KiB, or `"exact"`."""
    if predicted == measured:
        return "exact"
    if measured and abs(predicted - measured) < 1024:
        return f"{predicted - measured:+d} B"
    return f"{100 * (predicted / measured - 1):+.2f} %" if measured else "not measured"


def print_side_by_side(console: Console, ledgers: Sequence[tuple[str, Ledger]]) -> None:
    """Prints ledgers as stacked bars on one scale and as a table, and describes each one's difference from the first."""
    top = max(ledger.reserved_bytes for _, ledger in ledgers)
    width = max(len(name) for name, _ in ledgers)
    for name, ledger in ledgers:
        line = Text(f"{name:{width}}  ")
        line.append_text(
            bar(grouped(ledger.categories_at_peak), top, width=max(10, min(60, console.width - width - 16)))
        )
        line.append(f"  {format_bytes(ledger.reserved_bytes)}")
        console.print(line)
    table = Table()
    table.add_column("at the peak")
    for name, _ in ledgers:
        table.add_column(name, justify="right")
    for group in GROUPS:
        sizes = [grouped(ledger.categories_at_peak)[group] for _, ledger in ledgers]
        if any(sizes):
            table.add_row(group, *[format_bytes(size) for size in sizes])
    table.add_section()
    table.add_row("allocated", *[format_bytes(ledger.allocated_bytes) for _, ledger in ledgers], style="bold")
    table.add_row("reserved", *[format_bytes(ledger.reserved_bytes) for _, ledger in ledgers])
    if any(ledger.process_bytes for _, ledger in ledgers):
        sizes_or_none = [ledger.process_bytes for _, ledger in ledgers]
        table.add_row("process", *["?" if size is None else format_bytes(size) for size in sizes_or_none])
    trained = [f"{ledger.parameters['trainable']:,}" for _, ledger in ledgers]
    table.add_row("trainable parameters", *trained)
    table.add_row("source", *[f"{ledger.source}, {ledger.device}" for _, ledger in ledgers])
    console.print(table)
    for sentence in differences(ledgers):
        console.print(sentence)


def differences(ledgers: Sequence[tuple[str, Ledger]]) -> list[str]:
    """For each ledger after the first, a sentence that lists how its peak differs from the first, largest change first."""
    base_name, base = ledgers[0]
    before = grouped(base.categories_at_peak)
    sentences = []
    for name, ledger in ledgers[1:]:
        after = grouped(ledger.categories_at_peak)
        changes = sorted(((after[g] - before[g], g) for g in GROUPS if after[g] != before[g]), key=lambda c: -abs(c[0]))
        total = ledger.reserved_bytes - base.reserved_bytes
        parts = "; ".join(f"{group} {format_bytes(change, signed=True)}" for change, group in changes)
        sentences.append(
            f"{name} against {base_name}: {format_bytes(total, signed=True)}" + (f" ({parts})" if parts else "")
        )
    return sentences


def _headline(ledger: Ledger) -> str:
    parts = [
        f"peak {format_bytes(ledger.allocated_bytes)} allocated, in the {ledger.peak_phase_name.replace('_', ' ')}"
    ]
    if ledger.reserved_bytes != ledger.allocated_bytes:
        parts.append(f"{format_bytes(ledger.reserved_bytes)} reserved")
    if ledger.context_bytes and ledger.process_bytes is not None:
        parts.append(f"{format_bytes(ledger.process_bytes)} with the CUDA context")
    engine = f" ({ledger.engine})" if ledger.engine else ""
    whose = f", each of {ledger.processes} processes{engine}" if ledger.processes > 1 else ""
    lines = [f"{ledger.source}{whose}: " + ", ".join(parts)]
    verdicts = [
        (one.fits, f"does not fit: {one.name} {_of_budget(one.needed_bytes, one.budget_bytes)}")
        for one in ledger.resources
    ]
    # after the host's memory, before the disks: the order in which a run needs them
    risk = ledger.risk
    if risk is not None:
        sizes = _of_budget(ledger.needed_bytes, ledger.budget_bytes)
        alone = "" if all(one.fits for one in ledger.resources) else "the card: "
        device = f"{risk.verdict}: {alone}{sizes}; {_chance(risk, ledger.spills)}"
        verdicts.insert(1, (ledger.fits_device, device))
    lines[:0] = [verdict for fits, verdict in verdicts if not fits]
    if risk is not None and ledger.fits_device:
        lines.insert(-1, device)
    if ledger.copied_bytes:
        lines.append(
            f"copied: {format_bytes(ledger.copied_bytes)} of activations a step, from the card to the host and back"
        )
    what = "activations, model states and their buffers" if ledger.copied_bytes else "model states and their buffers"
    for nbytes, where in ((ledger.host_bytes, "host memory"), (ledger.nvme_bytes, "on disk")):
        if nbytes:
            lines.append(f"{where}: {format_bytes(nbytes)} of {what}, for all processes of one machine")
    return "\n".join(lines)


def _of_budget(nbytes: int, budget_bytes: int | None) -> str:
    return format_bytes(nbytes) + ("" if budget_bytes is None else f" of {format_bytes(budget_bytes)}")


def _chance(risk: Risk, spills: bool) -> str:
    """`at most 1 in 30 that it runs out, from 32 measured runs with a quantized base on Turing`."""
    if risk.verdict == SPILLS:
        return "the driver moves what does not fit to the host's memory instead of failing, which slows down every step"
    return f"{risk.chance} that it {'spills' if spills else 'runs out'}, from {risk.runs}"


def _label(category: str, meaning: str = "") -> str:
    """`parameters_frozen` -> `parameters: frozen`."""
    group, _, rest = category.partition("_")
    if group in ("parameters", "activations"):
        return f"{group}: {rest.replace('_', ' ')}"
    return category.replace("_", " ")


def load_all(paths: Iterable[str]) -> list[tuple[str, Ledger]]:
    """`(name, ledger)` for each path: a ledger file, or a run folder with a `memory.json`."""
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            found.append((printable(path.resolve().name), Ledger.load(path / "memory.json")))
        else:
            name = path.resolve().parent.name if path.name == "memory.json" else path.stem
            found.append((printable(name), Ledger.load(path)))
    return found
