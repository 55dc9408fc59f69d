"""The meter of a real NVIDIA GPU: PyTorch's own counters, beside which a trace's events are held."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from toolkit.memory.trace import Allocation

_earlier = 0  # bytes: the peak of what came before something that is no part of the account


@contextmanager
def excluded_from_peak(device: torch.device) -> Iterator[None]:
    """What runs within is in no phase's peak: scores of the base model, between loading and training."""
    global _earlier
    if device.type != "cuda":
        yield
        return
    _earlier = max(_earlier, torch.cuda.max_memory_allocated(device))
    try:
        yield
    finally:
        torch.cuda.reset_peak_memory_stats(device)


class CudaMeter:
    """Reads the caching allocator's statistics of one device; it counts nothing itself.

    It also counts what no trace sees: cuBLAS workspaces, buffers inside kernels, other libraries' tensors. Its first
    peak reaches back to the last `torch.cuda.reset_peak_memory_stats`, or to the start of the process: loading, without what
    was `excluded_from_peak`.
    """

    sees_all = False

    def __init__(self, device: torch.device):
        self.device = device

    def _current(self, name: str) -> int:
        return torch.cuda.memory.memory_stats_as_nested_dict(self.device)[name]["all"]["current"]

    @property
    def requested(self) -> int:
        return self._current("requested_bytes")

    @property
    def allocated(self) -> int:
        return self._current("allocated_bytes")

    @property
    def reserved(self) -> int:
        return self._current("reserved_bytes")

    def born(self, block: Allocation) -> None:
        pass

    def died(self, block: Allocation) -> None:
        pass

    def entered(self, phase: str, step: int) -> None:
        pass

    def take_peak(self) -> int:
        global _earlier
        peak, _earlier = max(torch.cuda.max_memory_allocated(self.device), _earlier), 0
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    def context_bytes(self) -> int:
        """What the device has in use beyond PyTorch's reserve: the CUDA context, and any other process's memory."""
        free, total = torch.cuda.mem_get_info(self.device)
        return max(0, total - free - self.reserved)
