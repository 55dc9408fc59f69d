"""The meter of a real NVIDIA GPU: PyTorch's own counters, against which the events of a trace are checked."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from toolkit.memory.trace import Allocation

_earlier = 0  # bytes: the peak before code that was excluded from it


@contextmanager
def excluded_from_peak(device: torch.device) -> Iterator[None]:
    """While open, allocations count in no phase's peak; for scoring the base model between loading and training."""
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
    """Reads the caching allocator's statistics for one device; it counts nothing itself.

    They include what no trace sees: cuBLAS workspaces, buffers inside kernels, tensors of other libraries. The first peak
    covers the time since the last `torch.cuda.reset_peak_memory_stats` or the start of the process. So it is the peak of
    loading, without what was `excluded_from_peak`.
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
        """Bytes in use on the device beyond what PyTorch reserved: the CUDA context and the memory of other processes."""
        free, total = torch.cuda.mem_get_info(self.device)
        return max(0, total - free - self.reserved)
