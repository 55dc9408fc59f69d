"""The shadow step: two optimizer steps of the Trainer that will train, on a model without weights.

    ledger = predict(build, trainer, arguments)

`build()` returns the model on the meta device with its method attached; `trainer(model, arguments, callback)` returns the
Trainer, whose data is the worst batch. Parameters become fake tensors (`fake.make_fake`), the callback that measures real
runs traces them, and a `Device` adds what another device would do differently. So a model, a method or an optimizer is
predicted by running it. What cannot run is refused.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from accelerate import FullyShardedDataParallelPlugin
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from transformers import DefaultFlowCallback, Trainer, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from toolkit.errors import UserError
from toolkit.memory import census, meta_ops
from toolkit.memory.cuda import quantized
from toolkit.memory.cuda.allocator import AllocatorMeter, OutOfMemory
from toolkit.memory.ledger import Ledger
from toolkit.memory.measure import MemoryCallback
from toolkit.memory.recording import Counter, Meter, Recording
from toolkit.memory.replay import replay_without_offloaded
from toolkit.memory.shadow import simulated_rank
from toolkit.memory.shadow.beside_steps import traced_beside_steps
from toolkit.memory.shadow.fake import make_fake
from toolkit.memory.shadow.folding import MARGINS, Fold
from toolkit.memory.shadow.host_copies import activations_on_host
from toolkit.memory.shadow.isolation import isolated, quick_collections
from toolkit.memory.shadow.optimizers import optimizer_packages
from toolkit.memory.shadow.stacks import CannotFold, TemplatesDiffer
from toolkit.memory.trace import Overlay, Sink, Trace
from toolkit.seams import patched

CUDA_GRAPHS = ("reduce-overhead", "max-autotune")  # modes of torch.compile
BACKENDS = ("inductor", "aot_eager", "eager")  # that compile no more than the operators of a step, and keep no memory
STEPS = 2  # the first, in which optimizer state appears, and the steady one


class Device(Protocol):
    """Where the shadow step pretends to run. Sizes in bytes."""

    name: str
    context_bytes: int | None
    budget_bytes: int | None

    @property
    def notes(self) -> tuple[str, ...]:
        """The device's figures that are uncertain, one sentence each."""

    def meter(self) -> Meter:
        """A meter that counts allocations as the device's allocator would."""

    def limited_meter(self) -> AllocatorMeter | None:
        """A meter of a device whose memory is limited to the budget; None without a limit."""

    def overlay(self) -> Overlay | None:
        """An overlay that runs operators as the device would."""

    def running(self) -> AbstractContextManager:
        """A context that is open while the shadow step runs; it replaces functions that differ on the device."""

    def load(self, trace: Trace, model: nn.Module) -> None:
        """Replays loading; afterwards `trace` has adopted every parameter and buffer of `model`."""

    def prepare(self, trainer: Trainer) -> None:
        """Changes what a Trainer does differently on the device, such as optimizers' foreach implementations."""


class _PassThroughOverlay:
    """Runs every operator unchanged, on the fast path of `meta_ops`."""

    def run(self, trace: Trace, op: Any, args: tuple, kwargs: dict) -> Any:
        if op.namespace == "c10d":
            simulated_rank.gloo_buffers(trace, op, args)
        return meta_ops.run(op, args, kwargs)


class Cpu:
    """The CPU that this process runs on: operators run unchanged, and allocated is what was requested."""

    name = "cpu"
    context_bytes: int | None = None
    budget_bytes: int | None = None
    notes: tuple[str, ...] = ()

    def meter(self) -> Meter:
        return Counter()

    def limited_meter(self) -> AllocatorMeter | None:
        return None

    def overlay(self) -> Overlay | None:
        return _PassThroughOverlay()

    def running(self) -> AbstractContextManager:
        return nullcontext()

    def load(self, trace: Trace, model: nn.Module) -> None:
        census.label_model(trace, model)

    def prepare(self, trainer: Trainer) -> None:
        pass


