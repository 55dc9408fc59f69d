"""Liger's kernels (Hsu et al. 2024, arXiv:2410.10989) on fake tensors: what they keep and allocate on a card, in their order.

liger-kernel computes only on a GPU, and need not be installed: while `liger_kernel(card)` is open, importing it gives the stand-ins
below. Sources, of liger-kernel 0.8.5: liger_kernel/ops/rms_norm.py, swiglu.py, geglu.py and rope.py for the functions,
liger_kernel/transformers/monkey_patch.py for what is replaced in which model.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MethodType, ModuleType
from typing import Any, Literal

import torch
from torch import nn

from toolkit.errors import UserError
from toolkit.memory.cuda.cards import Card
from toolkit.seams import imported, patched


class _RMSNorm(torch.autograd.Function):
    """`LigerRMSNormFunction` of x (..., n) and weight (n,): keeps its input and, for each row, a float32 number.

    It writes the gradient of its input over that of its output where `in_place`. The weight's gradient is a sum of one float32 row
    for each multiprocessor.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, multiprocessors: int, in_place: bool) -> torch.Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        rows = x.view(-1, x.shape[-1])
        y = rows.new_empty(rows.shape)
        rstd = rows.new_empty(len(rows), dtype=torch.float32)
        ctx.save_for_backward(rows, weight, rstd)
        ctx.multiprocessors, ctx.in_place = multiprocessors, in_place
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad = grad.contiguous()
        weight, sums = ctx.saved_tensors[1], None
        rows = grad.view(-1, grad.shape[-1])
        if ctx.needs_input_grad[1]:
            sums = weight.new_empty((ctx.multiprocessors, rows.shape[-1]), dtype=torch.float32)
        result = rows if ctx.in_place else torch.zeros_like(rows)
        result = result.view(grad.shape)
        return result, None if sums is None else sums.sum(dim=0).to(weight.dtype), None, None


class _GatedProduct(torch.autograd.Function):
    """`LigerSiLUMulFunction` and `LigerGELUMulFunction`: act(gate) * up. Keeps both, and writes their gradients over them."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        shape = gate.shape
        gate, up = (t.contiguous().view(-1, shape[-1]) for t in (gate, up))
        product = torch.empty_like(gate)
        ctx.save_for_backward(gate, up)
        return product.view(shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        grad = grad.contiguous()
        gate, up = ctx.saved_tensors
        return gate.view(grad.shape), up.view(grad.shape)


class _Rope(torch.autograd.Function):
    """`LigerRopeFunction` of q and k (rows, heads, tokens, size): rotates them in place, and keeps only cos and sin."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = (t.transpose(1, 2).contiguous() for t in (q, k))
        ctx.save_for_backward(cos.contiguous(), sin.contiguous())
        return q.transpose(1, 2), k.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dq, dk = (t.transpose(1, 2).contiguous() for t in (dq, dk))
        return dq.transpose(1, 2), dk.transpose(1, 2), None, None


@dataclass(frozen=True)
class Replaced:
    """What Liger replaces in a type of model, by the last part of its modules' names."""

    norms: str = "norm input_layernorm post_attention_layernorm"  # that write gradients in place
    copying_norms: str = ""  # that do not
    feed_forward: Literal["separate", "packed", ""] = (
        "separate"  # packed: gate and up are one product; "": it is not replaced
    )
    rotates: bool = True  # whether rotary embeddings are replaced


