"""The data set of a run: its flags, and its rows as token ids ready for one model."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from itertools import chain, pairwise
from typing import Any, ClassVar

from datasets import Dataset, DatasetDict, concatenate_datasets
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from toolkit.data.formats import FILLED, PLACEHOLDER, recognize, split_template
from toolkit.data.rows import SPLITS, Source, Splits, load_rows, read_source, sample, sample_of_classes
from toolkit.data.shared_rows import SharedRows
from toolkit.data.token_cache import Tokenized, cached
from toolkit.errors import UserError, did_you_mean, guarded
from toolkit.models.arguments import lasting_path, looks_like_path
from toolkit.models.heads import class_order, normalized
from toolkit.models.hub import hub_id
from toolkit.models.loading import T5_FAMILY, longest_input
from toolkit.models.losses import IGNORE_INDEX
from toolkit.tasks import TASKS, Task
from toolkit.tasks.chat import USUAL_ROLES
from toolkit.tasks.chat_templates import set_chat_template
from toolkit.tasks.tokenization import PromptTokenizer, Truncation

DEFAULT_MAX_LENGTH = 512
DEFAULT_TASK = "summarization"
AUTO = "auto"
MOST_CHARACTERS = 2_000_000  # of one text: a tokenizer takes seconds for each million, and most of it would be cut off
BY_TASK = sorted({flag for task in TASKS.values() for flag in task.flags})  # the flags that not every task has


def _by_task(flag: str) -> str:
    """For the help of a flag: its default in each task that uses it."""
    defaults = [f"{task.flags[flag]!r} ({name})" for name, task in sorted(TASKS.items()) if task.flags.get(flag)]
    return f"Default: {', '.join(defaults)}." if defaults else ""


@dataclass
class DataArguments:
    """The task, the data set, how its rows become prompts, and how long they may be."""

    _argument_group_name: ClassVar[str] = "data"

    task: str = field(
        default=AUTO,
        metadata={
            "choices": [AUTO, *sorted(TASKS)],
            "help": f"What is learned. {AUTO}: what the columns of the data suggest, else {DEFAULT_TASK}. classification generates the label as text; sequence_classification puts a head on the "
            "model; chat learns the assistant's turns; text is plain language modelling.",
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, a file, or a folder of csv / tsv / json / jsonl / parquet / arrow / txt files, or one that datasets "
            "saved; text files may be compressed. Default: the dialogues that come with footprint."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    encoding: str | None = field(
        default=None, metadata={"help": "Encoding of text files, such as latin-1 or cp1252. Default: utf-8."}
    )
    text_column: str | None = field(default=None, metadata={"help": f"Column with the text. {_by_task('text_column')}"})
    summary_column: str | None = field(
        default=None, metadata={"help": f"Column with the summary. {_by_task('summary_column')}"}
    )
    label_column: str | None = field(
        default=None, metadata={"help": f"Column with the class. {_by_task('label_column')}"}
    )
    messages_column: str | None = field(
        default=None,
        metadata={"help": f"Column with lists of role and content. {_by_task('messages_column')}"},
    )
    tools_column: str | None = field(
        default=None,
        metadata={"help": f"Column with lists of the tools' JSON schemas; optional. {_by_task('tools_column')}"},
    )
    system_column: str | None = field(
        default=None,
        metadata={"help": f"Column with the system's message; optional. {_by_task('system_column')}"},
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": "How conversations are written, for a tokenizer without a chat template: chatml, alpaca, or a file with a Jinja "
            "template. It is saved with the tokenizer."
        },
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column with the user's turn, for data without a messages column."}
    )
    response_column: str | None = field(
        default=None, metadata={"help": "Column with the assistant's answer; goes with --prompt_column."}
    )
    prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "The prompt; {text} is replaced by the text, {labels} by the classes, {NAME} by the column NAME. A "
            "paragraph whose columns are empty is left out. " + _by_task("prompt_template")
        },
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of tokens of the prompt (T5-like) or of prompt and target together (GPT-like); activation "
            f"memory grows with it. Default: {DEFAULT_MAX_LENGTH}, or the model's own limit if that is smaller."
        },
    )
    max_target_length: int | None = field(
        default=None,
        metadata={
            "help": f"Maximum number of tokens of the target, also when generating. {_by_task('max_target_length')}"
        },
    )
    max_train_samples: int | None = field(
        default=None,
        metadata={
            "help": "Train on N rows only: a random sample, with the same share of each class if there is a label column. The rows "
            "are the same for every --seed."
        },
    )
    max_eval_samples: int | None = field(
        default=None,
        metadata={"help": "Use only N rows of validation and N rows of test, chosen as with --max_train_samples."},
    )
    num_beams: int | None = field(
        default=None,
        metadata={"help": f"Beams for the generated answers that are scored; 1 is greedy. {_by_task('num_beams')}"},
    )

    def __post_init__(self) -> None:
        self.dataset_name = lasting_path(self.dataset_name and hub_id(self.dataset_name, "data set"))
        self.chat_template = lasting_path(self.chat_template)
        self._given: frozenset[str] = frozenset()  # the user's flags, once they are checked
        self._is_chosen = False  # whether `read` chose the task
        self._is_open = self.task == AUTO  # whether it may
        self._because = ""  # why the task is chat, where --task does not say so
        if self._is_open:
            chat = (
                "messages_column",
                "prompt_column",
                "response_column",
                "tools_column",
                "system_column",
                "chat_template",
            )
            named = next((flag for flag in chat if getattr(self, flag)), None)
            self.task = "chat" if named else DEFAULT_TASK
            self._because = f" (--task chat, by --{named})" if named else ""
            self._is_open = self.task == DEFAULT_TASK and self.dataset_name is not None
        for flag in BY_TASK:
            if flag not in TASKS[self.task].flags:
                setattr(self, flag, None)  # a method's default, without effect here; `check` refuses a user's flag

    def check(self, given: dict[str, Any]) -> None:
        """Raises UserError for impossible values and for flags without effect."""
        self._given = frozenset(given)
        task = TASKS[self.task]
        for flag in BY_TASK:
            if flag in given and flag not in task.flags:
                others = ", ".join(f"--task {name}" for name, other in sorted(TASKS.items()) if flag in other.flags)
                raise UserError(f"--{flag} has no effect with --task {task.name} (only with {others}); leave it out")
        for name in ("max_length", "max_target_length", "max_train_samples", "max_eval_samples", "num_beams"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} {value} is not possible; give a whole number of at least 1")
        if (template := self.get("prompt_template")) is not None and not {*PLACEHOLDER.findall(template)} - {"labels"}:
            raise UserError(
                f"--prompt_template {template!r} has no {{text}}; write {{text}} where the text goes, or a column's name in braces"
            )
        if self.prompt_column and "prompt_template" in given and "{text}" not in self.prompt_template:  # type: ignore[operator]
            raise UserError(
                "--prompt_column has no effect with a --prompt_template without {text}; leave one of them out"
            )
        if template is not None and "{labels}" in template and "label_column" not in task.flags:
            raise UserError(
                f"--prompt_template {template!r} has {{labels}}, and --task {task.name} has no classes; leave it out"
            )
        for name in ("dataset_config_name", "encoding", *(flag for flag in BY_TASK if flag.endswith("_column"))):
            if name in given and self.dataset_name is None:
                raise UserError(f"--{name} has no effect without --dataset_name; add it or leave --{name} out")
        if self.dataset_name is None and task.name != DEFAULT_TASK:
            raise UserError(
                f"--task {task.name} needs --dataset_name: the dialogues that come with footprint are for {DEFAULT_TASK}"
            )
        task.check(given)

    def get(self, flag: str) -> Any:
        """The value of a flag that depends on the task: the user's value, the task's default, or None."""
        value = getattr(self, flag)
        return TASKS[self.task].flags.get(flag) if value is None else value

    @property
    def columns(self) -> dict[str, str]:
        """The columns that the task reads, by flag name."""
        return {flag: self.get(flag) for flag in TASKS[self.task].column_flags(vars(self))}

    def read(self) -> Source:
        """Reads the data set, and sets the flags that its columns suggest and the user did not set: task, columns, prompt.

        The remarks say what was recognized.

        Raises: UserError for data that cannot be read, and for preference data.
        """
        task = None if self._is_open else self.task
        source = read_source(self.dataset_name, self.dataset_config_name, self.encoding, task)
        if self.dataset_name is None:
            return source
        train = source.splits["train"]
        columns = {flag: column for flag, column in self.columns.items() if flag not in TASKS[self.task].optional}
        if self.prompt_template and "{text}" not in self.prompt_template:
            columns.pop("text_column", None)
            columns.pop("prompt_column", None)
        is_named = self._is_open and self.summary_column is not None and self.prompt_template is None
        if all(column in train.column_names for column in columns.values()) and not is_named:
            said = [f"reads conversations: {', '.join(columns.values())}{self._because}"] if self._because else []
            return Source(source.splits, [*said, *source.remarks])
        flags = [flag for flag in BY_TASK if flag.endswith("_column") and getattr(self, flag) is not None]
        given = {flag: getattr(self, flag) for flag in flags}
        if not {*given.values()} <= {*train.column_names}:
            return source  # a column that is missing is refused when the rows are read
        found = recognize(train, task, given, self.prompt_template)
        if found is None:
            return source
        others = [flag for flag in BY_TASK if getattr(self, flag) is not None and flag not in TASKS[found.task].flags]
        if without := [flag for flag in others if flag in self._given]:
            raise UserError(
                f"--{without[0]} has no effect with --task {found.task}, which the columns of {self.dataset_name} suggest "
                f"({', '.join(train.column_names[:8])}); leave it out, or name the task with --task"
            )
        self._is_chosen, self.task, self._is_open = self._is_open, found.task, False
        for flag in others:
            setattr(self, flag, None)  # a method's default
        for flag, column in found.columns.items():
            setattr(self, flag, column)
        if self.prompt_template is None and found.template is not None:
            self.prompt_template = found.template
        return Source(source.splits, [found.remark + self._because, *source.remarks])

    @property
    def is_chosen(self) -> bool:
        """Whether the columns of the data chose the task."""
        return self._is_chosen

    @property
    def is_local(self) -> bool:
        """Whether the rows come from local files."""
        return self.dataset_name is not None and looks_like_path(self.dataset_name)


def guarded_rows(args: DataArguments) -> AbstractContextManager[None]:
    """The boundary around a user's rows: what a library raises about them becomes a UserError."""
    return guarded(f"--dataset_name {args.dataset_name}: its rows cannot be read", "give rows that the task can read")


