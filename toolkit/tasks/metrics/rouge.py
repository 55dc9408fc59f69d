"""ROUGE (Lin 2004, https://aclanthology.org/W04-1013) with Google's `rouge_score`; same values as `evaluate.load("rouge")`."""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
from rouge_score.rouge_scorer import RougeScorer

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class Rouge(evaluate.Metric):
    """F-measures of ROUGE-1, -2, -L and -Lsum, averaged over the pairs, with Porter stemming; each from 0 to 1.

    `compute(predictions=[str], references=[str])` gives `{"rouge1": float, ...}`; with `use_aggregator=False` each value is a
    list with one float per pair. ROUGE-Lsum splits a text into sentences at its line breaks.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__ or "",
            citation="Lin, C.-Y. (2004). ROUGE: A Package for Automatic Evaluation of Summaries.",
            inputs_description=type(self).__doc__ or "",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(
        self, predictions: list[str], references: list[str], use_aggregator: bool = True
    ) -> dict[str, float] | dict[str, list[float]]:
        scorer = RougeScorer(ROUGE_TYPES, use_stemmer=True)
        pairs = [scorer.score(reference, text) for reference, text in zip(references, predictions, strict=True)]
        each = {kind: [pair[kind].fmeasure for pair in pairs] for kind in ROUGE_TYPES}
        return {kind: float(np.mean(scores)) for kind, scores in each.items()} if use_aggregator else each


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The four mean scores of `predictions` (as many as `references`), computed in memory, so that processes share no cache file."""
    return Rouge(keep_in_memory=True).compute(predictions=predictions, references=references)


def rouge_of_each(predictions: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """The four scores of each of `predictions`."""
    return Rouge(keep_in_memory=True).compute(predictions=predictions, references=references, use_aggregator=False)
