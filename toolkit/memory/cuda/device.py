"""A CUDA card for the shadow step: what its kernels and libraries allocate that fake tensors on a CPU do not show.

`Cuda(card)` is the `Device` of the shadow step. Each of its parts states its reason and has a test:

- `CudaOverlay` runs operators: buffers inside kernels, workspaces, gradients summed in place.
- `running()` replaces the Python functions that behave differently on a GPU: attention (`attention`), softmax, dropout,
  the operators that CUDA's autocast runs in float32 (`autocast`), FlashAttention (`flash`), Liger (`liger`) and bitsandbytes (`quantized`).
- `load()` replays loading (`loading`); `prepare()` makes optimizers use their foreach implementations.

The docstrings below name their sources: files of PyTorch 2.14, under aten/src/ATen unless the path begins with torch/.
All sizes are bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from toolkit.memory import meta_ops
from toolkit.memory.cuda import attention, loading, quantized
from toolkit.memory.cuda.allocator import AllocatorMeter
from toolkit.memory.cuda.autocast import cuda_autocast, in_lower_precision
from toolkit.memory.cuda.cards import Card
from toolkit.memory.cuda.flash import flash_attention
from toolkit.memory.cuda.gradient_sums import caller, find_refcounts, sums_gradients
from toolkit.memory.cuda.liger import liger_kernel
from toolkit.memory.trace import Trace
from toolkit.seams import patched
from toolkit.units import MIB, format_bytes

_NOTEWORTHY = 256 * MIB  # below this, the difference can be the error of an estimated context
_MATRIX_PRODUCTS = {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::addmv", "aten::mv", "aten::dot"}


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def softmax_backward(args: tuple) -> list[int]:
    """native/cuda/SoftMax.cu, `softmax_backward_cuda_out`: `tmp = grad * output`, as large as the gradient."""
    return [_bytes(args[0])]


def flash_backward(args: tuple) -> list[int]:
    """native/transformers/cuda/flash_attn/flash_api.cpp, `mha_bwd`: row sums (batch, heads, queries) and the query's
    gradient in float32, with queries rounded to 128 and head size to 32; with fewer key heads, their gradients once for
    each query head."""
    query, key = args[1], args[2]
    batch, heads, queries, size = query.shape
    queries = _round_up(queries, 128)
    rounded = _round_up(size, 32) if size <= 192 else 256
    hidden = [4 * batch * heads * queries, 4 * batch * heads * queries * rounded]
    if key.shape[1] != heads:
        hidden += 2 * [_bytes(key) * heads // key.shape[1]]
    return hidden


def efficient_backward(args: tuple) -> list[int]:
    """native/transformers/cuda/attention_backward.cu, `_efficient_attention_backward`: delta (batch, heads, queries) in
    float32 and, for 16-bit inputs, a workspace in which the query's gradient is summed in float32."""
    query = args[1]
    delta = 4 * query.shape[0] * query.shape[1] * query.shape[2]
    return [delta] if query.dtype == torch.float32 else [delta, 4 * query.numel()]


def embedding_backward(args: tuple) -> list[int]:
    """native/cuda/Embedding.cu: more than 3,072 indices are sorted, with their places, from one buffer into another."""
    indices = args[1]
    return [4 * _bytes(indices)] if indices.numel() > 3072 else []