@dataclass
class TaskData:
    """A data set, ready for one model: tokenized train and validation splits, and the test split as prompts."""

    task: Task
    rows: DatasetDict  # train, validation and test, with the columns of the source
    columns: dict[str, str]  # those that the task reads, by flag name
    prompt_tokenizer: PromptTokenizer
    train: Dataset  # columns input_ids, attention_mask, labels (token ids, or a class index)
    validation: Dataset
    test_prompts: list[list[int]]  # token ids, one list for each row of the test split
    references: list[str]  # the answers to `test_prompts` are scored against these
    truncation: dict[str, Truncation]
    remarks: list[str]
    fingerprint: dict[str, str]  # split: SHA-256 over the columns that are read
    supervised_tokens: int  # labels of the train split that count in the loss
    is_collated: ClassVar[bool] = False  # `collator` makes batches of these rows

    @property
    def test(self) -> Dataset:
        """The rows of the test split."""
        return self.rows["test"]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer behind `prompt_tokenizer`."""
        return self.prompt_tokenizer.tokenizer

    def collator(self, model: PreTrainedModel, sequence_parallel_size: int = 1) -> Any:
        """The data collator. It pads each batch to its longest row: labels are (rows, length), or (rows,) for a head.

        Under sequence parallelism every batch is padded to the longest row of the data set.
        """
        if self.task.model_kind == "head":
            return DataCollatorWithPadding(self.tokenizer)
        seq2seq = model if model.config.is_encoder_decoder else None
        collator = DataCollatorForSeq2Seq(self.tokenizer, model=seq2seq, label_pad_token_id=IGNORE_INDEX)
        if sequence_parallel_size == 1:
            return collator
        longest = max(len(ids) for split in (self.train, self.validation) for ids in split["input_ids"])
        return SharedRows(collator, sequence_parallel_size, longest)

    def pairs(self, split: str) -> list[tuple[Any, Any]]:
        """Text and target of each row of `split`."""
        return list(_pairs(self.task, self.rows[split], self.columns, split))

    @cached_property
    def train_fingerprint(self) -> str:
        """SHA-256 over the train split as token ids, in order."""
        digest = hashlib.sha256()
        for rows in self.train.select_columns(["input_ids", "labels"]).iter(batch_size=1000):
            digest.update(json.dumps(rows, sort_keys=True).encode())
        return digest.hexdigest()

    @cached_property
    def test_texts(self) -> list[str]:
        """The texts of the test split, as in `completions.csv`."""
        return [self.task.shown(text) for text, _ in self.pairs("test")]


def load_data(
    args: DataArguments,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    virtual_tokens: int = 0,
    source: Source | None = None,
) -> TaskData:
    """Reads (unless `source` has it), checks and tokenizes the data set of `args` for the model of `config`.

    Raises: UserError for mistakes in the files, the columns, the lengths or the labels.
    """
    source = source or args.read()
    task = TASKS[args.task]
    if tokenizer.eos_token_id is None and task.model_kind != "head" and not config.is_encoder_decoder:
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer has no end-of-text token, so the model could not learn where to stop; give "
            "another with --tokenizer_name, or set eos_token in its tokenizer_config.json"
        )
    max_length, max_target_length, remarks = lengths(args, config, tokenizer, virtual_tokens)
    if args.chat_template is not None:
        remarks += set_chat_template(tokenizer, args.chat_template)
    splits, columns, template, more = _read_columns(args, source)
    remarks += more
    if args.is_chosen and task.name == DEFAULT_TASK and tokenizer.chat_template:
        remarks.append("the model has a chat template: --task chat would learn these rows as conversations")
    names = _names(splits, columns)
    _check_names(splits, columns, names)
    if task.model_kind == "head":
        names = class_order(config, names)
    template = template.replace("{labels}", ", ".join(names))
    prompt_tokenizer = task.prompt_tokenizer(
        tokenizer, template, config.is_encoder_decoder, max_length, max_target_length, names
    )
    _check_written(columns, prompt_tokenizer)
    for split in splits:
        flag = "max_train_samples" if split == "train" else "max_eval_samples"
        most = getattr(args, flag)
        if most is not None and most < len(splits[split]):
            splits[split], more = _sample(splits[split], most, columns.get("label_column"))
            remarks += [f"--{flag} {most}: {remark} of {split}" for remark in more]
        _check_sizes(splits[split], columns, split)
    limit = longest_input(config, tokenizer) if max_target_length and not args.max_target_length else None
    fingerprint = {split: _fingerprint(splits[split], list(columns.values())) for split in splits}
    tokenized, truncation = {}, {"test": Truncation()}
    for split in ("train", "validation"):
        empty = {name: [n for n, v in enumerate(splits[split][name][:]) if v is None] for name in columns.values()}
        others = (task.name, list(columns), limit, fingerprint[split], empty)
        make = partial(_tokenize, task, splits, split, columns, prompt_tokenizer, limit)
        made = cached(len(splits[split]), prompt_tokenizer, others, make)
        check_supervision(made.supervised_tokens, split)
        if made.left_out:
            remarks.append(f"{made.left_out:,} rows of {split} left out: no label within --max_length {max_length}")
        tokenized[split], truncation[split] = made.rows, made.truncation
        if split == "train":
            supervised_tokens = made.supervised_tokens
    test_prompts, references = [], []
    for number, (text, target) in enumerate(_pairs(task, splits["test"], columns, "test"), start=1):
        try:
            ids, cut = prompt_tokenizer.prompt(text)
            references.append(task.reference(prompt_tokenizer, text, target, ids))
        except UserError as error:
            raise UserError(f"row {number:,} of test: {error}") from None
        test_prompts.append(ids)
        truncation["test"].rows += cut > 0
        truncation["test"].text_tokens += cut
    remarks += [*prompt_tokenizer.remarks(), *_remarks(task, splits, columns, tokenizer, tokenized, truncation)]
    used = [tokenized[split]["input_ids"][:] for split in tokenized]
    if config.is_encoder_decoder and task.model_kind != "head":
        used += [tokenized[split]["labels"][:] for split in tokenized]
    _check_embedded(config, tokenizer, chain(test_prompts, *used))
    return TaskData(
        task,
        splits,
        columns,
        prompt_tokenizer,
        tokenized["train"],
        tokenized["validation"],
        test_prompts,
        references,
        truncation,
        remarks,
        fingerprint,
        supervised_tokens,
    )


def _tokenize(
    task: Task,
    splits: Splits,
    split: str,
    columns: dict[str, str],
    prompt_tokenizer: PromptTokenizer,
    limit: int | None,
) -> Tokenized:
    """The rows of `split` as token ids. Raises: UserError with the number of a row that cannot be one, or is above the model's `limit`."""
    rows, counts, lost = [], [], Truncation()
    most = prompt_tokenizer.max_target_length
    for number, (text, target) in enumerate(_pairs(task, splits[split], columns, split), start=1):
        cut_before = lost.target_tokens
        try:
            row = prompt_tokenizer.row(text, target, lost)
        except UserError as error:
            raise UserError(f"row {number:,} of {split}: {error}") from None
        if limit and (lost.target_tokens > cut_before or most > limit):
            needed = len(prompt_tokenizer.target_ids(target))
            if needed > limit:
                *_, column = columns.values()
                raise UserError(
                    f"row {number:,} of {split}: its {column} has {needed} tokens, more than the {limit} that the model can take; "
                    f"shorten it, or truncate such labels with --max_target_length {min(most, limit // 2)}"
                )
        counts.append(_supervised(row["labels"], prompt_tokenizer.is_encoder_decoder))
        if counts[-1]:
            rows.append(row)
    return Tokenized(Dataset.from_list(rows), counts.count(0), sum(counts), lost)


