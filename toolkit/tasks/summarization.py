"""Summarization: a dialogue in a prompt, its summary as the target, ROUGE as the score."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from toolkit.errors import UserError
from toolkit.models import longest_input, looks_like_path
from toolkit.tasks.rows import load_rows
from toolkit.tasks.tokenization import MASKED, Encoder, Truncation

PROMPT = "Summarize the following conversation.\n\n{text}\n\nSummary:"
DEFAULT_MAX_LENGTH = 512
DEFAULT_MAX_TARGET_LENGTH = 128


@dataclass
class DataArguments:
    """Which rows, how they become prompts, and how long they may be."""

    _argument_group_name: ClassVar[str] = "data"

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, or a folder of csv / jsonl / parquet. Default: the dialogues that come with footprint."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    text_column: str = field(default="dialogue", metadata={"help": "Column with the text to summarize."})
    summary_column: str = field(default="summary", metadata={"help": "Column with the summary."})
    prompt_template: str = field(default=PROMPT, metadata={"help": "The prompt; {text} stands for the text."})
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens of the prompt (T5-like) or of prompt and summary together (GPT-like); activations grow "
            f"with it. Default: {DEFAULT_MAX_LENGTH}, or the model's own limit where that is smaller."
        },
    )
    max_target_length: int | None = field(
        default=None,
        metadata={"help": f"Most tokens of the summary, also when generating. Default: {DEFAULT_MAX_TARGET_LENGTH}."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first N rows only."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Use the first N rows only of validation, and of test."}
    )
    num_beams: int = field(default=1, metadata={"help": "Beams when generating for the scores; 1 is greedy."})

    def check(self, given: dict[str, Any]) -> None:
        """Raises UserError for values that are not possible or would have no effect."""
        for name in ("max_length", "max_target_length", "max_train_samples", "max_eval_samples", "num_beams"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} {value} is not possible; give a whole number of at least 1")
        if "{text}" not in self.prompt_template:
            raise UserError(
                f"--prompt_template {self.prompt_template!r} has no {{text}}; write {{text}} where the text goes"
            )
        for name in ("dataset_config_name", "text_column", "summary_column"):
            if name in given and self.dataset_name is None:
                raise UserError(f"--{name} has no effect without --dataset_name; add it or leave --{name} out")

    @property
    def is_local(self) -> bool:
        """Whether the rows come from files of this machine."""
        return self.dataset_name is not None and looks_like_path(self.dataset_name)


@dataclass
class SummarizationData:
    """A data set, ready for one model: token ids to train and validate on, and the test split as text."""

    train: Dataset  # columns input_ids, attention_mask, labels
    validation: Dataset
    test: Dataset  # the columns of the source
    test_prompts: list[list[int]]  # token ids, one list a row of the test split
    encoder: Encoder
    text_column: str
    summary_column: str
    truncation: dict[str, Truncation]
    remarks: list[str]
    fingerprint: dict[str, str]  # split: SHA-256 over its texts and summaries

    @property
    def supervised_tokens(self) -> int:
        """Label tokens of the train split that the loss sees."""
        return sum(label != MASKED for labels in self.train["labels"] for label in labels)


def load_data(
    args: DataArguments, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> SummarizationData:
    """Reads, checks and tokenizes the data set of `args` for the model of `config`.

    Raises: UserError for whatever is wrong with the files, the columns, the lengths or the labels.
    """
    encoder, remarks = _encoder(args, config, tokenizer)
    columns = [args.text_column, args.summary_column]
    splits, more = load_rows(args.dataset_name, args.dataset_config_name, columns, seed)
    remarks += more
    for split in splits:
        most = args.max_train_samples if split == "train" else args.max_eval_samples
        if most is not None and most < len(splits[split]):
            splits[split] = splits[split].select(range(most))
    limit = None if args.max_target_length else longest_input(config, tokenizer)
    truncation = {split: Truncation() for split in ("train", "validation")}
    tokenized = {}
    for split, lost in truncation.items():
        rows = []
        for number, (text, summary) in enumerate(zip(*(splits[split][c] for c in columns), strict=True), start=1):
            if limit and (needed := len(encoder.target_ids(str(summary)))) > limit:
                raise UserError(
                    f"row {number:,} of {split}: its {args.summary_column} has {needed} tokens, more than the {limit} that "
                    "the model can take; shorten it, or have such labels cut with --max_target_length "
                    f"{min(DEFAULT_MAX_TARGET_LENGTH, limit // 2)}"
                )
            rows.append(encoder.row(str(text), str(summary), lost))
        tokenized[split] = Dataset.from_list(rows)
    data = SummarizationData(
        tokenized["train"],
        tokenized["validation"],
        splits["test"],
        _prompts(splits["test"][args.text_column], encoder, truncation.setdefault("test", Truncation())),
        encoder,
        args.text_column,
        args.summary_column,
        truncation,
        remarks,
        {split: _fingerprint(splits[split], columns) for split in splits},
    )
    check_supervision(data.supervised_tokens)
    return data


def _prompts(texts: Iterable[Any], encoder: Encoder, lost: Truncation) -> list[list[int]]:
    prompts = []
    for text in texts:
        ids, cut = encoder.prompt(str(text))
        prompts.append(ids)
        lost.rows += cut > 0
        lost.text_tokens += cut
    return prompts


def check_supervision(supervised_tokens: int) -> None:
    """Raises UserError where no label token is left for the loss."""
    if supervised_tokens == 0:
        raise UserError(
            "every label of the train split is masked, so there is nothing to learn from; "
            "check --summary_column, and that --max_target_length leaves room for a summary"
        )


def _encoder(
    args: DataArguments, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Encoder, list[str]]:
    """The encoder with lengths that the model can take, and a remark for each length that its limit lowered."""
    limit = longest_input(config, tokenizer)
    remarks = []
    max_length = args.max_length or DEFAULT_MAX_LENGTH
    max_target_length = args.max_target_length or DEFAULT_MAX_TARGET_LENGTH
    hard_limit = None if config.model_type in RELATIVE_POSITIONS else limit
    for name, value in (("max_length", args.max_length), ("max_target_length", args.max_target_length)):
        if value is not None and hard_limit and value > hard_limit:
            raise UserError(f"--{name} {value} is longer than the model can take; give at most {hard_limit}")
    if args.max_length is None and limit and limit < max_length:
        max_length = limit
        remarks.append(f"max_length {limit}: the most that the model can take")
    if not config.is_encoder_decoder and max_target_length >= max_length:
        if args.max_target_length is not None:
            raise UserError(
                f"--max_target_length {max_target_length} leaves no room for a prompt within --max_length {max_length}, "
                "which holds both for a GPT-like model; lower the first or raise the second"
            )
        max_target_length = max(1, max_length // 4)
        remarks.append(f"max_target_length {max_target_length}: a quarter of max_length")
    return Encoder(tokenizer, args.prompt_template, config.is_encoder_decoder, max_length, max_target_length), remarks


RELATIVE_POSITIONS = {"t5", "mt5", "umt5", "longt5", "switch_transformers"}  # lengths beyond the training length do run


def _fingerprint(rows: Dataset, columns: list[str]) -> str:
    digest = hashlib.sha256()
    for values in zip(*(rows[c] for c in columns), strict=True):
        for value in values:
            digest.update(f"{value}\0".encode())
    return digest.hexdigest()
