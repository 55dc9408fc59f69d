"""The Ledger: bytes by phase, category and module at each phase's peak, predicted by a shadow step or measured in a real run.

Its cells must add up to the totals that a meter counted independently. If they do not, there is no ledger (`LedgerError`).
Reports and comparisons treat predicted and measured ledgers alike.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from toolkit.errors import UserError
from toolkit.errors.reading import check_shape, read_json
from toolkit.memory import resources
from toolkit.memory.difference import Difference
from toolkit.memory.recording import Recording, Window, category_of
from toolkit.memory.risk import Risk, risk
from toolkit.memory.trace import PHASES

SCHEMA_VERSION = 1
BESIDE_STEPS = ("evaluation", "scoring", "saving")  # phases in which a run does not train; only predictions have them

# Disjoint, in the order in which they are shown.
CATEGORIES = {
    "parameters_frozen": "weights that do not train",
    "parameters_trainable": "weights that train",
    "parameters_quantization_state": "scales and tables of quantized weights",
    "buffers": "tensors of modules and libraries that are not weights",
    "gradients": "gradients of trainable weights",
    "optimizer_state": "the optimizer's moments and scales",
    "activations_saved": "activations kept for the backward pass",
    "activations_logits_loss": "activations of the logits and the loss, kept as well",
    "inputs": "the batch: ids, masks, labels",
    "temporaries": "results that live within one pass, gradients of activations among them",
    "communication": "buckets of gradients and gathered weights, which processes send each other",
    "workspaces": "buffers that libraries and kernels take unseen",
    "allocator_slack": "the allocator's rounding of each block",
    "cached_unused": "what the allocator reserves and has free at the peak",
}

Cells = dict[str, dict[str, int]]  # category -> module -> bytes
_USES = {
    str: {"allocated_peak_bytes": int, "allocated_end_bytes": int, "cells": {str: {str: int}}},
}
SHAPE = {  # of `to_json`, as `check_shape` takes it
    "source": str,
    "device": str,
    "phases": _USES,
    "first_step": _USES,
    "peak": {"reserved_bytes": int, "context_bytes": (int, None)},
    "parameters": {"trainable": int, "all": int},
    "stack": {str: (str, None)},
    "config": dict,
    "timeline": [[(str, int)]],
    "budget_bytes": (int, None),
    "seconds": float,
    "notes": [str],
    "warnings?": [str],
    "processes?": int,
    "engine?": (str, None),
    "host_bytes?": int,
    "copied_bytes?": int,
    "nvme_bytes?": int,
    "resources?": [resources.SHAPE | {"needed_bytes": int}],
    "error_group?": [str],
    "spills?": bool,
}


class LedgerError(AssertionError):
    """The parts do not add up to the total that was counted independently: a bug in the trace, not a user's mistake."""


@dataclass(frozen=True)
class PhaseUse:
    """One phase: the bytes allocated at its peak, which `cells` breaks down, and at its end."""

    allocated_peak_bytes: int
    allocated_end_bytes: int
    cells: Cells = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = self.cells.keys() - CATEGORIES.keys()
        if unknown:
            raise LedgerError(f"unknown categories {sorted(unknown)}")
        parts = sum(sum(modules.values()) for modules in self.cells.values())
        if parts != self.allocated_peak_bytes:
            raise LedgerError(f"the parts are {parts:,} bytes, the peak is {self.allocated_peak_bytes:,} bytes")

    @property
    def categories(self) -> dict[str, int]:
        """Bytes at this phase's peak for every category, including those with 0 bytes."""
        return {category: sum(self.cells.get(category, {}).values()) for category in CATEGORIES}


