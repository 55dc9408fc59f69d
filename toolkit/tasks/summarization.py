"""Summarization: a text in a prompt, its summary as the target, ROUGE as the score."""

from collections.abc import Sequence
from typing import Any, ClassVar

from toolkit.tasks.base import Task, text_in


class Summarization(Task):
    """Writes the summary of a text."""

    name: ClassVar[str] = "summarization"
    flags: ClassVar[dict[str, Any]] = {
        "text_column": "dialogue",
        "summary_column": "summary",
        "prompt_template": "Summarize the following conversation.\n\n{text}\n\nSummary:",
        "max_target_length": 128,
        "num_beams": 1,
    }
    metric: ClassVar[str] = "rougeL"
    scoring: ClassVar[str] = "ROUGE F-measures with stemming"

    def pair(self, row: dict[str, Any]) -> tuple[Any, Any]:
        """The text and its summary."""
        return text_in(row, "text_column"), text_in(row, "summary_column")

    def score(
        self, predictions: Sequence[str], references: Sequence[str], label_names: Sequence[str]
    ) -> dict[str, float]:
        """ROUGE-1, -2, -L and -Lsum, averaged over rows, each from 0 to 1."""
        from toolkit.tasks.metrics.rouge import rouge  # `evaluate` takes seconds to import

        return rouge(predictions, references)

    def row_scores(self, predictions: Sequence[str], references: Sequence[str]) -> list[float]:
        """ROUGE-L of each row."""
        from toolkit.tasks.metrics.rouge import rouge_of_each

        return rouge_of_each(predictions, references)["rougeL"]
