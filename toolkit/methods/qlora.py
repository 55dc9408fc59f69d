"""QLoRA: LoRA over a 4-bit (or 8-bit) base, with an optimizer whose state can move to the host's memory."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from toolkit.errors import UserError
from toolkit.methods.base import KBIT_UPCAST
from toolkit.methods.lora import Lora


@dataclass
class QLora(Lora):
    """LoRA over a frozen base in NF4 with double quantization (Dettmers et al. 2023, arXiv:2305.14314).

    The base needs about 0.52 bytes per weight instead of 2. Each layer is dequantized whenever it is used, so a step takes longer.

    Activations are recomputed in the backward pass, unless --activation_checkpointing false is given: next to 4-bit weights they
    would need most of the memory.
    """

    _argument_group_name: ClassVar[str] = "QLoRA"
    name: ClassVar[str] = "qlora"
    paper: ClassVar[str] = "arXiv:2305.14314"
    training_defaults: ClassVar[dict[str, Any]] = {"learning_rate": 2e-4, "load_in_4bit": True}

    kbit_upcast: Literal["none", "all"] = field(default="none", metadata={"help": KBIT_UPCAST})

    @classmethod
    def defaults(cls, given: dict[str, Any]) -> dict[str, Any]:
        """4 bits, unless --load_in_8bit is given; activation checkpointing, except for the embedded model."""
        chosen = super().defaults(given) | {"activation_checkpointing": given.get("model_name_or_path") is not None}
        return chosen | {"load_in_4bit": False} if given.get("load_in_8bit") else chosen

    @classmethod
    def optimizer(cls, on_gpu: bool) -> tuple[str | None, str]:
        """Paged 8-bit AdamW on a GPU, whose memory may run out; otherwise Trainer's default."""
        if on_gpu:
            return "paged_adamw_8bit", "8-bit state that moves to the host's memory when the GPU's runs out"
        return None, "not the paged 8-bit AdamW of QLoRA, for without a GPU there is nothing to page from"

    def check(self, given: dict[str, Any]) -> None:
        """Raises UserError if the user's flags (`given`) contradict each other, or nothing is quantized."""
        if given.get("load_in_4bit") is False and not given.get("load_in_8bit"):
            raise UserError("QLoRA with neither 4 nor 8 bits is LoRA: use recipes/lora.py")
        super().check(given)

    def _quantizes(self, given: dict[str, Any]) -> bool:
        return True
