"""The order of rows in an epoch."""

from collections.abc import Iterator

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices


class LengthGrouped(LengthGroupedSampler):
    """Groups rows of similar length. The order depends only on seed and epoch, so it is equal on all ranks and after a resume.

    transformers' own sampler draws the order from each rank's random state, which differs between ranks and after a resume.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of `epoch`, which counts from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))
