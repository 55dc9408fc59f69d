"""What bitsandbytes' CUDA kernels allocate. Its CPU kernels, which a shadow step would run, allocate differently.

Each replacement allocates and frees what the CUDA implementation in `bitsandbytes/backends/cuda/ops.py` (0.50.2) does, in
the same order. The 4-bit product either dequantizes the whole weight or runs a fused kernel. That rule is not copied here:
the installed library's own function decides.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor

from toolkit.memory.cuda.cards import Card
from toolkit.memory.trace import Trace
from toolkit.seams import patched

# `_gemm_4bit_custom_max_m`: with more rows the weight is always dequantized; seam "1536 rows".
_FUSED_ROWS = 1536


@cache
def fused_rule() -> Callable[..., bool] | None:
    """bitsandbytes' own `_gemm_4bit_use_custom_cuda`, read from its source: its module cannot be imported without CUDA.

    It takes ((multiprocessors, major, minor), dtype, rows, out features, in features). None: this version does not have it.
    """
    import bitsandbytes

    path = Path(bitsandbytes.__file__).parent / "backends" / "cuda" / "ops.py"
    if not path.is_file():
        return None
    wanted = [
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == "_gemm_4bit_use_custom_cuda"
    ]
    if not wanted:
        return None
    wanted[0].decorator_list = []
    scope = {"torch": torch, "_GEMM_4BIT_CUSTOM_FLOOR_M": 4, "_gpu_dispatch_props": lambda device: device}
    exec(compile(ast.Module(body=[*wanted], type_ignores=[]), str(path), "exec"), scope)
    return scope["_gemm_4bit_use_custom_cuda"]


def gemm_4bit(card: Card, trace: Trace, args: tuple, kwargs: dict) -> torch.Tensor:
    """A (..., in) times a packed weight (out, in): fused for few rows; otherwise the weight is dequantized to A's dtype."""
    a, _packed, shape, _absmax, blocksize, *_ = args
    bias = kwargs.get("bias")
    rows, rule = a.numel() // a.shape[-1], fused_rule()
    if rule is not None and rows <= _FUSED_ROWS and a.shape[-1] % blocksize == 0:
        device = (card.multiprocessors, *card.capability)
        if rule(device, a.dtype, rows, shape[0], a.shape[-1]):
            return a.new_empty((*a.shape[:-1], shape[0]))
    held = []
    nested = kwargs.get("absmax_8bit")
    if nested is not None:  # double quantization: the block maxima are dequantized, then the offset is added
        held += [trace.hold(nested.numel() * 4), trace.hold(nested.numel() * 4)]
    weight = a.new_empty(tuple(shape))
    trace.track(weight, "temporaries")
    result = F.linear(a, weight, bias)
    trace.track(result)  # allocated before the dequantized weight is freed
    for block in held:
        trace.release(block)
    return result


def dequantize_4bit(card: Card, trace: Trace, args: tuple, kwargs: dict) -> torch.Tensor:
    """The dequantized weight (out, in), in the requested dtype."""
    packed, _, _, _, shape, dtype = args
    return packed.new_empty(tuple(shape), dtype=dtype)


def dequantize_blockwise(card: Card, trace: Trace, args: tuple, kwargs: dict) -> torch.Tensor:
    """The dequantized block maxima of double quantization: the same shape, in `dtype`."""
    packed, dtype = args[0], args[4]
    return torch.empty_like(packed, dtype=dtype)


def int8_vectorwise_quant(card: Card, trace: Trace, args: tuple, kwargs: dict) -> tuple:
    """Rows of A (rows, in) as int8, with one float32 scale each. With a threshold it searches for outliers and finds none:
    which columns have outliers depends on values, and a fine-tuned model has few."""
    a, threshold = args[0], kwargs.get("threshold", args[1] if len(args) > 1 else 0.0)
    scale = a.new_empty((prod(a.shape[:-1]),), dtype=torch.float32)
    trace.track(scale)
    rows = a.new_empty(a.shape, dtype=torch.int8)
    trace.track(rows)
    if threshold <= 0:
        return rows, scale, None
    absolute, mask = trace.hold(a.numel() * a.element_size()), trace.hold(a.numel())
    trace.release(absolute)
    trace.release(mask)
    return rows, scale, a.new_empty((0,), dtype=torch.int64)


def int8_scaled_mm(card: Card, trace: Trace, args: tuple, kwargs: dict) -> torch.Tensor:
    """int8 (rows, in) times int8 (out, in): an int32 product, scaled to float16, then cast to the requested dtype."""
    a, weight = args[0], args[1]
    dtype = kwargs.get("dtype") or (args[5] if len(args) > 5 and args[5] is not None else torch.float16)
    shape = (*a.shape[:-1], weight.shape[0])
    product = trace.hold(4 * prod(shape))
    half = None if dtype == torch.float16 else trace.hold(2 * prod(shape))
    result = a.new_empty(shape, dtype=dtype)
    trace.track(result)
    for block in (product, half):
        if block is not None:
            trace.release(block)
    return result


def int8_mixed_scaled_mm(card: Card, trace: Trace, args: tuple, kwargs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The int8 product, and the columns with outliers: none (see `int8_vectorwise_quant`)."""
    a, rows, weight = args[:3]
    return int8_scaled_mm(card, trace, (rows, weight), {"dtype": a.dtype}), a.new_empty((0,))


STAND_INS: dict[str, Callable[[Card, Trace, tuple, dict], Any]] = {
    "bitsandbytes::gemm_4bit": gemm_4bit,
    "bitsandbytes::dequantize_4bit": dequantize_4bit,
    "bitsandbytes::dequantize_blockwise": dequantize_blockwise,
    "bitsandbytes::int8_vectorwise_quant": int8_vectorwise_quant,
    "bitsandbytes::int8_scaled_mm": int8_scaled_mm,
    "bitsandbytes::int8_mixed_scaled_mm": int8_mixed_scaled_mm,
}


@contextmanager
def cuda_paths() -> Iterator[None]:
    """While open, bitsandbytes runs the code for GPUs. On a CPU its int8 layers train through dequantized weights."""
    try:
        from bitsandbytes.autograd._functions import MatMul8bitLt, MatmulLtState
    except ImportError:
        yield
        return

    def matmul(
        a: torch.Tensor,
        b: torch.Tensor,
        out: torch.Tensor | None = None,
        state: Any = None,
        threshold: float = 0.0,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        state = state or MatmulLtState()
        if threshold > 0.0:
            state.threshold = threshold
        return MatMul8bitLt.apply(a, b, out, bias, state)

    with patched("bitsandbytes.matmul", matmul):
        yield


@contextmanager
def dequantized_by_peft() -> Iterator[None]:
    """While open, DoRA dequantizes fake 4-bit weights too. PEFT recognizes real ones by the name of their class."""
    try:
        from bitsandbytes.functional import dequantize_4bit as dequantize
        from peft.tuners.lora import dora
    except ImportError:
        yield
        return
    plain = dora.dequantize_module_weight

    def dequantize_module_weight(module: Any) -> torch.Tensor:
        state = getattr(module.weight, "quant_state", None) if isinstance(module.weight, FakeTensor) else None
        return plain(module) if state is None else dequantize(module.weight.data, state)

    with patched("dequantize_module_weight", dequantize_module_weight):
        yield
