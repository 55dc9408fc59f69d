"""The terminal: one console for the whole project. Only rank 0 prints."""

import os
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers.utils import logging

from toolkit.errors import printable


class PlainConsole(Console):
    """A terminal that prints text as it is: a folder called `[/bold]` is no markup, and none of its characters moves the cursor."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """The text with its control characters written out; lines stay lines."""
        return super().render_str("\n".join(map(printable, text.split("\n"))), **options)


is_main = os.environ.get("RANK", "0") == "0"
console = PlainConsole(quiet=not is_main, width=None if os.isatty(1) else 110)

if not console.is_terminal:
    logging.disable_progress_bar()  # of transformers, while it loads weights


def say(label: str, text: str) -> None:
    """Prints one line: an aligned label, then the text."""
    console.print(labelled(label, text), soft_wrap=True)


def labelled(label: str, text: str) -> Text:
    """The line that `say` prints."""
    return Text.assemble((f"{label:>11}", "bold"), "  ", printable(text))


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Prints a table; the first column is text, the others are numbers."""
    grid = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        grid.add_column(column, justify="right" if number else "left")
    for row in rows:
        grid.add_row(*row)
    console.print(grid)
