"""Batches for sequence parallelism: several processes share the tokens of each row."""

from collections.abc import Mapping
from typing import Any

import torch


class SharedRows:
    """Collates rows that `processes` ranks share (Ulysses): a batch is (rows, length), right-padded so that it splits evenly.

    Every batch has the length of the `longest` row in tokens, because ranks gather each other's batches and must agree on
    it. Positions count within the whole row. There is no mask: padding follows the text, so no token of the text attends to it.
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
        """`batch` without its mask, and with `position_ids` (rows, length)."""
        shape = batch["input_ids"].shape
        kept = {name: tensor for name, tensor in batch.items() if name != "attention_mask"}
        return kept | {"position_ids": torch.arange(shape[1]).expand(shape).contiguous()}


def shared_length(length: int, processes: int) -> int:
    """The smallest multiple of `processes` that is at least `length` tokens."""
    return -(-length // processes) * processes
