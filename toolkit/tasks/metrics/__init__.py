"""Scores, kept in the package as `evaluate.Metric` classes: `evaluate.load` would download its script from a hub."""


def score_title(name: str) -> str:
    """A score's name as tables show it: `rougeL` is ROUGE-L, `macro_f1` macro F1."""
    return name.replace("rouge", "ROUGE-").replace("_f1", " F1").replace("_", " ")
