"""The card's counters, and replacements on a CPU, so that a rehearsal runs the same code."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import Any

import torch


class Gpu:
    """The first CUDA device. Sizes in bytes."""

    type = "cuda"

    def allocated(self) -> int:
        """Bytes allocated by tensors."""
        return torch.cuda.memory_allocated()

    def reserved(self) -> int:
        """Bytes reserved by PyTorch's caching allocator."""
        return torch.cuda.memory_reserved()

    def peaks(self) -> tuple[int, int]:
        """Peak allocated and peak reserved bytes since `reset`."""
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()

    def reset(self) -> None:
        """Resets the peaks."""
        torch.cuda.reset_peak_memory_stats()

    def empty_cache(self) -> None:
        """Frees unused reserved memory."""
        torch.cuda.empty_cache()

    def used(self) -> int:
        """Bytes of the device that all processes use, contexts included."""
        free, total = torch.cuda.mem_get_info()
        return total - free

    def wait(self) -> None:
        """Waits until all queued work is done."""
        torch.cuda.synchronize()

    def limit(self, nbytes: int) -> None:
        """Limits the bytes that the allocator may reserve; the context is not included."""
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total))

    def profiled(self) -> Any:
        """A profiler that records kernels."""
        return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

    def timed(self, function: Any, repeat: int) -> list[float]:
        """Seconds of device time for each of `repeat` calls, after three warm-up calls."""
        for _ in range(3):
            function()
        pairs = []
        for _ in range(repeat):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            function()
            end.record()
            pairs.append((begin, end))
        self.wait()
        return [begin.elapsed_time(end) / 1000 for begin, end in pairs]


class Cpu:
    """The same interface on a CPU: all counters are 0, and times are wall-clock times."""

    type = "cpu"

    def allocated(self) -> int:
        return 0

    def reserved(self) -> int:
        return 0

    def peaks(self) -> tuple[int, int]:
        return 0, 0

    def reset(self) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def used(self) -> int:
        return 0

    def wait(self) -> None:
        pass

    def limit(self, nbytes: int) -> None:
        pass

    def profiled(self) -> AbstractContextManager[Any]:
        return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def timed(self, function: Any, repeat: int) -> list[float]:
        taken = []
        for _ in range(repeat):
            began = time.perf_counter()
            function()
            taken.append(time.perf_counter() - began)
        return taken


def device(rehearsed: bool) -> Gpu | Cpu:
    """The card, or the CPU in a rehearsal."""
    return Cpu() if rehearsed else Gpu()
