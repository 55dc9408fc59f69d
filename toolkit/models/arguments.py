"""The flags that name a model and how it is loaded."""

import importlib.util
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from toolkit.embedded import MODEL_DIR
from toolkit.errors import UserError
from toolkit.models.hub import hub_id

# transformers' names of FlashAttention, and the version that each runs. The last three are kernels of the hub: they are only predicted.
FLASH_ATTENTION = {
    "flash_attention_2": 2,
    "flash_attention_3": 3,
    "kernels-community/flash-attn2": 2,
    "kernels-community/flash-attn3": 3,
    "kernels-community/vllm-flash-attn3": 3,
}


@dataclass
class ModelArguments:
    """The model, and the form in which its weights are loaded."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder. Default: the tiny T5 that comes with footprint."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a hub model."})
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the tokenizer, where it is not the model's own."}
    )
    random_weights: bool = field(
        default=False, metadata={"help": "Make the model from its config only, with random weights drawn from --seed."}
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata={"help": "Type of the weights. auto: bf16 for a frozen base on a card that has it, else fp32."},
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "sdpa, eager, flash_attention_2 or flash_attention_3; eager keeps every attention map in memory. FlashAttention needs "
            "a GPU and its package, to predict it neither."
        },
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantize the frozen base to 4 bits (QLoRA)."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantize the frozen base to 8 bits (LLM.int8())."})
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = field(default="nf4", metadata={"help": "The 4-bit number format."})
    bnb_4bit_use_double_quant: bool = field(
        default=True, metadata={"help": "Quantize the quantization constants too: about 0.4 bits a weight less."}
    )

    def __post_init__(self) -> None:
        self.model_name_or_path = lasting_path(self.model_name_or_path and hub_id(self.model_name_or_path))
        self.tokenizer_name = lasting_path(self.tokenizer_name and hub_id(self.tokenizer_name))

    def check(self, given: dict[str, Any]) -> None:
        """Raises UserError for flags that exclude each other or would have no effect."""
        if self.load_in_4bit and self.load_in_8bit:
            raise UserError("--load_in_4bit and --load_in_8bit exclude each other; give one of them")
        for name in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant"):
            if name in given and not self.load_in_4bit:
                raise UserError(f"--{name} has no effect without --load_in_4bit; add it or leave --{name} out")
        if self.load_in_4bit or self.load_in_8bit:
            if importlib.util.find_spec("bitsandbytes") is None:
                raise UserError(
                    "quantized loading needs bitsandbytes, which is not installed: pip install bitsandbytes"
                )
            if "dtype" in given:
                raise UserError(
                    "--dtype has no effect with quantized loading, whose weights are integers; leave it out"
                )
            if self.random_weights:
                raise UserError(
                    "--random_weights cannot be quantized while loading; leave out --load_in_4bit / --load_in_8bit"
                )
        if self.attn_implementation not in FLASH_ATTENTION:
            self.check_kernel()
        if "model_revision" in given and self.is_local:
            raise UserError("--model_revision has no effect on a local model; leave it out")

    def check_kernel(self) -> None:
        """Raises UserError for attention that would be downloaded from the hub."""
        if "/" in (self.attn_implementation or ""):
            raise UserError(
                f"--attn_implementation {self.attn_implementation}: a kernel of the hub is code from outside, which footprint never "
                "runs; give sdpa, eager or flash_attention_2"
            )

    @property
    def source(self) -> str:
        """The hub id or folder that is loaded."""
        return self.model_name_or_path or str(MODEL_DIR)

    @property
    def is_local(self) -> bool:
        """Whether the name of the model is a path, whether or not the folder exists."""
        return looks_like_path(self.source)

    @property
    def short_name(self) -> str:
        """The last part of the model's name, for folders and titles."""
        return Path(self.source).resolve().name if self.model_name_or_path else "embedded"


def looks_like_path(name: str) -> bool:
    """Whether `name` is a path rather than a hub id (`user/name`)."""
    return name.startswith((".", "/", "~")) or _exists(name) or name.count("/") > 1


def lasting_path(name: str | None) -> str | None:
    """An existing path made absolute, so that a run's config.yaml is valid from any folder; a hub id unchanged."""
    if name is None or not _exists(name):
        return name
    return os.path.abspath(Path(name).expanduser())  # noqa: PTH100 - resolve() would follow links, absolute() keeps ".."


def _exists(name: str) -> bool:
    try:
        return Path(name).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long for a path, a NUL byte, or an unknown user
        return False
