"""Folders of whole models that are no run folders: merged ones, and what transformers saved or the hub holds."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from toolkit.errors import UserError
from toolkit.errors.reading import check_shape, read_json
from toolkit.models.arguments import ModelArguments
from toolkit.models.heads import has_own_head
from toolkit.models.loading import (
    check_weights,
    load_model,
    load_model_config,
    longest_input,
    read_config,
    read_model,
    read_tokenizer,
)
from toolkit.runs.finished_run import device
from toolkit.tasks import TASKS
from toolkit.tasks.base import Task
from toolkit.tasks.tokenization import PromptTokenizer

# How a run makes its prompts; footprint merge writes it into merge.json.
PROMPT: dict[str, Any] = {
    "task": str,
    "prompt_template": str,
    "label_names": [str],
    "max_length": int,
    "max_target_length": int,
}
NEW_TOKENS = 256  # of an answer, at most
LONGEST_PROMPT = 4096  # tokens


class ModelFolder:
    """The model in `path`: merged from a run (then it is asked as the run was), with a chat template, or neither.

    Raises: UserError if the folder holds no model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if (path / "adapter_config.json").exists():
            raise UserError(
                f"{path} holds an adapter without the files of its run; give the whole output folder of a recipe"
            )
        self.arguments = ModelArguments(model_name_or_path=str(path))
        self.config = read_config(str(path))
        self.classifies = has_own_head(self.config)
        if self.classifies:
            self.config.problem_type = "single_label_classification"  # so that it is loaded with its head
        else:
            self.config = load_model_config(self.arguments)
        self.merged: dict[str, Any] = {}
        if (path / "merge.json").exists():
            what = f"{path / 'merge.json'} is damaged"
            found = read_json(path / "merge.json", what, "merge the run again", finite=False)
            if "task" in found:  # versions before it was there
                check_shape(found, PROMPT, what, "merge the run again")
                self.merged = found
        if self.merged and self.merged["task"] not in TASKS:
            raise UserError(
                f"{path}: its task {self.merged['task']!r} is unknown; there are {', '.join(sorted(TASKS))}"
            )

    @property
    def adapter(self) -> None:
        """There is none: it is a whole model."""

    @property
    def shares_with(self) -> str:
        """A key: it shares its model with no other folder."""
        return str(self.path)

    @cached_property
    def task(self) -> Task:
        """What is asked of the model: what its run learned, else what its head, its chat template or its architecture is for."""
        if self.merged:
            return TASKS[self.merged["task"]]
        if self.classifies:
            return TASKS["sequence_classification"]
        if self.config.is_encoder_decoder:
            return TASKS["summarization"]
        return TASKS["chat" if self.tokenizer.chat_template else "text"]

    @cached_property
    def tokenizer(self) -> Any:
        """The folder's tokenizer, with a padding token."""
        tokenizer = read_tokenizer(str(self.path))
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    @cached_property
    def prompt_tokenizer(self) -> PromptTokenizer:
        """Makes the prompts: of the run that was merged, or the text alone (in a chat: as the user's turn)."""
        if self.merged:
            made = tuple(self.merged[name] for name in ("prompt_template", "max_length", "max_target_length"))
            names = tuple(self.merged["label_names"])
        else:
            most = min(longest_input(self.config, self.tokenizer) or LONGEST_PROMPT, LONGEST_PROMPT)
            new = 0 if self.task.name in ("sequence_classification", "text") else min(NEW_TOKENS, most // 2)
            made = ("{text}", most, new)
            labels = self.config.id2label if self.classifies else {}
            names = tuple(str(labels[number]) for number in range(len(labels)))
        template, length, target = made
        return self.task.prompt_tokenizer(
            self.tokenizer, template, bool(self.config.is_encoder_decoder), length, target, names
        )

    def load_base(self) -> PreTrainedModel:
        """The model, in the type in which it is stored."""
        if self.classifies:
            model, found = read_model(str(self.path), self.config, dtype="auto")
            check_weights(str(self.path), model, found)
            return model.to(device()).eval()
        stored = self.config.dtype if isinstance(self.config.dtype, torch.dtype) else torch.float32
        return load_model(self.arguments, self.config, stored, TrainingArguments(report_to="none")).eval()

    def generate(self, texts: Sequence[str], model: PreTrainedModel, num_beams: int = 1) -> list[str]:
        """The answers of `model` to `texts`; with a classification head, the labels."""
        prompts = [self.prompt_tokenizer.prompt(text)[0] for text in texts]
        return self.task.continuations(model, self.prompt_tokenizer, prompts, 8, num_beams)
