"""A shadow step changes nothing in the process: random states, accelerate's singletons and the environment are restored."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers.utils import logging as transformers_logging

# Variables that a launcher sets and accelerate reads. They are removed: the shadow step is one process on one device.
_LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "FSDP_", "ACCELERATE_")


@contextmanager
def isolated() -> Iterator[None]:
    """While open, accelerate is newly initialized for one CPU process without an engine; afterwards its state is restored."""
    states = [PartialState._shared_state, AcceleratorState._shared_state, GradientState._shared_state]
    kept = [dict(state) for state in states]
    environment = dict(os.environ)
    verbosity = transformers_logging.get_verbosity()
    python, numpy = random.getstate(), np.random.get_state()
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
        os.environ.clear()
        os.environ.update(environment)
        transformers_logging.set_verbosity(verbosity)
        random.setstate(python)
        np.random.set_state(numpy)
