"""Footprint: fine-tune language models on consumer GPUs, and know where the memory goes before, during and after.

Notebooks and scripts can use `predict`, `load_run`, `methods` and `Ledger`. Each raises `UserError` for a user's mistake.
PyTorch is imported when the first of them is used.

    >>> import toolkit
    >>> ledger = toolkit.predict(
    ...     "lora", gpu="RTX 4090", model_name_or_path="meta-llama/Llama-3.2-1B", max_length=512, bf16=True
    ... )
    >>> ledger.fits, ledger.peak_phase_name
    (True, 'forward')
    >>> ledger.save("prediction.json")
    >>> toolkit.Ledger.load("prediction.json").needed_bytes == ledger.needed_bytes
    True
    >>> run = toolkit.load_run("runs/demo")
    >>> sorted(run.scores)
    ['base', 'tuned']
    >>> answers = run.generate(["#Person1#: Is it raining?"])
    >>> run.ledger.source
    'measured'
    >>> toolkit.methods()["lora"].paper
    'arXiv:2106.09685'
"""

import importlib
import logging
import warnings
from typing import TYPE_CHECKING, Any

from toolkit.version import __version__

if TYPE_CHECKING:
    from toolkit.runs.api import Ledger, UserError, load_run, methods, predict

__all__ = ["Ledger", "UserError", "__version__", "load_run", "methods", "predict"]

# The module of each name above; it is imported at first use (PEP 562).
_HOMES = {"Ledger": "memory.ledger", "UserError": "errors", "load_run": "runs.api", "predict": "runs.api"}

if not TYPE_CHECKING:  # with __getattr__, a type checker would accept any name

    def __getattr__(name: str) -> Any:
        if name == "methods":  # the package toolkit.methods, which is callable
            return importlib.import_module(f"{__name__}.methods")
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


# Log messages of libraries that a user of this project can do nothing about, by the name of the logger. All others are shown.
# Libraries set the levels of their loggers when they are imported, but they keep filters.
HIDDEN = {
    "DeepSpeed": ("Setting accelerator to CPU",),  # at each start without a GPU
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),  # when it is imported, on some CPUs
    "huggingface_hub.utils._http": ("thrown while requesting", "Retrying in"),  # the last failure is our one-line error
}


def _is_shown(record: logging.LogRecord) -> bool:
    return not any(text in str(record.msg) for text in HIDDEN[record.name])


for name in HIDDEN:
    logging.getLogger(name).addFilter(_is_shown)
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # peft 0.21 on transformers 5.23
warnings.filterwarnings("ignore", message="`gradient_checkpointing")  # its newer name does not exist in 5.17
# torch 2.13 deprecates names that DeepSpeed 0.19 uses under ZeRO-3 (and transformers under sequence parallelism).
warnings.filterwarnings("ignore", message=r"`?torch\.distributed\.[\w.]+`? is deprecated", category=FutureWarning)