def rows_to_score(args: DataArguments, whole: bool) -> tuple[list[tuple[Any, Any]], list[str]]:
    """Text and target of each row of the test split, and remarks on where they come from.

    A test split that is missing is held out as for a run, or, with `whole`, stands for all rows.

    Raises: UserError for mistakes in the files and columns.
    """
    source = args.read()
    remarks = [*source.remarks]
    if whole:
        there = source.splits.get("test")
        if there is None:
            there = concatenate_datasets([*source.splits.values()])
            remarks.append("no test split: all rows are scored")
        source = Source(dict.fromkeys(SPLITS, there), source.remarks)
    splits, columns, _, _ = _read_columns(args, source)
    task, rows = TASKS[args.task], splits["test"]
    if args.max_eval_samples is not None and args.max_eval_samples < len(rows):
        rows, more = _sample(rows, args.max_eval_samples, columns.get("label_column"))
        remarks += more
    _check_sizes(rows, columns, "test")
    return list(_pairs(task, rows, columns, "test")), remarks


def _read_columns(args: DataArguments, source: Source) -> tuple[DatasetDict, dict[str, str], str, list[str]]:
    """The splits with the columns that the task reads, these columns by flag, the prompt around {text}, and remarks.

    Raises: UserError as `_template` and `load_rows` do.
    """
    task = TASKS[args.task]
    optional = [flag for flag in task.optional if getattr(args, flag) is None]
    template, middle, columns = _template(args, args.columns, source)
    splits, remarks = load_rows(
        args.dataset_name,
        args.dataset_config_name,
        columns,
        optional,
        source,
        middle,
        lambda row: task.shown(task.pair(row)[0]),
    )
    columns = {flag: column for flag, column in columns.items() if column in splits["train"].column_names}
    return splits, columns, template, remarks


