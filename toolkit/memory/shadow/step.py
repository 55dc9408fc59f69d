"""The shadow step: two optimizer steps of the very Trainer that will train, on a model without weights.

    ledger = predict(build, trainer, arguments)

`build()` gives the model on the meta device with its method attached, `trainer(model, arguments, callback)` the Trainer
over the worst batch. Parameters become fake tensors (`fake.make_fake`), the callback that measures real runs traces
them, and a `Device` says what another device would do differently. So a model, a method or an optimizer is predicted
by running it, and what cannot be run is refused: nothing is guessed.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
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
from toolkit.memory.shadow.fake import make_fake
from toolkit.memory.shadow.isolation import isolated
from toolkit.memory.trace import Overlay, Trace
from toolkit.seams import patched

STEPS = 2  # the first, in which optimizer state appears, and the steady one


class Device(Protocol):
    """Where the shadow step pretends to run. Sizes in bytes."""

    name: str
    context_bytes: int | None
    budget_bytes: int | None

    @property
    def notes(self) -> tuple[str, ...]:
        """What of the device's figures is uncertain, one sentence each."""

    def meter(self) -> Meter:
        """Counts allocations as the device's allocator would."""

    def limited_meter(self) -> AllocatorMeter | None:
        """The same, of a device that has no more than the budget; None where nothing is limited."""

    def overlay(self) -> Overlay | None:
        """Runs operators as the device would."""

    def running(self) -> AbstractContextManager:
        """Open while the shadow step runs: functions that the device's libraries replace."""

    def load(self, trace: Trace, model: nn.Module) -> None:
        """Replays loading: ends with every parameter and buffer of `model` adopted by `trace`."""

    def prepare(self, trainer: Trainer) -> None:
        """What the device makes a Trainer do differently, such as optimizers' foreach implementations."""


class _Straight:
    """Every operator as it is, by the short way."""

    def run(self, trace: Trace, op: Any, args: tuple, kwargs: dict) -> Any:
        if op.namespace == "c10d":
            simulated_rank.gloo_buffers(trace, op, args)
        return meta_ops.run(op, args, kwargs)


class Cpu:
    """The CPU that this process runs on: nothing differs, every allocation is what was asked for."""

    name = "cpu"
    context_bytes: int | None = None
    budget_bytes: int | None = None
    notes: tuple[str, ...] = ()

    def meter(self) -> Meter:
        return Counter()

    def limited_meter(self) -> AllocatorMeter | None:
        return None

    def overlay(self) -> Overlay | None:
        return _Straight()

    def running(self) -> AbstractContextManager:
        return nullcontext()

    def load(self, trace: Trace, model: nn.Module) -> None:
        census.label_model(trace, model)

    def prepare(self, trainer: Trainer) -> None:
        pass


CPU = Cpu()


class ShadowCallback(MemoryCallback):
    """The callback that measures, on fake tensors: `device` gives meter, overlay and loading."""

    def __init__(self, device: Device, config: Mapping[str, Any] | None = None):
        super().__init__(steps=tuple(range(1, STEPS + 1)), config=config)
        self.device = device
        self.notes: tuple[str, ...] = ()
        self.source, self.device_name, self.context_bytes = "predicted", device.name, device.context_bytes

    def new_trace(self, model: nn.Module) -> tuple[Meter, Callable[..., Trace]]:
        return self.device.meter(), lambda *sinks: Trace(*sinks, overlay=self.device.overlay())

    def load(self, trace: Trace, model: nn.Module) -> None:
        if simulated_rank.in_world():  # the engine has taken the model apart already
            census.label_model(trace, model)
        else:
            self.device.load(trace, model)

    def settled(self, recording: Recording) -> Recording:
        """Where more was reserved than the device has: as it goes there, for the cache is given back before an allocation fails.

        What fails even so is told as if the device had more.
        """
        recording.close()
        limited = self.device.limited_meter()
        if limited is None or limited.capacity is None or max(e.reserved for e in recording.events) <= limited.capacity:
            return recording
        try:
            recording = replay_without_offloaded(recording, limited)[0]
        except OutOfMemory:
            return recording
        self.notes += ("PyTorch gives its cache back to fit, which costs time: there is next to no room",)
        return recording

    def refused(self, error: AssertionError) -> None:
        raise error  # a prediction that does not add up is a bug, and nobody's training depends on it


