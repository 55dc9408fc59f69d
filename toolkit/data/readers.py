"""Reads one data file without guessing types: each cell becomes exactly the text in the file.

pandas and pyarrow guess a type for each column: they turn `001` into 1, `1.10` into 1.1 and `TRUE` into True.
"""

import codecs
import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Json, Value, concatenate_datasets, load_dataset

from toolkit.errors import UserError

RETURN = "\udc0d"  # stands for a carriage return in a cell; no UTF-8 file contains it


class _BrokenTable(ValueError):
    """The cells do not form a table."""


def read_file(file: Path, suffix: str) -> tuple[Dataset, list[str]]:
    """The rows of a .csv, .tsv, .json, .jsonl or .parquet file (by `suffix`), and remarks on how it was read.

    Cells of csv and tsv files are text. Numbers, `true` and `false` in JSON are text too, in the file's own spelling; a
    column with lists or objects keeps them. Parquet files have their own types.

    Raises: UserError for a file that is empty, damaged, or not in UTF-8.
    """
    _check_text(file, suffix)
    if suffix == ".parquet":
        try:
            return load_dataset("parquet", data_files={"train": str(file)}, split="train"), []
        except Exception as error:  # pyarrow and datasets raise exceptions of their own
            reason = " ".join(str(error.__cause__ or error).split())[:200]
            raise UserError(f"{file}: a .parquet file cannot be read ({reason})") from None
    if suffix in (".json", ".jsonl"):
        return _of_objects(_objects(file), file), []
    header, rows, remarks = _table(file, suffix == ".tsv")
    if twice := sorted({name for name in header if name and header.count(name) > 1}):
        raise UserError(f"{file}: its header has the column {twice[0]!r} twice; give each its own name")
    if not rows:
        raise UserError(f"{file}: there is a header but no row; give a file with rows")
    names = {name: at for at, name in enumerate(header) if name}
    text = Features({name: Value("string") for name in names})
    return Dataset.from_dict({name: [row[at] for row in rows] for name, at in names.items()}, features=text), remarks


def read_sentences(file: Path) -> Dataset:
    """The rows (`sentence`, `label`) of a file with lines `sentence@label`, as financial_phrasebank has (Malo et al. 2014).

    The file is read as UTF-8, or as Latin-1 if that fails (the published files are Latin-1). A line ends with a line feed.

    Raises: UserError for a line without a label, and for an empty file.
    """
    content = file.read_bytes()
    _check_mark(file, content)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            sentence, separator, label = line.rpartition("@")
            if not separator:
                raise UserError(
                    f"{file}: line {number} has no @label at its end; a .txt file holds lines sentence@label"
                )
            rows.append({"sentence": sentence, "label": label.strip()})
    if not rows:
        raise UserError(f"{file}: the file is empty; give one with lines sentence@label")
    return Dataset.from_list(rows)


def as_text(rows: Dataset, column: str) -> Dataset:
    """`rows` with the values of `column` as text: a class becomes its name, a number its digits.

    Lists and objects are kept, as JSON without null fields: Arrow adds to each object the fields of all others.
    """
    feature = rows.features[column]
    if isinstance(feature, ClassLabel):
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


def _table(file: Path, tabs: bool) -> tuple[list[str], list[list[str]], list[str]]:
    """The header and the rows of a csv or tsv file, and a remark if its quotation marks are ambiguous.

    In csv, quotation marks wrap cells (RFC 4180). If the file cannot be parsed that way, and no cell is wrapped in them,
    they are text. In tsv they are text (IANA's text/tab-separated-values), unless a csv writer wrote the file with tabs.
    """
    quoted, problem = _tried(_rows_quoted, file, tabs)
    if quoted is None:
        quoted, _ = _tried(_rows_with_returns, file, tabs)
    if quoted == []:
        raise UserError(f"{file}: the file is empty; give one with a header line and rows")
    if quoted is not None and not tabs:
        return quoted[0], quoted[1:], []
    plain, why = _tried(_rows_plain, file, tabs)
    problem = why if tabs else problem
    opened = plain is not None and any(cell.startswith('"') for row in plain for cell in row)
    if quoted is not None and (plain is None or (opened and _was_written_quoted(plain))):
        return quoted[0], quoted[1:], [f"{file.name}: quotation marks around a cell are not part of its text"]
    if plain is None or (not tabs and any(_is_wrapped(cell) for row in plain for cell in row)):
        raise UserError(f"{file}: {problem}")
    remarks = [f"{file.name}: quotation marks around or in a cell are part of its text"] if opened else []
    return plain[0], plain[1:], remarks


