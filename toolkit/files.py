"""Files that a reader never sees half-written, and tables whose cells may be whole documents."""

import csv
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path


def atomic_write(path: Path, text: str) -> None:
    """Writes `text` to a file beside `path` and renames it there."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def csv_text(names: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """What a CSV file with the header `names` and these `rows` holds."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(names)
    writer.writerows(rows)
    return text.getvalue()


def read_csv(path: Path) -> dict[str, list[str]]:
    """The columns of a CSV file with a header, cells of any length.

    Raises: OSError where it cannot be read; ValueError where it is not such a table, or a row of it is cut short.
    """
    csv.field_size_limit(2**31 - 1)  # the module's own, 131,072 characters, is less than a long text
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            names, *rows = csv.reader(stream, strict=True)
    except csv.Error as error:
        raise ValueError(f"{path}: {error}") from error
    if any(len(row) != len(names) for row in rows):
        raise ValueError(f"{path}: a row has not as many cells as there are columns: {', '.join(names)}")
    return {name: [row[at] for row in rows] for at, name in enumerate(names)}
