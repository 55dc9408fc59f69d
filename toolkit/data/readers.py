"""Reads one data file without guessing types: each cell becomes exactly the text in the file.

pandas and pyarrow guess a type for each column: they turn `001` into 1, `1.10` into 1.1 and `TRUE` into True.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Json, Value, concatenate_datasets, load_dataset

from toolkit.data.files import check_begin, decoded, empty, mark_of, regular_file
from toolkit.errors import UserError

RETURN = "\udc0d"  # stands for a carriage return in a cell; no UTF-8 file contains it
DELIMITERS = ",;\t|"


class _BrokenTable(ValueError):
    """The cells do not form a table."""


def read_file(file: Path, suffix: str, encoding: str | None = None) -> tuple[Dataset, list[str]]:
    """The rows of a .csv, .tsv, .json, .jsonl, .parquet or .arrow file (by `suffix`), and remarks on how it was read.

    Cells of csv and tsv files are text. Numbers, `true` and `false` in JSON are text too, in the file's own spelling; a
    column with lists or objects keeps them. Parquet and Arrow files have their own types. Text files may be compressed
    (.gz, .bz2, .xz, .zst), and are in UTF-8 unless `encoding` names another.

    Raises: UserError for a file that is empty, damaged, or not in that encoding.
    """
    regular_file(file)
    if suffix in (".parquet", ".arrow"):
        with file.open("rb") as stream:
            check_begin(file, stream.read(200))
        try:
            if suffix == ".arrow":
                return Dataset.from_file(str(file)), []
            return load_dataset("parquet", data_files={"train": str(file)}, split="train"), []
        except Exception as error:  # pyarrow and datasets raise exceptions of their own
            reason = " ".join(str(error.__cause__ or error).split())[:200]
            raise UserError(f"{file}: a {suffix} file cannot be read ({reason})") from None
    text = decoded(file, encoding)
    if suffix in (".json", ".jsonl"):
        objects, remarks = _objects(text, file)
        return _of_objects(objects, file), remarks
    header, rows, remarks = _table(text, file, suffix == ".tsv")
    if twice := sorted({name for name in header if name and header.count(name) > 1}):
        raise UserError(f"{file}: its header has the column {twice[0]!r} twice; give each its own name")
    if not rows:
        raise UserError(f"{file}: there is a header but no row; give a file with rows")
    names = {name: at for at, name in enumerate(header) if name}
    features = Features({name: Value("string") for name in names})
    return Dataset.from_dict(
        {name: [row[at] for row in rows] for name, at in names.items()}, features=features
    ), remarks


def read_sentences(file: Path, encoding: str | None = None) -> Dataset:
    """The rows (`sentence`, `label`) of a file with lines `sentence@label`, as financial_phrasebank has (Malo et al. 2014).

    The file is read in `encoding`, or as UTF-8, or as Latin-1 if that fails (the published files are Latin-1). A line ends
    with a line feed.

    Raises: UserError for a line without a label, and for an empty file.
    """
    rows = []
    for number, line in enumerate(_text_or_latin_1(file, encoding).split("\n"), start=1):
        if line.strip():
            sentence, separator, label = line.rpartition("@")
            if not separator:
                raise UserError(
                    f"{file}: line {number} has no @label at its end; a .txt file holds lines sentence@label, or plain text "
                    "with --task text"
                )
            rows.append({"sentence": sentence, "label": label.strip()})
    if not rows:
        raise UserError(f"{file}: the file is empty; give one with lines sentence@label")
    return Dataset.from_list(rows)


def holds_sentences(file: Path, encoding: str | None = None) -> bool:
    """Whether each line of a .txt file that is not blank ends with @ and one word."""
    lines = [line for line in _text_or_latin_1(file, encoding).split("\n") if line.strip()]
    ends = [line.rpartition("@") for line in lines]
    return bool(lines) and all(
        mark and sentence.strip() and label.split() == [label.strip()] for sentence, mark, label in ends
    )


def read_plain(file: Path, encoding: str | None = None) -> tuple[Dataset, str]:
    """The texts of a plain .txt file as a column `text`, and what one text is.

    Blank lines separate texts. A file without blank lines between its lines has one text in each line.

    Raises: UserError for an empty file, or text that is not in `encoding` (default: UTF-8).
    """
    lines = [line.removesuffix("\r") for line in decoded(file, encoding).split("\n")]
    groups: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            groups[-1].append(line)
        elif groups[-1]:
            groups.append([])
    texts = ["\n".join(group) for group in groups if group]
    if not texts:
        raise UserError(f"{file}: the file is empty; give one with text")
    unit = "paragraph"
    if len(texts) == 1:
        texts, unit = groups[0], "line"
    return Dataset.from_dict({"text": texts}), unit


def _text_or_latin_1(file: Path, encoding: str | None) -> str:
    try:
        return decoded(file, encoding)
    except UserError:
        regular_file(file)
        if encoding is not None or not file.stat().st_size or mark_of(file):
            raise
        return decoded(file, "latin-1")


def as_text(rows: Dataset, column: str) -> Dataset:
    """`rows` with the values of `column` as text: a class becomes its name, a number its digits.

    Lists and objects are kept, as JSON without null fields: Arrow adds to each object the fields of all others.
    """
    feature = rows.features[column]
    if isinstance(feature, ClassLabel):
        known = feature.num_classes or 0
        if other := next((n for n in rows[column] if n is not None and not -1 <= n < known), None):
            raise UserError(
                f"column {column} has the class number {other}, and the file names {known} classes (0 to {known - 1}); correct "
                "the number, or name another column"
            )
        names = [None if number in (None, -1) else feature.int2str(number) for number in rows[column]]
    elif isinstance(feature, Json) or (isinstance(feature, Value) and feature.dtype in ("string", "large_string")):
        return rows
    elif not isinstance(feature, Value):
        nested = {column: [_without_nulls(value) for value in rows[column]]}
        rest = rows.remove_columns(column)
        return concatenate_datasets([rest, Dataset.from_dict(nested, features=Features({column: Json()}))], axis=1)
    elif feature.dtype.startswith("float"):  # Arrow would write 5.0 as 5
        kind = np.dtype(feature.dtype).type
        names = [None if number is None or number != number else str(kind(number)) for number in rows[column]]
    else:
        names = rows.data.column(column).cast("string").to_pylist()
        names = names if rows._indices is None else [names[i] for i in rows._indices.column(0).to_pylist()]
    return rows.remove_columns(column).add_column(column, names, feature=Value("string"))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def _table(text: str, file: Path, tabs: bool) -> tuple[list[str], list[list[str]], list[str]]:
    """The header and the rows of a csv or tsv file, and remarks on its delimiter and on ambiguous quotation marks.

    In csv, quotation marks wrap cells (RFC 4180). If the file cannot be parsed that way, and no cell is wrapped in them,
    they are text. In tsv they are text (IANA's text/tab-separated-values), unless a csv writer wrote the file with tabs.
    """
    named = re.match(r'"?sep=([^\r\n"])"?\r?\n', text, re.IGNORECASE)  # Excel's first line
    text = "\n" + text[named.end() :] if named else text  # lines keep their numbers
    delimiter, remarks = named[1] if named else _delimiter(text, tabs), []
    usual = "\t" if tabs else ","
    if delimiter != usual:
        remarks.append(f"{file.name}: {DELIMITER_NAMES.get(delimiter, repr(delimiter))} separate its cells")
    tabs = delimiter == "\t"
    quoted, problem = _tried(_rows_quoted, text, delimiter)
    if quoted is None:
        quoted, _ = _tried(_rows_with_returns, text, delimiter)
    if quoted == []:
        raise empty(file)
    if quoted is not None and not tabs:
        return quoted[0], quoted[1:], remarks
    plain, why = _tried(_rows_plain, text, delimiter)
    problem = why if tabs else problem
    opened = plain is not None and any(cell.startswith('"') for row in plain for cell in row)
    if quoted is not None and (plain is None or (opened and _was_written_quoted(plain))):
        return quoted[0], quoted[1:], [*remarks, f"{file.name}: quotation marks around a cell are not part of its text"]
    if plain is None or (not tabs and any(_is_wrapped(cell) for row in plain for cell in row)):
        raise UserError(f"{file}: {problem}")
    if opened:
        remarks.append(f"{file.name}: quotation marks around or in a cell are part of its text")
    return plain[0], plain[1:], remarks


DELIMITER_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}


def _delimiter(text: str, tabs: bool) -> str:
    """The delimiter of a table: the usual one if the header has it, otherwise the one that the header has most often."""
    first = next((line for line in text.split("\n") if line.strip()), "")
    try:
        cells = {mark: len(next(csv.reader([first], delimiter=mark))) for mark in DELIMITERS}
    except csv.Error:
        return "\t" if tabs else ","
    usual = "\t" if tabs else ","
    return usual if cells[usual] > 1 else max(DELIMITERS, key=lambda mark: (cells[mark], mark == usual))


def _tried(
    reader: Callable[[str, str], list[list[str]]], text: str, delimiter: str
) -> tuple[list[list[str]] | None, _BrokenTable | None]:
    try:
        return reader(text, delimiter), None
    except _BrokenTable as error:
        return None, error


def _rows_with_returns(text: str, delimiter: str) -> list[list[str]]:
    """Like `_rows_quoted`, but a carriage return does not end a line: writers that end lines with a line feed do not quote it."""
    rows: list[list[str]] = []
    lines = (line.replace("\r", RETURN) for line in io.StringIO(text, newline="\n"))
    for row, number in _parsed_rows(lines, delimiter):
        if row and not rows and row[-1].endswith(RETURN):
            raise _BrokenTable("its lines end with a carriage return and a line feed")
        _add(rows, [cell.replace(RETURN, "\r") for cell in row], number)
    return rows


def _rows_quoted(text: str, delimiter: str) -> list[list[str]]:
    rows: list[list[str]] = []
    for row, number in _parsed_rows(io.StringIO(text, newline=""), delimiter):
        _add(rows, row, number)
    return rows


def _parsed_rows(lines: Iterable[str], delimiter: str) -> Iterator[tuple[list[str], int]]:
    csv.field_size_limit(2**31 - 1)  # the module's default, 131,072 characters, is too short for long texts
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        for row in reader:
            yield row, reader.line_num
    except csv.Error as error:
        raise _BrokenTable(
            f"line {reader.line_num}: {error}; put quotation marks around a cell that has quotation marks, line breaks or "
            f"{delimiter!r}, and write each quotation mark in it twice"
        ) from None


def _rows_plain(text: str, delimiter: str) -> list[list[str]]:
    rows: list[list[str]] = []
    for number, line in enumerate(io.StringIO(text, newline="\n"), start=1):
        line = line.removesuffix("\n").removesuffix("\r")
        _add(rows, line.split(delimiter) if line else [], number)
    return rows


def _add(rows: list[list[str]], row: list[str], line: int) -> None:
    """Appends a row. Empty lines are skipped; a row with only blank cells becomes one empty cell for each column."""
    if not row:
        return
    width = len(rows[0]) if rows else len(row)
    if len(row) != width and not any(cell.strip() for cell in row):
        row = [""] * width
    if len(row) != width:
        raise _BrokenTable(
            f"line {line} has {len(row)} cells, and the header {width}; put quotation marks around a cell that has a comma, a "
            "tab or a line break, and write quotation marks in it twice"
        )
    rows.append(row)


def _is_wrapped(cell: str) -> bool:
    return len(cell) > 1 and cell[0] == cell[-1] == '"'


def _was_written_quoted(plain: list[list[str]]) -> bool:
    """Whether a csv writer put the quotation marks: all header cells are wrapped, or a wrapped cell has doubled marks."""
    if all(map(_is_wrapped, plain[0])):
        return True
    return any(_is_wrapped(cell) and '""' in cell[1:-1] for row in plain for cell in row)


def _objects(text: str, file: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a JSON file, and a remark if they are not simply its objects.

    The file holds one object per line, one list of objects, an object with one such list, or an object of columns. Numbers,
    true and false at the top level of a row become text, in the file's own spelling.
    """
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if text.lstrip().startswith("[") or (len(lines) > 1 and not _is_json(lines[0][1]) and _is_json(text)):
        value, spelled = _parsed(text, str(file))
    else:
        pairs = [_parsed(line, f"{file}: line {number}") for number, line in lines]
        value, spelled = pairs[0] if len(pairs) == 1 else ([one for one, _ in pairs], [other for _, other in pairs])
    remarks = []
    if isinstance(value, dict):
        value, spelled, remark = _unwrapped(value, spelled, file)
        remarks = [f"{file.name}: {remark}"] if remark else []
    if not isinstance(value, list) or not value:
        raise UserError(f"{file}: the file has no row; give one with rows")
    for number, row in enumerate(value, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{file}: row {number} is not an object but {str(row)[:60]!r}; give one object per row")
    return [_spelled(*pair) for pair in zip(value, spelled, strict=True)], remarks


def _unwrapped(whole: dict[str, Any], spelled: dict[str, Any], file: Path) -> tuple[list[Any], list[Any], str]:
    """The rows of a file that is one object, the same rows with numbers as text, and a remark.

    The rows are the only list of objects in it, beside objects that tell of them, or its keys are columns, or it is the only row.
    """
    lists = [name for name, value in whole.items() if _is_list_of_objects(value) and name not in CONVERSATIONS]
    nested = [name for name, value in whole.items() if isinstance(value, list | dict) and value]
    if len(lists) > 1:
        raise UserError(
            f"{file}: several of its keys hold rows ({', '.join(lists)}); write each list to a file of its own in one folder, "
            "train.jsonl, validation.jsonl and test.jsonl"
        )
    # beside them may be objects that are no columns, such as pandas' "schema"
    cells = [name for name in nested if isinstance(whole[name], list) or _column(whole[name])]
    if lists and lists == cells:
        return whole[lists[0]], spelled[lists[0]], f"its rows are the list {lists[0]!r}"
    columns = {name: _column(value) for name, value in whole.items()}
    if columns and None not in columns.values() and len({len(cells or []) for cells in columns.values()}) == 1:
        both = [
            [dict(zip(of, cells, strict=True)) for cells in zip(*(_column(c) or [] for c in of.values()), strict=True)]
            for of in (whole, spelled)
        ]
        if not any(name in CONVERSATIONS and _is_list_of_objects(value) for name, value in whole.items()):
            return both[0], both[1], "each of its keys is a column"
    return [whole], [spelled], ""


CONVERSATIONS = ("messages", "conversations", "conversation", "dialog", "tools")  # a list of objects that is one cell


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(one, dict) for one in value)


def _column(value: Any) -> list[Any] | None:
    """The cells of a column: a list, or an object whose keys are row numbers (pandas' `to_json`); None for anything else."""
    if isinstance(value, list) and value:
        return value
    if isinstance(value, dict) and value and all(key.isdigit() for key in value):
        return [*value.values()]
    return None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parsed(text: str, where: str) -> tuple[Any, Any]:
    """`text` parsed as JSON, and the same with each number as text."""
    try:
        return json.loads(text, parse_constant=_null), json.loads(
            text, parse_int=str, parse_float=str, parse_constant=_null
        )
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(
            f"{where} cannot be read as JSON ({reason}); give one object per line, or a list of objects"
        ) from None


def _null(text: str) -> None:
    """The value of NaN, which pandas writes for a missing value, and of infinities."""


def _spelled(row: Any, spelled: Any) -> Any:
    if not isinstance(row, dict):
        return row
    as_text = {True: "true", False: "false"}
    return {
        name: as_text[value] if isinstance(value, bool) else spelled[name] if isinstance(value, int | float) else value
        for name, value in row.items()
    }


def _of_objects(objects: list[dict[str, Any]], file: Path) -> Dataset:
    """The columns of `objects`: text, or JSON if one of the values is a list or an object."""
    names = list(dict.fromkeys(name for row in objects for name in row))
    columns = {name: [row.get(name) for row in objects] for name in names}
    nested = {name for name in names if any(isinstance(value, list | dict) for value in columns[name])}
    features = Features({name: Json() if name in nested else Value("string") for name in names})
    try:
        return Dataset.from_dict(columns, features=features)
    except UnicodeEncodeError as error:
        raise UserError(
            f"{file}: {error.object[:60]!r} has half of a surrogate pair, which is not valid text; correct it"
        ) from None
