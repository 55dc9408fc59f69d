"""Full fine-tuning: every weight is trained."""

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedModel

from toolkit.methods.base import EMBEDDED, Method, refuse_quantized, refuse_quantized_model
from toolkit.models.language_part import unused_modules


@dataclass
class Full(Method):
    """Trains all parameters: the reference for quality, with the largest memory (weights, gradients and optimizer state)."""

    _argument_group_name: ClassVar[str] = "full fine-tuning"
    name: ClassVar[str] = "full"
    freezes_base: ClassVar[bool] = False
    training_defaults: ClassVar[dict[str, Any]] = {"learning_rate": 5e-5}
    embedded_defaults: ClassVar[dict[str, Any]] = EMBEDDED | {"learning_rate": 2e-3}

    def check(self, given: dict[str, Any]) -> None:
        """Raises UserError for a quantized base: its packed integer weights have no gradients."""
        refuse_quantized(given, "full fine-tuning")

    def attach(self, model: PreTrainedModel) -> PreTrainedModel:
        """Returns `model` with every parameter trainable, except in layers that no text passes through."""
        refuse_quantized_model(model)
        model.requires_grad_(True)
        unused = unused_modules(model)
        for name, module in model.named_modules():
            if unused and re.fullmatch(unused, name):
                module.requires_grad_(False)
        return model
