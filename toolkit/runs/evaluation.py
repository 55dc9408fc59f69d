"""Scoring: a model answers the test split, and its answers are scored against the references."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from transformers import PreTrainedModel

from toolkit.config import Config
from toolkit.console import is_main, say
from toolkit.data.loading import TaskData
from toolkit.errors import guarded
from toolkit.memory.cuda.meter import excluded_from_peak
from toolkit.tasks.base import Task
from toolkit.tasks.tokenization import PromptTokenizer


@dataclass
class Completions:
    """One model's answers to the test split, and their scores (only on rank 0)."""

    texts: list[str]
    scores: dict[str, float]


def evaluate_by_generation(model: PreTrainedModel, data: TaskData, config: Config, title: str) -> Completions:
    """The model's answers to every row of the test split, scored against the references.

    Rows with the same text are answered once: DialogSum's test split has three references for each dialogue.
    """
    name = config.model.model_name_or_path or "the embedded model"
    say("scoring", f"the {title} answers {len({*map(tuple, data.test_prompts)}):,} rows of the test split")
    guard = guarded(f"{name}: the {title} cannot answer the test split", "mend its files, or give another model")
    # with several processes an exception can be the loss of another one, which `exits_cleanly` explains
    with excluded_from_peak(model.device), guard if config.training.world_size == 1 else nullcontext():
        texts = answers_to(
            data.test_prompts,
            model,
            data.task,
            data.prompt_tokenizer,
            config.training.per_device_eval_batch_size,
            config.data.get("num_beams") or 1,
            title,
        )
    return Completions(
        texts, data.task.score(texts, data.references, data.prompt_tokenizer.label_names) if is_main else {}
    )


def answers_to(
    prompts: Sequence[Sequence[int]],
    model: PreTrainedModel,
    task: Task,
    tokenizer: PromptTokenizer,
    batch_size: int,
    num_beams: int,
    title: str,
) -> list[str]:
    """The model's answer to each of `prompts` (token ids); equal ones are answered once."""
    rows = [tuple(ids) for ids in prompts]
    unique = list(dict.fromkeys(rows))
    answers = task.answers(model, tokenizer, unique, batch_size, num_beams, title)
    answer = dict(zip(unique, answers, strict=True))
    return [answer[row] for row in rows]
