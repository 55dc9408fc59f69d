"""Scores as `evaluate.Metric` classes in this package, because `evaluate.load` would download a script from the hub."""


def score_title(name: str) -> str:
    """A score's name as tables show it: `rougeL` is ROUGE-L, `macro_f1` macro F1."""
    return name.replace("rouge", "ROUGE-").replace("_f1", " F1").replace("_", " ")
