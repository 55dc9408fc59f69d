"""`footprint evaluate RUN_DIR`: the scores of a finished run on its own test rows, or on other data."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from toolkit.config.start import check_name
from toolkit.console import say, table
from toolkit.data.loading import DataArguments, rows_to_score
from toolkit.data.rows import read_source
from toolkit.errors import UserError, guarded
from toolkit.files import atomic_write, csv_text
from toolkit.runs.evaluation import answers_to
from toolkit.runs.finished_run import AGAIN, FinishedRun
from toolkit.tasks.metrics import score_title


def evaluate(
    run_dir: Path,
    given: Mapping[str, Any],
    batch_size: int = 8,
    output_file: Path | None = None,
    json_to: TextIO | None = None,
) -> dict[str, float]:
    """Scores the run in `run_dir` as the run itself does, and prints the scores, or one JSON object to `json_to`.

    Args:
        given: flags of the data, by name. With `dataset_name` other data is scored: its test split, or all rows without one.
        batch_size: rows of one batch; the scores do not depend on it.
        output_file: a new CSV file with text, reference and answer of each row. The run's folder is not changed.

    Raises: UserError for a folder that holds no finished run, data that does not fit the run's task, and a file that exists.
    """
    if output_file is not None:
        check_name("--output_file", output_file)
        if output_file.exists():
            raise UserError(f"--output_file {output_file} exists; give a new file")
    run = FinishedRun(run_dir)
    tokenizer, task = run.prompt_tokenizer, run.task
    args = _data(run, given)
    pairs, remarks = rows_to_score(args, whole="dataset_name" in given)
    for remark in remarks:
        say("data", remark)
    prompts, references = _prompts(run, pairs)
    if unknown := sorted({*references} - {*tokenizer.label_names}) if tokenizer.label_names else []:
        raise UserError(
            f"--dataset_name {args.dataset_name} has the label {unknown[0]!r}, which {run_dir} does not know; it knows "
            f"{', '.join(tokenizer.label_names)}"
        )
    model, beams = run.model, args.get("num_beams") or 1
    say("scoring", f"the tuned model answers {len({*prompts}):,} rows")
    with guarded(f"{run_dir}: its model cannot answer these rows", "mend its files, or give another run"):
        texts = answers_to(prompts, model, task, tokenizer, batch_size, beams, "tuned model")
    scores = task.score(texts, references, tokenizer.label_names)
    name = args.dataset_name or "embedded"
    if output_file is not None:
        shown = [task.shown(text) for text, _ in pairs]
        rows = zip(shown, references, texts, strict=True)
        try:
            atomic_write(output_file, csv_text(["text", "reference", "answer"], rows))
        except OSError as error:
            raise UserError(f"--output_file {output_file} cannot be written ({error.strerror})") from None
    if json_to is not None:
        print(json.dumps({"run": str(run_dir), "data": name, "rows": len(pairs), "scores": scores}), file=json_to)
        return scores
    shown_scores = {"tuned": scores}
    if not given and (recorded := run.scores.get("tuned")):
        shown_scores["in run.json"] = recorded
    kinds = list(scores)
    table(
        f"Scores on {len(pairs):,} rows of {name}",
        ["model", *map(score_title, kinds)],
        [[who, *(f"{s[k]:.4f}" if k in s else "" for k in kinds)] for who, s in shown_scores.items()],
    )
    return scores


def own_test_rows(run: FinishedRun, most: int) -> list[tuple[Any, str]]:
    """(text, reference) of the first `most` rows of the run's own test split.

    They come from its completions.csv. In that a conversation is one text, so a chat's rows are read from its data again, as
    messages, if they are still there.

    Raises: UserError if neither is there.
    """
    if run.task.name != "chat":
        return run.sample(most)
    try:
        pairs = rows_to_score(_data(run, {}), whole=False)[0][:most]
    except UserError as error:
        say("data", f"the run's data cannot be read ({error}): its completions.csv is used")
        return run.sample(most)
    return [(text, reference) for (text, _), reference in zip(pairs, _prompts(run, pairs)[1], strict=True)]


def _prompts(run: FinishedRun, pairs: Sequence[tuple[Any, Any]]) -> tuple[list[tuple[int, ...]], list[str]]:
    """The prompt (token ids) and the reference of each (text, target)."""
    tokenizer = run.prompt_tokenizer
    prompts = [tuple(tokenizer.prompt(text)[0]) for text, _ in pairs]
    references = [
        run.task.reference(tokenizer, text, target, prompt)
        for (text, target), prompt in zip(pairs, prompts, strict=True)
    ]
    return prompts, references


def _data(run: FinishedRun, given: Mapping[str, Any]) -> DataArguments:
    """The flags of the run's data, with `given`; other data has other columns, unless it has all of the run's."""
    names = {field.name for field in dataclasses.fields(DataArguments) if field.init}
    settings = {name: value for name, value in run.settings.items() if name in names} | {"task": run.task.name}
    if other := given.get("dataset_name"):
        theirs = read_source(other, given.get("dataset_config_name"), given.get("encoding"), run.task.name).splits
        columns = {name: value for name, value in settings.items() if name.endswith("_column")}
        dropped = {"dataset_config_name", "encoding", "max_eval_samples"}
        if not {*map(str, columns.values())} <= {*theirs["train"].column_names}:
            dropped |= {*columns, "prompt_template"}
        settings = {name: value for name, value in settings.items() if name not in dropped}
    with guarded(f"{run.path / 'config.yaml'} is damaged", AGAIN):
        args = DataArguments(**settings | dict(given))
        args.check(dict(given) if other or run.settings.get("dataset_name") is None else {**given, "dataset_name": ""})
    return args
