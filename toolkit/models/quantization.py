"""4-bit and 8-bit bases: their configuration, and which weights are packed."""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    PreTrainedConfig,
)

from toolkit.distributed.deepspeed import without_partitioning
from toolkit.models.arguments import ModelArguments
from toolkit.models.heads import auto_class, has_head, head_modules
from toolkit.models.meta import model_on_meta
from toolkit.units import format_bytes


def quantization_config(
    args: ModelArguments, config: PreTrainedConfig, dtype: torch.dtype, sharded: bool = False
) -> BitsAndBytesConfig | None:
    """How the weights are quantized while loading, computing in `dtype`; None where they are not. A head never is.

    Packed 4-bit weights are stored as bytes, or, where the engine shards them, in `dtype`: it takes floating point alone.
    """
    if not (args.load_in_4bit or args.load_in_8bit):
        return None
    heads = None
    if has_head(config):
        with without_partitioning():
            heads = head_modules(model_on_meta(auto_class(config), copy.deepcopy(config), dtype))
    return BitsAndBytesConfig(
        load_in_4bit=args.load_in_4bit,
        load_in_8bit=args.load_in_8bit,
        bnb_4bit_quant_type=args.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=args.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=heads,  # of both, in spite of its name
        bnb_4bit_quant_storage=dtype if sharded and args.load_in_4bit else None,
    )


def is_packed(parameter: nn.Parameter) -> bool:
    """Whether bitsandbytes holds it in 4 or 8 bits."""
    return type(parameter).__name__ in ("Params4bit", "Int8Params")


@dataclass(frozen=True)
class Packed:
    """How many elements of a quantized model's weights bitsandbytes packs: those of linear layers alone."""

    packed: int
    all: int
    experts: int  # of experts that are stacked in one tensor, and stay in the type they are computed in

    @classmethod
    def of(cls, model: nn.Module) -> "Packed":
        """Those of a model without adapters, as `build_on_meta` gives it."""
        weights = dict(model.named_parameters())
        packed = {name for name, p in weights.items() if is_packed(p)}
        experts = {name for name, p in weights.items() if ".experts." in name and p.dim() == 3} - packed
        return cls(*(sum(weights[name].numel() for name in names) for names in (packed, weights, experts)))

    def warning(self, dtype: torch.dtype) -> str | None:
        """What to say of experts; None where there are none."""
        if not self.experts:
            return None
        size = format_bytes(self.experts * dtype.itemsize)
        return (
            f"{self.experts / self.all:.0%} of the weights are not quantized: bitsandbytes packs linear layers alone, and this model's "
            f"experts are stacked tensors, which stay in {str(dtype).removeprefix('torch.')} ({size})"
        )
