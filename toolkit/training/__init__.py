"""Training: transformers' Trainer with our loss, guards, checkpoints and optimizers."""