CPU = Cpu()


class ShadowCallback(MemoryCallback):
    """The callback that measures, on fake tensors: `device` provides meter, overlay and loading."""

    def __init__(
        self,
        device: Device,
        config: Mapping[str, Any] | None = None,
        sinks: Sequence[Sink] = (),
        fold: Fold | None = None,
    ):
        super().__init__(steps=tuple(range(1, STEPS + 1)), config=config, sinks=sinks)
        self.device = device
        self.fold = fold
        self.beside: dict[str, Callable[[], object]] = {}  # what the run does beside its steps, by phase
        self.notes: tuple[str, ...] = ()
        self.source, self.device_name, self.context_bytes = "predicted", device.name, device.context_bytes

    def new_trace(self, model: nn.Module) -> tuple[Meter, Callable[..., Trace]]:
        new_trace = self.fold.trace if self.fold else Trace
        return self.device.meter(), lambda *sinks: new_trace(*sinks, overlay=self.device.overlay())

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().on_pre_optimizer_step(*args, **kwargs)
        if self.fold:
            self.fold.remember_gradients()

    def compiled(self, args: Any) -> str:
        return ""  # stand-ins are not compiled

    def load(self, trace: Trace, model: nn.Module) -> None:
        if simulated_rank.in_world():  # the engine has already partitioned the model
            census.label_model(trace, model)
        else:
            self.device.load(trace, model)

    def _finish(self, model: nn.Module) -> None:
        """After the last step, where a run validates. What else it does beside its steps follows training: then `finish` makes the ledger."""
        self._trace_beside("evaluation", model)
        if not self.beside:
            self._make_ledger(model)
        elif self._trace is not None:
            self._trace.enter_phase(next(iter(self.beside)))  # what training gives back belongs to no step

    def finish(self, model: nn.Module) -> None:
        """After training: traces what a run does then, and makes the ledger."""
        for phase in tuple(self.beside):
            self._trace_beside(phase, model)
        if self._trace is not None:
            self._make_ledger(model)

    def _make_ledger(self, model: nn.Module) -> None:
        if self.fold:
            self.fold.unfold()
        super()._finish(model)

    def _trace_beside(self, phase: str, model: nn.Module) -> None:
        run = self.beside.pop(phase, None)
        if run is not None and self._trace is not None:
            problem = traced_beside_steps(self._trace, self._recording, phase, model, run)
            if problem and self.fold:
                raise CannotFold(*problem)
            self.notes += problem

    def replayed_within_budget(self, recording: Recording) -> Recording:
        """The recording as on a device with this budget: when memory is full, the allocator gives its cache back and tries again.

        If an allocation fails even then, the result is `recording`, as on a device with enough memory.
        """
        recording.close()
        limited = self.device.limited_meter()
        if limited is None or limited.capacity is None or max(e.reserved for e in recording.events) <= limited.capacity:
            return recording
        try:
            recording = replay_without_offloaded(recording, limited)[0]
        except OutOfMemory:
            return recording
        self.notes += ("it fits only because PyTorch gives its cache back when the card is full, which costs time",)
        return recording

    def refused(self, error: AssertionError) -> None:
        raise error  # a prediction that does not add up is a bug, and no training is lost by raising it


