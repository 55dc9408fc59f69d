"""Recognizes what the columns of a data set hold, so that usual formats need no flags; a user's flags come first."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Audio, Dataset, Image, Video

from toolkit.data.readers import as_text
from toolkit.errors import UserError, did_you_mean
from toolkit.tasks.chat import listed

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)  # Taori et al. 2023, https://github.com/tatsu-lab/stanford_alpaca
SUMMARIZE = "Summarize the following text.\n\n{text}\n\nSummary:"
FILLED = "filled prompt"  # the column that holds a template filled with several columns of a row
# Names of columns in any case, the likelier ones first.
CONVERSATIONS = ["messages", "conversations", "conversation", "dialog", "dialogue", "chat", "turns"]
SUMMARIES = ["summary", "highlights", "abstract", "tldr", "headline", "summaries"]
DOCUMENTS = ["dialogue", "document", "article", "text", "body", "report", "content", "maintext", "source", "passage"]
QUESTIONS = ["prompt", "question", "query", "instruction", "input", "inputs", "source", "user", "human", "src"]
QUESTIONS += ["text", "problem"]
ANSWERS = ["completion", "response", "answer", "output", "target", "targets", "outputs", "assistant", "reply"]
ANSWERS += ["solution", "tgt", "gpt", "bot", "chosen"]
CONTEXTS = ["input", "context"]  # what an instruction is about; often empty
TEXTS = ["text", "sentence", "review", "content", "tweet", "comment", "body", "headline", "title", "document"]
TEXTS += ["article", "message", "question", "query", "utterance", "input", "prompt", "phrase", "description"]
CLASSES = ["label_text", "label_name", "label", "labels", "category", "class", "sentiment", "emotion", "intent"]
CLASSES += ["topic", "coarse_label", "rating", "stars", "target", "score", "polarity", "genre", "type", "spam"]
BETTER = ["chosen", "accepted", "preferred", "chosen_response", "better"]
WORSE = ["rejected", "dispreferred", "rejected_response", "worse"]
RANKS = ["rank", "ranks", "ranking", "rankings", "preference", "winner"]
YES_NO = {"true", "false"}
PLACEHOLDER = re.compile(r"\{([^{}\n]{1,100})\}")


@dataclass(frozen=True)
class Recognized:
    """What a data set holds: the task that learns it, its columns by flag name, and the prompt around them."""

    task: str
    columns: dict[str, str] = field(default_factory=dict)
    template: str | None = None
    remark: str = ""  # one line for the user


def recognize(rows: Dataset, task: str | None, given: dict[str, str], template: str | None) -> Recognized | None:
    """What `rows` hold for `task` (None: whatever they hold), or None if that is unknown.

    `given` has the columns that the user named, by flag name, and `template` is the user's prompt; both are kept.

    Raises: UserError for preference data.
    """
    names = rows.column_names
    _refuse_preferences(rows, task, given)
    if (
        task in (None, "chat")
        and not template
        and not {"prompt_column", "response_column", "text_column"} & given.keys()
    ):
        at = given.get("messages_column") or _conversation_column(rows)
        if at is not None and at in names and (form := _form(_first(rows, at))):
            return _found("chat", {"messages_column": at}, None, form, rows, task is None, ("tools", "system"))
    if task == "chat" or (task is None and not given and _is_conversational(rows)):
        return _question_and_answer(rows, "chat", given, template, task is None)
    if task in (None, "summarization") and (
        found := _question_and_answer(rows, "summarization", given, template, task is None)
    ):
        return found
    if task in (None, "classification", "sequence_classification"):
        text = given.get("text_column") or (_named(names, TEXTS) if not _columns_in(template, names) else None)
        label = given.get("label_column") or _named(names, CLASSES)
        if label and not given.get("text_column") and text is None and template is None:
            rest = [name for name in names if name != label and name.lower() not in ("id", "idx", "index", "")]
            text = rest[0] if len(rest) == 1 else None
        if task is None and label and len({*map(str, rows[label][:1000])}) > max(2, min(len(rows), 1000) // 2):
            label = None  # a number or a text of its own in most rows
        if label and (text or template) and text != label:
            columns = {"text_column": text} if text else {}
            return _found(
                task or "classification", columns | {"label_column": label}, None, "labelled texts", rows, task is None
            )
    if task in (None, "text") and not template:
        text = given.get("text_column") or _named(names, ("text", "content", "body", "document"))
        text = text or (names[0] if len(names) == 1 else None)
        if text:
            return _found("text", {"text_column": text}, None, "plain text", rows, task is None)
    return None


def _question_and_answer(
    rows: Dataset, task: str, given: dict[str, str], template: str | None, is_open: bool
) -> Recognized | None:
    """Rows of a text and an answer to it, in the flags of `task` (chat or summarization)."""
    names, chat = rows.column_names, task == "chat"
    question_flag, answer_flag = ("prompt_column", "response_column") if chat else ("text_column", "summary_column")
    answer, question = given.get(answer_flag), given.get(question_flag)
    if template is not None:
        answer = answer or _named(names, ANSWERS + SUMMARIES)
        question = question or (_named(names, QUESTIONS + DOCUMENTS) if "{text}" in template else None)
        columns = {question_flag: question} if question else {}
        used = _columns_in(template, names)
        return (
            _found(task, columns | {answer_flag: answer}, None, "columns", rows, is_open, used=used) if answer else None
        )
    if not chat and answer is None and question is None and (summary := _named(names, SUMMARIES)):
        question = _named([name for name in names if name != summary], DOCUMENTS)
        answer = summary if question else None
    answer = answer or _named([name for name in names if name != question], ANSWERS)
    question = question or _named([name for name in names if name != answer], QUESTIONS)
    if question is None or answer is None:
        return None
    columns = {question_flag: question, answer_flag: answer}
    if not chat and answer.lower() in SUMMARIES:
        own = None if question == "dialogue" else SUMMARIZE
        return _found(task, columns, own, "texts with summaries", rows, is_open)
    form = f"{question}/{answer} pairs"
    is_alpaca = question.lower() == "instruction" and answer.lower() in ("output", "response")
    if is_alpaca:
        form = "Alpaca rows"
    context = _named([name for name in names if name not in (question, answer)], CONTEXTS)
    if context and question_flag not in given and isinstance(_first(rows, context), str | None):
        own = f"{{{question}}}\n\n{{{context}}}"
        if is_alpaca and not chat:
            own = ALPACA.replace("{instruction}", f"{{{question}}}").replace("{input}", f"{{{context}}}")
        return _found(task, {answer_flag: answer}, own, form, rows, is_open, used=(question, context))
    return _found(task, columns, None if chat else "{text}", form, rows, is_open)


def _found(
    task: str,
    columns: dict[str, str],
    template: str | None,
    form: str,
    rows: Dataset,
    is_open: bool,
    more: Sequence[str] = (),
    used: Iterable[str] = (),
) -> Recognized:
    *sources, target = columns.values()
    sources = [*dict.fromkeys([*used, *sources])]
    more = [name for name in more if name in rows.column_names]
    shown = f"{', '.join(sources)} -> {target}" if sources else ", ".join([target, *more])
    rest = [name for name in rows.column_names if name not in {*sources, target, *more}]
    unread = f"; not read: {', '.join(rest[:8])}{' ...' if len(rest) > 8 else ''}" if rest else ""
    chosen = f" (--task {task})" if is_open else ""
    return Recognized(task, columns, template, f"reads {form}: {shown}{chosen}{unread}")


def _named(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    """The first of `wanted` that is among `names`, in any case."""
    lowered = {name.lower().strip(): name for name in reversed(names)}
    return next((lowered[name] for name in wanted if name in lowered), None)


def _first(rows: Dataset, column: str) -> Any:
    """The first value in `column` that is not empty."""
    return _filled_first(rows[column][:1000])


def _filled_first(values: Sequence[Any]) -> Any:
    return next((value for value in values if value not in (None, "", [], {})), None)


def _conversation_column(rows: Dataset) -> str | None:
    known = [name for wanted in CONVERSATIONS for name in rows.column_names if name.lower() == wanted]
    media = [name for name, feature in rows.features.items() if isinstance(feature, Audio | Image | Video)]
    taken = (*known, *media)
    others = [name for name in rows.column_names if name not in taken and name.lower() not in (*ANSWERS, *QUESTIONS)]
    if not known and not others:
        return None
    begin = rows.select_columns([*known, *others])[:1000]  # at once: a table may have thousands of columns
    return next((name for name in (*known, *others) if _form(_filled_first(begin[name]))), None)


def _form(value: Any) -> str | None:
    """The form of a conversation, or None if `value` is none."""
    if isinstance(value, str) and not value.lstrip().startswith("["):
        return None
    turns = listed(value)
    if not turns:
        return None
    if all({"from", "value"} <= turn.keys() for turn in turns):
        return "ShareGPT conversations"
    return "conversations" if all(isinstance(turn.get("role"), str) for turn in turns) else None


def _is_conversational(rows: Dataset) -> bool:
    answer = _named(rows.column_names, ANSWERS)
    return answer is not None and _form(_first(rows, answer)) is not None


def _refuse_preferences(rows: Dataset, task: str | None, given: dict[str, str]) -> None:
    """Raises UserError if the rows compare answers and the user named no column to learn."""
    if {"summary_column", "response_column", "messages_column", "label_column"} & given.keys() or task == "text":
        return
    names = rows.column_names
    better, worse, ranks = (_named(names, wanted) for wanted in (BETTER, WORSE, RANKS))
    answers = [name for name in names if re.fullmatch(r"(response|answer|completion|output)_?[0-9a-d]", name.lower())]
    question = _named([name for name in names if name not in (better, worse)], QUESTIONS)
    if better and worse:
        if _form(_first(rows, better)):
            is_answer = question is not None and listed(_first(rows, question)) is not None
            how = f"--task chat --{'response' if is_answer else 'messages'}_column {better}"
            how += f" --prompt_column {question}" if is_answer else ""
        elif question:
            how = f"--text_column {question} --summary_column {better}"
        else:
            how = f"--task text --text_column {better}"
        columns = f"{better}, {worse}"
    elif ranks and len(answers) > 1:
        how = f"--text_column {question or '...'} --summary_column {answers[0]}"
        columns = f"{', '.join(answers)}, {ranks}"
    elif {"prompt", "completion", "label"} <= {*names} and {str(one).lower() for one in rows["label"][:1000]} <= YES_NO:
        how = "keep the rows with label true, and name the columns: --text_column prompt --summary_column completion"
        columns = "completion, label"
    else:
        return
    raise UserError(
        f"the data hold preferences ({columns}), which DPO and other preference methods learn and footprint does not; to learn the "
        f"better answers alone: {how}"
    )


def _columns_in(template: str | None, names: Sequence[str]) -> list[str]:
    return [name for name in PLACEHOLDER.findall(template or "") if name in names]


def split_template(template: str, names: Sequence[str], text: str | None) -> tuple[str, str, str]:
    """A prompt as what comes before its columns, the columns with what is between them, and what comes after.

    `names` are the columns of the data, and {text} stands for the column `text`.

    Raises: UserError for a template that names no column, or misspells one.
    """
    marks = [
        mark for mark in PLACEHOLDER.finditer(template) if mark[1] in (*names, "text") and (mark[1] != "text" or text)
    ]
    for mark in PLACEHOLDER.finditer(template):
        if mark[1] not in (*names, "text", "labels") and (hint := did_you_mean(mark[1], names)):
            raise UserError(
                f"--prompt_template has {mark[0]}, and there is no such column{hint}; it has {', '.join(names)}"
            )
    if not marks:
        raise UserError(
            f"--prompt_template {template[:60]!r} names no column; write {{text}} or a column's name in braces where its text goes "
            f"({', '.join(names)})"
        )
    begin, end = marks[0].start(), marks[-1].end()
    return template[:begin], template[begin:end], template[end:]


def filled(rows: Dataset, middle: str, split: str) -> list[str]:
    """`middle` of a template, filled for each of `rows`; a paragraph whose columns are all empty is left out.

    Raises: UserError for a value that is not text.
    """
    paragraphs = [(part, PLACEHOLDER.findall(part)) for part in middle.split("\n\n")]
    used = {name for _, names in paragraphs for name in names if name in rows.column_names}
    cells = {name: as_text(rows, name)[name][:] for name in used}
    texts = []
    for number in range(len(rows)):
        values = {name: "" if of_all[number] is None else of_all[number] for name, of_all in cells.items()}
        if other := next((name for name, value in values.items() if not isinstance(value, str)), None):
            raise UserError(
                f"row {number + 1:,} of {split}: its column {other} has {json.dumps(values[other])[:60]}, which is not text; leave it "
                "out of --prompt_template"
            )
        kept = []
        for part, names in paragraphs:
            there = [name for name in names if name in values]
            if not there or any(values[name].strip() for name in there):
                kept.append(_filled(part, values))
        texts.append("\n\n".join(kept).strip())
    return texts


def _filled(part: str, values: dict[str, str]) -> str:
    return PLACEHOLDER.sub(lambda mark: values.get(mark[1], mark[0]), part)
