"""Batches whose rows are shared out among processes (sequence parallelism)."""

from collections.abc import Mapping
from typing import Any

import torch


class SharedRows:
    """Collates rows whose tokens `processes` ranks share (Ulysses): a batch is (rows, length), right-padded for an even cut.

    The length is that of the `longest` row, in tokens, for ranks gather each other's batches, and must agree on it.
    Positions are those in the whole row, and there is no mask: what follows the text is seen by none of its tokens.
    """

    def __init__(self, collator: Any, processes: int, longest: int) -> None:
        collator.padding, collator.max_length = "max_length", shared_length(longest, processes)
        self.collator = collator

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        tokenizer = self.collator.tokenizer
        side, tokenizer.padding_side = tokenizer.padding_side, "right"
        try:
            return self.with_positions(self.collator(rows))
        finally:
            tokenizer.padding_side = side

    @staticmethod
    def with_positions(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`batch` with the positions (rows, length) of its tokens, and without a mask."""
        shape = batch["input_ids"].shape
        kept = {name: tensor for name, tensor in batch.items() if name != "attention_mask"}
        return kept | {"position_ids": torch.arange(shape[1]).expand(shape).contiguous()}


def shared_length(length: int, processes: int) -> int:
    """The tokens of a row that `processes` can share evenly: no less than `length`."""
    return -(-length // processes) * processes
