"""FlashAttention 2 and 3 on fake tensors: what their functions keep and allocate on a card, in their order.

The packages compute only on a GPU, and need not be installed. transformers' own code around them runs as it is: it casts float32
inputs, takes padding out, and finds rows that were laid end to end. The functions here stand for the packages' `flash_attn_func` and
`flash_attn_varlen_func`. Sources, of Dao-AILab/flash-attention (0251105a; kernels-community's copies allocate the same):

- FlashAttention 2 (Dao 2023, arXiv:2307.08691): flash_attn/flash_attn_interface.py, csrc/flash_attn/flash_api.cpp.
- FlashAttention 3 (Shah et al. 2024, arXiv:2407.08608): hopper/flash_attn_interface.py, hopper/flash_api.cpp.

Not counted: partial results in float32 that FlashAttention 2 makes in the forward pass, where rows are so few and short that they
would not occupy all multiprocessors (`set_params_splitkv`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import modeling_flash_attention_utils as flash_utils

from toolkit.errors import UserError
from toolkit.memory.cuda.cards import Card
from toolkit.memory.trace import current_trace
from toolkit.seams import patched

_HALF = (torch.float16, torch.bfloat16)
_FLOAT = 4  # bytes


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@dataclass(frozen=True)
class Kernel:
    """One call of FlashAttention `version` on `card`."""

    card: Card
    version: int
    causal: bool
    is_local: bool  # attends within a window
    softcap: float
    deterministic: bool
    longest: int  # queries of a row
    rows: int | None = None  # that are laid end to end in one dimension; None: rows of one length, in two

    def check(self, q: torch.Tensor) -> None:
        """Raises UserError for a card, a type or a head size for which there is no kernel."""
        name, (major, minor), size = f"FlashAttention {self.version}", self.card.capability, q.shape[-1]
        instead = "leave --attn_implementation out"
        if major < 8:
            raise UserError(
                f"{name} needs a card of compute capability 8.0 or later, and {self.card.name} has {major}.{minor}; {instead}"
            )
        if self.version == 3 and major > 9:
            raise UserError(
                f"FlashAttention 3 has no kernels for compute capability {major}.{minor} ({self.card.name}); give flash_attention_2"
            )
        if q.dtype not in _HALF:
            raise UserError(f"{name} computes in 16 bits, and this run in float32; add --bf16, or {instead}")
        if size > 256 or (self.version == 3 and size % 8):
            raise UserError(f"{name} has no kernel for heads of {size} numbers; {instead}")

    def hidden(self, q: torch.Tensor, k: torch.Tensor) -> list[int]:
        """The bytes of the buffers that the backward pass takes, in order.

        `q` is (rows, queries, heads, head size) and `k` (rows, keys, key heads, head size); laid end to end, (tokens, heads, head size).
        """
        return self._hidden_3(q, k) if self.version == 3 else self._hidden_2(q, k)

    def _hidden_2(self, q: torch.Tensor, k: torch.Tensor) -> list[int]:
        """csrc/flash_attn/flash_api.cpp, `mha_bwd` and `mha_varlen_bwd`: the row sums `softmax_d` and the query's gradient in float32
        with rounded sizes; with fewer key heads, their gradients once for each query head."""
        heads, size = q.shape[-2:]
        rounded = _round_up(size, 32 if size <= 128 else 64)
        rows = q.shape[0] if self.rows is None else self.rows
        queries = rows * _round_up(q.shape[1], 128) if self.rows is None else q.shape[0] + 128 * rows
        copies = -(-self.card.multiprocessors // (rows * heads)) if self.deterministic else 1
        hidden = [_FLOAT * heads * queries, _FLOAT * copies * queries * heads * rounded]
        if k.shape[-2] != heads:
            hidden += 2 * [k.numel() // k.shape[-2] * heads * k.element_size()]
        return hidden

    def _hidden_3(self, q: torch.Tensor, k: torch.Tensor) -> list[int]:
        """hopper/flash_api.cpp, `mha_bwd`: `softmax_d` and `softmax_lse_log2`, the query's gradient in float32, with fewer key heads
        their gradients in float32, and a semaphore for each tile of queries."""
        heads, size = q.shape[-2:]
        rounded = next(one for one in (64, 96, 128, 192, 256) if size <= one)
        of_queries, of_keys = self._tiles_3(rounded)
        if self.rows is None:
            rows = q.shape[0]
            queries, keys = rows * _round_up(q.shape[1], of_queries), rows * _round_up(k.shape[1], of_keys)
        else:
            rows = self.rows
            queries = _round_up(q.shape[0] + rows * of_queries, of_queries)
            keys = _round_up(k.shape[0] + rows * of_keys, of_keys)
        hidden = [_FLOAT * heads * queries, _FLOAT * heads * queries, _FLOAT * heads * queries * rounded]
        if k.shape[-2] != heads:
            hidden += 2 * [_FLOAT * k.shape[-2] * keys * rounded]
        return [*hidden, _FLOAT * -(-self.longest // of_queries) * rows * heads]

    def _tiles_3(self, size: int) -> tuple[int, int]:
        """The queries and keys of a tile, by the rounded head size."""
        if self.card.capability >= (9, 0):
            queries = 64
            if size <= 64:
                queries = 96 if self.causal and self.softcap > 0 else 128
            elif size == 128 and not (self.causal or self.is_local or self.softcap > 0):
                queries = 80
            return queries, 128 if size <= 128 else 96 if size <= 192 else 80
        if self.card.capability in ((8, 6), (8, 9)):
            return 64 if size <= 192 else 32, 128 if size <= 96 else 96 if size <= 128 else 64
        return 128 if size <= 64 else 64, 128 if size <= 128 else 80 if size <= 192 else 64


class _FlashAttention(torch.autograd.Function):
    """`FlashAttnFunc` and `FlashAttnVarlenFunc` of both versions."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernel: Kernel, *lengths: torch.Tensor
    ) -> torch.Tensor:
        size = q.shape[-1]
        if size % 8:
            q, k, v = (F.pad(t, (0, -size % 8)) for t in (q, k, v))
        inputs = [t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v)]
        output = torch.empty_like(inputs[0]) if kernel.version == 2 else q.new_empty(q.shape)
        *rows, queries, heads, _ = q.shape
        kept = [output, q.new_empty((*rows, heads, queries), dtype=torch.float32)]
        if kernel.version == 2:
            kept.append(q.new_empty(2, dtype=torch.int64))  # the state of the random generator
        ctx.kernel = kernel
        ctx.save_for_backward(q, k, v, *kept, *lengths)
        return output[..., :size]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs = ctx.saved_tensors[:3]
        grads, size, trace = [torch.empty_like(t) for t in inputs], grad.shape[-1], current_trace()
        if size % 8:
            grad = F.pad(grad, (0, -size % 8))
        contiguous = [t if t.stride(-1) == 1 else t.contiguous() for t in (grad, *inputs)]
        assert trace is not None
        for block in [trace.hold(nbytes, "flash_attn") for nbytes in ctx.kernel.hidden(*inputs[:2])]:
            trace.release(block)
        del contiguous
        return *(t[..., :size] for t in grads), *(None for _ in ctx.needs_input_grad[3:])


