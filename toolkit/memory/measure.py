"""The measured ledger: a Trainer callback that traces a few steps of a real run, on CPU or CUDA.

    measure = MemoryCallback()
    Trainer(..., callbacks=[measure]).train()
    measure.ledger.save("ledger.json")

On a CPU the total is the number of bytes in live tensors. On CUDA it is the caching allocator's own total (`memory_stats`);
what this total holds in addition to the traced tensors is reported as workspaces and slack.

Cost: steps that are not traced cost nothing, because no hook or mode stays in place. A traced step costs a fixed time per
operator, independent of tensor sizes. Measured on one slow CPU core (torch 2.13): a step of a 4-layer Llama of width 64 on
2 x 64 tokens took 234 ms of CPU time instead of 92 ms. A step of 8 layers of width 256 on 8 x 128 tokens took 4.3 s, and
the difference was within the noise. The cost on a GPU was not measured.

On a GPU the trace sums gradients in place where autograd would without a trace (`cuda.gradient_sums`), so that a traced step
needs the memory of the steps after it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.state import GradientState
from torch.utils._python_dispatch import _disable_current_modes
from transformers import TrainerCallback

from toolkit.memory import census
from toolkit.memory.cuda.gradient_sums import SumsInPlace
from toolkit.memory.cuda.meter import CudaMeter
from toolkit.memory.environment import device_name, stack_versions
from toolkit.memory.ledger import Ledger, LedgerError, ledger_of
from toolkit.memory.recording import Counter, Meter, Recording
from toolkit.memory.replay import copied_bytes, replay_without_offloaded
from toolkit.memory.resizing import resizes_seen_by
from toolkit.memory.trace import Sink, Trace

logger = logging.getLogger(__name__)
COMPILED = ("adamw_torch_4bit", "adamw_torch_8bit")  # optimizers whose step torch.compile compiles


class MemoryCallback(TrainerCallback):
    """Traces the optimizer steps numbered in `steps` (from 1, counted from where training starts or resumes).

    By default it traces the first step, in which the optimizer state appears, and the second, which all later steps resemble.
    `config` is copied into the ledger. `snapshot` (CUDA only) is the path
    of a file for PyTorch's memory viewer.

    `ledger` is None until the last of these steps is over (or training ends). It stays None if the parts do not add up to
    the device's total: the run goes on, `problem` holds the reason, and a warning is logged. `batches` holds the arguments
    of each traced forward pass, so that the same steps can be predicted. `sinks` receive the trace's events too.
    """

    def __init__(
        self,
        steps: tuple[int, ...] = (1, 2),
        config: Mapping[str, Any] | None = None,
        snapshot: str | Path | None = None,
        sinks: Sequence[Sink] = (),
    ):
        self.steps = frozenset(steps)
        self.config = dict(config or {})
        self.snapshot = snapshot
        self.sinks = tuple(sinks)
        self.ledger: Ledger | None = None
        self.problem: str | None = None
        self.batches: list[dict[str, torch.Tensor]] = []
        self.source = "measured"
        self.device_name: str | None = None  # None: the name of the device that the model is on
        self.context_bytes: int | None = None
        self._trace: Trace | None = None  # from training's begin until the ledger is made
        self._active: Trace | None = None  # the same, while one of the steps is traced
        self._open = ExitStack()

    # ---- the Trainer's events

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.abort()  # of an earlier attempt, such as a batch size that did not fit
        self.ledger, self.problem, self.batches = None, None, []
        if compiled := self.compiled(args):
            self.problem = (
                f"memory cannot be measured under {compiled}: PyTorch does not compile the operators of a traced step"
            )
            logger.warning("no measured ledger: %s", self.problem)
            return
        self._first_step = state.global_step
        self._seconds = 0.0
        self._optimizer: Any = None
        self._device = next(model.parameters()).device
        if self.snapshot is not None and self._device.type == "cuda":
            torch.cuda.memory._record_memory_history()
        self._meter, new_trace = self.new_trace(model)
        self._recording = Recording(self._meter)
        self._trace = new_trace(self._meter, self._recording, *self.sinks)
        self.load(self._trace, model)
        self._trace.on_phase = self._on_phase

    def compiled(self, args: Any) -> str:
        """The flag by which a part of the step is compiled; empty without one."""
        optim = str(getattr(args.optim, "value", args.optim))
        return "--torch_compile" if args.torch_compile else f"--optim {optim}" if optim in COMPILED else ""

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if self._trace is None or state.global_step - self._first_step + 1 not in self.steps:
            return
        number = state.global_step - self._first_step + 1
        self._began, self._batches_before = time.perf_counter(), len(self.batches)
        census.label_model(self._trace, model)
        self._optimizer = optimizer
        census.label_optimizer_state(self._trace, optimizer)
        self._trace.step = number
        self._trace.enter_phase("forward")
        self._open.enter_context(self._trace.modules_of(model, census.head_of(model)))
        self._open.enter_context(resizes_seen_by(self._trace))
        hook = model.register_forward_pre_hook(self._on_forward, with_kwargs=True)
        self._open.callback(hook.remove)
        self._open.enter_context(self._trace)
        self._active = self._trace

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._active is not None:
            census.label_gradients(self._active, model)
            if self._active.phase != "optimizer_step":
                self._active.enter_phase("optimizer_step")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if self._active is not None:
            census.label_optimizer_state(self._active, optimizer)

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if self._active is None:
            return
        self._close()
        self._seconds += time.perf_counter() - self._began
        if getattr(optimizer, "step_was_skipped", False) and state.global_step < state.max_steps:
            # fp16 overflowed, as it often does in the first steps. Nothing was updated, so the next step counts as the first.
            self._recording.discount(state.global_step - self._first_step)
            del self.batches[self._batches_before :]
            self._first_step += 1
        if state.global_step - self._first_step >= max(self.steps):
            self._finish(model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._trace is not None:
            self._close()
            self._finish(model)

    # ---- what a shadow step does differently

    def new_trace(self, model: Any) -> tuple[Meter, Callable[..., Trace]]:
        """A meter for the model's device, and a function that makes a trace from sinks."""
        if self._device.type == "cuda":
            return CudaMeter(self._device), partial(Trace, overlay=SumsInPlace(), device_type="cuda")
        return Counter(), partial(Trace, device_type=self._device.type)

    def load(self, trace: Trace, model: Any) -> None:
        """Reports to `trace` what is in memory after loading."""
        census.label_model(trace, model)

    def replayed_within_budget(self, recording: Recording) -> Recording:
        """The recording from which the ledger is made; a shadow step replays it within the memory of its device."""
        return recording

    def refused(self, error: LedgerError) -> None:
        """Handles parts that do not add up to the total."""
        self.problem = str(error)
        logger.warning("no measured ledger: %s", error)

    # ---- our own

    @property
    def _tracing(self) -> bool:
        return (
            self._trace is not None and self._trace in torch.utils._python_dispatch._get_current_dispatch_mode_stack()
        )

    def _on_forward(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """A forward pass begins. With gradient accumulation a step has several, and clipping follows only the last one."""
        assert self._trace is not None
        with _disable_current_modes():  # the copies must not be traced
            # single numbers, such as num_items_in_batch, belong to the step
            tensors = {name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor) and value.dim()}
            self.batches.append({name: value.detach().to("cpu", copy=True) for name, value in tensors.items()})
        if self._trace.phase != "forward":
            self._trace.enter_phase("forward")
        self._trace.after_backward = "optimizer_step" if GradientState().sync_gradients else "backward"

    def _on_phase(self, phase: str, step: int) -> None:
        """Labels DeepSpeed's gradients, which exist when its step begins; it steps inside the Trainer's backward call."""
        if phase == "optimizer_step" and self._active is not None:
            census.label_optimizer_state(self._active, self._optimizer)

    def abort(self) -> None:
        """Ends tracing at once, without a ledger. Call it if `Trainer.train` raised an exception."""
        self._close()
        if self._trace is not None:
            self._trace.close()
            self._trace = None

    def _close(self) -> None:
        self._open.close()
        self._active = None

    def _finish(self, model: Any) -> None:
        assert self._trace is not None
        context = self._meter.context_bytes() if isinstance(self._meter, CudaMeter) else self.context_bytes
        recording, local = self._recording, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        host = census.paged_bytes(self._optimizer) if isinstance(self._meter, CudaMeter) else 0
        copied = copied_bytes(recording)
        if any(event.block.offloaded for event in recording.events):  # recorded only if host memory is traced too
            recording.close()
            recording, host = replay_without_offloaded(recording, self.new_trace(model)[0])
        recording = self.replayed_within_budget(recording)
        try:
            self.ledger = ledger_of(
                recording,
                source=self.source,
                device=self.device_name or device_name(self._device),
                stack=stack_versions(),
                config=self.config,
                parameters=census.count_parameters(model),
                context_bytes=context,
                processes=int(os.environ.get("WORLD_SIZE", "1")),
                host_bytes=host * local,
                copied_bytes=copied,
                nvme_bytes=census.swapped_bytes(self._optimizer) * local,
                seconds=self._seconds,
            )
        except LedgerError as error:
            self.refused(error)
        if self.snapshot is not None and isinstance(self._meter, CudaMeter):
            temporary = f"{self.snapshot}.partial"
            torch.cuda.memory._dump_snapshot(temporary)
            Path(temporary).replace(self.snapshot)
            torch.cuda.memory._record_memory_history(enabled=None)
        self.abort()
