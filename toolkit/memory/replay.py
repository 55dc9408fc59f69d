"""What an engine offloads: it lives in the host's memory, so the card's account is told anew without it.

On a CPU, where runs are rehearsed and predicted, host and device are the same memory: only the engine knows which of its
tensors would be where. Once it has said so (`census.label_optimizer_state`), what was recorded is replayed to a fresh meter.
"""

from __future__ import annotations

from toolkit.memory.recording import Meter, Recording


def replay_without_offloaded(recording: Recording, meter: Meter) -> tuple[Recording, int]:
    """`recording` as `meter` would have counted it without the blocks that are offloaded, and their own peak, in bytes."""
    first = recording.windows[0]
    kept = Recording(meter, first.phase, first.step)
    host = peak = 0
    for window in recording.windows:
        if window is not first:
            meter.entered(window.phase, window.step)
            kept.entered(window.phase, window.step)
        for event in recording.events[window.start : window.end]:
            if event.block.offloaded:
                host += event.sign * event.block.nbytes
                peak = max(peak, host)
                continue
            for sink in (meter, kept):
                (sink.born if event.sign > 0 else sink.died)(event.block)
    return kept, peak