def _tried(
    reader: Callable[[Path, str], list[list[str]]], file: Path, tabs: bool
) -> tuple[list[list[str]] | None, _BrokenTable | None]:
    try:
        return reader(file, "\t" if tabs else ","), None
    except _BrokenTable as error:
        return None, error


def _rows_with_returns(file: Path, delimiter: str) -> list[list[str]]:
    """Like `_rows_quoted`, but a carriage return does not end a line: writers that end lines with a line feed do not quote it."""
    rows: list[list[str]] = []
    with file.open(newline="\n", encoding="utf-8-sig") as stream:
        for row, number in _parsed_rows((line.replace("\r", RETURN) for line in stream), delimiter):
            if row and not rows and row[-1].endswith(RETURN):
                raise _BrokenTable("its lines end with a carriage return and a line feed")
            _add(rows, [cell.replace(RETURN, "\r") for cell in row], number)
    return rows


def _rows_quoted(file: Path, delimiter: str) -> list[list[str]]:
    rows: list[list[str]] = []
    with file.open(newline="", encoding="utf-8-sig") as stream:
        for row, number in _parsed_rows(stream, delimiter):
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


def _rows_plain(file: Path, delimiter: str) -> list[list[str]]:
    rows: list[list[str]] = []
    with file.open(newline="\n", encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
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


def _objects(file: Path) -> list[dict[str, Any]]:
    """The objects of a file that holds one object per line, or one list of objects."""
    text = file.read_bytes().decode("utf-8-sig")
    if text.lstrip().startswith("["):
        objects = _parsed(text, str(file))
    else:
        lines = enumerate(text.split("\n"), start=1)
        objects = [_parsed(line, f"{file}: line {number}") for number, line in lines if line.strip()]
    if not objects:
        raise UserError(f"{file}: the file has no row; give one with rows")
    for number, row in enumerate(objects, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{file}: row {number} is not an object but {str(row)[:60]!r}; give one object per row")
    return objects


def _parsed(text: str, where: str) -> Any:
    """`text` parsed as JSON. Numbers, true and false at the top level of a row become text, in the file's own spelling."""
    try:
        value, spelled = json.loads(text), json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
    except ValueError as error:
        raise UserError(
            f"{where} cannot be read as JSON ({error}); give one object per line, or a list of objects"
        ) from None
    if isinstance(value, list):
        return [_spelled(*pair) for pair in zip(value, spelled, strict=True)]
    return _spelled(value, spelled)


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


def _check_text(file: Path, suffix: str) -> None:
    """Raises UserError for an empty file, and, with the line, for text that is not UTF-8."""
    if file.stat().st_size == 0:
        raise UserError(f"{file}: the file is empty; give one with a header line and rows")
    if suffix == ".parquet":
        return
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            _check_mark(file, chunk if line == 1 else b"")
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                line += chunk[: max(0, error.start)].count(b"\n")
                raise UserError(
                    f"{file}: not UTF-8 (line {line}, byte 0x{error.object[error.start]:02x}); "
                    f"convert it first: iconv -f latin1 -t utf-8 {file.name}"
                ) from None
            line += chunk.count(b"\n")


def _check_mark(file: Path, content: bytes) -> None:
    """Raises UserError if `content`, the beginning of `file`, has the byte order mark of UTF-16."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{file}: not UTF-8 but UTF-16; convert it first: iconv -f utf-16 -t utf-8 {file.name}")
