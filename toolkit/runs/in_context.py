"""In-context learning: examples in the prompt, their gain in quality, and their cost in context and time."""

import random
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from toolkit.config import Config
from toolkit.console import is_main, say, table
from toolkit.data.loading import TaskData
from toolkit.errors import UserError
from toolkit.files import csv_text
from toolkit.models.loading import T5_FAMILY, longest_input
from toolkit.models.losses import IGNORE_INDEX
from toolkit.runs.evaluation import Completions, evaluate_by_generation
from toolkit.runs.preflight import Preflight
from toolkit.runs.run_folder import RunFolder
from toolkit.tasks.chat import ChatPromptTokenizer, Conversation, Message
from toolkit.tasks.metrics import score_title


@dataclass
class Shots:
    """The model's answers with this number of examples, and the cost of a row of the test split."""

    number: int
    completions: Completions
    prompt_tokens: float  # mean per row
    seconds: float  # wall-clock time per row on this rank

    @property
    def name(self) -> str:
        """The name in tables and in run.json."""
        return f"{self.number}-shot"


def answer_in_context(model: PreTrainedModel, ready: Preflight, config: Config) -> list[Shots]:
    """The model's answers to the test split with each number of examples.

    Raises: UserError before any generation, if the examples do not fit into the model's context.
    """
    numbers = config.method.num_shots  # type: ignore[attr-defined]
    prompts = {number: prompts_with_examples(ready, number, config.training.seed) for number in numbers}
    results = []
    for number in numbers:
        data = replace(ready.data, test_prompts=prompts[number])
        began = time.perf_counter()
        completions = evaluate_by_generation(model, data, config, title=f"{number}-shot")
        seconds = (time.perf_counter() - began) / len(prompts[number])
        results.append(Shots(number, completions, sum(map(len, prompts[number])) / len(prompts[number]), seconds))
    return results


def prompts_with_examples(ready: Preflight, number: int, seed: int) -> list[list[int]]:
    """The prompts (token ids) of the test split, each after the same `number` answered rows of the train split.

    A smaller number uses the first examples of a larger one. Special tokens at the ends of a text stay at the ends of the
    whole prompt. In a chat the examples are earlier turns, after the question's system message, in the chat template.

    Raises: UserError if the train split has too few rows, or the prompt is too long for the model.
    """
    data, tokenizer = ready.data, ready.data.tokenizer
    if number > len(data.train):
        raise UserError(f"--num_shots {number}: the train split has {len(data.train)} rows; give at most that")
    if number and not data.prompt_tokenizer.max_target_length:
        raise UserError(
            f"--task {data.task.name} generates no answer, so examples in a prompt have no use; use another task"
        )
    if isinstance(data.prompt_tokenizer, ChatPromptTokenizer):
        prompts = _conversations(data, number, seed) if number else data.test_prompts
        _check_fit(ready, number, max(map(len, prompts)))
        return prompts
    between = tokenizer("\n\n", add_special_tokens=False).input_ids
    closing = set(tokenizer.all_special_ids)
    examples: list[int] = []
    for row in (data.train[index] for index in _drawn(len(data.train), number, seed)):
        ids = _inner(row["input_ids"], closing)
        if ready.model_config.is_encoder_decoder:
            ids = ids + _inner([label for label in row["labels"] if label != IGNORE_INDEX], closing)
        examples += ids + between
    prompts = []
    for prompt in data.test_prompts:
        start = next((at for at, token in enumerate(prompt) if token not in closing), 0)
        prompts.append([*prompt[:start], *examples, *prompt[start:]])
    _check_fit(ready, number, max(map(len, prompts)))
    return prompts


def _conversations(data: TaskData, number: int, seed: int) -> list[list[int]]:
    """The prompts (token ids) of a chat: each conversation of the test split after `number` of the train split, not truncated."""
    pairs = data.pairs("train")
    examples: list[Message] = []
    for index in _drawn(len(pairs), number, seed):
        question, answer = pairs[index]
        examples += [*_without_system(question.messages), answer]
    prompts = []
    for question, _ in data.pairs("test"):
        system = [message for message in question.messages if message["role"] == "system"]
        whole = Conversation([*system, *examples, *_without_system(question.messages)], question.tools)
        prompts.append(data.prompt_tokenizer.prompt(whole, room=sys.maxsize)[0])
    return prompts


def _drawn(rows: int, number: int, seed: int) -> list[int]:
    """`number` random row indices below `rows`; a smaller number gives the first ones of a larger number."""
    return random.Random(seed).sample(range(rows), rows)[:number]


def _without_system(messages: list[Message]) -> list[Message]:
    return [message for message in messages if message["role"] != "system"]


def _inner(ids: list[int], closing: set[int]) -> list[int]:
    """`ids` without the special tokens around them."""
    kept = [at for at, token in enumerate(ids) if token not in closing]
    return ids[kept[0] : kept[-1] + 1] if kept else []


def _check_fit(ready: Preflight, number: int, longest: int) -> None:
    config, prompt_tokenizer = ready.model_config, ready.data.prompt_tokenizer
    limit = longest_input(config)
    if limit is None or config.model_type in T5_FAMILY:
        return  # T5's relative positions have no limit
    needed = longest + (0 if config.is_encoder_decoder else prompt_tokenizer.max_target_length)
    advice = (
        "give fewer"
        if isinstance(prompt_tokenizer, ChatPromptTokenizer)
        else "give fewer, or lower --max_length, which truncates each example"
    )
    if needed > limit:
        raise UserError(
            f"--num_shots {number} makes a prompt of {longest:,} tokens, with the answer {needed:,}: more than the {limit:,} "
            f"that the model can take; {advice}"
        )


def finish_in_context(run: RunFolder, ready: Preflight, results: list[Shots]) -> None:
    """Writes scores, costs and completions into the run's folder, and shows them."""
    if not is_main:
        return
    run.record["scores"] = {shots.name: shots.completions.scores for shots in results}
    costs: dict[str, Any] = {s.name: {"prompt_tokens": s.prompt_tokens, "seconds_a_row": s.seconds} for s in results}
    run.record["context"] = costs
    answers = [ready.data.test_texts, ready.data.references, *(shots.completions.texts for shots in results)]
    header = ["text", "reference", *(shots.name for shots in results)]
    run.write("completions.csv", csv_text(header, zip(*answers, strict=True)))
    run.end()
    kinds = list(results[0].completions.scores)
    columns = ["examples", *map(score_title, kinds), "prompt tokens", "ms a row"]
    rows = [
        [
            s.name,
            *(f"{s.completions.scores[k]:.4f}" for k in kinds),
            f"{s.prompt_tokens:,.0f}",
            f"{1000 * s.seconds:,.0f}",
        ]
        for s in results
    ]
    table(f"In-context learning on the test split ({len(ready.data.test):,} rows)", columns, rows)
    say("folder", str(run.path))
