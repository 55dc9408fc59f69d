"""The card's counters, and stand-ins on a CPU so that a rehearsal runs the same lines."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import Any

import torch


class Gpu:
    """The first CUDA device. Sizes in bytes."""

    type = "cuda"

    def allocated(self) -> int:
        """What tensors hold."""
        return torch.cuda.memory_allocated()

    def reserved(self) -> int:
        """What PyTorch's caching allocator holds."""
        return torch.cuda.memory_reserved()

    def peaks(self) -> tuple[int, int]:
        """The most that was allocated and reserved since `reset`."""
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()

    def reset(self) -> None:
        """Peaks begin anew."""
        torch.cuda.reset_peak_memory_stats()

    def empty_cache(self) -> None:
        """Gives back what is not in use."""
        torch.cuda.empty_cache()

    def used(self) -> int:
        """What all processes hold of the device, contexts included."""
        free, total = torch.cuda.mem_get_info()
        return total - free

    def wait(self) -> None:
        """Until all that was asked for is done."""
        torch.cuda.synchronize()

    def limit(self, nbytes: int) -> None:
        """The allocator may reserve so much and no more; a context is not counted."""
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total))

    def profiled(self) -> Any:
        """A profiler of kernels."""
        return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

    def timed(self, function: Any, repeat: int) -> list[float]:
        """Seconds that the device took for each of `repeat` calls, after three more."""
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
    """The same on a CPU: it counts nothing, and times with a clock."""

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
    """The card, or what stands for it in a rehearsal."""
    return Cpu() if rehearsed else Gpu()
