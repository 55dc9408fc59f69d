"""Files that a reader never sees half-written."""

import os
from pathlib import Path


def write_aside(path: Path, text: str) -> None:
    """Writes `text` to a file beside `path` and renames it there."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