def _functions(card: Card, version: int) -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
    """The two functions of a package, with the parameters by which transformers finds out what a version supports."""

    def run(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        causal: bool,
        window: tuple[int, int],
        softcap: float,
        deterministic: bool,
        longest: Any,
        *lengths: torch.Tensor,
    ) -> torch.Tensor:
        rows = len(lengths[0]) - 1 if lengths else None
        kernel = Kernel(card, version, causal, max(window) >= 0, softcap, deterministic, int(longest), rows)
        kernel.check(q)
        return _FlashAttention.apply(q, k, v, kernel, *lengths)

    def flash_attn_func(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        deterministic: bool = False,
    ) -> torch.Tensor:
        return run(q, k, v, causal, window_size, softcap, deterministic, q.shape[1])

    def flash_attn_varlen_func(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: Any,
        max_seqlen_k: Any,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        deterministic: bool = False,
    ) -> torch.Tensor:
        return run(q, k, v, causal, window_size, softcap, deterministic, max_seqlen_q, cu_seqlens_q, cu_seqlens_k)

    return flash_attn_func, flash_attn_varlen_func


@contextmanager
def flash_attention(card: Card) -> Iterator[None]:
    """While open, transformers' attention implementations `flash_attention_2` and `flash_attention_3` run as on `card`.

    Raises: UserError, in the first pass, as `Kernel.check`.
    """
    loaded: dict[str, Any] = {}

    def functions_of(implementation: str, *args: Any, **kwargs: Any) -> Any:
        if implementation not in loaded:
            one, of_lengths = _functions(card, int(implementation[-1]))
            functions = (one, of_lengths, None, flash_utils._pad_input, flash_utils._unpad_input)
            options = flash_utils._lazy_define_process_function(of_lengths)
            # in newer versions of transformers the functions of paged caches have options of their own
            both = hasattr(flash_utils, "_process_with_kvcache_kwargs_fn")
            loaded[implementation] = functions, ((options, None) if both else options)
        return loaded[implementation]

    with patched("lazy_import_flash_attention", functions_of):
        yield
