"""A shadow step changes nothing in the process: random states, libraries' singletons and the environment are restored."""

from __future__ import annotations

import gc
import os
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers.utils import logging as transformers_logging

# Variables that a launcher sets and accelerate reads. They are removed: the shadow step is one process on one device.
_LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "FSDP_", "ACCELERATE_")


@contextmanager
def isolated() -> Iterator[None]:
    """While open, accelerate is newly initialized for one CPU process without an engine; afterwards its state is restored.

    So are bitsandbytes' settings of single weights, which it finds by their places: another model's would be taken for this one's.
    """
    states = [PartialState._shared_state, AcceleratorState._shared_state, GradientState._shared_state]
    kept = [dict(state) for state in states]
    environment = dict(os.environ)
    verbosity = transformers_logging.get_verbosity()
    python, numpy = random.getstate(), np.random.get_state()
    of_weights = _settings_of_weights(None)
    for state in states:
        state.clear()
    for name in environment:
        if name.startswith(_LAUNCH):
            del os.environ[name]
    transformers_logging.set_verbosity_error()
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            PartialState(cpu=True)
            yield
    finally:
        for state, before in zip(states, kept, strict=True):
            state.clear()
            state.update(before)
        _settings_of_weights(of_weights)
        os.environ.clear()
        os.environ.update(environment)
        transformers_logging.set_verbosity(verbosity)
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def quick_collections() -> Iterator[None]:
    """While open, collecting garbage looks at new objects only; afterwards those that are no longer used are gone.

    Trainer collects garbage when it begins, which takes a third of a second with all that the libraries keep. Open it around the
    function that makes the model: what its frame still holds when this ends would stay, and be left out the next time.
    """
    freezes = not gc.get_freeze_count()
    if freezes:
        gc.freeze()
    try:
        yield
    finally:
        if freezes:
            gc.collect()
            gc.unfreeze()


def _settings_of_weights(new: Any) -> Any:
    """Sets bitsandbytes' manager of them, if it is imported (None: it makes an empty one), and returns the one before."""
    module: Any = sys.modules.get("bitsandbytes.optim.optimizer")
    if module is None:
        return None
    before, module.GlobalOptimManager._instance = module.GlobalOptimManager._instance, new
    return before