def safe_softmax(args: tuple) -> list[int]:
    """native/transformers/attention.cpp: a mask of the scores, a mask of the fully masked rows, and the zero written to them.

    The zero is written into the softmax itself, so there is no second matrix of scores.
    """
    scores, dim = args[:2]
    return [scores.numel(), scores.numel() // scores.shape[dim], scores.element_size()]


def singular_values(args: tuple) -> list[int]:
    """native/cuda/linalg/BatchLinearAlgebraLib.cpp, `svd_cusolver`: a copy of the matrix, which cuSOLVER overwrites. Its own workspace
    is not counted: only cuSOLVER knows its size."""
    return [_bytes(args[0])]


HIDDEN: dict[str, Callable[[tuple], list[int]]] = {
    "aten::_safe_softmax": safe_softmax,
    "aten::_softmax_backward_data": softmax_backward,
    "aten::_scaled_dot_product_flash_attention_backward": flash_backward,
    "aten::_scaled_dot_product_efficient_attention_backward": efficient_backward,
    "aten::embedding_dense_backward": embedding_backward,
    "aten::_linalg_svd": singular_values,
}


class CudaOverlay:
    """Runs each operator with the memory use that it has on `card`."""

    def __init__(self, card: Card) -> None:
        self.card = card
        self._threads: set[bool] = set()  # the threads with a cuBLAS workspace: False is the main one, True autograd's
        find_refcounts()

    def run(self, trace: Trace, op: Any, args: tuple, kwargs: dict) -> Any:
        name = op.name()
        stand_in = quantized.STAND_INS.get(name)
        if stand_in is not None:
            return stand_in(self.card, trace, args, kwargs)
        if name == "aten::add.Tensor" and (sums_gradients(args) or _adds_a_mask()):
            return args[0]
        result = meta_ops.run(op, args, kwargs)
        if name in _MATRIX_PRODUCTS:
            self._workspace(trace, result)
        hidden = HIDDEN.get(name)
        if hidden is not None:
            for tensor in result if isinstance(result, tuple) else (result,):
                if isinstance(tensor, torch.Tensor):
                    trace.track(tensor)  # PyTorch allocates the result first
            for block in [trace.hold(nbytes) for nbytes in hidden(args)]:
                trace.release(block)
        return result

    def _workspace(self, trace: Trace, result: torch.Tensor) -> None:
        """cuda/CublasHandlePool.cpp: each thread's handle allocates a workspace at its first product and keeps it; autograd
        has its own thread. cuBLASLt (a linear layer with bias) shares the workspace since PyTorch 2.7."""
        in_autograd = torch._C._current_graph_task_id() != -1
        if in_autograd not in self._threads:
            self._threads.add(in_autograd)
            trace.track(result)
            trace.hold(self.card.blas_workspace_bytes, "cublas")


def _adds_a_mask() -> bool:
    """Whether this addition adds a mask to the scores in the math kernel for attention.

    native/transformers/attention.cpp, `_scaled_dot_product_attention_math`: it is in place, except for tensor subclasses. The
    kernel is called from `attention` and adds in C++: seam "mask of the math kernel".
    """
    code = caller()
    return code is not None and code.co_filename == attention.__file__


class _HalfToFloatSoftmax(torch.autograd.Function):
    """Softmax from float16 to float32 in one kernel: neither pass makes a float32 copy of the float16 tensor."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int) -> torch.Tensor:
        output = x.new_empty(x.shape, dtype=torch.float32)
        ctx.save_for_backward(output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (output,) = ctx.saved_tensors
        result = output.new_empty(output.shape, dtype=torch.float16)
        # the buffer inside the kernel (`softmax_backward`), allocated after the result
        product = torch.empty_like(grad)
        del product
        return result, None


def _is_autocast(x: torch.Tensor) -> bool:
    """Whether autocast would change what runs on `x`."""
    return isinstance(x, FakeTensor) and torch.is_autocast_enabled("cpu") and x.dtype in (torch.float16, torch.bfloat16)


def replaced_functions(card: Card, built_with_flash: bool = True) -> dict[str, Callable[..., Any]]:
    """Replacements for functions of `torch.nn.functional`, by name, as they run on `card`; real tensors take the original."""
    softmax, log_softmax, cross_entropy = F.softmax, F.log_softmax, F.cross_entropy
    dropout, real_attention = F.dropout, F.scaled_dot_product_attention
    fake_attention = attention.attention_on(card, built_with_flash)

    def cuda_softmax(input: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
        # native/SoftMax.cpp: only float16 is converted inside the kernel; bfloat16 is cast first. A given dtype is kept.
        dtype = torch.float32 if dtype is None and _is_autocast(input) else dtype
        if isinstance(input, FakeTensor) and input.dtype == torch.float16 and dtype == torch.float32:
            return _HalfToFloatSoftmax.apply(input, dim)
        return softmax(input, dim, _stacklevel, dtype)

    def cuda_log_softmax(input: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
        dtype = torch.float32 if dtype is None and _is_autocast(input) else dtype
        return log_softmax(input, dim, _stacklevel, dtype)

    def cuda_cross_entropy(
        input: Any,
        target: Any,
        weight: Any = None,
        size_average: Any = None,
        ignore_index: int = -100,
        *rest: Any,
        **more: Any,
    ) -> Any:
        # native/LossNLL.cpp: its log_softmax gets the input's dtype, which autocast keeps; nll_loss runs in float32.
        if not _is_autocast(input) or rest or more.get("label_smoothing") or target.is_floating_point():
            return cross_entropy(input, target, weight, size_average, ignore_index, *rest, **more)
        more.pop("label_smoothing", None)
        logs = log_softmax(input, min(1, input.dim() - 1), dtype=input.dtype)
        return F.nll_loss(logs, target, weight, size_average, ignore_index, **more)

    def cuda_dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        # native/Dropout.cpp: fused on CUDA with a bool mask; on a CPU the mask has the dtype of the input.
        if isinstance(input, FakeTensor) and training and 0 < p < 1 and not inplace:
            return torch.native_dropout(input, p, True)[0]
        return dropout(input, p, training, inplace)

    def cuda_attention(query: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(query, FakeTensor):
            return in_lower_precision(fake_attention, query, *args, **kwargs)
        return real_attention(query, *args, **kwargs)

    return {
        "softmax": cuda_softmax,
        "log_softmax": cuda_log_softmax,
        "cross_entropy": cuda_cross_entropy,
        "dropout": cuda_dropout,
        "scaled_dot_product_attention": cuda_attention,
    }


def _expandable_segments() -> bool:
    """Whether the environment enables them, as it would for a run from here (PYTORCH_CUDA_ALLOC_CONF is the older name)."""
    settings = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    return "expandable_segments:true" in settings.replace(" ", "").lower()


@contextmanager
def _fused_dropout() -> Iterator[None]:
    """native/Dropout.cpp: on CUDA `at::dropout` is one operator with a bool mask; on a CPU, a mask in the input's dtype and a product.

    `replaced_functions` replaces it only for calls from Python; the math kernel for attention calls it from C++.
    """
    library = torch.library.Library("aten", "IMPL")

    def dropout(input: torch.Tensor, p: float, train: bool) -> torch.Tensor:
        if not train or p == 0 or not input.numel():
            return input
        return input * 0 if p == 1 else torch.native_dropout(input, p, train)[0]

    library.impl("dropout", dropout, "AutogradCPU")
    try:
        yield
    finally:
        library._destroy()


def _page_state(optimizer: Any) -> None:
    """bitsandbytes/optim/optimizer.py, `get_state_buffer`: state of 100,000 elements or more is in managed memory, outside
    PyTorch's allocator. The driver keeps it on the card while there is room, and moves it to the host's memory otherwise.
    Fake state only gets the mark. It depends on seam "state of paged optimizers"."""

    def get_state_buffer(p: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        buffer = torch.zeros_like(p, dtype=dtype)
        buffer.is_paged = p.numel() >= 1e5
        return buffer

    optimizer.get_state_buffer = get_state_buffer
    optimizer.prefetch_state = lambda p: None


class Cuda:
    """A card as the device of a shadow step.

    Args:
        card: the card that is predicted.
        expandable_segments: the allocator setting of that name; by default as in PYTORCH_ALLOC_CONF.
        budget_bytes: bytes that the process can use, context included; by default all that the card offers.
        adapters_cast_on_device: see `loading.replay`.
        empties_cache_after_casts: whether PEFT empties the cache after its casts (0.20 and later do).
        built_with_flash: whether PyTorch was built with the flash kernel; by default as the installed one.
    """

    def __init__(
        self,
        card: Card,
        expandable_segments: bool | None = None,
        budget_bytes: int | None = None,
        adapters_cast_on_device: bool = False,
        empties_cache_after_casts: bool = True,
        built_with_flash: bool | None = None,
    ) -> None:
        self.card = card
        self.name = card.name
        self.context_bytes: int | None = card.context_bytes
        self.budget_bytes: int | None = card.budget_bytes if budget_bytes is None else budget_bytes
        self.expandable_segments = _expandable_segments() if expandable_segments is None else expandable_segments
        self.adapters_cast_on_device = adapters_cast_on_device
        self.empties_cache_after_casts = empties_cache_after_casts
        self.built_with_flash = attention.installed_has_flash() if built_with_flash is None else built_with_flash
        self._meter = AllocatorMeter(self.expandable_segments)

    @property
    def notes(self) -> tuple[str, ...]:
        """The card's figures that are estimates, one sentence each."""
        notes = []
        if self.card.context_is_estimate and self.card.context_bytes:
            notes.append(f"the CUDA context of {self.card.name} is an estimate: it was not measured")
        if self.card.context_bytes == 0:
            notes.append(
                "no CUDA context is counted: a size in GiB or MiB is what PyTorch can use; a card as sold is given in GB"
            )
        if self.card.total_is_estimate:
            notes.append(f"the capacity of {self.card.name} is a typical value: no public report confirms it")
        if self.card.taken_bytes >= _NOTEWORTHY:
            notes.append(f"other programs use {format_bytes(self.card.taken_bytes)} of {self.card.name}")
        if self.card.is_limited:
            notes.append(
                f"PyTorch is limited to {format_bytes(self.card.limit_bytes or 0)} of {self.card.name}: set_per_process_memory_fraction, "
                "or per_process_memory_fraction in PYTORCH_ALLOC_CONF"
            )
        return tuple(notes)

    def meter(self) -> AllocatorMeter:
        """A new replay of the caching allocator."""
        self._meter = AllocatorMeter(self.expandable_segments)
        return self._meter

    def limited_meter(self) -> AllocatorMeter | None:
        """A new replay on a card whose memory is limited to the budget."""
        if self.budget_bytes is None:
            return None
        return AllocatorMeter(self.expandable_segments, capacity=self.budget_bytes - (self.context_bytes or 0))

    def overlay(self) -> CudaOverlay:
        """A new overlay, in which no cuBLAS handle has a workspace yet."""
        return CudaOverlay(self.card)

    @contextmanager
    def running(self) -> Iterator[None]:
        """While open, functions behave as on this card."""
        replaced = replaced_functions(self.card, self.built_with_flash)
        with (
            quantized.cuda_paths(),
            cuda_autocast(),
            _fused_dropout(),
            flash_attention(self.card),
            liger_kernel(self.card),
            ExitStack() as stack,
        ):
            for name, function in replaced.items():
                stack.enter_context(patched(f"F.{name}", function))
            yield

    def load(self, trace: Trace, model: nn.Module) -> None:
        """Replays loading in its order, with its staging buffers."""
        give_back = self._meter.empty_cache if self.empties_cache_after_casts else lambda: None
        loading.replay(trace, model, give_back, self.adapters_cast_on_device)

    def prepare(self, trainer: Any) -> None:
        """Makes optimizers work as on CUDA: PyTorch's update all parameters together (foreach); paged ones page their state."""
        create = trainer.create_optimizer

        def create_optimizer(*args: Any, **kwargs: Any) -> Any:
            optimizer = create(*args, **kwargs)
            if getattr(trainer.optimizer, "is_paged", False):
                _page_state(trainer.optimizer)
            for group in getattr(trainer.optimizer, "param_groups", ()):
                if group.get("foreach", False) is None and not group.get("fused"):
                    group["foreach"] = True
            return optimizer

        trainer.create_optimizer = create_optimizer
