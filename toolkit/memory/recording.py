"""The recording: all events of a trace, with the totals that a meter counted independently.

A meter counts bytes in its own way: `Counter` keeps a running sum, the replayed allocator counts blocks in segments, and on
a GPU PyTorch's `memory_stats` are read. The parts of a `Ledger` come from the events; they are checked against these totals.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from toolkit.memory.trace import Allocation, Sink


class Meter(Sink, Protocol):
    """A sink that counts bytes.

    `requested` is what the program asked for, `allocated` adds the allocator's rounding, and `reserved` is what the
    allocator took from the device. `take_peak` returns the largest `allocated` since its last call (at least the current
    one) and resets the peak; a recording calls it at each change of phase. `sees_all` is true if the meter counts exactly
    the blocks of the trace. The meter of a real GPU also counts buffers that no trace sees.
    """

    sees_all: bool

    @property
    def requested(self) -> int: ...

    @property
    def allocated(self) -> int: ...

    @property
    def reserved(self) -> int: ...

    def take_peak(self) -> int: ...


class Counter:
    """The meter of a device without a caching allocator: on a CPU, allocated is what was requested."""

    sees_all = True

    def __init__(self) -> None:
        self.allocated = self._peak = 0

    @property
    def requested(self) -> int:
        return self.allocated

    @property
    def reserved(self) -> int:
        return self.allocated

    def born(self, block: Allocation) -> None:
        self.allocated += block.nbytes
        self._peak = max(self._peak, self.allocated)

    def died(self, block: Allocation) -> None:
        self.allocated -= block.nbytes

    def entered(self, phase: str, step: int) -> None:
        pass

    def take_peak(self) -> int:
        peak, self._peak = self._peak, self.allocated
        return peak


class Event(NamedTuple):
    """A block is born (`sign` 1) or dies (-1), with the meter's totals after it, in bytes."""

    block: Allocation
    sign: int
    requested: int
    allocated: int
    reserved: int


@dataclass
class Window:
    """A stretch of one phase: events `start` (inclusive) to `end` (exclusive), and the meter's peak over it.

    `step` counts from 1. It is 0 before the first step, and in a step that was discounted.
    """

    phase: str
    step: int
    start: int
    end: int
    allocated_peak: int
    before: tuple[int, int, int]  # requested, allocated, reserved when it began
    after: tuple[int, int, int]


class Recording:
    """A sink that keeps every event. Among the trace's sinks, `meter` must come before it."""

    def __init__(self, meter: Meter, phase: str = "load", step: int = 0):
        self.meter = meter
        self.events: list[Event] = []
        self.windows: list[Window] = []
        self._open(phase, step)

    def born(self, block: Allocation) -> None:
        self.events.append(Event(block, 1, *self._totals()))

    def died(self, block: Allocation) -> None:
        self.events.append(Event(block, -1, *self._totals()))

    def entered(self, phase: str, step: int) -> None:
        self.close()
        self._open(phase, step)

    def discount(self, step: int) -> None:
        """Excludes `step` from the ledger's phases, because it updated nothing; its events stay in the timeline."""
        for window in self.windows:
            if window.step == step:
                window.step = 0

    def close(self) -> None:
        """Ends the open window. A second call moves the end of that window to the current event."""
        window = self.windows[-1]
        window.allocated_peak = max(window.allocated_peak, self.meter.take_peak())
        window.end, window.after = len(self.events), self._totals()

    def _open(self, phase: str, step: int) -> None:
        totals = self._totals()
        self.windows.append(Window(phase, step, len(self.events), len(self.events), totals[1], totals, totals))

    def _totals(self) -> tuple[int, int, int]:
        return self.meter.requested, self.meter.allocated, self.meter.reserved


def category_of(block: Allocation) -> str:
    """The category of `block`: its label or, without a label, the category that its lifetime shows.

    A block that is born while the autograd graph is built, and outlives that segment (the forward pass, or one checkpoint's
    recomputation), is an activation: it is kept for the backward pass. Every other block is a temporary.
    """
    if block.category is not None:
        return block.category
    if not block.builds_graph or block.died_in_segment == block.segment:
        return "temporaries"
    return "activations_logits_loss" if block.at_head else "activations_saved"
