"""The terminal: one console for the whole project. Only rank 0 prints."""

import os

from rich.console import Console
from rich.table import Table
from transformers.utils import logging

is_main = os.environ.get("RANK", "0") == "0"
console = Console(quiet=not is_main, highlight=False, width=None if os.isatty(1) else 110)

if not console.is_terminal:
    logging.disable_progress_bar()  # of transformers, while it loads weights


def say(label: str, text: str) -> None:
    """Prints one line: an aligned label, then the text."""
    console.print(f"[bold]{label:>11}[/bold]  {text}", soft_wrap=True)


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Prints a table; the first column is text, the others are numbers."""
    grid = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        grid.add_column(column, justify="right" if number else "left")
    for row in rows:
        grid.add_row(*row)
    console.print(grid)
