"""A run from preflight to model card, its prediction, and loading finished runs."""
