"""Removes from a recording what is offloaded to host memory, so that it does not count as the card's memory.

On a CPU, where runs are rehearsed and predicted, host and device share one memory. Only the engine knows which of its
tensors would be on the host; `census.label_optimizer_state` marks them. Then the recording is replayed to a new meter.
"""

from __future__ import annotations

from toolkit.memory.recording import Meter, Recording
from toolkit.memory.trace import Allocation


def copied_bytes(recording: Recording) -> int:
    """The bytes of activations that the last recorded step copies to the host and back, both ways together."""
    last = max(window.step for window in recording.windows)
    return 2 * sum(
        event.block.nbytes
        for window in recording.windows
        if window.step == last
        for event in recording.events[window.start : window.end]
        if event.block.pinned and event.sign > 0
    )


def _on_host(block: Allocation) -> int:
    """ATen/core/CachingHostAllocator.h rounds a pinned block up to a power of two. It depends on seam "rounding of pinned memory"."""
    return 1 << (block.nbytes - 1).bit_length() if block.pinned and block.nbytes else block.nbytes


def replay_without_offloaded(recording: Recording, meter: Meter) -> tuple[Recording, int]:
    """`recording` without its offloaded blocks, as `meter` counts the rest, and the peak of the offloaded blocks in bytes."""
    first = recording.windows[0]
    kept = Recording(meter, first.phase, first.step)
    host = peak = 0
    for window in recording.windows:
        if window is not first:
            meter.entered(window.phase, window.step)
            kept.entered(window.phase, window.step)
        for event in recording.events[window.start : window.end]:
            if event.block.offloaded:
                host += event.sign * _on_host(event.block)
                peak = max(peak, host)
                continue
            for sink in (meter, kept):
                (sink.born if event.sign > 0 else sink.died)(event.block)
    return kept, peak