def predict(
    build: Callable[[], nn.Module],
    trainer: Callable[[nn.Module, TrainingArguments, MemoryCallback], Trainer],
    arguments: TrainingArguments,
    device: Device = CPU,
    config: Mapping[str, Any] | None = None,
) -> Ledger:
    """The ledger of training, predicted in this process without weights and without a GPU.

    `build` is called once; it must make its model on the meta device. `trainer` must put `arguments` (a copy, limited
    to two steps on one CPU process) and the callback into the Trainer that training uses; its data set gives at least
    `rows_needed(arguments)` rows, each as long as the longest of training, in their order.

    Raises:
        UserError: for options and models that the shadow step does not support, saying which.
    """
    began = time.perf_counter()
    refuse_unsupported(arguments)
    with ExitStack() as stack:
        if not simulated_rank.in_world():
            stack.enter_context(isolated())
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        model = build()
        model.train()
        fake_mode = make_fake(model)
        if simulated_rank.in_world():
            model._apply = partial(simulated_rank.applied, model)  # DeepSpeed casts a model to bf16 itself
        callback = ShadowCallback(device, config)
        if arguments.fp16 and not simulated_rank.in_deepspeed():
            stack.enter_context(_fp16_autocast())
        shadow = trainer(model, shadow_arguments(arguments, folder), callback)
        keep_only(shadow, callback)
        device.prepare(shadow)
        stack.enter_context(_real_losses())
        stack.enter_context(quantized.dequantized_by_peft())
        stack.enter_context(meta_ops.large_ones_fake(fake_mode))
        stack.enter_context(device.running())
        stack.callback(callback.abort)
        if simulated_rank.in_world():
            stack.enter_context(simulated_rank.engine_on_fakes(fake_mode))
        with _explained():
            shadow.train()
    assert callback.ledger is not None
    return replace(
        callback.ledger,
        seconds=time.perf_counter() - began,
        budget_bytes=device.budget_bytes,
        notes=device.notes + callback.notes,
    )


def rows_needed(arguments: TrainingArguments) -> int:
    """Rows for the shadow steps: one full batch for each forward pass."""
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
    }
    if not simulated_rank.in_world():
        changes["deepspeed_plugin"] = None
    for name, value in changes.items():
        shadow.__dict__[name] = value
    return shadow


def _mixed_precision(arguments: TrainingArguments) -> str:
    """What accelerate is asked for on the CPU, where it knows fp16 under DeepSpeed alone, which casts the model itself."""
    if arguments.fp16 and simulated_rank.in_deepspeed():
        return "fp16"
    return "bf16" if arguments.bf16 or arguments.fp16 else "no"


def refuse_unsupported(arguments: TrainingArguments) -> None:
    """Raises UserError for options whose effect on memory the shadow step does not know."""
    if arguments.torch_compile:
        raise UserError("memory under --torch_compile cannot be predicted: kernels are fused as they are compiled")
    if arguments.use_liger_kernel:
        raise UserError("memory under --use_liger_kernel cannot be predicted: its kernels run on GPUs alone")
    if arguments.auto_find_batch_size:
        raise UserError("--auto_find_batch_size has no one batch size to predict; give --per_device_train_batch_size")


def keep_only(trainer: Trainer, callback: MemoryCallback) -> None:
    """Leaves the callbacks that steer training and ours: the others write logs and files of a run that is none."""
    for other in list(trainer.callback_handler.callbacks):
        if other is not callback and not isinstance(other, DefaultFlowCallback):
            trainer.remove_callback(other)


@contextmanager
def _fp16_autocast() -> Iterator[None]:
    """accelerate runs fp16 on GPUs alone; here the shadow asks it for bf16, and autocast and FSDP compute in fp16.

    What is left out is the gradient scaler: it scales in place, and its own tensors are a few numbers.
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
def _real_losses() -> Iterator[None]:
    """Trainer sees a real loss of 0 where a step gives a fake one, so that checks for NaN have something to look at."""
    step = Trainer.training_step

    def training_step(self: Trainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = step(self, *args, **kwargs)
        return torch.tensor(0.0, dtype=loss.dtype)  # not `zeros`: what an engine makes anew is fake

    with patched("Trainer.training_step", training_step):
        yield


@contextmanager
def _explained() -> Iterator[None]:
    """What a fake tensor cannot do becomes one line; other errors of the model's own code are told as they are."""
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UserError(f"cannot be predicted: a shape or a branch depends on values ({error.func})") from error
    except (UnsupportedOperatorException, UnsupportedFakeTensorException, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"cannot be predicted: no shadow of an operator ({reason})") from error
