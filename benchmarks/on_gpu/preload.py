"""Imported once by the process that forks (multiprocessing's forkserver): everything that a recipe imports, and no CUDA.

A fork of a process that has a CUDA context cannot use CUDA. Two things would make one here: `torch.cuda.is_available`,
unless it asks NVML, and bitsandbytes, which asks each card for its compute capability as it is imported. The first is told
to ask NVML (`environment`), the second is given the capability that `nvidia-smi` knows.
"""

import contextlib
import gc
import importlib
import runpy
import sys
import traceback

from on_gpu.machine import ROOT, nvidia_smi

LATER = (  # what a recipe imports once it knows that it needs it; DeepSpeed is left to those that use it
    "evaluate",
    "peft.tuners.lora.bnb",
    "rouge_score.rouge_scorer",
    "torch.distributed.fsdp",
    "torch.profiler",
    "transformers.models.bart.modeling_bart",
    "transformers.models.llama.modeling_llama",
    "transformers.models.t5.modeling_t5",
    "transformers.models.t5.tokenization_t5",
)


def preload() -> None:
    """Imports, and forgets the project's own modules again: they read the rank of the process that they are imported in."""
    from toolkit.seams import patched

    capability = nvidia_smi("compute_cap")
    with contextlib.ExitStack() as stack:
        if capability is not None:
            known = tuple(int(number) for number in capability.split("."))
            stack.enter_context(patched("torch.cuda.get_device_capability", lambda *_: known))
        with contextlib.suppress(ImportError):  # its own message comes where it is used
            import bitsandbytes  # noqa: F401
        runpy.run_path(str(ROOT / "recipes" / "lora.py"), run_name="imported")
        for name in LATER:
            with contextlib.suppress(ImportError):  # not every system has them
                importlib.import_module(name)
    for name in [name for name in sys.modules if name.split(".")[0] == "toolkit"]:
        del sys.modules[name]
    gc.freeze()  # a fork that collected what was imported would copy all of its memory


try:
    preload()
except Exception:  # the process that forks must not end: each item meets the same error, and leaves it in the results
    traceback.print_exc()