def predict(
    build: Callable[[], nn.Module],
    trainer: Callable[[nn.Module, TrainingArguments, MemoryCallback], Trainer],
    arguments: TrainingArguments,
    device: Device = CPU,
    config: Mapping[str, Any] | None = None,
    sinks: Sequence[Sink] = (),
    beside: Callable[[], Mapping[str, Callable[[Trainer], object]]] = dict,
) -> Ledger:
    """The predicted ledger of training, made in this process without weights and without a GPU.

    Layers that repeat are run once, where that gives the events of the whole model (`folding`); otherwise all are.
    `build` must make its model on the meta device; each attempt calls it, and `beside`, once. `trainer` must make the Trainer
    that training uses, with the given arguments (a copy limited to two steps on one CPU process) and callback. Its data set
    must give, in order, either at least `rows_needed(arguments)` rows as long as the longest row of training, or one collated
    batch for each forward pass (2 x gradient_accumulation_steps). `sinks` receive the trace's events; then no layer is left
    out. `beside()` gives what else the run does with the trained model, by the phases of `ledger.BESIDE_STEPS`; one that fails
    on fake tensors becomes a note.

    Raises:
        UserError: for options and models that the shadow step does not support, by name.
    """
    began = time.perf_counter()
    refuse_unsupported(arguments)
    attempt = partial(_predict, build, trainer, arguments, device, config, sinks, beside)
    ledger = None
    with quick_collections():
        if not simulated_rank.in_world() and not sinks:
            for margin in MARGINS:
                try:
                    ledger = attempt(margin)
                except TemplatesDiffer:
                    continue
                except UserError:
                    raise
                except Exception:
                    pass  # CannotFold, or what a stand-in led to; an error of the model itself comes again below
                break
        ledger = ledger or attempt(None)
    return replace(ledger, seconds=time.perf_counter() - began)


def _predict(
    build: Callable[[], nn.Module],
    trainer: Callable[[nn.Module, TrainingArguments, MemoryCallback], Trainer],
    arguments: TrainingArguments,
    device: Device,
    config: Mapping[str, Any] | None,
    sinks: Sequence[Sink],
    beside: Callable[[], Mapping[str, Callable[[Trainer], object]]],
    margin: int | None,
) -> Ledger:
    """`predict` with layers folded at this margin (`stacks.find_stacks`); None: all layers run. Raises: CannotFold."""
    with ExitStack() as stack:
        if not simulated_rank.in_world():
            stack.enter_context(isolated())
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        model = build()
        model.train()
        checkpointing = vars(arguments).get("activation_checkpointing_kwargs") or {}
        fold = None if margin is None else Fold(model, margin, every=checkpointing.get("every_n_layers", 1))
        fake_mode = make_fake(model)
        if simulated_rank.in_world():
            model._apply = partial(simulated_rank.applied, model)  # DeepSpeed casts a model to bf16 itself
        callback = ShadowCallback(device, config, sinks, fold)
        if arguments.fp16 and not simulated_rank.in_deepspeed():
            stack.enter_context(_fp16_autocast())
        stack.enter_context(device.running())
        stack.enter_context(optimizer_packages())
        shadow = trainer(model, shadow_arguments(arguments, folder), callback)
        keep_only(shadow, callback)
        callback.beside = {phase: partial(run, shadow) for phase, run in beside().items()}
        device.prepare(shadow)
        stack.enter_context(real_zero_losses())
        stack.enter_context(quantized.dequantized_by_peft())
        stack.enter_context(meta_ops.large_ones_fake(fake_mode))
        stack.enter_context(activations_on_host(checkpointing))
        stack.callback(callback.abort)
        if simulated_rank.in_world():
            stack.enter_context(simulated_rank.engine_on_fakes(fake_mode))
        with _unsupported_as_user_error():
            shadow.train()
        callback.finish(shadow.model)
    assert callback.ledger is not None
    return replace(
        callback.ledger,
        budget_bytes=device.budget_bytes,
        notes=device.notes + callback.notes,
    )


def rows_needed(arguments: TrainingArguments) -> int:
    """The number of rows for the shadow steps: one full batch for each forward pass."""
    return STEPS * arguments.gradient_accumulation_steps * arguments.per_device_train_batch_size


