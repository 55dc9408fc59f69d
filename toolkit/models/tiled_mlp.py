"""Feed-forward layers in tiles of tokens: only one tile's intermediate results are in memory at a time.

A feed-forward layer computes each token alone, so that tiles give the same result (Arctic Long Sequence Training, Bekman et al.
2025, arXiv:2506.13996). Each tile is recomputed in the backward pass. DeepSpeed's TiledMLP does the same, but not under DDP and
FSDP2, and its recomputation draws another dropout mask; PyTorch's checkpoint has neither limit.
"""

import inspect
import re
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from toolkit.errors import UserError

FEED_FORWARD = re.compile(r"(MLP|FeedForward|FFN|Dense(Gated)?ActDense)$")  # names of classes, from T5 to Llama
SHIFTS_TOKENS = {"rwkv"}  # its feed-forward layers see the token before
ROUTED = re.compile(r"Expert|Router|TopK")  # parts of a mixture of experts, which see all tokens together


def feed_forwards(model: nn.Module) -> list[nn.Module]:
    """The feed-forward layers of `model` that compute each token alone, from the hidden states and nothing else."""
    if model.config.model_type in SHIFTS_TOKENS:
        return []
    return [
        module
        for module in model.modules()
        if FEED_FORWARD.search(type(module).__name__)
        and not any(ROUTED.search(type(part).__name__) for part in [*module.modules()][1:])
        and _takes_hidden_states_alone(module)
    ]


def _takes_hidden_states_alone(module: nn.Module) -> bool:
    needed = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
    return [p.kind for p in needed if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)] == [
        inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]


def tile_feed_forwards(model: nn.Module, tokens: int) -> list[nn.Module]:
    """From now on each feed-forward layer of `model` computes `tokens` tokens at a time; returns these layers.

    Raises: UserError for a model without such layers.
    """
    layers = feed_forwards(model)
    if not layers:
        raise UserError(
            f"--mlp_tile_tokens has no effect on {model.config.model_type}: it has no feed-forward layer that computes each token "
            "alone in a module of its own; leave it out"
        )
    for layer in layers:
        plain = layer.forward.args[0] if isinstance(layer.forward, partial) else layer.forward  # tiled before
        layer.forward = partial(_in_tiles, plain, layer, tokens)
    return layers


def _in_tiles(
    forward: Any, layer: nn.Module, tokens: int, hidden: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """The output of `forward` for `hidden` (..., width), `tokens` rows at a time."""
    rows = hidden.reshape(1, -1, hidden.shape[-1])
    if rows.shape[1] <= tokens:
        return forward(hidden, *args, **kwargs)
    tiles = [
        checkpoint(forward, tile, *args, use_reentrant=False, preserve_rng_state=layer.training, **kwargs)
        for tile in rows.split(tokens, dim=1)
    ]
    output = torch.cat(tiles, dim=1)
    return output.view(*hidden.shape[:-1], output.shape[-1])
