"""Footprint: fine-tune language models on consumer GPUs, and know where the memory goes before, during and after."""

import logging
import warnings

__version__ = "0.1.0"

# What libraries say that a user of this project can do nothing about; everything else is left to be seen.
ADVICE = (
    "Setting accelerator to CPU",  # DeepSpeed, at each start without a GPU
    "Failed to load CPU gemm_4bit_forward",  # bitsandbytes, likewise
)


def _is_news(record: logging.LogRecord) -> bool:
    return not record.msg.startswith(ADVICE)


for name in ("DeepSpeed", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(name).addFilter(_is_news)
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; what failed in the end is said in one line
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # peft 0.21 on transformers 5.23
warnings.filterwarnings("ignore", message="`gradient_checkpointing")  # its newer name does not exist in 5.17
# torch 2.13 has new names for what DeepSpeed 0.19 calls under ZeRO-3 (and transformers where rows are shared), and says so each time.
warnings.filterwarnings("ignore", message=r"`?torch\.distributed\.[\w.]+`? is deprecated", category=FutureWarning)
