"""Answers of a model: all ranks process prompts in batches and keep only the answers, never the logits.

The answer to a row does not depend on the other rows of its batch.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.progress import track
from torch.nn.functional import cross_entropy
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from toolkit.console import console, say
from toolkit.distributed.deepspeed import gathered_in_use
from toolkit.distributed.sharded_models import is_sharded
from toolkit.errors import UserError
from toolkit.models.soft_prompts import base_model, cache_by_both_names, embedded, has_virtual_tokens

Answer = TypeVar("Answer")

# Settings that are copied from a model's generation_config: tokens that begin and end a text, and forced or banned tokens.
# All others keep transformers' defaults. With the other settings of some models (penalties of BART's summarizers, sampling of
# Qwen's chat models, several answers per row), answers would not be the most probable ones, one per row.
TAKEN_OVER = (
    *("bos_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"),
    *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids"),
)

# Settings that change no answer, or that scoring sets itself
OF_NO_EFFECT = {"pad_token_id", "eos_token_id", "use_cache", "transformers_version", "max_length", "max_new_tokens"}
OF_NO_EFFECT |= {"_from_model_config", "output_attentions", "output_hidden_states", "generation_kwargs", "dtype"}

SILENCE = 10.0  # seconds between lines of progress

IGNORES_MASK = {"rwkv"}  # recurrent models that read padding as text: they answer one row at a time


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    max_new_tokens: int,
    num_beams: int = 1,
    title: str = "",
    end_tokens: Sequence[int] = (),
    empty_target: Sequence[int] = (),
) -> list[str]:
    """Generates texts for `prompts` (token ids), returned in their order on every rank. Greedy or beam search, no sampling.

    A text ends at any end token of the model's generation_config, of the tokenizer or in `end_tokens`. `empty_target` holds
    the labels of an empty target: an encoder-decoder model begins its answer with the tokens that begin its labels in training.
    """

    def answer(batch: list[Sequence[int]]) -> list[str]:
        return tokenizer.batch_decode(_continued(model, tokenizer, batch), skip_special_tokens=True)

    settings = _settings(model, tokenizer, end_tokens, empty_target)
    settings.num_beams, settings.max_new_tokens = num_beams, max_new_tokens
    rows = 1 if model.config.model_type in IGNORES_MASK else batch_size
    with generating_by(settings, model):
        texts = _in_batches(answer, model, prompts, rows, title)
    return [text.strip() for text in texts]


def generation_error(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], new_tokens: int = 8
) -> float:
    """The relative difference between the logits of generation and those of one forward pass over the same tokens.

    It is the norm of the difference divided by the norm of the logits' deviations from their mean, over `new_tokens` tokens after
    (or for) `prompt`. It is zero up to rounding, unless generation loses something: virtual tokens, a prefix, the cache.
    """

    def answer(batch: list[Sequence[int]]) -> list[float]:
        output = _continued(model, tokenizer, batch, return_dict_in_generate=True, output_logits=True)
        written = torch.stack(output.logits, 1)[0].float()  # (new tokens, vocabulary)
        inputs = {"input_ids": torch.tensor([batch[0]], device=model.device)}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = output.sequences[:, :-1]
        else:
            new = output.sequences[:, -len(written) : -1]
            inputs["input_ids"] = torch.cat([inputs["input_ids"], new], 1)
        logits = model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]), use_cache=False).logits
        whole = logits[0, -len(written) :].float()
        spread = whole - whole.mean(-1, keepdim=True)
        return [((whole - written).norm() / spread.norm()).item()]

    settings = _settings(model, tokenizer)
    settings.max_new_tokens, settings.eos_token_id = new_tokens, None
    settings.forced_bos_token_id = settings.forced_eos_token_id = None
    with generating_by(settings, model):
        return _in_batches(answer, model, [prompt], 1, "")[0]


def _settings(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    end_tokens: Sequence[int] = (),
    empty_target: Sequence[int] = (),
) -> GenerationConfig:
    """The settings of generation, without sampling: the model's own ones in `TAKEN_OVER`, and the arguments of `generate`."""
    holder = base_model(model)
    shipped = holder.generation_config
    settings = GenerationConfig(**{name: getattr(shipped, name, None) for name in TAKEN_OVER}, do_sample=False)
    if settings.decoder_start_token_id is None:  # a generation_config.json need not repeat what config.json says
        settings.decoder_start_token_id = getattr(model.config, "decoder_start_token_id", None)
    settings.pad_token_id = tokenizer.pad_token_id
    settings.eos_token_id = _end_tokens(shipped, tokenizer, end_tokens)
    if empty_target:
        _begin_as_labels(settings, holder, empty_target)
    return settings


