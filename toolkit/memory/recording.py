"""The recording: what a trace said, event by event, with the totals that a meter counted independently of it.

A meter counts bytes by means of its own (`Counter`: a running sum; the allocator's replay: blocks of segments; on a
GPU: PyTorch's `memory_stats`). A recording keeps both, so that a `Ledger`, whose parts come from the events, can be
held against totals that do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from toolkit.memory.trace import Allocation, Sink


class Meter(Sink, Protocol):
    """A sink that counts. All in bytes.

    `requested` is what the program asked for, `allocated` adds the allocator's rounding, `reserved` what the allocator
    took from the device. `take_peak` gives the greatest `allocated` since it was last called (at least the present
    one), and starts anew: a recording calls it at each change of phase. `sees_all` says whether the meter counts
    exactly the blocks that it is told of; a real GPU's also counts buffers that no trace sees.
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
    """The meter of a device without a caching allocator: a CPU's allocations are what was asked for."""

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
    """A block is born (`sign` 1) or dies (-1); the totals are the meter's, after it. Bytes."""

    block: Allocation
    sign: int
    requested: int
    allocated: int
    reserved: int


@dataclass
class Window:
    """A stretch of one phase: events `start` (inclusive) to `end` (exclusive), and the meter's peak over it.

    `step` counts from 1; 0 is before the first, or in one that does not count.
    """

    phase: str
    step: int
    start: int
    end: int
    allocated_peak: int
    before: tuple[int, int, int]  # requested, allocated, reserved when it began
    after: tuple[int, int, int]


class Recording:
    """A sink that keeps every event. `meter` must stand before it among the trace's sinks."""

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
        """The windows of `step` are those of none: what they held stays in the timeline alone."""
        for window in self.windows:
            if window.step == step:
                window.step = 0

    def close(self) -> None:
        """Ends the window that is open; called again, it moves that window's end to the present."""
        window = self.windows[-1]
        window.allocated_peak = max(window.allocated_peak, self.meter.take_peak())
        window.end, window.after = len(self.events), self._totals()

    def _open(self, phase: str, step: int) -> None:
        totals = self._totals()
        self.windows.append(Window(phase, step, len(self.events), len(self.events), totals[1], totals, totals))

    def _totals(self) -> tuple[int, int, int]:
        return self.meter.requested, self.meter.allocated, self.meter.reserved


def category_of(block: Allocation) -> str:
    """The category of `block`: the one it was labelled with, else the one that its life shows.

    What is born while the autograd graph is built, and outlives that stretch of the pass (the forward pass, or one
    checkpoint's recomputation), is kept for the backward pass: an activation. Everything else is a temporary.
    """
    if block.category is not None:
        return block.category
    if not block.builds_graph or block.died_in_segment == block.segment:
        return "temporaries"
    return "activations_logits_loss" if block.at_head else "activations_saved"
