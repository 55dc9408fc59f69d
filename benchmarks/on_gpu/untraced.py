"""Measures the peak of a step without the trace, for comparison with traced steps."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class Untraced(TrainerCallback):
    """Measures the allocator's peak in the second step after those that `memory` traces, then ends training.

    It is the second step because long and short rows alternate: with one row per batch, it is like the last traced step. A step
    that fp16 skips because of an overflow does not count.
    """

    def __init__(self, it: Any, memory: Any) -> None:
        self.it, self.memory = it, memory
        self.after = 0  # steps started since the last traced one
        self.step: int | None = None  # the number of the measured step
        self.allocated_bytes: int | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.memory.ledger is not None or self.memory.problem is not None:
            self.after += 1
            self.it.wait()
            self.it.reset()

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if self.after and self.after % 2 == 0 and not getattr(optimizer, "step_was_skipped", False):
            self.it.wait()
            self.step, self.allocated_bytes = state.global_step, self.it.peaks()[0]
            control.should_training_stop = True
