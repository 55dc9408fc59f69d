"""The rows of a batch end to end in one row, so that no step computes padding.

Positions restart with each row, and no token sees those of another row: the loss and its gradients are those of the padded batch, to
rounding. transformers' flash and flex attention find the rows by their positions. For SDPA it makes a mask of (tokens, tokens), with
which most kernels do not run, and computes all of it. So here SDPA runs once for each row, causally and without a mask: it reads the
rows where they are, and computes no score between two of them (packing and its attention: Krell et al. 2021, arXiv:2107.02027).
"""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from toolkit.models.heads import has_head
from toolkit.models.soft_prompts import base_model

ROW_BY_ROW = "sdpa_row_by_row"  # our name in transformers' registries of attention functions and of masks
KNOW_ROWS = ("flash_attention_", "flex_attention")  # implementations that find the rows by their positions
ATTENTION = {
    "full_attention",
    "sliding_attention",
    "chunked_attention",
}  # other layers pass a state on, or see neighbours
# Models that take positions, and do not tell them to their masks
DEAF = {"bert", "bert-generation", "camembert", "data2vec-text", "doge", "electra", "ernie", "opt", "roberta"}
DEAF |= {"roberta-prelayernorm", "roc_bert", "xlm-roberta", "xlm-roberta-xl", "xmod"}


def padded_reason(model: nn.Module) -> str:
    """Why the rows of a batch cannot be laid end to end for `model`, in words; empty if they can."""
    model = base_model(model)
    config, attention = model.config, model.config.get_text_config()._attn_implementation
    kind = config.model_type
    if config.is_encoder_decoder:
        return f"{kind} is an encoder-decoder model, whose attention would see all rows"
    if has_head(config):
        return "a classification head reads the end of each row"
    layers = {*(getattr(config.get_text_config(), "layer_types", None) or ())}
    if layers - ATTENTION:
        return f"{kind} has layers that pass a state from one row to the next ({', '.join(sorted(layers - ATTENTION))})"
    takes_positions = "position_ids" in signature(type(model).forward).parameters
    if kind in DEAF or not takes_positions or not model._supports_attention_backend:
        return f"the attention of {kind} would see all rows, whatever their positions"
    if attention not in ("sdpa", ROW_BY_ROW) and not attention.startswith(KNOW_ROWS):
        return f"{kind} with {attention} attention keeps the scores of all rows with one another"
    return ""


def keep_rows_apart(model: nn.Module) -> None:
    """From now on the SDPA attention of `model` keeps apart the rows that `position_ids` (1, tokens) tell it.

    A padded batch is computed as before. Other attention than SDPA is left as it is.
    """
    model = base_model(model)
    assert isinstance(model, PreTrainedModel)
    if model.config.get_text_config()._attn_implementation == "sdpa":
        model.set_attn_implementation(ROW_BY_ROW)


@dataclass(frozen=True)
class Rows:
    """The rows of a packed batch: models pass it on to their attention, in the place of a mask."""

    lengths: list[int]  # tokens of each row
    masks: list[torch.Tensor | None]  # of each row, (1, 1, length, length); None where it is causal and nothing else


def _rows_or_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Rows | torch.Tensor | None:
    """What `AttentionMaskInterface` asks of a mask function: `Rows` for a packed batch, else transformers' mask for SDPA.

    `mask_function(row, head, query, key)` says whether a query sees a key. A row ends where a token does not see the one before it.
    """
    assert mask_function is not None
    if attention_mask is None and batch_size == 1 and q_length == kv_length and not use_vmap:
        zero, after = torch.zeros(1, dtype=torch.long, device=device), torch.arange(1, q_length, device=device)
        ends = (~mask_function(zero, zero, after, after - 1)).nonzero().squeeze(1) + 1
        if len(ends):
            rows = [(start, end - start) for start, end in pairwise([0, *ends.tolist(), q_length])]
            whole = {"mask_function": mask_function, "allow_is_causal_skip": False, "device": device}
            return Rows(
                [n for _, n in rows],
                [
                    sdpa_mask(1, n, n, start, start, **whole) if local_size and n > local_size else None
                    for start, n in rows
                ],
            )
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        local_size,
        use_vmap=use_vmap,
        device=device,
        **options,
    )


def _row_by_row(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Rows | torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """What `AttentionInterface` asks of an attention function, with `query` of (1, heads, tokens, head size) if rows are packed."""
    if not isinstance(attention_mask, Rows):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    parts = (states.split(attention_mask.lengths, dim=2) for states in (query, key, value))
    outputs = [
        sdpa_attention_forward(module, *row, **options)[0] for row in zip(*parts, attention_mask.masks, strict=True)
    ]
    return torch.cat(outputs, dim=1), None  # (1, tokens, heads, head size)


AttentionInterface.register(ROW_BY_ROW, _row_by_row)
AttentionMaskInterface.register(ROW_BY_ROW, _rows_or_mask)
