"""Libraries that compile functions while they are imported do so at the first call instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from typing import Any

import torch

from toolkit.seams import patched


@contextmanager
def compiled_at_first_call() -> Iterator[None]:
    """While open, what `torch.compile` decorates is compiled when it is called for the first time.

    bitsandbytes, which PEFT imports, decorates functions that a GPU never runs. Compiling them loads Inductor, a fifth of all the
    time in which torch, transformers and PEFT are imported.
    """
    compile_now = torch.compile

    def compile_late(model: Callable[..., Any] | None = None, **options: Any) -> Any:
        if model is None:
            return partial(compile_late, **options)
        if isinstance(model, torch.nn.Module):
            return compile_now(model, **options)
        compiled = cache(lambda: compile_now(model, **options))

        @wraps(model)
        def late(*args: Any, **kwargs: Any) -> Any:
            return compiled()(*args, **kwargs)

        return late

    with patched("torch.compile", compile_late):
        yield