def shadow_arguments(arguments: TrainingArguments, folder: str) -> TrainingArguments:
    """A copy of `arguments` for two steps on one CPU process that writes, logs and evaluates nothing."""
    shadow = copy.copy(arguments)
    changes = {
        "output_dir": folder,
        "max_steps": STEPS,
        "logging_strategy": "no",
        "save_strategy": SaveStrategy.NO,
        "eval_strategy": "no",
        "do_eval": False,
        "eval_on_start": False,
        "report_to": [],
        "disable_tqdm": True,
        "load_best_model_at_end": False,
        "push_to_hub": False,
        "resume_from_checkpoint": None,
        "dataloader_num_workers": 0,
        "logging_nan_inf_filter": False,
        "use_cpu": True,
        "_n_gpu": 0,
        "_setup_devices": torch.device("cpu"),
        "mixed_precision": _mixed_precision(arguments),
        "torch_compile": False,
        "torch_compile_backend": "no",
        "torch_compile_mode": None,
    }
    if not simulated_rank.in_world():
        changes["deepspeed_plugin"] = None
    for name, value in changes.items():
        shadow.__dict__[name] = value
    return shadow


def _mixed_precision(arguments: TrainingArguments) -> str:
    """The precision requested of accelerate. On a CPU it supports fp16 only under DeepSpeed, which casts the model itself."""
    if arguments.fp16 and simulated_rank.in_deepspeed():
        return "fp16"
    return "bf16" if arguments.bf16 or arguments.fp16 else "no"


def refuse_unsupported(arguments: TrainingArguments) -> None:
    """Raises UserError for options whose effect on memory the shadow step cannot predict."""
    if arguments.torch_compile and arguments.torch_compile_mode in CUDA_GRAPHS:
        raise UserError(
            f"memory under --torch_compile_mode {arguments.torch_compile_mode} cannot be predicted: it records CUDA graphs, which hold "
            "memory pools of their own; give default or max-autotune-no-cudagraphs"
        )
    if arguments.torch_compile and arguments.torch_compile_backend not in BACKENDS:
        raise UserError(
            f"memory under --torch_compile_backend {arguments.torch_compile_backend} cannot be predicted; that under "
            f"{', '.join(BACKENDS)} can"
        )
    if arguments.auto_find_batch_size:
        raise UserError(
            "--auto_find_batch_size tries several batch sizes, and a prediction needs one; give --per_device_train_batch_size"
        )


def keep_only(trainer: Trainer, callback: MemoryCallback) -> None:
    """Removes all callbacks except ours and those that control training: the others write the logs and files of a real run."""
    for other in list(trainer.callback_handler.callbacks):
        if other is not callback and not isinstance(other, DefaultFlowCallback):
            trainer.remove_callback(other)


@contextmanager
def _fp16_autocast() -> Iterator[None]:
    """While open, autocast and FSDP compute in fp16, although accelerate is asked for bf16: it runs fp16 only on GPUs.

    There is no gradient scaler. It scales in place, and its own tensors are a few numbers.
    """
    set_precision = FullyShardedDataParallelPlugin.set_mixed_precision

    def set_fp16(self: FullyShardedDataParallelPlugin, _: Any, **options: Any) -> None:
        set_precision(self, "fp16", **options)

    with (
        patched("get_mixed_precision_context_manager", lambda *_: torch.autocast("cpu", torch.float16)),
        patched("FullyShardedDataParallelPlugin.set_mixed_precision", set_fp16),
    ):
        yield


@contextmanager
def real_zero_losses() -> Iterator[None]:
    """While open, Trainer gets a real loss of 0 instead of a fake one, so that its checks for NaN work."""
    step = Trainer.training_step

    def training_step(self: Trainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = step(self, *args, **kwargs)
        return torch.tensor(0.0, dtype=loss.dtype, device=loss.device)  # `torch.zeros` would be fake under an engine

    with patched("Trainer.training_step", training_step):
        yield


@contextmanager
def _unsupported_as_user_error() -> Iterator[None]:
    """While open, an operation that fake tensors do not support raises a one-line UserError; other errors pass unchanged."""
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UserError(
            f"this model cannot be predicted: a shape or a branch of its code depends on values ({error.func})"
        ) from error
    except (UnsupportedOperatorException, UnsupportedFakeTensorException, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"this model cannot be predicted: an operator does not run on fake tensors ({reason})"
        ) from error
