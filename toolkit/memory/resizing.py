"""Storages that are resized in place: FSDP2 frees and allocates gathered weights this way, and no operator reports it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from toolkit.memory.trace import Trace
from toolkit.seams import patched


@contextmanager
def resizes_seen_by(trace: Trace) -> Iterator[None]:
    """While open, `trace` sees each storage that Python code resizes (torch's `alloc_storage` and `free_storage`)."""
    resize = torch.UntypedStorage.resize_

    def resize_(self: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        result = resize(self, size)
        trace.resized(self)
        return result

    with patched("UntypedStorage.resize_", resize_):
        yield