_GEMMA = "norm input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm"
_GLM = "norm input_layernorm post_attention_layernorm post_self_attn_layernorm"
_OLMO = Replaced("norm", "post_attention_layernorm post_feedforward_layernorm")
MODELS = {
    "exaone4": Replaced("", "norm post_attention_layernorm post_feedforward_layernorm q_norm k_norm"),
    "gemma": Replaced(),
    "gemma2": Replaced("", _GEMMA),
    "gemma3_text": Replaced("", f"{_GEMMA} q_norm k_norm"),
    "glm4": Replaced("", f"{_GLM} post_mlp_layernorm", feed_forward="packed", rotates=False),
    "gpt_oss": Replaced(feed_forward=""),
    "granite": Replaced(),
    "hunyuan_v1_dense": Replaced(),
    "llama": Replaced(),
    "ministral": Replaced(),
    "mistral": Replaced(),
    "olmo2": _OLMO,
    "olmo3": _OLMO,
    "phi3": Replaced(feed_forward="packed"),
    "qwen2": Replaced(),
    "qwen3": Replaced("norm input_layernorm post_attention_layernorm q_norm k_norm"),
    "smollm3": Replaced(),
}
# Other types for which liger-kernel has kernels: mixtures of experts, models that read images, linear attention.
_OTHERS = (
    "deepseek_v2 deepseek_v3 deepseek_v4 falcon_h1 gemma3 gemma4 gemma4_text glm4v glm4v_moe hunyuan_v1_moe "
    "internvl llama4 llama4_text llava mixtral mllama mllama_text_model muse_glimmer nemotron paligemma pixtral "
    "qwen2_5_vl qwen2_5_vl_text qwen2_vl qwen2_vl_text qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe "
    "qwen3_next qwen3_vl qwen3_vl_moe qwen3_vl_moe_text qwen3_vl_text smolvlm"
)
NOT_PREDICTED = _OTHERS.split()


def _feed_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(_GatedProduct.apply(self.gate_proj(x), self.up_proj(x)))


def _packed_feed_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = self.gate_up_proj(x).chunk(2, dim=-1)  # views, from which the product's inputs are copied
    return self.down_proj(_GatedProduct.apply(gate, up))


def _rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *_: Any) -> Any:
    return _Rope.apply(q, k, cos, sin)


@contextmanager
def liger_kernel(card: Card) -> Iterator[None]:
    """While open, `--use_liger_kernel` replaces parts of a model by what Liger's would allocate on `card`, installed or not.

    Raises: UserError, when a trainer is made, for a model whose kernels are not predicted, and for Liger's own loss.
    """

    class LigerRMSNorm(nn.Module):
        def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
            return _RMSNorm.apply(hidden_states, self.weight, card.multiprocessors, self.in_place)

    with ExitStack() as stack:

        def apply_to(model: nn.Module, **options: bool) -> None:
            kind = model.config.model_type
            if kind in NOT_PREDICTED:
                raise UserError(f"--use_liger_kernel: Liger's kernels for {kind} are not predicted; leave it out")
            if kind not in MODELS:
                raise UserError(
                    f"--use_liger_kernel has no effect on {kind}: Liger has no kernels for it; leave it out"
                )
            if options != {"cross_entropy": False, "fused_linear_cross_entropy": False}:
                raise UserError(
                    "--use_liger_kernel: memory of Liger's own loss is not predicted; leave --loss_chunk_tokens 0 out"
                )
            replaced = MODELS[kind]
            for name, module in model.named_modules():
                last = name.rpartition(".")[2]
                if last in f"{replaced.norms} {replaced.copying_norms}".split():
                    module.in_place = last in replaced.norms.split()
                    module.forward = MethodType(LigerRMSNorm.forward, module)
                elif last == "mlp" and replaced.feed_forward:
                    forward = _packed_feed_forward if replaced.feed_forward == "packed" else _feed_forward
                    module.forward = MethodType(forward, module)
            if replaced.rotates:
                stack.enter_context(patched("apply_rotary_pos_emb", _rotate, sys.modules[type(model).__module__]))

        package, functions = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
        functions.__dict__.update(LigerRMSNorm=LigerRMSNorm, _apply_liger_kernel_to_instance=apply_to)
        for name, module in (("liger_kernel", package), ("liger_kernel.transformers", functions)):
            stack.enter_context(imported(name, module))
        stack.enter_context(patched("is_liger_kernel_available", lambda *_: True))
        yield