@contextmanager
def generating_by(settings: GenerationConfig, model: PreTrainedModel) -> Iterator[None]:
    """While open, `model` generates with `settings` and a cache."""
    holder = base_model(model)
    # a model of two models has its setting in the config of its decoder
    configs: list[Any] = [model.config, *(getattr(model.config, name) for name in model.config.sub_configs)]
    parts = [part for part in configs if hasattr(part, "use_cache")]
    shipped, use_cache = holder.generation_config, [part.use_cache for part in parts]
    holder.generation_config = settings
    try:
        for part in parts:
            part.use_cache = True
        yield
    finally:
        holder.generation_config = shipped
        for part, before in zip(parts, use_cache, strict=True):
            part.use_cache = before


def _begin_as_labels(settings: GenerationConfig, model: PreTrainedModel, empty_target: Sequence[int]) -> None:
    """Makes an answer begin as labels do: mBART's decoder starts with the target language, which its tokenizer sets."""
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is not None:
        settings.decoder_start_token_id = shift(torch.tensor([empty_target]))[0, 0].item()
    if settings.forced_bos_token_id is not None:
        first, *rest = empty_target
        settings.forced_bos_token_id = first if rest and first not in (settings.eos_token_id or []) else None


def classify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    title: str = "",
) -> list[int]:
    """The class with the largest logit for each prompt (token ids), in order, on every rank."""

    def answer(batch: list[Sequence[int]]) -> list[int]:
        return classes_of(model, _padded(tokenizer, batch, "right", model.device))

    return _in_batches(answer, model, prompts, batch_size, title)


def classes_of(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> list[int]:
    """The class with the largest logit for each row of `inputs` (rows, length)."""
    return model(**inputs).logits.argmax(-1).tolist()  # logits: (rows, classes)


def losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    title: str = "",
) -> list[float]:
    """The mean negative log-likelihood of each prompt (token ids) in nats, in order, on every rank; 0 for a single token."""

    def answer(batch: list[Sequence[int]]) -> list[float]:
        return losses_of(model, _padded(tokenizer, batch, "right", model.device), list(map(len, batch)))

    return _in_batches(answer, model, prompts, batch_size, title)


def losses_of(model: PreTrainedModel, inputs: dict[str, torch.Tensor], ends: Sequence[int]) -> list[float]:
    """The mean negative log-likelihood of each row of `inputs` (rows, length) up to its end, in nats."""
    ids = inputs["input_ids"]
    logits = model(**inputs).logits[:, -ids.shape[1] :]  # (rows, length, vocabulary), without virtual tokens
    return [
        cross_entropy(logits[i, : end - 1].float(), ids[i, 1:end]).item() if end > 1 else 0.0
        for i, end in enumerate(ends)
    ]


@contextmanager
def answering(model: PreTrainedModel) -> Iterator[None]:
    """While open, `model` answers: in evaluation mode, without gradients, and with the weights of a sharded model at hand."""
    was_training = model.training
    model.eval()
    try:
        # not inference_mode: weights gathered in it could not be trained
        with torch.no_grad(), gathered_in_use(model):
            yield
    finally:
        model.train(was_training)


