"""Which kernel `scaled_dot_product_attention` runs on a card, and the operator that represents it on fake tensors.

The rules are those of `sdp_utils.cpp` (ATen/native/transformers/cuda, PyTorch 2.14): the first kernel that supports the
inputs runs, in the order cuDNN (first only on Hopper and data-centre Blackwell), flash, memory-efficient, math. The user's
switches (`torch.nn.attention.sdpa_kernel`) are respected. The math kernel writes the full matrix of scores (batch, heads,
queries, keys) several times, in float32 for 16-bit inputs; the other kernels never write it. So choosing the wrong kernel
is the largest error that a prediction can make.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from toolkit.memory.cuda.cards import Card

_HALF = (torch.float16, torch.bfloat16)
_TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def choose_kernel(
    card: Card,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    enable_gqa: bool = False,
    built_with_flash: bool = True,
) -> str:
    """`"cudnn"`, `"flash"`, `"efficient"` or `"math"`.

    Args:
        query: (..., heads, queries, head size); `key` and `value`: (..., key heads, keys, head size).
        built_with_flash: whether PyTorch was built with the flash kernel (`installed_has_flash`).

    Raises:
        RuntimeError: as PyTorch does, if the user's switches leave no kernel that can run.
    """
    cuda = torch.backends.cuda
    same_size = query.shape[-1] == key.shape[-1] == value.shape[-1]
    grouped = query.shape[-3] != key.shape[-3] if query.dim() == 4 else False
    square = query.shape[-2] == key.shape[-2]
    # `check_last_dim_stride_equals_1_dense`: T5's position bias is a permuted view, so T5 runs math on every card
    dense = all(t.stride(-1) == 1 for t in (query, key, value, attn_mask) if t is not None)
    if query.dim() == 4 and (not grouped or enable_gqa) and dense:
        prefers_cudnn = card.capability[0] in (9, 10)
        learned = attn_mask is not None and attn_mask.requires_grad
        can = same_size and not learned and _cudnn_can(card, query, dropout_p)
        if prefers_cudnn and cuda.cudnn_sdp_enabled() and can:
            return "cudnn"
        flash = built_with_flash and cuda.flash_sdp_enabled() and attn_mask is None
        flash = flash and same_size and (square or not is_causal)
        if flash and _flash_can(card, query, dropout_p):
            return "flash"
        # Up to PyTorch 2.13 the memory-efficient kernel does not support fewer key heads than query heads.
        if cuda.mem_efficient_sdp_enabled() and not grouped and _efficient_can(card, query, value):
            return "efficient"
    if cuda.math_sdp_enabled():
        return "math"
    raise RuntimeError("No available kernel. Aborting execution.")


def installed_has_flash() -> bool:
    """Whether the installed PyTorch has flash attention for CUDA. Builds for CPUs do not show it and are assumed to have it.

    Windows wheels come without it: from 2.2 on they warn "Torch was not compiled with flash attention"
    (Comfy-Org/ComfyUI#3363). For 2.6 this is inferred: runs measured on an RTX 4080 match predictions without flash.
    """
    return torch.version.cuda is None or torch.backends.cuda.is_flash_attention_available()


def attention_on(card: Card, built_with_flash: bool = True) -> Any:
    """A replacement for `torch.nn.functional.scaled_dot_product_attention` that runs the kernel that `card` would run."""

    def scaled_dot_product_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        given = (query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
        kernel = choose_kernel(card, *given, built_with_flash)
        ops = torch.ops.aten
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = _additive(attn_mask, query.dtype)
        # cuDNN saves what flash saves (the output and a log-sum-exp per row) and, as `efficient`, the mask as a 16-bit bias.
        # The operator of `efficient` cannot take fewer key heads than query heads.
        grouped = query.shape[-3] != key.shape[-3]
        if kernel == "flash" or (kernel == "cudnn" and (attn_mask is None or grouped)):
            size = query.shape[-1]
            query = query if attn_mask is None else _Keeping.apply(query, attn_mask)
            q, k, v = (F.pad(t, (0, -size % 8)) if size % 8 else t for t in (query, key, value))
            scale = size**-0.5 if scale is None else scale
            output = ops._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False, scale=scale)[0]
            return output[..., :size] if size % 8 else output
        if kernel in ("efficient", "cudnn"):
            bias = _bias(attn_mask, query, key, padded=kernel == "efficient")
            keeps = any(t.requires_grad for t in (query, key, value)) and torch.is_grad_enabled()
            return ops._scaled_dot_product_efficient_attention(
                query, key, value, bias, keeps, dropout_p, is_causal, scale=scale
            )[0]
        return ops._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )[0]

    return scaled_dot_product_attention


class _Keeping(torch.autograd.Function):
    """`query` unchanged; `bias` lives until the backward pass of the attention is over."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(bias)
        return query.view_as(query)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`convert_boolean_attn_mask`: 0 where `mask` is true, -inf elsewhere. Every kernel gets the mask in this form."""
    zero, never = (torch.tensor(value, dtype=dtype, device=mask.device) for value in (0.0, -torch.inf))
    return torch.where(mask, zero, never)


def _bias(attn_mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor, padded: bool) -> torch.Tensor | None:
    """The mask as the kernel gets it: additive and expanded.

    For the memory-efficient kernel its rows are padded to a multiple of 16 elements, in a copy. cuDNN takes it as it is: on an
    H200 the layers of T5 kept one bias for their cross-attention.
    """
    if attn_mask is None:
        return None
    keys = key.shape[-2]
    if padded and keys % 16:
        attn_mask = F.pad(attn_mask, (0, -keys % 16))[..., :keys]
    return attn_mask.expand(*query.shape[:-1], keys)


def _cudnn_can(card: Card, query: torch.Tensor, dropout_p: float) -> bool:
    """Whether cuDNN supports head size, type and dropout.

    Head sizes up to 256 on Hopper, with the cuDNN (9.10 and later) of every supported PyTorch. From PyTorch 2.12 on only dropout
    probabilities that are multiples of 1/16 (pytorch/pytorch#174245). On an H200 with PyTorch 2.11, T5 with dropout 0.1 and
    heads of 256 ran cuDNN's kernels.
    """
    size, limit = query.shape[-1], 256 if card.capability == (9, 0) else 128
    dropout = _TORCH < (2, 12) or (dropout_p * 16).is_integer()
    return query.dtype in _HALF and size % 8 == 0 and size <= limit and dropout


def _flash_can(card: Card, query: torch.Tensor, dropout_p: float) -> bool:
    size = query.shape[-1]
    if card.capability < (8, 0) or query.dtype not in _HALF or size > 256:
        return False
    small_shared_memory = (8, 6) <= card.capability <= (8, 9) or card.capability[0] == 12
    if small_shared_memory and query.requires_grad:
        return size <= 192 or (dropout_p == 0 and size > 224)
    return True


def _efficient_can(card: Card, query: torch.Tensor, value: torch.Tensor) -> bool:
    half = query.dtype in _HALF
    if query.dtype == torch.bfloat16 and card.capability < (8, 0):
        return False
    if query.dtype not in (*_HALF, torch.float32):
        return False
    tensor_cores = card.capability >= (8, 0) or half
    alignment = max(4 if card.capability >= (8, 0) else 1, (8 if half else 4) if tensor_cores else 1)
    return query.shape[-1] % alignment == 0 and value.shape[-1] % alignment == 0
