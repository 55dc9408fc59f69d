"""The trace: the birth and death of every storage, with operator, module and phase.

A `Trace` is a `TorchDispatchMode`: it sees each operator below autograd, in the forward and the backward pass, on real and on
fake tensors. It counts nothing itself: it reports births and deaths, in order, to its sinks (`recording.Recording`, an
allocator).

    meter = Counter()
    trace = Trace(meter, Recording(meter))
    trace.adopt(weight, "parameters_frozen")      # existed before the trace
    with trace, trace.modules_of(model):
        trace.enter_phase("forward")
        ...

The caller enters phases by name, except "backward", which the trace detects: an operator that runs inside an autograd graph
task is in the backward pass, no matter what called it (a loop, `Trainer`, DDP's reducer).
"""

from __future__ import annotations

import bisect
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

PHASES = ("load", "forward", "backward", "optimizer_step")
_FAKE = torch._C._TorchDispatchModeKey.FAKE
# AccumulateGrad nodes have 2**64 - 1: they belong to no point of the forward pass; seam "sequence number of AccumulateGrad".
_NO_SEQUENCE_NUMBER = 2**63
_LAYER = re.compile(r".*?\.\d+(?=\.|$)")  # the path of a layer at the beginning of a module's path


@dataclass(slots=True, eq=False)
class Allocation:
    """One storage, or a buffer inside a kernel: `nbytes` as requested, without the allocator's rounding."""

    nbytes: int
    op: str
    module: str
    phase: str
    step: int
    segment: int  # stretches of the forward pass, of recomputation or of the backward pass, numbered in order
    builds_graph: bool  # born in the forward pass, or in the recomputation of activation checkpointing
    at_head: bool  # born in the forward pass at or after the output embedding: logits and loss
    category: str | None = None  # one of `ledger.CATEGORIES`; None: `recording.category_of` infers it from its lifetime
    died_in_segment: int | None = None
    offloaded: bool = False  # in host memory
    pinned: bool = False  # of those, a copy of an activation: it goes out and comes back in each step
    handle: Any = None  # for the meter's own use

    def copy(self) -> Allocation:
        """Another block like this one, without a handle."""
        return Allocation(
            nbytes=self.nbytes,
            op=self.op,
            module=self.module,
            phase=self.phase,
            step=self.step,
            segment=self.segment,
            builds_graph=self.builds_graph,
            at_head=self.at_head,
            category=self.category,
            died_in_segment=self.died_in_segment,
            offloaded=self.offloaded,
            pinned=self.pinned,
        )


class Sink(Protocol):
    """Listens to a trace. Sinks are called in the order in which they were given, so a meter comes before its reader."""

    def born(self, block: Allocation) -> None: ...

    def died(self, block: Allocation) -> None: ...

    def entered(self, phase: str, step: int) -> None: ...


class Overlay(Protocol):
    """Runs an operator as another device would.

    `run` returns the operator's result; the plain one is `op(*args, **kwargs)`. It may call `trace.passing` and `trace.hold`
    for buffers that a kernel allocates internally: before the result or, after `trace.track(result)`, after it. It may also
    return tensors of other sizes or dtypes than `op` does.
    """

    def run(self, trace: Trace, op: Any, args: tuple, kwargs: dict) -> Any: ...


