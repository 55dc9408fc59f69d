"""Cross entropy of each row, and its mean over all label tokens."""

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import EvalPrediction

from toolkit.models.soft_prompts import has_virtual_tokens


def row_losses(
    logits: torch.Tensor, labels: torch.Tensor, aligned: bool, smoothing: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed cross entropy of each row and the number of its label tokens, both (rows,).

    Args:
        logits: (rows, length, vocabulary), for a GPT-like model possibly with virtual tokens first; or (rows, classes).
        labels: (rows, length), or (rows,) for classes.
        aligned: whether the logits at a position predict the label there (T5-like models, heads) or the next label.
        smoothing: see `torch.nn.functional.cross_entropy`.
    """
    if not aligned:  # the first label has a prediction only if virtual tokens come before it
        logits = logits[:, -labels.shape[1] - 1 : -1]
        labels = labels[:, -logits.shape[1] :]
    sums = [
        cross_entropy(row.float(), targets, ignore_index=IGNORE_INDEX, label_smoothing=smoothing, reduction="sum")
        for row, targets in zip(logits, labels, strict=True)
    ]
    return torch.stack(sums), labels.ne(IGNORE_INDEX).view(len(labels), -1).sum(1)


def label_tokens(model: nn.Module, labels: torch.Tensor) -> torch.Tensor:
    """How many of `labels` the loss of `model` sees: all classes (batch,), or the tokens (batch, length) that are not masked.

    A GPT-like model never predicts the first position, unless virtual tokens stand before it.
    """
    shifted = labels.dim() == 2 and not model.config.is_encoder_decoder and not has_virtual_tokens(model)
    return (labels[:, 1:] if shifted else labels).ne(IGNORE_INDEX).sum()


def mean_loss(rows: EvalPrediction) -> dict[str, float]:
    """The mean over all label tokens of the validation split, independent of batches and processes."""
    return {"loss": float(np.sum(rows.predictions, dtype=np.float64) / np.sum(rows.label_ids))}


IGNORE_INDEX = -100  # label of tokens that the loss ignores