def _template(args: DataArguments, columns: dict[str, str], source: Source) -> tuple[str, str | None, dict[str, str]]:
    """The prompt around {text}; what {text} is made of, if not just one column; and the columns that are read, by flag.

    In a chat the whole prompt is the user's turn.

    Raises: UserError for a prompt that names no column of the data.
    """
    template, names = args.get("prompt_template") or "{text}", source.splits["train"].column_names
    is_chat = "text_column" not in columns
    flag = "prompt_column" if is_chat else "text_column"
    used = {*PLACEHOLDER.findall(template)} - {"labels"}
    text = columns.get(flag)
    if used <= {"text"} and (template == "{text}" or not is_chat):
        return template, None, columns
    if text not in names:
        if "text" in used and getattr(args, flag) is not None:
            return template, None, columns  # the missing column is refused when the rows are read
        text = "text" if "text" in names else None
    before, middle, after = split_template(template, names, text)
    if is_chat:
        before, middle, after = "", template, ""
    elif middle == "{text}":
        return template, None, columns
    if "{labels}" in middle:
        raise UserError(
            "--prompt_template has {labels} between two columns; write it before the first or after the last"
        )
    if text is not None:
        middle = middle.replace("{text}", f"{{{text}}}")
    return f"{before}{{text}}{after}", middle, columns | {flag: FILLED}


