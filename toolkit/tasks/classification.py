"""Classification as text: the prompt names the classes, and the model writes one of them."""

from collections.abc import Sequence
from typing import Any, ClassVar

from toolkit.tasks.base import Task, text_in


class Classification(Task):
    """Generates the label of a text, with any generating model (Raffel et al. 2019, arXiv:1910.10683)."""

    name: ClassVar[str] = "classification"
    flags: ClassVar[dict[str, Any]] = {
        "text_column": "sentence",
        "label_column": "label",
        "prompt_template": "Classify the following text as one of: {labels}.\n\n{text}\n\nLabel:",
        "max_target_length": 16,
        "num_beams": 1,
    }
    metric: ClassVar[str] = "accuracy"
    scoring: ClassVar[str] = (
        "Answers are compared with the labels without regard to case; an unknown answer is wrong. "
        "The majority class is the accuracy of always answering the most frequent label"
    )

    def pair(self, row: dict[str, Any]) -> tuple[str, str]:
        """The text and the name of its class."""
        return text_in(row, "text_column"), text_in(row, "label_column")

    def score(
        self, predictions: Sequence[str], references: Sequence[str], label_names: Sequence[str]
    ) -> dict[str, float]:
        """Accuracy, macro-F1, the share of answers that are no label, and the share of the most frequent label."""
        from toolkit.tasks.metrics.classification import classification

        return classification(predictions, references, label_names)

    def row_scores(self, predictions: Sequence[str], references: Sequence[str]) -> list[float]:
        """1 for each right answer, 0 for each wrong one."""
        from toolkit.models.heads import normalized

        return [float(normalized(a) == normalized(b)) for a, b in zip(predictions, references, strict=True)]
