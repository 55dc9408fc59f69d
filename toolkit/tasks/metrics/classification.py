"""Accuracy and macro-F1 of answers that are label names, as text."""

from collections import Counter
from collections.abc import Sequence

import datasets
import evaluate

from toolkit.models.heads import normalized


class Classification(evaluate.Metric):
    """Accuracy, macro-F1, and two figures to judge them by; each from 0 to 1.

    `compute(predictions=[str], references=[str], label_names=[str])` gives

    - `accuracy`: the share of answers that are the row's label;
    - `macro_f1`: the mean over the labels that occur in the references of F1 = 2 TP / (2 TP + FP + FN);
    - `unknown`: the share of answers that are none of `label_names`, each of which counts as wrong;
    - `majority_class`: the share of the most frequent reference, which is the accuracy of the best constant answer.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__ or "",
            citation="Sokolova, M., Lapalme, G. (2009). A systematic analysis of performance measures for classification tasks.",
            inputs_description=type(self).__doc__ or "",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(
        self, predictions: list[str], references: list[str], label_names: Sequence[str] = ()
    ) -> dict[str, float]:
        answers, right = ([normalized(text) for text in texts] for texts in (predictions, references))
        occurs, given = Counter(right), Counter(answers)
        hits = Counter(a for a, b in zip(answers, right, strict=True) if a == b)
        known = {normalized(name) for name in label_names} | set(right)
        return {
            "accuracy": hits.total() / len(right),
            # 2 TP + FP + FN = answers that are the label + references that are it
            "macro_f1": sum(2 * hits[name] / (given[name] + occurs[name]) for name in occurs) / len(occurs),
            "unknown": sum(answer not in known for answer in answers) / len(right),
            "majority_class": max(occurs.values()) / len(right),
        }


def classification(
    predictions: Sequence[str], references: Sequence[str], label_names: Sequence[str]
) -> dict[str, float]:
    """The scores of `predictions` (as many as `references`), computed in memory, so that processes share no cache file."""
    metric = Classification(keep_in_memory=True)
    return metric.compute(predictions=predictions, references=references, label_names=label_names)
