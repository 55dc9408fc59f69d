"""The peak of a step that is not traced, beside those that are."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class Untraced(TrainerCallback):
    """Of the second step after those that `memory` traces: what the allocator holds at its peak, without the trace.

    The second, because rows are long and short in turn: where a batch is one row, it is like the last that was traced.
    Then training ends. A step that fp16 skipped, as it overflowed, does not count.
    """

    def __init__(self, it: Any, memory: Any) -> None:
        self.it, self.memory = it, memory
        self.after = 0  # steps begun since the last that was traced
        self.step: int | None = None  # the number of the one that was measured
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
