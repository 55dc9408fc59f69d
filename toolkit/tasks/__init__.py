"""What is learned: one file for each task. `TASKS` finds these files, so a new task is one new file here.

A task defines which columns it reads, how a row becomes token ids and labels, how a model answers, and how answers are scored.
"""

import importlib
import pkgutil
from collections.abc import Sequence

from toolkit.tasks.base import Task

__all__ = ["TASKS", "Task", "row_scores"]


def _find() -> dict[str, Task]:
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    classes = {value for module in modules for value in vars(module).values() if isinstance(value, type)}
    return {cls.name: cls() for cls in classes if issubclass(cls, Task) and "name" in vars(cls)}


TASKS = _find()


def row_scores(task: str, predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """One score for each row: ROUGE-L, 0 or 1, or a text's loss. Their mean is about `TASKS[task].metric`."""
    return TASKS[task].row_scores(predictions, references)
