"""Scores, kept in the package as `evaluate.Metric` classes: `evaluate.load` would download its script from a hub."""
