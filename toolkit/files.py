"""Atomic writes, and CSV files whose cells may hold whole documents."""

import csv
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path


def atomic_write(path: Path, text: str) -> None:
    """Writes `text` to a temporary file next to `path` and renames it to `path`, so no reader sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def csv_text(names: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """The text of a CSV file with the header `names` and these `rows`."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(names)
    writer.writerows(rows)
    return text.getvalue()


def read_csv(path: Path) -> dict[str, list[str]]:
    """The columns of a CSV file with a header; cells may have any length.

    Raises: OSError if the file cannot be read; ValueError if it is no such table, or a row has a wrong number of cells.
    """
    csv.field_size_limit(2**31 - 1)  # the module's default, 131,072 characters, is too short for long texts
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            names, *rows = csv.reader(stream, strict=True)
    except csv.Error as error:
        raise ValueError(f"{path}: {error}") from error
    if any(len(row) != len(names) for row in rows):
        raise ValueError(f"{path}: a row does not have one cell for each of the columns {', '.join(names)}")
    return {name: [row[at] for row in rows] for at, name in enumerate(names)}
