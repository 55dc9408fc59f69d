"""Activations in pinned host memory: what transformers and accelerate offload, in a shadow step."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from toolkit.memory.trace import current_trace
from toolkit.seams import patched


class _OnHost(saved_tensors_hooks):
    """`torch.autograd.graph.save_on_cpu` for a card that is not here: a copy counts as host memory until the backward pass."""

    def __init__(self, pin_memory: bool = False, device_type: str = "cuda") -> None:
        super().__init__(_to_host, torch.clone)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    copy, trace = torch.empty_like(tensor, memory_format=torch.contiguous_format), current_trace()
    block = None if trace is None else trace.block_of(copy)
    if block is not None:
        block.offloaded = block.pinned = True
    return copy.copy_(tensor)


@contextmanager
def activations_on_host(options: dict[str, Any]) -> Iterator[None]:
    """While open, what `save_on_cpu` moves to the host is counted there. `options`: --activation_checkpointing_kwargs."""
    with patched("save_on_cpu of FSDP2", _OnHost):
        if not options.get("offload"):  # transformers 5.17 does not have it
            yield
            return
        with patched("save_on_cpu of transformers", _OnHost):
            yield
