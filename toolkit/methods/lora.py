"""LoRA: two thin matrices beside each chosen weight are trained, the weight itself is not."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from toolkit.errors import UserError, did_you_mean
from toolkit.methods.base import Method


@dataclass
class Lora(Method):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685): W x + (alpha / r) B A x, with A (r, in) and B (out, r).

    Trains r x (in + out) parameters for each target instead of in x out, so gradients and optimizer state all but
    vanish. Activations do not: the gradient still passes through the whole frozen model.
    """

    _argument_group_name: ClassVar[str] = "LoRA"
    name: ClassVar[str] = "lora"
    paper: ClassVar[str] = "arXiv:2106.09685"
    freezes_base: ClassVar[bool] = True
    training_defaults: ClassVar[dict[str, Any]] = {"learning_rate": 3e-4}
    embedded_defaults: ClassVar[dict[str, Any]] = {
        "learning_rate": 5e-3,
        "num_train_epochs": 2.0,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 50,
        "max_length": 256,
        "max_target_length": 48,
        "lora_dropout": 0.0,
        "lora_target_modules": ["all-linear"],
    }

    lora_r: int = field(default=16, metadata={"help": "Rank: trainable parameters and adapter size grow with it."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale: the update is multiplied by alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before A; costs one mask a target in memory."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the modules to adapt, or all-linear. Default: PEFT's choice for the architecture."},
    )

    def check(self, given: dict[str, Any]) -> None:
        """Raises UserError for a rank, scale or dropout that is not possible."""
        if self.lora_r < 1:
            raise UserError(f"--lora_r {self.lora_r} is not possible; give a whole number of at least 1")
        if self.lora_alpha < 1:
            raise UserError(f"--lora_alpha {self.lora_alpha} is not possible; give a whole number of at least 1")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"--lora_dropout {self.lora_dropout:g} is not possible; give a number from 0 to below 1")

    def attach(self, model: PreTrainedModel) -> PreTrainedModel:
        """Returns `model` wrapped by PEFT, its own weights frozen.

        Raises: UserError where a target matches no module (the message lists those that exist).
        """
        targets: list[str] | str | None = self.lora_target_modules
        if self.lora_target_modules == ["all-linear"]:
            targets = "all-linear"
        elif self.lora_target_modules:
            _check_targets(model, self.lora_target_modules)
        config = LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=targets,
            task_type=TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM,
        )
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            if targets is not None:
                raise UserError(f"LoRA does not fit this model: {' '.join(str(error).split())}") from None
            raise UserError(
                f"PEFT has no default LoRA targets for the architecture {model.config.model_type!r}; "
                f"name them with --lora_target_modules, from: {', '.join(linear_names(model))}"
            ) from None


def linear_names(model: nn.Module) -> list[str]:
    """The distinct last names of the model's linear layers, such as `q` or `o_proj`: what a target may be."""
    return sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, module in model.named_modules()
            if "Linear" in type(module).__name__ or type(module).__name__ == "Conv1D"
        }
    )


def _check_targets(model: nn.Module, targets: list[str]) -> None:
    names = [name for name, _ in model.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            valid = linear_names(model)
            raise UserError(
                f"--lora_target_modules {target} matches no module{did_you_mean(target, valid)}; "
                f"this model has: {', '.join(valid)}"
            )
