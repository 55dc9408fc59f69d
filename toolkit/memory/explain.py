"""The difference of two predictions in sentences: how much, in which phase, and for each category where and why.

This module only renders: every figure comes from the ledgers. A reason is something that they say of their runs and that differs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from toolkit.distributed.engine import EngineKind
from toolkit.memory.difference import Part
from toolkit.memory.ledger import CATEGORIES, Ledger
from toolkit.memory.report import assumptions
from toolkit.units import format_bytes

LEAST_SHARE = 0.01  # of the larger total: smaller changes share a line
MOST = 8  # categories with a line of their own
MOST_MODULES = 3  # named of a category
NAMES = CATEGORIES | {"context": "the CUDA context"}
ALLOCATOR = ("allocator_slack", "cached_unused", "context")  # in lines of their own, after the rest

_OF_TRAINED = ("parameters_trainable", "gradients", "optimizer_state")
_STATES = ("parameters_frozen", "parameters_quantization_state", *_OF_TRAINED)
# Of these the module is known, unless an engine keeps those of all modules in one buffer. Optimizer state is made outside of modules.
_PLACED = ("parameters_frozen", "parameters_trainable", "parameters_quantization_state", "gradients")
_ACTIVATIONS = ("activations_saved", "activations_logits_loss", "temporaries")
_OF_BATCH = (*_ACTIVATIONS, "inputs")


def _frozen(ledger: Ledger) -> int:
    return ledger.parameters["all"] - ledger.parameters["trainable"]


def _assumed(name: str) -> Callable[[Ledger], Any]:
    return lambda ledger: ledger.assumed.get(name)


def _setting(name: str) -> Callable[[Ledger], Any]:
    return lambda ledger: ledger.config.get(name, "its default")


def processes_of(ledger: Ledger) -> str:
    """`one process`, or with its engine `ZeRO-3 on 2 processes`."""
    if ledger.engine in (None, str(EngineKind.NONE)):
        return "one process"
    return f"{ledger.engine} on {ledger.processes} process{'es' if ledger.processes > 1 else ''}"


def _phase(ledger: Ledger) -> str:
    return ledger.peak_phase_name.replace("_", " ")


# What decides the bytes of some categories: these, its value in a ledger (None: unknown, or it decides nothing here), and how a
# change of it is said.
Fact = tuple[Sequence[str], Callable[[Ledger], Any], str]
FACTS: tuple[Fact, ...] = (
    (("parameters_frozen",), _frozen, "{after:,} instead of {before:,} parameters are frozen"),
    (_OF_TRAINED, lambda ledger: ledger.parameters["trainable"], "{after:,} instead of {before:,} parameters train"),
    (
        ("parameters_frozen", "parameters_quantization_state"),
        lambda ledger: ledger.assumed.get("weights") if _frozen(ledger) else None,
        "the weights are {after} (in A: {before})",
    ),
    (
        _OF_TRAINED,
        lambda ledger: None if _frozen(ledger) else ledger.assumed.get("weights"),
        "the weights are {after} (in A: {before})",
    ),
    (("optimizer_state",), _setting("optim"), "{after} instead of {before}"),
    (("gradients",), _setting("optimizer_in_backward"), "--optimizer_in_backward {after} instead of {before}"),
    (_ACTIVATIONS, _setting("model_name_or_path"), "another model"),
    (_OF_BATCH, _assumed("rows"), "{after:,} instead of {before:,} rows"),
    (_OF_BATCH, _assumed("tokens"), "rows of {after:,} instead of {before:,} tokens"),
    (_OF_BATCH, _assumed("target_tokens"), "targets of {after:,} instead of {before:,} tokens"),
    (_ACTIVATIONS, _assumed("precision"), "{after} instead of {before}"),
    (
        ("activations_saved",),
        lambda ledger: f"{'' if ledger.assumed.get('gradient_checkpointing') else 'no '}activation checkpointing",
        "{after}",
    ),
    (_ACTIVATIONS, _setting("attn_implementation"), "--attn_implementation {after} instead of {before}"),
    (
        ("activations_logits_loss", "temporaries"),
        _setting("loss_chunk_tokens"),
        "--loss_chunk_tokens {after} instead of {before}",
    ),
    (
        ("activations_saved", "temporaries"),
        _setting("mlp_tile_tokens"),
        "--mlp_tile_tokens {after} instead of {before}",
    ),
    (
        ("activations_saved",),
        lambda ledger: format_bytes(ledger.copied_bytes),
        "{after} instead of {before} copied to the host and back",
    ),
    (
        _STATES,
        lambda ledger: None if ledger.copied_bytes else format_bytes(ledger.host_bytes + ledger.nvme_bytes),
        "{after} instead of {before} offloaded, by all processes of a machine",
    ),
    ((*_STATES, "communication"), processes_of, "{after} instead of {before}"),
    ((*ALLOCATOR, "workspaces"), lambda ledger: ledger.device, "{after} instead of {before}"),
    ((*_ACTIVATIONS, "gradients"), _phase, "at a peak in the {after} instead of the {before}"),
)


def print_difference(console: Console, before: Ledger, after: Ledger, changed: Sequence[str]) -> None:
    """Prints by how much the memory of run B (`after`) differs from that of run A, and what causes it, largest change first.

    `changed` describes each setting that differs.
    """
    console.print(_headline(before, after))
    for name, ledger in (("A", before), ("B", after)):
        for resource in (one for one in ledger.resources if not one.fits):
            there = format_bytes(resource.budget_bytes or 0)
            console.print(
                f"{name} needs {format_bytes(resource.needed_bytes)} of {resource.name}, and there are {there}."
            )
    if len(changed) == 1 and before.needed_bytes != after.needed_bytes:
        console.print(f"All of it comes from {changed[0]}.")
    elif changed:
        console.print(f"B differs from A in: {'; '.join(changed)}.")
    one, other = _phase(before), _phase(after)
    console.print(f"Both peak in the {one}." if one == other else f"A peaks in the {one}, B in the {other}.")
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    for change, text in lines(before, after):
        table.add_row(format_bytes(change, signed=True), text)
    if table.row_count:
        table.add_row(format_bytes(after.needed_bytes - before.needed_bytes, signed=True), "in all", style="bold")
        console.print("", table, "", sep="\n")
    others = {resource.name: resource for resource in before.resources}
    for resource in after.resources:
        needed = others[resource.name].needed_bytes if resource.name in others else 0
        if resource.needed_bytes != needed:
            console.print(f"{resource.name}: {format_bytes(resource.needed_bytes)} instead of {format_bytes(needed)}")
    for warning, whose in _of_each(before.warnings, after.warnings):
        console.print(f"{whose}{': ' if whose else ''}{warning}")
    for assumed, whose in _of_each(*([assumptions(one.assumed)] if one.assumed else [] for one in (before, after))):
        console.print(f"assumed{f' for {whose}' if whose else ''}: {assumed}")
    for note, whose in _of_each(before.notes, after.notes):
        console.print(f"note{f' on {whose}' if whose else ''}: {note}")


def _of_each(before: Sequence[str], after: Sequence[str]) -> list[tuple[str, str]]:
    """Each text once, with `A` or `B` if only that run has it."""
    return [
        (text, "" if text in before and text in after else "A" if text in before else "B")
        for text in dict.fromkeys([*before, *after])
    ]


def lines(before: Ledger, after: Ledger) -> list[tuple[int, str]]:
    """What causes the difference: (bytes more, sentence), the largest first. The bytes add up to the difference of `needed_bytes`.

    Small changes and those after the first `MOST` categories are one line, followed by those of allocator and CUDA context.
    """
    parts = before.difference(after).parts
    least = LEAST_SHARE * max(before.needed_bytes, after.needed_bytes)
    large = [part for part in parts if part.category not in ALLOCATOR and abs(part.change_bytes) >= least][:MOST]
    last = [part for part in parts if part.category in ALLOCATOR]
    rest = sum(part.change_bytes for part in parts if part not in large and part not in last)

    def line(part: Part) -> tuple[int, str]:
        amounts = f"{format_bytes(part.after_bytes)} instead of {format_bytes(part.before_bytes)}"
        return part.change_bytes, "; ".join((f"{NAMES[part.category]}: {amounts}", *_why(part, before, after)))

    others = [(rest, "all other categories")] if rest else []
    return [*map(line, large), *others, *map(line, last)]


def _why(part: Part, before: Ledger, after: Ledger) -> list[str]:
    """Where the bytes of `part` differ, and which facts that decide them do."""
    found = [where] if (where := _where(part, before, after)) else []
    for categories, value, text in FACTS:
        one, other = value(before), value(after)
        if part.category in categories and None not in (one, other) and one != other:
            found.append(text.format(before=one, after=other))
    return found


def _where(part: Part, before: Ledger, after: Ledger) -> str:
    """The modules with most of the change of `part`: `in model.layers.*: mlp +4.50 GiB, self_attn +2.52 GiB`."""
    one_process = {processes_of(before), processes_of(after)} == {"one process"}
    if part.category not in (_ACTIVATIONS + _PLACED if one_process else _ACTIVATIONS):
        return ""
    path, children = "", _children(part.modules, "")
    while True:
        name, change = max(children.items(), key=lambda child: abs(child[1]))
        if name == path or not 0.9 <= change / part.change_bytes <= 1.1:
            break
        path, children = name, _children(part.modules, name)
    named = [one for one in children.items() if abs(one[1]) >= 0.1 * abs(part.change_bytes)]
    named = sorted(named, key=lambda child: -abs(child[1]))[:MOST_MODULES]
    if [name for name, _ in named] == [path]:
        return f"in {path}" if path else ""
    below = ", ".join(
        f"{name.removeprefix(path).lstrip('.') or 'itself'} {format_bytes(change, signed=True)}"
        for name, change in named
    )
    return f"in {path}: {below}" if path else f"in {below}"


def _children(modules: Mapping[str, int], path: str) -> Counter[str]:
    """Bytes of each module directly below `path`, with all below it, and of `path` itself."""
    found: Counter[str] = Counter()
    for module, nbytes in modules.items():
        if module == path:
            found[path] += nbytes
        elif not path or module.startswith(f"{path}."):
            rest = module[len(path) + 1 :] if path else module
            found[f"{path}.{rest.split('.')[0]}".lstrip(".")] += nbytes
    return found


def _headline(before: Ledger, after: Ledger) -> str:
    """The difference, both totals and whether they fit: `B needs 3.10 GiB less than A: 6.90 GiB instead of 10.00 GiB on RTX 4090.`"""
    change = after.needed_bytes - before.needed_bytes
    amounts = [format_bytes(ledger.needed_bytes) for ledger in (after, before)]
    same_device = before.device == after.device
    if not same_device:
        amounts = [f"{size} on {ledger.device}" for size, ledger in zip(amounts, (after, before), strict=True)]
    much = f"{format_bytes(abs(change))} {'more' if change > 0 else 'less'} than" if change else "exactly as much as"
    totals = f"{amounts[0]} instead of {amounts[1]}" if change or not same_device else amounts[0]
    return f"B needs {much} A: {totals}{f' on {before.device}' if same_device else ''}.{_verdict(before, after)}"


def _verdict(before: Ledger, after: Ledger) -> str:
    budget = before.budget_bytes
    if budget is not None and budget == after.budget_bytes:
        if before.fits_device == after.fits_device:
            return f" {'Both fit' if after.fits_device else 'Neither fits'} into {format_bytes(budget)}."
        fits, other = "AB" if before.fits_device else "BA"
        return f" {fits} fits into {format_bytes(budget)}, {other} does not."
    said = [
        f"{name} {'fits' if ledger.fits_device else 'does not fit'} into {format_bytes(ledger.budget_bytes)}"
        for name, ledger in (("A", before), ("B", after))
        if ledger.budget_bytes is not None
    ]
    return f" {', '.join(said)}." if said else ""
