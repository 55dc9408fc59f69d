"""Sums of gradients: autograd adds in place where it can, but never under a dispatch mode such as a trace.

If a tensor is used twice, autograd's engine sums its gradients. Under a dispatch mode every tensor counts as a subclass
(ATen/TensorSubclassLikeUtils.h), so the engine adds into a new tensor. Measured on an H200: a traced step of full fine-tuning
of Llama-3.2-1B, whose embedding is tied, then held 5 % more than the steps without a trace. So both kinds of trace check the
engine's own conditions: the overlay of a card on fake tensors, and `SumsInPlace` on the real tensors of a GPU.
"""

from __future__ import annotations

import sys
from functools import cache
from types import CodeType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from toolkit.memory.trace import Trace

# the modules between an operator's caller and its overlay
_DISPATCH = {__name__, "toolkit.memory.cuda.device", "toolkit.memory.trace", "torch._ops"}


class SumsInPlace:
    """The overlay of a measured step: real operators, with gradients summed in place as in a step without a trace."""

    def __init__(self) -> None:
        find_refcounts()

    def run(self, trace: Trace, op: Any, args: tuple, kwargs: dict) -> Any:
        if op is torch.ops.aten.add.Tensor and not kwargs and sums_gradients(args):
            return args[0].add_(args[1])
        return op(*args, **kwargs)


def sums_gradients(args: tuple) -> bool:
    """Whether autograd's engine does this addition in place without a trace: it sums the gradients of a tensor that is used twice.

    torch/csrc/autograd/input_buffer.cpp, `can_accumulate_inplace`: the engine adds into the first gradient if that is dense
    and if nothing else refers to the tensor or its storage. It never adds into a view, whose base refers to the storage too
    (the gradient of a linear layer's 3-D input, or of a tied embedding). Another reference to the tensor is a second node
    that received the same gradient and has not run yet.
    It depends on seams "who sums gradients" and "holders of a tensor".
    """
    if torch._C._current_graph_task_id() == -1 or torch.is_grad_enabled() or len(args) < 2:
        return False
    code = caller()
    if code is not None and code.co_name != "_engine_run_backward":
        return False
    first, second = args[:2]
    if not (isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)) or first.layout != torch.strided:
        return False
    alike = first.shape == second.shape and first.dtype == second.dtype and second.layout == torch.strided
    return alike and _is_dense(first) and _refcounts(first) == _unshared_refcounts()


def caller() -> CodeType | None:
    """The Python code that called the current operator: the nearest frame outside the dispatch of operators.

    C++ code has no Python frame: for autograd's engine, its nodes and kernels this is the Python code that called them. A node
    written in Python and the recomputation of activation checkpointing have their own frame.
    """
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") in _DISPATCH:
        frame = frame.f_back
    return None if frame is None else frame.f_code


def find_refcounts() -> None:
    """Finds the counts that `sums_gradients` compares with. It runs a backward pass: call it outside operators and traces."""
    _unshared_refcounts()


def _refcounts(tensor: torch.Tensor) -> tuple[int, int]:
    """The C++ reference counts of `tensor` and of its storage."""
    return tensor._use_count(), torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


class _FirstGradient(TorchDispatchMode):
    """Records the reference counts of the first gradient that the engine adds to."""

    refcounts = (0, 0)

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if op is torch.ops.aten.add.Tensor and torch._C._current_graph_task_id() != -1:
            self.refcounts = _refcounts(args[0])
        return op(*args, **(kwargs or {}))


@cache
def _unshared_refcounts() -> tuple[int, int]:
    """`_refcounts` of a gradient to which only the engine, the call and the Python object refer, inside a dispatch mode.

    The counts differ between versions of PyTorch, so a backward pass finds them. The first call must not be inside an operator.
    """
    with torch.enable_grad(), _FirstGradient() as seen:
        x = torch.ones(1, requires_grad=True) * 1.0
        torch.autograd.grad(x * 2.0 - x * 3.0, x)
    return seen.refcounts


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill the memory that they span, each exactly once (an expanded tensor spans less)."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return span == tensor.numel()
