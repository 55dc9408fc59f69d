"""CUDA's autocast on a CPU: the operators that CUDA's autocast runs in float32 and the CPU's autocast does not.

The common case is `gelu_new` of GPT-2 and T5: on a card, its `pow` makes the rest of the feed-forward layer float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from toolkit.seams import patched

_KEY = "AutocastCPU"
# ATen/autocast_mode.h (PyTorch 2.14), AT_FORALL_FP32: all inputs are cast. PyTorch 2.11 does not have `rms_norm` in it; there it
# gets no rule. A test compares both lists with the header of the installed PyTorch: seam "operators of CUDA's autocast".
FP32 = [
    "acos",
    "asin",
    "cosh",
    "erfinv",
    "exp",
    "expm1",
    "log",
    "log10",
    "log2",
    "log1p",
    "reciprocal",
    "rsqrt",
    "sinh",
    "tan",
    "pow.Tensor_Scalar",
    "pow.Tensor_Tensor",
    "pow.Scalar",
    "softplus",
    "layer_norm",
    "native_layer_norm",
    "rms_norm",
    "group_norm",
    "frobenius_norm.dim",
    "nuclear_norm",
    "nuclear_norm.dim",
    "cosine_similarity",
    "poisson_nll_loss",
    "cosine_embedding_loss",
    "nll_loss",
    "nll_loss2d",
    "hinge_embedding_loss",
    "kl_div",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "mse_loss",
    "margin_ranking_loss",
    "multilabel_margin_loss",
    "soft_margin_loss",
    "triplet_margin_loss",
    "multi_margin_loss",
    "binary_cross_entropy_with_logits",
    "dist",
    "pdist",
    "cdist",
    "renorm",
    "logsumexp",
    "upsample_nearest1d",
    "_upsample_nearest_exact1d",
    "upsample_nearest2d",
    "_upsample_nearest_exact2d",
    "upsample_nearest3d",
    "_upsample_nearest_exact3d",
    "upsample_linear1d",
    "upsample_bilinear2d",
    "_upsample_bilinear2d_aa",
    "upsample_trilinear3d",
    "upsample_bicubic2d",
    "_upsample_bicubic2d_aa",
]
# AT_FORALL_FP32_SET_OPT_DTYPE: the result is float32 unless the caller gives a dtype; the input keeps its dtype. Softmax, also
# in that list, is replaced in `device.replaced_functions`.
FP32_RESULT = ("prod", "prod.dim_int", "cumprod", "cumsum", "sum", "sum.dim_IntList")


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """While open, autocast on a CPU also applies the rules of CUDA's autocast.

    Operators with a CPU rule keep it. Operators without a CUDA rule in the installed PyTorch get none.
    `torch.is_autocast_enabled()` without a device (PEFT's quantized layers) means CUDA; here it answers for the CPU.
    """
    library, enabled = torch.library.Library("aten", "IMPL"), torch.is_autocast_enabled
    has_rule = torch._C._dispatch_has_kernel_for_dispatch_key
    try:
        with patched("torch.is_autocast_enabled", lambda *device: enabled(*(device or ("cpu",)))):
            for names, kernel in ((FP32, _in_float32), (FP32_RESULT, _into_float32)):
                for name in names:
                    if has_rule(f"aten::{name}", "AutocastCUDA") and not has_rule(f"aten::{name}", _KEY):
                        packet, _, overload = name.partition(".")
                        op = getattr(getattr(torch.ops.aten, packet), overload or "default")
                        library.impl(name, kernel(op), _KEY)
            yield
    finally:
        library._destroy()


def in_lower_precision(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Runs `function` as autocast runs an operator of AT_FORALL_LOWER_PRECISION_FP: it casts the inputs and nothing inside."""
    if not torch.is_autocast_enabled("cpu"):
        return function(*args, **kwargs)
    dtype = torch.get_autocast_dtype("cpu")

    def cast(value: Any) -> Any:
        eligible = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if eligible else value

    with _without_autocast():
        return function(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})


def _in_float32(op: Any) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with _without_autocast():
            return op(*map(_cast, args), **{name: _cast(value) for name, value in kwargs.items()})

    return run


def _into_float32(op: Any) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("dtype") is None and _is_16_bits(args[0]):
            kwargs["dtype"] = torch.float32
        with _without_autocast():
            return op(*args, **kwargs)

    return run


def _without_autocast() -> Any:
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _KEY)))


def _cast(value: Any) -> Any:
    return value.float() if _is_16_bits(value) else value


def _is_16_bits(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16)
