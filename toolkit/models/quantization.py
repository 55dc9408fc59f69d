"""4-bit and 8-bit base models: their configuration, and which weights are packed."""

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
from toolkit.models.stored import as_dict, method_of
from toolkit.units import format_bytes


def quantization_config(
    args: ModelArguments, config: PreTrainedConfig, dtype: torch.dtype, sharded: bool = False
) -> BitsAndBytesConfig | None:
    """How weights are quantized in the file or while loading, to compute in `dtype`; None without. A new head is never quantized.

    Packed 4-bit weights are stored as bytes. With `sharded` they are stored in `dtype`: an engine can shard only floating-point
    weights.
    """
    if not (args.load_in_4bit or args.load_in_8bit):
        return None
    heads = None
    if has_head(config):
        with without_partitioning():
            heads = head_modules(model_on_meta(auto_class(config), copy.deepcopy(config), dtype))
    if method_of(config) is not None:
        own = (as_dict(config) or {}) | {"bnb_4bit_compute_dtype": dtype}
        if heads:
            own["llm_int8_skip_modules"] = [*(own.get("llm_int8_skip_modules") or ()), *heads]
        return BitsAndBytesConfig.from_dict(own)
    return BitsAndBytesConfig(
        load_in_4bit=args.load_in_4bit,
        load_in_8bit=args.load_in_8bit,
        bnb_4bit_quant_type=args.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=args.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=heads,  # applies to 4 bits too, despite its name
        bnb_4bit_quant_storage=dtype if sharded and args.load_in_4bit else None,
    )


def is_packed(parameter: nn.Parameter) -> bool:
    """Whether bitsandbytes stores the parameter in 4 or 8 bits."""
    return type(parameter).__name__ in ("Params4bit", "Int8Params")


def stacked_experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """The experts' weights that are one tensor (experts, out, in) for all experts of a layer, by name."""
    return {name: p for name, p in model.named_parameters() if ".experts." in name and p.dim() == 3}


def untrained_experts(model: nn.Module) -> str | None:
    """A warning about experts of which the tuned `model` trains nothing, neither weights nor adapters; None without such."""
    experts = stacked_experts(model)
    if not experts or any(p.requires_grad and ".experts." in name for name, p in model.named_parameters()):
        return None
    share = sum(p.numel() for p in experts.values()) / sum(p.numel() for p in model.parameters())
    return f"the experts, {share:.0%} of the weights, stay as they are: nothing of them is trained"


@dataclass(frozen=True)
class Packed:
    """How many elements of a quantized model's weights bitsandbytes packs: only those of linear layers."""

    packed: int
    all: int
    experts: int  # of experts stacked in one tensor, which keep the type in which they compute

    @classmethod
    def of(cls, model: nn.Module) -> "Packed":
        """The counts for a model without adapters, as `build_on_meta` builds it."""
        weights = dict(model.named_parameters())
        packed = {name for name, p in weights.items() if is_packed(p)}
        experts = stacked_experts(model).keys() - packed
        return cls(*(sum(weights[name].numel() for name in names) for names in (packed, weights, experts)))

    def in_words(self, args: ModelArguments, beside: torch.dtype) -> str:
        """How the weights are held: `4-bit nf4 for 82% of the parameters, bfloat16 for the rest`; without quantization that type alone."""
        rest = str(beside).removeprefix("torch.")
        if not (args.load_in_4bit or args.load_in_8bit):
            return rest
        short = f"4-bit {args.bnb_4bit_quant_type}" if args.load_in_4bit else "8-bit"
        return f"{short} for {self.packed / self.all:.0%} of the parameters, {rest} for the rest"

    def warning(self, dtype: torch.dtype) -> str | None:
        """A warning about experts that are not quantized; None without experts."""
        if not self.experts:
            return None
        size = format_bytes(self.experts * dtype.itemsize)
        return (
            f"{self.experts / self.all:.0%} of the weights are not quantized: bitsandbytes packs only linear layers, and this model's "
            f"experts are stacked tensors, which are held in {str(dtype).removeprefix('torch.')} ({size}); what helps is a dense model, or more memory: recipes/lora.py with "
            "launch/zero3_offload.yaml needs the host's"
        )
