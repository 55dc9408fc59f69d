"""Trainer callbacks: a checkpoint and a clean exit after SIGTERM or Ctrl-C, what a resumed run takes over, and metrics.jsonl."""

import json
import math
import time
from pathlib import Path
from typing import Any

from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from toolkit.console import say
from toolkit.distributed.ranks import SIGNALS, Preempted, RollCall, interruption
from toolkit.errors.reading import check_regular
from toolkit.files import atomic_write
from toolkit.training.checkpoints import best_of, readable_write_errors


class Preemption(TrainerCallback):
    """After SIGTERM or Ctrl-C on any rank, all ranks finish the step, save a checkpoint, and exit with code 143 or 130.

    Trainer's own --enable_jit_checkpoint saves when each rank's own timer expires. Then ranks wait for each other in
    different steps, and a checkpoint may fall between accumulated batches, which the resumed run would lose.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.leaving = 0  # the signal
        self.ranks = RollCall(args.device, args.ddp_timeout)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.leaving = self.ranks.highest(int(interruption.received or 0))
        if self.leaving:
            control.should_training_stop = True
            # time is short, but choosing the best checkpoint needs every evaluation
            control.should_evaluate &= args.load_best_model_at_end

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.leaving:
            if not float(state.epoch or 0).is_integer():  # in the middle of an epoch
                control.should_evaluate = control.should_log = False
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.leaving:
            kept = f"by {SIGNALS[self.leaving]}, with {PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            say("stopped", f"{kept}; continue with: {interruption.continue_with or '--resume_from_checkpoint'}")
            raise Preempted(self.leaving)


class ResumedChoice(TrainerCallback):
    """Finds the best checkpoint of a resumed run in the run's folder, also after that was renamed."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.resume_from_checkpoint is None or not args.load_best_model_at_end:
            return
        best = best_of(Path(args.resume_from_checkpoint), Path(args.output_dir))
        if best is None:
            return
        state.best_model_checkpoint = str(best)
        if not best.is_dir():
            state.best_model_checkpoint = state.best_metric = state.best_global_step = None
            say("warning", f"{best}, the best checkpoint so far, is gone: the best of the later ones will be chosen")


class EarlyStopping(EarlyStoppingCallback):
    """Transformers' early stopping, which a resumed run continues: it counts on, and stops at once if it had stopped."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        saved = state.stateful_callbacks.get(type(self).__name__, {})
        self.early_stopping_patience_counter = saved.get("attributes", {}).get("early_stopping_patience_counter", 0)
        if state.global_step and self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True


class MetricsFile(TrainerCallback):
    """Writes each logged step as a line of `metrics.jsonl`; on resuming, lines after the checkpoint are removed.

    The last step is always logged. `seconds` is the time within steps since training began or was resumed.
    `tokens_per_second` counts real tokens of all ranks, without the first two steps, which the memory measurement slows
    down. Neither includes evaluations and checkpoints.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen = 0
        self.began = 0.0
        self.durations: list[float] = []  # of each step, in seconds
        self.tokens: list[int] = []  # of each step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and self.path.exists():
            check_regular(self.path)
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            # a killed run may have left an incomplete last line
            whole = [line for line in lines if line.endswith("}\n")]
            kept = [line.rstrip() for line in whole if json.loads(line)["step"] <= state.global_step]
            with readable_write_errors(self.path.name, self.path.parent):
                atomic_write(self.path, "".join(f"{line}\n" for line in kept))
        self.seen, self.durations, self.tokens = state.num_input_tokens_seen, [], []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.began = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.durations.append(time.monotonic() - self.began)
        self.tokens.append(state.num_input_tokens_seen - self.seen)
        self.seen = state.num_input_tokens_seen
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs or not ("loss" in logs or "eval_loss" in logs):
            return
        first = 2 if len(self.durations) > 2 else 0
        rate = sum(self.tokens[first:]) / max(sum(self.durations[first:]), 1e-9)
        line = {"step": state.global_step, "tokens": state.num_input_tokens_seen}
        line |= {"seconds": round(sum(self.durations), 3), "tokens_per_second": round(rate, 1)}
        line |= {name: value for name, value in logs.items() if name != "num_input_tokens_seen"}
        finite = {k: (v if not isinstance(v, float) or math.isfinite(v) else None) for k, v in line.items()}
        with readable_write_errors(self.path.name, self.path.parent), self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(finite) + "\n")
