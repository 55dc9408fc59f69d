"""Full fine-tuning: every weight is trained."""

from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedModel

from toolkit.errors import UserError
from toolkit.methods.base import Method


@dataclass
class Full(Method):
    """Trains all parameters: the reference for quality, and the most memory (weights, gradients and optimizer state)."""

    _argument_group_name: ClassVar[str] = "full fine-tuning"
    name: ClassVar[str] = "full"
    freezes_base: ClassVar[bool] = False
    training_defaults: ClassVar[dict[str, Any]] = {"learning_rate": 5e-5}
    embedded_defaults: ClassVar[dict[str, Any]] = {
        "learning_rate": 2e-3,
        "num_train_epochs": 2.0,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 50,
        "max_length": 256,
        "max_target_length": 48,
    }

    def check(self, given: dict[str, Any]) -> None:
        """Raises UserError for a quantized base: its packed integer weights have no gradients."""
        for flag in ("load_in_4bit", "load_in_8bit"):
            if given.get(flag):
                raise UserError(
                    f"--{flag} and full fine-tuning exclude each other: quantized weights cannot be trained; "
                    "leave the flag out, or use recipes/lora.py"
                )

    def attach(self, model: PreTrainedModel) -> PreTrainedModel:
        """Returns `model` with every parameter trainable."""
        if getattr(model, "is_quantized", False):
            raise UserError(
                "this model is already quantized, and quantized weights cannot be trained; use recipes/lora.py"
            )
        model.requires_grad_(True)
        return model