class Trace(TorchDispatchMode):
    """Reports each storage to `sinks`. `device_type` limits it to one type of device (None: all, as in a shadow step)."""

    def __init__(self, *sinks: Sink, overlay: Overlay | None = None, device_type: str | None = None):
        super().__init__()
        self.sinks = sinks
        self.overlay = overlay
        self.device_type = device_type
        self.phase = "load"
        self.step = 0
        self.after_backward = "optimizer_step"  # the phase of the first operator after the backward pass
        self.on_phase: Callable[[str, int], None] | None = None  # called before the sinks
        # called before each operator, with its arguments' blocks
        self.on_operator: Callable[[list[Allocation]], None] | None = None
        self._segment = 0
        self._recomputing = False
        self._at_head = False
        self._op = ""
        self._module = ""
        self._entered: list[str] = []  # the modules around those whose forward pass is running
        self._blocks: dict[int, Allocation] = {}  # by address of the StorageImpl
        self._watches: dict[int, weakref.ref] = {}
        self._sequence_numbers: list[int] = []  # where in the autograd graph a module's operators begin
        self._sequence_modules: list[str] = []

    @property
    def module(self) -> str:
        """The path of the module that runs now."""
        return self._module

    @property
    def op(self) -> str:
        """The operator that runs now."""
        return self._op

    # ---- phases

    def enter_phase(self, phase: str) -> None:
        """Starts `phase`. The caller sets `step` when a new step begins."""
        self._segment += 1
        self._recomputing = self._at_head = False
        self.phase = phase
        if self.on_phase is not None:
            self.on_phase(phase, self.step)
        for sink in self.sinks:
            sink.entered(phase, self.step)

    def _find_phase(self) -> None:
        """Follows the autograd engine: the backward pass begins, is interrupted by recomputation, and ends.

        What a module computes in its forward pass is part of that, even if it computes gradients, as a loss in chunks does.
        """
        if self.phase == "forward" and self._entered:
            return
        if torch._C._current_graph_task_id() == -1:
            if self.phase == "backward" and self.after_backward != "backward":
                self.enter_phase(self.after_backward)
            return
        if self.phase != "backward":
            self.enter_phase("backward")
        recomputing = torch.is_grad_enabled()  # the engine disables grad mode, checkpointing enables it to recompute
        begins = recomputing and not self._recomputing
        if recomputing != self._recomputing:
            self._segment += 1
            self._recomputing = recomputing
        if self._entered or (recomputing and not begins):
            return  # the module that is recomputed
        node = torch._C._current_autograd_node()
        number = node._sequence_nr() if node is not None else _NO_SEQUENCE_NUMBER
        if number < _NO_SEQUENCE_NUMBER:
            at = bisect.bisect_right(self._sequence_numbers, number) - 1
            self._module = self._sequence_modules[at] if at >= 0 else ""
        if begins and (layer := _LAYER.match(self._module)):  # checkpointing runs its forward pass without its hooks
            self._module = layer.group()

    # ---- storages

    def track(
        self, tensor: torch.Tensor, category: str | None = None, op: str | None = None, module: str | None = None
    ) -> Allocation | None:
        """Reports the storage of `tensor` if it is new, and labels it if `category` is given. Returns its block.

        By default it is born in the operator and the module that run now.
        """
        storage = self._storage_of(tensor)
        if storage is None:
            return None
        key = storage._cdata
        block = self._blocks.get(key)
        if block is not None:
            if block.nbytes == storage.nbytes():
                if category is not None:
                    block.category = category
                return block
            self._forget(key, block)  # resized in place
        return self._watch(storage, self._op if op is None else op, category, module)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Handles a tracked storage that was resized: engines free and allocate gathered weights this way."""
        block = self._blocks.get(storage._cdata)
        if block is not None and block.nbytes != storage.nbytes():
            self._forget(storage._cdata, block)
            self._watch(storage, "resize_", "communication")

    def _watch(
        self, storage: torch.UntypedStorage, op: str, category: str | None, module: str | None = None
    ) -> Allocation:
        key, block = storage._cdata, self._new_block(storage.nbytes(), op, category, module)
        self._blocks[key] = block
        self._watches[key] = weakref.ref(storage, partial(self._on_death, key, block))
        self._announce(block)
        return block

    def adopt(self, tensor: torch.Tensor, category: str, module: str = "") -> Allocation | None:
        """Tracks a tensor that existed before the trace (a parameter, the batch), under a known category."""
        return self.track(tensor, category, op="", module=module)

    def block_of(self, tensor: torch.Tensor) -> Allocation | None:
        """The block of `tensor`'s storage, or None if the storage is not tracked."""
        storage = self._storage_of(tensor)
        return None if storage is None else self._blocks.get(storage._cdata)

    def passing(self, nbytes: int, op: str = "") -> None:
        """Reports a buffer that a kernel allocates and frees before it returns, which PyTorch's operators do not show."""
        self.release(self.hold(nbytes, op))

    def hold(self, nbytes: int, op: str = "", category: str = "workspaces") -> Allocation:
        """Reports a buffer without a tensor, such as a library's workspace, which lives until `release`."""
        block = self._new_block(nbytes, op or self._op, category)
        self._announce(block)
        return block

    def release(self, block: Allocation) -> None:
        """Ends the life of a block that `hold` began."""
        block.died_in_segment = self._segment
        for sink in self.sinks:
            sink.died(block)

    def close(self) -> None:
        """Stops watching: the deaths of storages that outlive the trace are not reported."""
        self._watches.clear()
        self._blocks.clear()

    def _storage_of(self, tensor: torch.Tensor) -> torch.UntypedStorage | None:
        if self.device_type is not None and tensor.device.type != self.device_type:
            return None
        try:
            return tensor.untyped_storage()
        except NotImplementedError:  # sparse tensors have none; their parts are tracked
            return None

    def _new_block(self, nbytes: int, op: str, category: str | None, module: str | None = None) -> Allocation:
        return Allocation(
            nbytes=nbytes,
            op=op,
            module=self._module if module is None else module,
            phase=self.phase,
            step=self.step,
            segment=self._segment,
            builds_graph=self.phase == "forward" or self._recomputing,
            at_head=self._at_head,
            category=category,
        )

    def _announce(self, block: Allocation) -> None:
        for sink in self.sinks:
            sink.born(block)

    def _on_death(self, key: int, block: Allocation, _: weakref.ref) -> None:
        self._forget(key, block)

    def _forget(self, key: int, block: Allocation) -> None:
        if self._watches.pop(key, None) is not None:
            del self._blocks[key]
            self.release(block)

    # ---- operators

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled; True would add a wrapper around every operator

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if DTensor in types:
            return NotImplemented  # DTensor then runs the operator on its shard
        if torch._C._get_dispatch_mode(_FAKE) is not None:  # DTensor infers shapes on fake tensors of its own
            return op(*args, **(kwargs or {}))
        if op is torch.ops.prim.device.default:  # the autograd engine often queries the device of each fake tensor
            return getattr(args[0], "fake_device", None) or op(*args)
        kwargs = kwargs or {}
        self._find_phase()
        self._op = op.name()
        read = []
        for tensor in _tensors((args, *kwargs.values())):
            block = self.block_of(tensor)
            if block is None:  # made outside the trace: a batch, a library's table
                block = self.adopt(tensor, "buffers" if tensor.is_floating_point() else "inputs")
            if block is not None:
                read.append(block)
        if self.on_operator is not None:
            self.on_operator(read)
        if op.namespace == "c10d":
            self._label_sent((args, *kwargs.values()))
        result = op(*args, **kwargs) if self.overlay is None else self.overlay.run(self, op, args, kwargs)
        for tensor in _tensors(result):
            self.track(tensor)
        return result

    def _label_sent(self, arguments: Any) -> None:
        """Labels the tensors that a collective operation sends or fills as communication, unless they have another label."""
        for tensor in _tensors(arguments):
            block = self.block_of(tensor)
            if block is not None and (block.category is None or (block.category == "buffers" and not block.module)):
                block.category = "communication"

    # ---- modules

    @contextmanager
    def modules_of(self, model: torch.nn.Module, head: torch.nn.Module | None = None) -> Iterator[None]:
        """While open, each block gets the path of the module of `model` in which it is born.

        `head` is the output embedding, where logits and loss begin (None: they are not distinguished). Paths are those of
        `named_modules`. In the backward pass, the module is the one whose forward built the autograd node that is running.
        """
        names = {module: name for name, module in model.named_modules()}
        stack = self._entered

        def enter(module: torch.nn.Module, args: Any) -> None:
            if torch._C._current_graph_task_id() != -1:
                self._find_phase()  # a recomputation can begin in this module
            stack.append(self._module)
            self._module = names.get(module, self._module)
            if module is head and self.phase == "forward":
                self._at_head = True
            self._mark()

        def leave(module: torch.nn.Module, args: Any, output: Any) -> None:
            if stack:
                self._module = stack.pop()
                self._mark()

        hooks = [
            torch.nn.modules.module.register_module_forward_pre_hook(enter),
            torch.nn.modules.module.register_module_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            stack.clear()
            self._module = ""

    def _mark(self) -> None:
        """Records which module owns the autograd nodes from here on; their sequence numbers increase within a thread."""
        number = torch._C._autograd._get_sequence_nr()
        numbers, modules = self._sequence_numbers, self._sequence_modules
        while numbers and numbers[-1] >= number:
            numbers.pop()
            modules.pop()
        numbers.append(number)
        modules.append(self._module)


def current_trace() -> Trace | None:
    """The trace that is open."""
    return next((mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, Trace)), None)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    """The tensors in an operator's arguments or result, whose schemas nest only lists and tuples."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _tensors(item)
