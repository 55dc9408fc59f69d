"""Liger's kernels (Hsu et al. 2024, arXiv:2410.10989): its norm for T5-like models, and which models it cannot serve."""

from __future__ import annotations

from types import MethodType

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from toolkit.errors import UserError
from toolkit.models.loading import T5_FAMILY


def check_liger(model_type: str) -> None:
    """Raises UserError for a type of model for which the installed Liger has no kernels, nor we its norms."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN and model_type not in T5_FAMILY:
        raise UserError(f"--use_liger_kernel has no effect on {model_type}: Liger has no kernels for it; leave it out")


def check_norms(model: nn.Module) -> None:
    """Raises UserError for an adapter around a norm: Liger would run the norm's own weight, and leave the adapter out."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and type(module.get_base_layer()).__name__.endswith("Norm"):
            raise UserError(
                f"--use_liger_kernel replaces {name}, which has an adapter; leave it out, or adapt other modules"
            )


def use_liger_norms(model: nn.Module) -> None:
    """From now on the norms of a T5-like `model` run Liger's kernel for RMSNorm, which Liger itself does not offer for T5.

    T5's norm is RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467): it subtracts no mean and has no bias. Both compute in float32
    and multiply by the weight in the type of the input.
    """
    from liger_kernel.transformers import LigerRMSNorm

    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.offset, module.casting_mode, module.in_place, module.row_mode = 0.0, "llama", True, None
            module.forward = MethodType(LigerRMSNorm.forward, module)
