"""T5's position bias and mask, added once for all layers that share them.

In a T5-like model the first layer computes the bias, and all others get it. transformers adds it to the mask in each layer, a tensor of
(rows, heads, queries, keys) that the layer keeps for the backward pass. Here the layers share that sum too: the same values, so
the same loss and gradients, but in the memory and the time of one layer.
"""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import create_position_bias_mask, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from toolkit.models.soft_prompts import base_model

SHARED = "sdpa_shared_bias"  # our name in transformers' registries of attention functions and of masks


def share_position_bias(model: nn.Module) -> None:
    """From now on the layers of a T5-like `model` with SDPA attention share the sum of bias and mask. Other models stay as they are."""
    model = base_model(model)
    assert isinstance(model, PreTrainedModel)
    has_bias = any(hasattr(module, "has_relative_attention_bias") for module in model.modules())
    if has_bias and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(SHARED)


def _shared_bias(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_bias: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """What `AttentionInterface` asks of an attention function. `position_bias` is (1, heads, queries, keys).

    A recomputed layer adds for itself, because it runs again alone; a decoder without a mask has a sum without rows, which is small.
    """
    is_recomputed = module.training and getattr(module, "gradient_checkpointing", False)
    if position_bias is not None and attention_mask is not None and not is_recomputed:
        kept = vars(position_bias).get("_with_mask")
        if kept is None or kept[0] is not attention_mask:
            kept = attention_mask, create_position_bias_mask(position_bias, attention_mask, False, query, key)
            vars(position_bias)["_with_mask"] = kept
        attention_mask, position_bias = kept[1], None
    return sdpa_attention_forward(module, query, key, value, attention_mask, position_bias=position_bias, **options)


AttentionInterface.register(SHARED, _shared_bias)
AttentionMaskInterface.register(SHARED, sdpa_mask)