def _check_sizes(rows: Dataset, columns: dict[str, str], split: str) -> None:
    """Raises UserError for a text of more than `MOST_CHARACTERS`."""
    for column in columns.values():
        for number, value in enumerate(rows[column][:], start=1):
            if isinstance(value, str) and len(value) > MOST_CHARACTERS:
                raise UserError(
                    f"row {number:,} of {split}: its column {column} has {len(value):,} characters, and at most "
                    f"{MOST_CHARACTERS:,} are read; split it into several rows, or shorten it"
                )


@cache
def label_names(
    dataset_name: str | None, dataset_config_name: str | None, label_column: str, encoding: str | None = None
) -> tuple[str, ...]:
    """The classes of a data set: a prediction needs their number for the head, and has no tokenizer."""
    source = read_source(dataset_name, dataset_config_name, encoding, "sequence_classification")
    train = source.splits["train"]
    if label_column not in train.column_names and (found := recognize(train, "sequence_classification", {}, None)):
        label_column = found.columns["label_column"]
    columns = {"label_column": label_column}
    return _names(load_rows(dataset_name, dataset_config_name, columns, source=source)[0], columns)


def lengths(
    args: DataArguments,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    virtual_tokens: int = 0,
) -> tuple[int, int, list[str]]:
    """The maximum tokens of prompt and target, and a remark for each that the model's limit lowered.

    The target's maximum is 0 if the task generates nothing. The tokenizer's own limit only counts if `tokenizer` is given.
    `virtual_tokens` is the number of positions that the method needs.

    Raises: UserError for lengths that the model cannot take.
    """
    limit = longest_input(config, tokenizer)
    taken = ""
    if limit and virtual_tokens and config.model_type not in T5_FAMILY:
        limit, taken = max(1, limit - virtual_tokens), f" ({virtual_tokens} positions are virtual tokens)"
    remarks = []
    max_length = args.max_length or DEFAULT_MAX_LENGTH
    max_target_length = args.get("max_target_length") or 0
    hard_limit = None if config.model_type in T5_FAMILY else limit
    for name, value in (("max_length", args.max_length), ("max_target_length", args.max_target_length)):
        if value is not None and hard_limit and value > hard_limit:
            raise UserError(f"--{name} {value} is longer than the model can take; give at most {hard_limit}{taken}")
    if args.max_length is None and limit and limit < max_length:
        max_length = limit
        remarks.append(f"max_length {limit}: the most that the model can take{taken}")
    if not config.is_encoder_decoder and max_target_length >= max_length:
        if args.max_target_length is not None:
            raise UserError(
                f"--max_target_length {max_target_length} leaves no room for a prompt within --max_length {max_length}, "
                "which holds both for a GPT-like model; lower the first or raise the second"
            )
        max_target_length = max(1, max_length // 4)
        remarks.append(f"max_target_length {max_target_length}: a quarter of max_length")
    return max_length, max_target_length, remarks


def check_supervision(supervised_tokens: int, split: str = "train") -> None:
    """Raises UserError if no label token is left for the loss."""
    if supervised_tokens == 0:
        raise UserError(
            f"every label of the {split} split is masked, so there is nothing to learn from; check the columns, and that "
            "--max_length (and --max_target_length, where the task has it) leave room for the target"
        )


def _pairs(task: Task, rows: Dataset, columns: dict[str, str], split: str) -> Any:
    for number, values in enumerate(zip(*(rows[column][:] for column in columns.values()), strict=True), start=1):
        try:
            yield task.pair(dict(zip(columns, values, strict=True)))
        except UserError as error:
            raise UserError(f"row {number:,} of {split}: {error}") from None


def _remarks(
    task: Task,
    splits: Splits,
    columns: dict[str, str],
    tokenizer: PreTrainedTokenizerBase,
    tokenized: dict[str, Dataset],
    truncation: dict[str, Truncation],
) -> list[str]:
    """Remarks on duplicates, unknown tokens and masked turns, none of which is an error."""
    texts = {split: [task.shown(text) for text, _ in _pairs(task, splits[split], columns, split)] for split in splits}
    known = {*texts["train"]}
    remarks = [
        f"{again:,} of {len(texts[split]):,} rows of {split} have a text that train has too"
        for split in ("validation", "test")
        if (again := sum(text in known for text in texts[split]))
    ]
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown not in (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id):
        for split, rows in tokenized.items():
            if count := sum(ids.count(unknown) for ids in rows["input_ids"][:]):
                remarks.append(f"{count:,} tokens of {split} are unknown to the tokenizer ({tokenizer.unk_token})")
            labels = rows["labels"][:] if task.model_kind != "head" else []
            if count := sum(ids.count(unknown) for ids in labels):
                remarks.append(
                    f"{count:,} label tokens of {split} are unknown to the tokenizer ({tokenizer.unk_token})"
                )
    for split, lost in truncation.items():
        if lost.masked_turns:
            remarks.append(
                f"{lost.masked_turns:,} turns of the assistant in {split} are not learned: the chat template rewrites or shortens "
                "them once other turns follow"
            )
        if lost.unwritten_turns:
            remarks.append(f"{lost.unwritten_turns:,} turns or tools in {split} are left out by the chat template")
        for role, count in lost.unusual_roles.most_common(3):
            remarks.append(
                f"{count:,} turn{'s' * (count > 1)} in {split} ha{'ve' if count > 1 else 's'} the role {role[:40]!r}, which few chat "
                f"templates know{did_you_mean(role, USUAL_ROLES)}"
            )
    return remarks


def _check_embedded(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, rows: Iterable[list[int]]) -> None:
    """Raises UserError if padding or `rows` (token ids) contain a token for which the model has no embedding.

    A tokenizer may have more tokens than the model, as long as no text uses them: Gemma 3's has one for images.
    """
    embedded = getattr(config.get_text_config(), "vocab_size", None)
    highest = max((max(ids, default=0) for ids in rows), default=0)
    highest = max(highest, tokenizer.pad_token_id or 0)
    if embedded and highest >= embedded:
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer gives token {highest:,} ({tokenizer.convert_ids_to_tokens(highest)}), but the "
            f"model has embeddings for {embedded:,} tokens, numbered from 0; give the model's own tokenizer with --tokenizer_name"
        )


