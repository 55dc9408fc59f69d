"""Scores, kept in the package as `evaluate.Metric` classes: `evaluate.load` would download its script from a hub."""


def score_title(name: str) -> str:
    """A score's name as tables show it: `rougeL` is ROUGE-L, `macro_f1` macro F1."""
    return name.replace("rouge", "ROUGE-").replace("_f1", " F1").replace("_", " ")


def normalized(answer: str) -> str:
    """An answer of a classifier as it is compared: without surrounding space and without regard to case."""
    return answer.strip().casefold()
