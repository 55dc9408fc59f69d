"""One run from preflight to model card, its prediction, and finished runs read back."""
