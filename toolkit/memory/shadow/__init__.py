"""The shadow step: the real training step on fake tensors."""
