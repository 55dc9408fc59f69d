"""Scoring: prompts are answered in batches by all ranks, and only the answers are kept, never logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.progress import track
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from toolkit.console import console, is_main
from toolkit.engine import gathered_in_use, is_sharded

if TYPE_CHECKING:  # tasks use this module
    from toolkit.config import Config
    from toolkit.data import TaskData

Answer = TypeVar("Answer")


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
) -> list[str]:
    """The model's texts for `prompts` (token ids), in their order, on every rank. Greedy or beam search: no sampling."""

    def answer(batch: list[Sequence[int]]) -> list[str]:
        return _generate_batch(model, tokenizer, batch, max_new_tokens, num_beams)

    use_cache = model.config.use_cache
    model.config.use_cache = True
    try:
        return _in_batches(answer, model, prompts, batch_size, title)
    finally:
        model.config.use_cache = use_cache


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
        with gathered_in_use(model):
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


def _generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    num_beams: int,
) -> list[str]:
    is_encoder_decoder = model.config.is_encoder_decoder
    side = "right" if is_encoder_decoder else "left"  # a decoder continues from the last position
    inputs = _padded(tokenizer, prompts, side, model.device)
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        do_sample=False,
        synced_gpus=is_sharded(model),  # transformers sees ZeRO-3 by itself, but not FSDP2 as accelerate sets it up
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    new = output if is_encoder_decoder else output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
