"""Scoring by generation: prompts are answered in batches by all ranks, and only the text is kept."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.progress import track
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from toolkit.config import Config
from toolkit.console import console, is_main
from toolkit.tasks.summarization import SummarizationData


@dataclass
class Completions:
    """What one model wrote for the test split, and its scores (ROUGE F-measures from 0 to 1; rank 0 alone)."""

    texts: list[str]
    scores: dict[str, float]


def evaluate_by_generation(model: PreTrainedModel, data: SummarizationData, config: Config, title: str) -> Completions:
    """Generates for every row of the test split and scores the texts against the references.

    Rows with the same text (DialogSum's test split has three references a dialogue) are generated once.
    """
    prompts = [tuple(ids) for ids in data.test_prompts]
    unique = list(dict.fromkeys(prompts))
    written = generate(
        model,
        data.encoder.tokenizer,
        unique,
        batch_size=config.training.per_device_eval_batch_size,
        max_new_tokens=data.encoder.max_target_length,
        num_beams=config.data.num_beams,
        title=title,
    )
    answer = dict(zip(unique, written, strict=True))
    answers = [answer[prompt] for prompt in prompts]
    references = [str(summary) for summary in data.test[data.summary_column]]
    if not is_main:
        return Completions(answers, {})
    from toolkit.metrics.rouge import rouge  # `evaluate` takes seconds to import

    return Completions(answers, rouge(answers, references))


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    max_new_tokens: int,
    num_beams: int = 1,
    title: str = "",
) -> list[str]:
    """The model's texts for `prompts` (token ids), in their order, on every rank. Greedy or beam search: no sampling.

    Prompts are sorted by length, so that a batch holds little padding, and shared out among the ranks.
    """
    state = PartialState()
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    mine = order[state.process_index :: state.num_processes]
    batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    was_training, use_cache = model.training, model.config.use_cache
    model.eval()
    model.config.use_cache = True
    texts: list[tuple[int, str]] = []
    try:
        for batch in track(
            batches, description=title, console=console, transient=True, disable=not console.is_terminal
        ):
            texts += zip(
                batch,
                _generate_batch(model, tokenizer, [prompts[i] for i in batch], max_new_tokens, num_beams),
                strict=True,
            )
    finally:
        model.train(was_training)
        model.config.use_cache = use_cache
    if state.num_processes > 1:
        texts = gather_object(texts)
    return [text for _, text in sorted(texts)]


def _generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    num_beams: int,
) -> list[str]:
    is_encoder_decoder = model.config.is_encoder_decoder
    side = "right" if is_encoder_decoder else "left"  # a decoder continues from the last position
    inputs = tokenizer.pad({"input_ids": [list(ids) for ids in prompts]}, padding_side=side, return_tensors="pt").to(
        model.device
    )
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    new = output if is_encoder_decoder else output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