def _supervised(labels: list[int] | int, is_encoder_decoder: bool) -> int:
    """How many labels of a row count in the loss: 1 for a class, or its tokens. A GPT-like model never predicts the first."""
    if isinstance(labels, int):
        return 1
    return sum(label != IGNORE_INDEX for label in (labels if is_encoder_decoder else labels[1:]))


def _sample(rows: Dataset, size: int, label: str | None) -> tuple[Dataset, list[str]]:
    """A sample of `size` of `rows`, with the same share of each class if there is a `label` column.

    The second value is a remark on classes that got no row, if there are any.
    """
    if label is None:
        return sample(rows, size), []
    chosen = sample_of_classes(rows, label, size)
    missing = sorted({*rows[label]} - {*chosen[label]})
    return chosen, [f"no row of {', '.join(missing)} among those"] if missing else []


def _names(splits: Splits, columns: dict[str, str]) -> tuple[str, ...]:
    """The classes of train: in the data set's own order if it declares one, otherwise sorted (as numbers, if all are)."""
    if "label_column" not in columns:
        return ()
    there = splits["train"][columns["label_column"]]
    if splits.classes:
        return tuple(name for name in splits.classes if name in {*there})
    numbers = all(re.fullmatch(r"[+-]?\d+(\.\d+)?", name, re.ASCII) for name in there)
    return tuple(sorted({*there}, key=(lambda name: (float(name), name)) if numbers else None))


