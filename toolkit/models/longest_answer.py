"""The most memory that generation needs, without generating every token: its first step, and its last one.

Memory grows with the cache, so it is largest in the first step, which reads the whole prompt at once, or in the last one.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig, LogitsProcessor, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutput

from toolkit.distributed.sharded_models import is_sharded
from toolkit.models.generation import generating_by
from toolkit.models.loading import ORDINARY_TOKEN_ID
from toolkit.models.soft_prompts import base_model, cache_by_both_names, embedded, has_virtual_tokens


def generate_first_and_last(
    model: PreTrainedModel, rows: int, prompt_tokens: int, new_tokens: int, num_beams: int
) -> None:
    """Generates as `generation.generate` does, but only the first and the last tokens; between them the cache grows at once.

    All prompts but the first have one token of padding. `model` is on fake tensors, which have no largest logit, so each token is
    the first of the vocabulary; none ends an answer.
    """
    base, is_encoder_decoder = base_model(model), model.config.is_encoder_decoder
    settings = GenerationConfig(
        do_sample=False,
        num_beams=num_beams,
        pad_token_id=0,
        decoder_start_token_id=0 if is_encoder_decoder else None,
    )
    first = _FirstToken(num_beams)
    options: dict[str, Any] = {
        "synced_gpus": is_sharded(model),
        "logits_processor": [first],
        "return_dict_in_generate": True,
    }
    ids = torch.full((rows, prompt_tokens), ORDINARY_TOKEN_ID)
    mask = _padded_mask(rows, prompt_tokens, -1 if is_encoder_decoder else 0)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    generating = model
    if not is_encoder_decoder and has_virtual_tokens(model):
        inputs, generating = (
            embedded(model, [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]),
            base,
        )
    settings.max_new_tokens = 1
    encoded: list[tuple[torch.Size, torch.dtype]] = []  # what the encoder gives
    with ExitStack() as open_:
        open_.enter_context(generating_by(settings, model))
        open_.enter_context(cache_by_both_names(model))
        if is_encoder_decoder:
            keep = base.get_encoder().register_forward_hook(
                lambda *args: encoded.append((args[-1][0].shape, args[-1][0].dtype))
            )
            open_.callback(keep.remove)
        output = generating.generate(**inputs, **options)
        name = next((name for name in ("cache", "past_key_values") if output.get(name) is not None), None)
        if new_tokens == 1 or name is None:
            return
        cache = output[name]
        del output
        _grow(cache, new_tokens - 2)
        # what a step has of the one before it: its scores, and for beams their logarithms too
        scores = (rows * num_beams, base.config.get_text_config(decoder=True).vocab_size)
        weight = base.get_input_embeddings().weight
        first.earlier += [weight.new_zeros(scores, dtype=torch.float32) for _ in range(2 if num_beams > 1 else 1)]
        length = cache.get_seq_length() + 1  # of which the last token is not in the cache yet
        if is_encoder_decoder:
            shape, dtype = encoded[0]
            inputs = {
                "encoder_outputs": BaseModelOutput(last_hidden_state=weight.new_zeros(shape, dtype=dtype)),
                "attention_mask": _padded_mask(rows, shape[1], -1),
                "decoder_input_ids": torch.full((rows, 1), ORDINARY_TOKEN_ID),
            }
        else:
            inputs = {
                "input_ids": torch.full((rows, 1), ORDINARY_TOKEN_ID),
                "attention_mask": _padded_mask(rows, length, 0),
            }
        # not through PEFT, which would add virtual tokens; what is trained beside them is part of the base
        base.generate(**inputs, **{name: cache}, **options)


def _padded_mask(rows: int, length: int, place: int) -> torch.Tensor:
    """A mask (rows, length) in which all rows but the first have padding at `place`."""
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[1:, place] = 0
    return mask


class _FirstToken(LogitsProcessor):
    """Real scores in place of fake ones, all of them 0. They take the memory of those that generation would go on with."""

    def __init__(self, num_beams: int) -> None:
        self.num_beams = num_beams
        self.earlier: list[torch.Tensor] = []  # scores that the next ones replace

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.earlier.clear()
        if not isinstance(scores, FakeTensor):
            return scores
        with _disable_current_modes():  # the trace counts them once they are used, when the fake ones are gone
            whole = self.num_beams > 1  # greedy search keeps the scores that it gave, too
            return torch.zeros(scores.shape if whole else (1, 1), dtype=scores.dtype).expand(scores.shape)


def _grow(cache: Any, tokens: int) -> None:
    """Adds `tokens` to the keys and values of each layer (rows, heads, length, size), as so many steps would."""
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    for layer in own.layers if tokens and isinstance(own, DynamicCache) else ():
        if isinstance(layer, DynamicLayer) and layer.keys is not None:
            # one token each, seen many times: what is added takes no memory of its own
            one = [old.new_zeros(*old.shape[:-2], 1, old.shape[-1]) for old in (layer.keys, layer.values)]
            layer.update(*(token.expand(*token.shape[:-2], tokens, token.shape[-1]) for token in one))
            del one  # not with the next layer's
