"""The trace: every storage's birth and death, with the operator, module and phase that it happened in.

A `Trace` is a `TorchDispatchMode`, so it sees each operator below autograd, forward and backward alike, and it works on
real and on fake tensors with the same code. It keeps no books: it tells its sinks (`recording.Recording`, an allocator)
what is born and what dies, in order.

    meter = Counter()
    trace = Trace(meter, Recording(meter))
    trace.adopt(weight, "parameters_frozen")      # what was there before
    with trace, trace.modules_of(model):
        trace.enter_phase("forward")
        ...

Phases are entered by name, except "backward", which the trace finds by itself: an operator that runs inside an autograd
graph task is in the backward pass, whoever called it (a loop, `Trainer`, DDP's reducer).
"""

from __future__ import annotations

import bisect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

PHASES = ("load", "forward", "backward", "optimizer_step")
_FAKE = torch._C._TorchDispatchModeKey.FAKE
# AccumulateGrad nodes carry 2**64 - 1: they belong to no point of the forward pass; seam "sequence number of AccumulateGrad".
_NO_SEQUENCE_NUMBER = 2**63


@dataclass(slots=True, eq=False)
class Allocation:
    """One storage (or hidden buffer): `nbytes` as requested, before any allocator's rounding."""

    nbytes: int
    op: str
    module: str
    phase: str
    step: int
    segment: int  # stretches of forward, of recomputation or of pure backward, numbered in order
    builds_graph: bool  # born in the forward pass, or in checkpointing's recomputation of it
    at_head: bool  # born at or after the output embedding, in the forward pass: logits and loss
    category: str | None = None  # of `ledger.CATEGORIES` where it is known, else `recording` infers it from its life
    died_in_segment: int | None = None
    offloaded: bool = False  # in the host's memory, where the engine says so
    handle: Any = None  # for the meter's own use


class Sink(Protocol):
    """Listens to a trace. Sinks are told in the order in which they were given, so a meter comes before its reader."""

    def born(self, block: Allocation) -> None: ...

    def died(self, block: Allocation) -> None: ...

    def entered(self, phase: str, step: int) -> None: ...


class Overlay(Protocol):
    """Runs an operator in the trace's stead where another device would do it differently.

    `run` returns the operator's result; by default `op(*args, **kwargs)`. It may call `trace.passing` and `trace.hold`
    for buffers that the kernel takes unseen (before or, after `trace.track(result)`, behind the output), or return
    tensors of other sizes or dtypes than `op` would.
    """

    def run(self, trace: Trace, op: Any, args: tuple, kwargs: dict) -> Any: ...


