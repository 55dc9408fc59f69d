"""Imported once by multiprocessing's fork server: imports everything that a recipe imports, without initializing CUDA.

A fork of a process with a CUDA context cannot use CUDA. Two things would create a context here: `torch.cuda.is_available`, unless
it uses NVML, and bitsandbytes, which queries each card's compute capability on import. So `machine.environment` makes torch use
NVML, and bitsandbytes gets the capability from `nvidia-smi`.
"""

import contextlib
import gc
import importlib
import runpy
import sys
import traceback

from on_gpu.machine import ROOT, nvidia_smi

LATER = (  # modules that a recipe imports on demand; DeepSpeed is left to the runs that use it
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
    """Imports everything, then removes the project's own modules: on import they read the rank of the importing process."""
    from toolkit.seams import patched

    capability = nvidia_smi("compute_cap")
    with contextlib.ExitStack() as stack:
        if capability is not None:
            known = tuple(int(number) for number in capability.split("."))
            stack.enter_context(patched("torch.cuda.get_device_capability", lambda *_: known))
        with contextlib.suppress(ImportError):  # the run that needs it reports the error
            import bitsandbytes  # noqa: F401
        runpy.run_path(str(ROOT / "recipes" / "lora.py"), run_name="imported")
        for name in LATER:
            with contextlib.suppress(ImportError):  # not every system has them
                importlib.import_module(name)
    for name in [name for name in sys.modules if name.split(".")[0] == "toolkit"]:
        del sys.modules[name]
    gc.freeze()  # garbage collection of imported objects in a fork would copy all their memory


try:
    preload()
except Exception:  # the fork server must not end: each item runs into the same error and reports it
    traceback.print_exc()