def _in_batches(
    answer: Callable[[list[Sequence[int]]], list[Answer]],
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    title: str,
) -> list[Answer]:
    """Applies `answer` to batches of `prompts`; returns the results in the order of `prompts`, on every rank.

    Prompts are sorted by length, so that batches contain little padding, and divided among the ranks. Every rank processes the
    same number of batches, because a sharded model computes on all ranks or on none.
    """
    state = PartialState()
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    mine = order[state.process_index :: state.num_processes]
    most = -(-len(order) // state.num_processes)  # rows of the rank that has the most
    batches = [mine[i : i + batch_size] for i in range(0, most, batch_size)]
    found: list[tuple[int, Answer]] = []
    with answering(model):
        for batch in _said(batches, title, len(order)):
            computed = batch or order[-1:]  # a rank without rows left still takes part in the computation
            found += zip(batch, answer([prompts[i] for i in computed])[: len(batch)], strict=True)
    if state.num_processes > 1:
        found = gather_object(found)
    return [one for _, one in sorted(found, key=lambda pair: pair[0])]


def _said(batches: Sequence[list[int]], title: str, rows: int) -> Iterator[list[int]]:
    """`batches`, with their progress: a bar in a terminal, otherwise a line every `SILENCE` seconds."""
    if console.is_terminal or not title:
        yield from track(
            batches, description=title, console=console, transient=True, disable=not (console.is_terminal and title)
        )
        return
    last = time.monotonic()
    for number, batch in enumerate(batches):
        if number and time.monotonic() - last > SILENCE:
            say("scoring", f"{number / len(batches):.0%} of {rows:,} rows are answered")
            last = time.monotonic()
        yield batch


def _padded(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], side: str, device: torch.device
) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` (rows, longest), padded on `side`."""
    inputs = tokenizer.pad({"input_ids": [list(ids) for ids in prompts]}, padding_side=side, return_tensors="pt")
    return {name: inputs[name].to(device) for name in ("input_ids", "attention_mask")}


def _end_tokens(
    settings: GenerationConfig, tokenizer: PreTrainedTokenizerBase, more: Sequence[int]
) -> list[int] | None:
    """The sorted ids of all tokens that end a text; None if there are none."""
    of_model = settings.eos_token_id
    tokens = [*(of_model if isinstance(of_model, list) else [of_model]), tokenizer.eos_token_id, *more]
    return sorted({token for token in tokens if token is not None}) or None


def _continued(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], **options: Any
) -> Any:
    """The generated ids (rows, longest answer) for each of `prompts`; those of an encoder-decoder begin with its start token.

    If `options` request more than ids, the result is transformers' own output, in which sequences may begin with the prompt.
    """
    # transformers detects ZeRO-3 itself, but not FSDP2 as accelerate sets it up.
    options["synced_gpus"] = is_sharded(model)
    if model.config.is_encoder_decoder:
        inputs = _padded(tokenizer, prompts, "right", model.device)
    elif has_virtual_tokens(model):
        return model.get_base_model().generate(**embedded(model, prompts), **options)
    else:  # a decoder continues from the last position
        inputs = _padded(tokenizer, prompts, "left", model.device)
    with cache_by_both_names(model):
        output = model.generate(**inputs, **options)
    prompt = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    return output[:, prompt:] if isinstance(output, torch.Tensor) else output


SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


BEAMS = ("early_stopping", "length_penalty")


def end_as_the_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives `model` the tokenizer's padding, as Trainer would, and makes its generation settings fit to be saved.

    Raises: UserError for settings that cannot be mended.
    """
    generation = getattr(model, "generation_config", None)
    for settings in filter(None, (model.config, generation)):
        settings.pad_token_id = tokenizer.pad_token_id
    if generation is not None:
        _say_overruled(generation)
        make_saveable(generation)


def _say_overruled(shipped: GenerationConfig) -> None:
    """Prints which of the model's generation settings scoring does not follow: all that are not in `TAKEN_OVER`."""
    asked = shipped.to_diff_dict()
    names = sorted(
        name for name, value in asked.items() if name not in (*TAKEN_OVER, *OF_NO_EFFECT) and value is not None
    )
    if names:
        shown = ", ".join(f"{name} {asked[name]}" for name in names)[:300]
        say(
            "generation",
            f"generation_config.json asks for {shown}; scoring answers with the most probable tokens instead",
        )


def make_saveable(settings: GenerationConfig) -> None:
    """Repairs contradictory settings of some published models, which transformers loads with a warning but refuses to save.

    If sampling settings are present and `do_sample` is not set, it becomes true: other libraries sample with these settings, as
    the model's author intended. If it is false, the sampling settings are removed, and with one beam the settings of beam
    search: nothing reads them. The test split is always answered without sampling.

    Raises: UserError for settings that cannot be repaired, before training starts.
    """
    try:
        settings.validate(strict=True)
        return
    except ValueError:
        pass
    if settings.do_sample is None and any(getattr(settings, name, None) is not None for name in SAMPLING):
        settings.do_sample = True
    unread: tuple[str, ...] = SAMPLING if not settings.do_sample else ()
    unread += BEAMS if (settings.num_beams or 1) == 1 else ()
    for name in unread:
        setattr(settings, name, None)
    try:
        settings.validate(strict=True)
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the model's generation_config.json contradicts itself, so the trained model could not be saved: {reason}"
        ) from None