class Trace(TorchDispatchMode):
    """Tells `sinks` about each storage; `device_type` limits it to one kind of device (None: all, as for a shadow)."""

    def __init__(self, *sinks: Sink, overlay: Overlay | None = None, device_type: str | None = None):
        super().__init__()
        self.sinks = sinks
        self.overlay = overlay
        self.device_type = device_type
        self.phase = "load"
        self.step = 0
        self.after_backward = "optimizer_step"  # the phase of the first operator behind the backward pass
        self.on_phase: Callable[[str, int], None] | None = None  # told before the sinks are; may change nothing
        self._segment = 0
        self._recomputing = False
        self._at_head = False
        self._op = ""
        self._module = ""
        self._blocks: dict[int, Allocation] = {}  # by address of the StorageImpl
        self._watches: dict[int, weakref.ref] = {}
        self._sequence_numbers: list[int] = []  # where in the autograd graph a module's operators begin
        self._sequence_modules: list[str] = []

    # ---- phases

    def enter_phase(self, phase: str) -> None:
        """Starts `phase`; entering "forward" after "optimizer_step" is for the caller to count as a new `step`."""
        self._segment += 1
        self._recomputing = self._at_head = False
        self.phase = phase
        if self.on_phase is not None:
            self.on_phase(phase, self.step)
        for sink in self.sinks:
            sink.entered(phase, self.step)

    def _find_phase(self) -> None:
        """Follows the autograd engine: backward begins, is interrupted by recomputation, ends."""
        if torch._C._current_graph_task_id() == -1:
            if self.phase == "backward" and self.after_backward != "backward":
                self.enter_phase(self.after_backward)
            return
        if self.phase != "backward":
            self.enter_phase("backward")
        recomputing = torch.is_grad_enabled()  # the engine disables grad mode, checkpointing enables it to recompute
        if recomputing != self._recomputing:
            self._segment += 1
            self._recomputing = recomputing
        if not recomputing:
            node = torch._C._current_autograd_node()
            number = node._sequence_nr() if node is not None else _NO_SEQUENCE_NUMBER
            if number < _NO_SEQUENCE_NUMBER:
                at = bisect.bisect_right(self._sequence_numbers, number) - 1
                self._module = self._sequence_modules[at] if at >= 0 else ""

    # ---- storages

    def track(self, tensor: torch.Tensor, category: str | None = None, op: str | None = None) -> Allocation | None:
        """Announces `tensor`'s storage if it is new, and labels it where `category` is given. Returns its block."""
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
        return self._watch(storage, self._op if op is None else op, category)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """A storage that is known has another size now: engines let gathered weights go, and take them back, like that."""
        block = self._blocks.get(storage._cdata)
        if block is not None and block.nbytes != storage.nbytes():
            self._forget(storage._cdata, block)
            self._watch(storage, "resize_", "communication")

    def _watch(self, storage: torch.UntypedStorage, op: str, category: str | None) -> Allocation:
        key, block = storage._cdata, self._new_block(storage.nbytes(), op, category)
        self._blocks[key] = block
        self._watches[key] = weakref.ref(storage, partial(self._on_death, key, block))
        self._announce(block)
        return block

    def adopt(self, tensor: torch.Tensor, category: str, module: str = "") -> Allocation | None:
        """Tracks a tensor that was there before the trace was (a parameter, the batch), under a known category."""
        before, self._module = self._module, module
        try:
            return self.track(tensor, category, op="")
        finally:
            self._module = before

    def block_of(self, tensor: torch.Tensor) -> Allocation | None:
        """The block of a storage that is tracked already, else None."""
        storage = self._storage_of(tensor)
        return None if storage is None else self._blocks.get(storage._cdata)

    def passing(self, nbytes: int, op: str = "") -> None:
        """A buffer that a kernel takes and gives back before it returns, unseen by PyTorch's operators."""
        self.release(self.hold(nbytes, op))

    def hold(self, nbytes: int, op: str = "", category: str = "workspaces") -> Allocation:
        """A buffer without a tensor, such as a library's workspace, held until `release`."""
        block = self._new_block(nbytes, op or self._op, category)
        self._announce(block)
        return block

    def release(self, block: Allocation) -> None:
        """Ends the life of a block that `hold` began."""
        block.died_in_segment = self._segment
        for sink in self.sinks:
            sink.died(block)

    def close(self) -> None:
        """Stops watching: storages that outlive the trace die unheard from here on."""
        self._watches.clear()
        self._blocks.clear()

    def _storage_of(self, tensor: torch.Tensor) -> torch.UntypedStorage | None:
        if self.device_type is not None and tensor.device.type != self.device_type:
            return None
        try:
            return tensor.untyped_storage()
        except NotImplementedError:  # sparse tensors have none; their parts are tracked
            return None

    def _new_block(self, nbytes: int, op: str, category: str | None) -> Allocation:
        return Allocation(
            nbytes=nbytes,
            op=op,
            module=self._module,
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
        return False  # nothing here is compiled, and the wrapper that this leaves out runs for every operator

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it asks again, for its shard
        if torch._C._get_dispatch_mode(_FAKE) is not None:  # DTensor tries an operator on tensors of no substance
            return op(*args, **(kwargs or {}))
        if op is torch.ops.prim.device.default:  # the autograd engine asks each fake tensor where it is, many times
            return getattr(args[0], "fake_device", None) or op(*args)
        kwargs = kwargs or {}
        self._find_phase()
        self._op = op.name()
        for tensor in _tensors((args, *kwargs.values())):
            if self.block_of(tensor) is None:  # made outside: a batch, a library's table
                self.adopt(tensor, "buffers" if tensor.is_floating_point() else "inputs")
        if op.namespace == "c10d":
            self._label_sent((args, *kwargs.values()))
        result = op(*args, **kwargs) if self.overlay is None else self.overlay.run(self, op, args, kwargs)
        for tensor in _tensors(result):
            self.track(tensor)
        return result

    def _label_sent(self, arguments: Any) -> None:
        """What a collective operation sends or fills, and nothing else claims, is a buffer of communication."""
        for tensor in _tensors(arguments):
            block = self.block_of(tensor)
            if block is not None and (block.category is None or (block.category == "buffers" and not block.module)):
                block.category = "communication"

    # ---- modules

    @contextmanager
    def modules_of(self, model: torch.nn.Module, head: torch.nn.Module | None = None) -> Iterator[None]:
        """While open, blocks carry the path of the `model`'s module that they are born in, and the head is noticed.

        `head` is the output embedding (None: no logits are told apart). Paths are as `named_modules` gives them;
        in backward they are those of the module whose forward built the autograd node that is running.
        """
        names = {module: name for name, module in model.named_modules()}
        stack: list[str] = []

        def enter(module: torch.nn.Module, args: Any) -> None:
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
            self._module = ""

    def _mark(self) -> None:
        """Remembers which module owns the autograd nodes from here on; numbers grow with time within a thread."""
        number = torch._C._autograd._get_sequence_nr()
        numbers, modules = self._sequence_numbers, self._sequence_modules
        while numbers and numbers[-1] >= number:
            numbers.pop()
            modules.pop()
        numbers.append(number)
        modules.append(self._module)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    """The tensors in an operator's arguments or result: schemas nest lists and tuples, nothing else."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _tensors(item)
