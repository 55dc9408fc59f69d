"""What a run does with its model beside the training steps, traced on fake tensors: it validates, answers the test split and saves.

Model, optimizer state and batch are then those of the shadow steps, which are still in memory.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from toolkit.memory import census
from toolkit.memory.recording import Recording
from toolkit.memory.resizing import resizes_seen_by
from toolkit.memory.shadow.stacks import CannotFold
from toolkit.memory.trace import Trace


def traced_beside_steps(
    trace: Trace, recording: Recording, phase: str, model: nn.Module, run: Callable[[], object]
) -> tuple[str, ...]:
    """Traces `run()` as `phase`. If it fails, the phase counts for nothing, and a sentence says why; otherwise there is none."""
    trace.enter_phase(phase)
    try:
        with trace.modules_of(model, census.head_of(model)), resizes_seen_by(trace), trace:
            run()
    except CannotFold:
        raise
    except Exception as error:  # of any kind: the training step is predicted whatever a model's generation does
        for window in recording.windows:
            if window.phase == phase:
                window.step = 0
        reason = " ".join(str(error).split())[:120]
        return (f"{phase} is not predicted for this model: {type(error).__name__}: {reason}",)
    return ()