@dataclass(frozen=True)
class Ledger:
    """Memory of one training run on one device, in bytes; `parameters` counts elements.

    `phases` holds loading, the steady step (the last step recorded) and those of `BESIDE_STEPS` that the run has. `first_step`
    holds the first step, in which the optimizer state appears. `timeline` has rows (phase, step, allocated, reserved), each the largest of its interval.
    """

    source: str  # "predicted" or "measured"
    device: str
    phases: Mapping[str, PhaseUse]
    first_step: Mapping[str, PhaseUse]
    reserved_bytes: int
    parameters: Mapping[str, int]  # {"trainable", "all"}
    stack: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    timeline: tuple[tuple[str, int, int, int], ...] = ()
    context_bytes: int | None = None  # taken by the driver and by libraries outside PyTorch; None on a CPU
    budget_bytes: int | None = None
    seconds: float = 0.0
    notes: tuple[str, ...] = ()  # how far the figures can be trusted
    warnings: tuple[str, ...] = ()  # what to know before the figures, and what would fit
    assumed: Mapping[str, Any] = field(default_factory=dict)  # the batch, the precision and the data of a prediction
    processes: int = 1  # of the run; the ledger describes one of them
    engine: str | None = None  # "ZeRO-3"; None: unknown
    host_bytes: int = 0  # offloaded to the memory of one machine, by all of its processes
    copied_bytes: int = 0  # of activations, between card and host memory in one step of one process, both ways together
    nvme_bytes: int = 0  # offloaded to the disks of one machine, by all of its processes
    resources: tuple[resources.Resource, ...] = ()  # the host's memory and disks of one machine; predicted only
    error_group: tuple[str, ...] = ()  # of a prediction, as `risk` takes it: method, architecture, attention
    spills: bool = False  # whether the driver moves to the host what is beyond the budget, instead of failing

    def __post_init__(self) -> None:
        if self.source not in ("predicted", "measured"):
            raise LedgerError(f"source is {self.source!r}")
        if self.reserved_bytes < self.allocated_bytes:
            raise LedgerError(f"reserved {self.reserved_bytes:,} bytes < allocated {self.allocated_bytes:,} bytes")

    @property
    def peak_phase(self) -> PhaseUse:
        """The phase with the highest peak, among `phases` and the first step."""
        return self._peak()[1]

    @property
    def peak_phase_name(self) -> str:
        """The name of `peak_phase`, one of `PHASES` or `BESIDE_STEPS`."""
        return self._peak()[0]

    @property
    def allocated_bytes(self) -> int:
        """Bytes allocated at the peak, for tensors and workspaces."""
        return self.peak_phase.allocated_peak_bytes

    @property
    def process_bytes(self) -> int | None:
        """Bytes that the process occupies on the device: reserved plus context. None if the context is unknown."""
        return None if self.context_bytes is None else self.reserved_bytes + self.context_bytes

    @property
    def categories_at_peak(self) -> dict[str, int]:
        """Bytes by category at the peak. With `cached_unused` they add up to `reserved_bytes`."""
        return self.peak_phase.categories | {"cached_unused": self.reserved_bytes - self.allocated_bytes}

    @property
    def fits(self) -> bool:
        """Whether nothing runs out: the device, the host's memory and the disks; what has no budget does not."""
        return self.fits_device and all(resource.fits for resource in self.resources)

    @property
    def fits_device(self) -> bool:
        """Whether `needed_bytes` is within the budget; true without a budget."""
        return self.budget_bytes is None or self.needed_bytes <= self.budget_bytes

    @property
    def risk(self) -> Risk | None:
        """The chance that the run takes more than the budget; None without one, as on a CPU and of measured runs."""
        if self.budget_bytes is None:
            return None
        return risk(self.needed_bytes, self.budget_bytes, self.error_group, self.spills)

    @property
    def needed_bytes(self) -> int:
        """Bytes that the device must have free: `process_bytes`, or `reserved_bytes` if the context is unknown."""
        return self.reserved_bytes if self.process_bytes is None else self.process_bytes

    def difference(self, other: Ledger) -> Difference:
        """How many bytes more `other` needs (fewer: negative), by category and module, each at its own peak.

        The parts, among them `"context"`, add up exactly to the difference of `needed_bytes`.
        """
        return Difference.of(self._needed_cells(), other._needed_cells())

    def _needed_cells(self) -> Cells:
        beyond = {"cached_unused": self.reserved_bytes - self.allocated_bytes, "context": self.context_bytes or 0}
        return {**self.peak_phase.cells, **{category: {"": nbytes} for category, nbytes in beyond.items()}}

    def _peak(self) -> tuple[str, PhaseUse]:
        both = [*self.phases.items(), *self.first_step.items()]
        return max(both, key=lambda item: item[1].allocated_peak_bytes)

    # ---- JSON

    def to_json(self) -> dict[str, Any]:
        """A plain object with all fields and the figures derived from them."""
        return {
            "schema_version": SCHEMA_VERSION,
            "source": self.source,
            "device": self.device,
            "stack": dict(self.stack),
            "config": dict(self.config),
            "assumed": dict(self.assumed),
            "peak": {
                "allocated_bytes": self.allocated_bytes,
                "reserved_bytes": self.reserved_bytes,
                "process_bytes": self.process_bytes,
                "context_bytes": self.context_bytes,
                "phase": self.peak_phase_name,
            },
            "phases": {name: asdict(use) for name, use in self.phases.items()},
            "first_step": {name: asdict(use) for name, use in self.first_step.items()},
            "categories_at_peak": self.categories_at_peak,
            "parameters": dict(self.parameters),
            "budget_bytes": self.budget_bytes,
            "fits": self.fits,
            "risk": self.risk.to_json() if self.risk else None,
            "error_group": list(self.error_group),
            "spills": self.spills,
            "processes": self.processes,
            "engine": self.engine,
            "host_bytes": self.host_bytes,
            "copied_bytes": self.copied_bytes,
            "nvme_bytes": self.nvme_bytes,
            "resources": [resource.to_json() for resource in self.resources],
            "seconds": round(self.seconds, 3),
            "warnings": list(self.warnings),
            "notes": list(self.notes),
            "timeline": [list(row) for row in self.timeline],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Ledger:
        """The ledger that `to_json` wrote.

        Raises:
            UserError: if `data` has another schema version or is no ledger.
            LedgerError: if its parts do not add up.
        """
        if data.get("schema_version") != SCHEMA_VERSION:
            got = data.get("schema_version", "none")
            raise UserError(f"the ledger has schema version {got}; this version of footprint reads {SCHEMA_VERSION}")
        try:
            return cls(
                source=data["source"],
                device=data["device"],
                phases={name: PhaseUse(**use) for name, use in data["phases"].items()},
                first_step={name: PhaseUse(**use) for name, use in data["first_step"].items()},
                reserved_bytes=data["peak"]["reserved_bytes"],
                parameters=data["parameters"],
                stack=data["stack"],
                config=data["config"],
                timeline=tuple((phase, step, a, r) for phase, step, a, r in data["timeline"]),
                context_bytes=data["peak"]["context_bytes"],
                budget_bytes=data["budget_bytes"],
                seconds=data["seconds"],
                notes=tuple(data["notes"]),
                warnings=tuple(data.get("warnings", ())),
                assumed=data.get("assumed", {}),
                processes=data.get("processes", 1),
                engine=data.get("engine"),
                host_bytes=data.get("host_bytes", 0),
                copied_bytes=data.get("copied_bytes", 0),
                nvme_bytes=data.get("nvme_bytes", 0),
                resources=tuple(map(resources.Resource.from_json, data.get("resources", ()))),
                error_group=tuple(data.get("error_group", ())),
                spills=data.get("spills", False),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"not a ledger: {type(error).__name__} {error}") from error

    def to_text(self) -> str:
        """The content of the file that `save` writes."""
        return json.dumps(self.to_json(), indent=1) + "\n"

    def save(self, path: str | Path) -> None:
        """Writes the ledger as JSON."""
        Path(path).write_text(self.to_text(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Ledger:
        """Reads a ledger that `save` wrote. Raises `UserError` if the file is missing or is no ledger."""
        path = Path(path)
        if not path.exists():
            raise UserError(
                f"there is no ledger {path}; give the folder of a run whose memory was measured, or a ledger file"
            )
        what, remedy = f"cannot read ledger {path}", "give a ledger that footprint wrote"
        data = read_json(path, what, remedy)
        if data.get("schema_version") == SCHEMA_VERSION:
            check_shape(data, SHAPE, what, remedy)
            if (wrong := _impossible(data)) is not None:
                raise UserError(f"{what}: {wrong} is no number of bytes or processes; {remedy}")
        try:
            return cls.from_json(data)
        except LedgerError as error:
            raise UserError(f"{what}: {error}; {remedy}") from None


def _impossible(content: Any, name: str = "ledger") -> str | None:
    """`NAME: NUMBER` of the first number outside of the config that is negative or beyond all memory; None without one."""
    if isinstance(content, int | float):
        return None if 0 <= content < 2**60 else f"{name}: {content:g}"
    pairs: Iterable[tuple[str, Any]] = ()
    if isinstance(content, dict):
        pairs = content.items()
    elif isinstance(content, list):
        pairs = ((name, one) for one in content)
    return next((found for key, one in pairs if key != "config" and (found := _impossible(one, key))), None)


def ledger_of(recording: Recording, timeline_rows: int = 400, **about: Any) -> Ledger:
    """The ledger of a recording. `about` gives the other fields of `Ledger`: `source`, `device`, `parameters`, ...

    Raises:
        LedgerError: if the events' bytes do not add up to the meter's totals.
    """
    recording.close()
    steps = sorted({window.step for window in recording.windows if window.step})
    peaks = {id(window): _peak_index(recording, window) for window in recording.windows}
    cells = _compositions(recording, sorted(set(peaks.values())))

    def use(phase: str, step: int) -> PhaseUse | None:
        windows = [w for w in recording.windows if (w.phase, w.step) == (phase, step)]
        if not windows:
            return None
        top = max(windows, key=lambda window: window.allocated_peak)
        totals = _totals_at(recording, top, peaks[id(top)])
        parts = _complete(cells[peaks[id(top)]], totals, top.allocated_peak, recording.meter.sees_all)
        return PhaseUse(top.allocated_peak, windows[-1].after[1], parts)

    def uses(names: Iterable[str], step: int) -> dict[str, PhaseUse]:
        found = {phase: use(phase, step) for phase in names}
        return {phase: one for phase, one in found.items() if one is not None}

    in_step = [phase for phase in (*PHASES, *BESIDE_STEPS) if phase != "load"]
    reserved = [event.reserved for event in recording.events] + [w.after[2] for w in recording.windows]
    allocated = max((w.allocated_peak for w in recording.windows), default=0)
    return Ledger(
        phases=uses(["load"], 0) | (uses(in_step, steps[-1]) if steps else {}),
        first_step=uses(in_step, steps[0]) if steps else {},
        reserved_bytes=max([allocated, *reserved]),
        timeline=_timeline(recording, timeline_rows),
        **about,
    )


def _peak_index(recording: Recording, window: Window) -> int:
    """The index of the birth after which `window` holds the most; `window.start - 1` if it holds the most at its start.

    Of several equal ones, the last: adopting a block does not change a GPU's total, and every adopted block must be counted.
    """
    best, top = window.start - 1, window.before[1]
    for index in range(window.start, window.end):
        event = recording.events[index]
        if event.sign > 0 and event.allocated >= top:
            best, top = index, event.allocated
    return best


def _compositions(recording: Recording, indices: list[int]) -> dict[int, Cells]:
    """The bytes alive after each of the events `indices` (ascending): category -> module -> bytes."""
    alive: Counter[tuple[str, str]] = Counter()
    result: dict[int, Cells] = {}
    at = -1
    for wanted in indices:
        while at < wanted:
            at += 1
            block, sign = recording.events[at].block, recording.events[at].sign
            alive[category_of(block), folded(block.module)] += sign * block.nbytes
        cells: defaultdict[str, dict[str, int]] = defaultdict(dict)
        for (category, module), nbytes in alive.items():
            if nbytes < 0:
                raise LedgerError(f"{category} of {module or 'the model'} is {nbytes:,} bytes")
            if nbytes:
                cells[category][module] = nbytes
        result[wanted] = dict(cells)
    return result


def _totals_at(recording: Recording, window: Window, index: int) -> tuple[int, int]:
    """Requested and allocated bytes after event `index` of `window`."""
    if index < window.start:
        return window.before[0], window.before[1]
    event = recording.events[index]
    return event.requested, event.allocated


def _complete(cells: Cells, totals: tuple[int, int], allocated_peak: int, sees_all: bool) -> Cells:
    """Adds what only the meter counts: the allocator's rounding and, on a real GPU, buffers inside kernels."""
    requested, allocated = totals
    unseen = requested - sum(sum(modules.values()) for modules in cells.values()) + allocated_peak - allocated
    slack = allocated - requested
    if unseen < 0 or slack < 0 or (unseen and sees_all):
        raise LedgerError(f"the parts differ from the meter's total by {unseen:,} bytes, slack {slack:,} bytes")
    cells = {category: dict(modules) for category, modules in cells.items()}
    for category, nbytes in (("workspaces", unseen), ("allocator_slack", slack)):
        if nbytes:
            cells.setdefault(category, {})
            cells[category][""] = cells[category].get("", 0) + nbytes
    return cells


def _timeline(recording: Recording, rows: int) -> tuple[tuple[str, int, int, int], ...]:
    """About `rows` rows, each the event with the most bytes allocated in its interval, so that all peaks are kept."""
    total = max(1, len(recording.events))
    result = []
    for window in recording.windows:
        count = max(1, round(rows * (window.end - window.start) / total))
        length = max(1, -(-(window.end - window.start) // count))
        for start in range(window.start, window.end, length):
            top = max(recording.events[start : min(start + length, window.end)], key=lambda event: event.allocated)
            result.append((window.phase, window.step, top.allocated, top.reserved))
    return tuple(result)


_LAYER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def folded(module: str) -> str:
    """`model.layers.17.mlp` -> `model.layers.*.mlp`, so that repeated layers share a row."""
    return _LAYER.sub("*", module)