def _check_names(splits: Splits, columns: dict[str, str], names: Sequence[str]) -> None:
    """Raises UserError for classes that differ only in case, and for classes that train does not have."""
    if not names:
        return
    column = columns["label_column"]
    if len(names) == 1:
        raise UserError(f"column {column} has only one value ({names[0]!r}); classification needs at least two")
    if len(names) > 1000:
        raise UserError(
            f"column {column} has {len(names):,} different values, so it holds no classes; name another with --label_column"
        )
    for one, other in pairwise(sorted(names, key=normalized)):
        if normalized(one) == normalized(other):
            raise UserError(
                f"column {column} has the labels {one!r} and {other!r}, but answers are compared without regard to case; use "
                "one of them everywhere"
            )
    for split in splits:
        if unknown := sorted(set(splits[split][column]) - set(names)):
            raise UserError(
                f"the {split} split has the label {unknown[0]!r}, which train does not have ({', '.join(names)})"
            )


def _check_written(columns: dict[str, str], prompt_tokenizer: PromptTokenizer) -> None:
    """Raises UserError for class names that are too long to generate, or that the tokenizer cannot encode."""
    if not prompt_tokenizer.label_names or not prompt_tokenizer.max_target_length:
        return
    column, ids = (
        columns["label_column"],
        {name: prompt_tokenizer.target_ids(name) for name in prompt_tokenizer.label_names},
    )
    needed = max(map(len, ids.values()))
    if needed > prompt_tokenizer.max_target_length:
        raise UserError(
            f"--max_target_length {prompt_tokenizer.max_target_length} truncates labels: the longest has {needed} tokens; "
            f"give at least {needed}"
        )
    for name in ids:
        written = prompt_tokenizer.tokenizer.decode(ids[name], skip_special_tokens=True)
        if normalized(written) != normalized(name):
            raise UserError(
                f"the tokenizer cannot write the label {name!r} of column {column}: it becomes {written.strip()!r}; use another "
                "model, other names, or --task sequence_classification"
            )


def _fingerprint(rows: Dataset, columns: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for values in zip(*(rows[c][:] for c in columns), strict=True):
        for value in values:
            digest.update(f"{value}\0".encode())
    return digest.hexdigest()
