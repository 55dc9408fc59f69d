"""Scoring: prompts are answered in batches by all ranks, and only the answers are kept, never logits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import PeftModel
from rich.progress import track
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from toolkit.console import console, is_main
from toolkit.engine import gathered_in_use, is_sharded
from toolkit.memory.cuda_meter import outside_the_account

if TYPE_CHECKING:  # tasks use this module
    from toolkit.config import Config
    from toolkit.data import TaskData

Answer = TypeVar("Answer")

# What a model's generation_config may say of its decoding, and what is left out, for else the answers of models that ship
# such settings (BART's summarizers, Qwen's chat models) would not be the most probable ones, or transformers would warn.
STEERING = (
    *("max_length", "min_length", "min_new_tokens", "length_penalty"),
    *("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    *("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),  # of sampling
)


@dataclass
class Completions:
    """What one model answered for the test split, and its scores (rank 0 alone)."""

    texts: list[str]
    scores: dict[str, float]


def evaluate_by_generation(model: PreTrainedModel, data: TaskData, config: Config, title: str) -> Completions:
    """Has the model answer every row of the test split, as its task answers, and scores that against the references.

    Rows with the same text (DialogSum's test split has three references a dialogue) are answered once.
    """
    prompts = [tuple(ids) for ids in data.test_prompts]
    unique = list(dict.fromkeys(prompts))
    answers = data.task.answers(
        model,
        data.encoder,
        unique,
        batch_size=config.training.per_device_eval_batch_size,
        num_beams=config.data.get("num_beams") or 1,
        title=title,
    )
    answer = dict(zip(unique, answers, strict=True))
    texts = [answer[prompt] for prompt in prompts]
    return Completions(texts, data.task.score(texts, data.references, data.encoder.label_names) if is_main else {})


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    max_new_tokens: int,
    num_beams: int = 1,
    title: str = "",
    end_tokens: Sequence[int] = (),
) -> list[str]:
    """The model's texts for `prompts` (token ids), in their order, on every rank. Greedy or beam search: no sampling.

    A text ends with any token that ends one for the model's generation_config or the tokenizer, or is of `end_tokens`.
    What else generation_config says of decoding (`STEERING`) is passed over; tokens that it forces or bans stay so.
    """
    holder = model.get_base_model() if isinstance(model, PeftModel) else model
    settings = copy.deepcopy(holder.generation_config)
    for name in STEERING:
        setattr(settings, name, None)
    settings.do_sample, settings.num_beams, settings.max_new_tokens = False, num_beams, max_new_tokens
    settings.pad_token_id, settings.eos_token_id = tokenizer.pad_token_id, _end_tokens(settings, tokenizer, end_tokens)

    def answer(batch: list[Sequence[int]]) -> list[str]:
        return _generate_batch(model, tokenizer, batch)

    shipped = holder.generation_config
    use_cache = model.config.use_cache
    model.config.use_cache, holder.generation_config = True, settings
    try:
        return _in_batches(answer, model, prompts, batch_size, title)
    finally:
        model.config.use_cache, holder.generation_config = use_cache, shipped


def classify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    title: str = "",
) -> list[int]:
    """The class with the largest logit for each of `prompts` (token ids), in their order, on every rank."""

    def answer(batch: list[Sequence[int]]) -> list[int]:
        inputs = _padded(tokenizer, batch, "right", model.device)
        return model(**inputs).logits.argmax(-1).tolist()  # logits: (rows, classes)

    return _in_batches(answer, model, prompts, batch_size, title)


def losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    title: str = "",
) -> list[float]:
    """The mean negative log-likelihood of each of `prompts` (token ids), in nats, on every rank; 0 for a single token."""

    def answer(batch: list[Sequence[int]]) -> list[float]:
        inputs = _padded(tokenizer, batch, "right", model.device)
        logits, ids = model(**inputs).logits, inputs["input_ids"]  # (rows, length, vocabulary), (rows, length)
        ends = [len(prompt) for prompt in batch]
        return [
            cross_entropy(logits[i, : end - 1].float(), ids[i, 1:end]).item() if end > 1 else 0.0
            for i, end in enumerate(ends)
        ]

    return _in_batches(answer, model, prompts, batch_size, title)


@torch.no_grad()  # not inference_mode: weights that are gathered in it could not be trained on
def _in_batches(
    answer: Callable[[list[Sequence[int]]], list[Answer]],
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    title: str,
) -> list[Answer]:
    """What `answer` gives for batches of `prompts`, in the order of `prompts`, on every rank.

    Prompts are sorted by length, so that a batch holds little padding, and shared out among the ranks. Every rank answers
    the same number of batches, for where the model is sharded it computes on all of them or on none.
    """
    state = PartialState()
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    mine = order[state.process_index :: state.num_processes]
    most = -(-len(order) // state.num_processes)  # of the ranks' shares
    batches = [mine[i : i + batch_size] for i in range(0, most, batch_size)]
    was_training = model.training
    model.eval()
    found: list[tuple[int, Answer]] = []
    try:
        with outside_the_account(model.device), gathered_in_use(model):
            for batch in track(
                batches, description=title, console=console, transient=True, disable=not console.is_terminal
            ):
                asked = batch or order[-1:]  # a rank without a row left computes along with the others
                found += zip(batch, answer([prompts[i] for i in asked])[: len(batch)], strict=True)
    finally:
        model.train(was_training)
    if state.num_processes > 1:
        found = gather_object(found)
    return [one for _, one in sorted(found, key=lambda pair: pair[0])]


def _padded(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], side: str, device: torch.device
) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` (rows, longest), padded on `side`."""
    inputs = tokenizer.pad({"input_ids": [list(ids) for ids in prompts]}, padding_side=side, return_tensors="pt")
    return {name: inputs[name].to(device) for name in ("input_ids", "attention_mask")}


def _end_tokens(
    settings: GenerationConfig, tokenizer: PreTrainedTokenizerBase, more: Sequence[int]
) -> list[int] | None:
    """The ids that end a text, without repetition; None where nothing does."""
    of_model = settings.eos_token_id
    told = [*(of_model if isinstance(of_model, list) else [of_model]), tokenizer.eos_token_id, *more]
    return sorted({token for token in told if token is not None}) or None


def _generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
) -> list[str]:
    is_encoder_decoder = model.config.is_encoder_decoder
    side = "right" if is_encoder_decoder else "left"  # a decoder continues from the last position
    inputs = _padded(tokenizer, prompts, side, model.device)
    output = model.generate(
        **inputs,
        synced_gpus=is_sharded(model),  # transformers sees ZeRO-3 by itself, but not FSDP2 as accelerate sets it up
    )
    new = output if is_encoder_decoder else output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
