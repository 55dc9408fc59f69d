"""Shows the progress of training on rank 0: a live line in a terminal, plain lines otherwise."""

import time
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from toolkit.console import console, is_main, labelled


class ProgressCallback(TrainerCallback):
    """Steps, loss, tokens/s (real tokens of all ranks, padding not counted) and time left."""

    def __init__(self) -> None:
        self.bar: Progress | None = None
        self.began = self.first_tokens = self.first_step = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.began, self.first_tokens, self.first_step = (
            time.monotonic(),
            state.num_input_tokens_seen,
            state.global_step,
        )
        if console.is_terminal and is_main:
            columns = (
                TextColumn("[bold]training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}", markup=False),
            )
            self.bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
            self.bar.start()
            self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, note="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or not ("loss" in logs or "eval_loss" in logs):
            return
        seconds = time.monotonic() - self.began
        rate = (state.num_input_tokens_seen - self.first_tokens) / seconds
        done = state.global_step - self.first_step
        left = seconds / done * (state.max_steps - state.global_step) if done else 0.0
        parts = [f"{'loss' if 'loss' in logs else 'validation loss'} {logs.get('loss', logs.get('eval_loss')):.4f}"]
        if "loss" in logs:
            parts.append(f"{rate:,.0f} tokens/s")
        note = ", ".join(parts)
        if self.bar:
            self.bar.update(self.task, note=note)
            if "eval_loss" in logs:
                self.bar.console.print(labelled("step", f"{state.global_step}: {note}"))
        else:
            console.print(labelled("step", f"{state.global_step}/{state.max_steps}  {note}, {left:.0f} s left"))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.abort()

    def abort(self) -> None:
        """Ends the live line, also after an error in training."""
        if self.bar:
            self.bar.stop()
            self.bar = None
