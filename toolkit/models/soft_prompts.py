"""Virtual tokens before the input: what PEFT leaves to its caller, or does wrongly with some versions of transformers.

Prompt tuning and P-tuning put embeddings before those of the input; prefix tuning puts keys and values into the cache.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from peft import PeftModel, PeftType
from torch import nn
from transformers import PreTrainedModel

from toolkit.models.heads import has_head, head_modules
from toolkit.seams import patched

IN_THE_CACHE = (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)


def base_model(model: nn.Module) -> PreTrainedModel:
    """The model of transformers in a PEFT model, or `model` itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def has_virtual_tokens(model: nn.Module) -> bool:
    """Whether virtual tokens are part of the input sequence, as with prompt tuning and P-tuning.

    A GPT-like model then also predicts the first token of the text, from the last virtual token.
    """
    config = getattr(model, "active_peft_config", None)
    return config is not None and config.is_prompt_learning and config.peft_type not in IN_THE_CACHE


def embedded(model: PeftModel, prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Inputs from which a GPT-like base model generates: `inputs_embeds` (rows, length, width), `attention_mask` (rows, length).

    Each row consists of padding, virtual tokens and text, in this order. PEFT (0.21) puts the padding between virtual tokens and
    text, so that a row's answer depends on the lengths of the other rows in its batch.
    """
    embeddings = model.word_embeddings
    virtual = model.get_prompt(batch_size=1)[0]  # (virtual tokens, width)
    rows = [torch.cat([virtual, embeddings(torch.tensor(ids, device=model.device)).to(virtual)]) for ids in prompts]
    longest = max(map(len, rows))
    inputs = virtual.new_zeros(len(rows), longest, virtual.shape[-1])
    mask = torch.zeros(len(rows), longest, dtype=torch.long, device=model.device)
    for row, values in enumerate(rows):
        inputs[row, -len(values) :] = values
        mask[row, -len(values) :] = 1
    return {"inputs_embeds": inputs.to(embeddings.weight.dtype), "attention_mask": mask}


@contextmanager
def cache_by_both_names(model: PreTrainedModel) -> Iterator[None]:
    """While open, PEFT finds the cache into which it puts a prefix under both names that transformers has given it.

    transformers 5.24 renamed `past_key_values` to `cache`. PEFT 0.21 writes only the old name and so generates without the
    prefix. Here PEFT gets both names, and what it wrote is stored under the name that transformers reads.
    """
    given = getattr(model, "base_model_prepare_inputs_for_generation", None)
    if given is None:  # not a PEFT model
        yield
        return
    of_peft = model.prepare_inputs_for_generation

    def with_both(*args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = given(*args, **kwargs)
        return inputs | {"past_key_values": inputs["cache"]} if "cache" in inputs else inputs

    def with_one(*args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = of_peft(*args, **kwargs)
        if "cache" in inputs:
            written = inputs.pop("past_key_values")
            inputs["cache"] = inputs["cache"] if written is kwargs.get("cache") else written
        return inputs

    with (
        patched("PeftModel.base_model_prepare_inputs_for_generation", with_both, owner=model),
        patched("PeftModel.prepare_inputs_for_generation", with_one, owner=model),
    ):
        yield


def fit_head(model: PeftModel) -> None:
    """Makes a head work with virtual tokens and prefixes; see the two functions below."""
    if has_head(model.get_base_model().config):
        _take_prefix_by_its_old_name(model)
        _read_head_at_the_last_token(model)


def _take_prefix_by_its_old_name(model: PeftModel) -> None:
    """Adds the argument `past_key_values` to the base model's forward, which transformers 5.24 calls `cache`.

    PEFT 0.21 looks for the old name in the signature of a model with a head and refuses prefix tuning without it.
    """
    base = model.get_base_model()
    plain, signature = base.forward, inspect.signature(base.forward)
    if model.active_peft_config.peft_type not in IN_THE_CACHE or "cache" not in signature.parameters:
        return

    @wraps(plain)
    def forward(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        return plain(*args, **(kwargs if past_key_values is None else kwargs | {"cache": past_key_values}))

    *others, last = signature.parameters.values()
    old_name = inspect.Parameter("past_key_values", inspect.Parameter.KEYWORD_ONLY, default=None)
    rest = [old_name, last] if last.kind is inspect.Parameter.VAR_KEYWORD else [last, old_name]
    forward.__signature__ = signature.replace(parameters=[*others, *rest])  # type: ignore[attr-defined]
    base.forward = forward


def _read_head_at_the_last_token(model: PeftModel) -> None:
    """Makes the head of a GPT-like model with virtual tokens read each row at its last token.

    With embeddings instead of token ids, transformers' heads read the last position, which is padding in all but the longest
    row of a batch.
    """
    base = model.get_base_model()
    if not has_virtual_tokens(model):
        return
    mask: list[torch.Tensor] = []  # of the current batch: (rows, length)

    def keep_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        embedded, kept = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        mask[:] = [] if embedded is None or kept is None else [kept]

    def take_last(module: nn.Module, args: tuple[Any, ...], scores: torch.Tensor) -> torch.Tensor:
        if not mask or scores.shape[:-1] != mask[0].shape:
            return scores  # (rows, classes): this head has already chosen its position
        last = mask[0].shape[1] - 1 - mask[0].flip(1).argmax(1)  # (rows,)
        return scores[torch.arange(len(last), device=scores.device), last.to(scores.device)].unsqueeze(1)

    base.register_forward_pre_hook(keep_mask, with_kwargs=True)
    for name in head_modules(base):
        base.get_submodule(name).register_forward_hook(take_last)
