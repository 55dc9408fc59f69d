"""(IA)3: multiplies chosen activations by learned vectors."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import IA3Config
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as PEFTS_CHOICE
from transformers import PreTrainedModel

from toolkit.errors import UserError
from toolkit.methods.base import EMBEDDED, PeftBased, targets_of, task_type


@dataclass
class IA3(PeftBased):
    """Rescales keys, values and the feed-forward's inner activations (Liu et al. 2022, arXiv:2205.05638).

    One number for each channel of a target: the smallest adapter of all. It can be merged into the weights.
    """

    _argument_group_name: ClassVar[str] = "(IA)3"
    name: ClassVar[str] = "ia3"
    paper: ClassVar[str] = "arXiv:2205.05638"
    training_defaults: ClassVar[dict[str, Any]] = {"learning_rate": 3e-3}  # the paper's
    embedded_defaults: ClassVar[dict[str, Any]] = EMBEDDED | {"learning_rate": 0.2, "num_train_epochs": 5.0}

    ia3_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the modules to rescale. Default: PEFT's choice for the architecture."},
    )
    ia3_feedforward_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Those of --ia3_target_modules whose input is rescaled instead of the output. Default: none, or PEFT's choice."
        },
    )

    def check(self, given: dict[str, Any]) -> None:
        """Raises UserError for feed-forward modules that are not targets, and for --kbit_upcast none."""
        super().check(given)
        if self.kbit_upcast == "none":
            raise UserError(
                "--kbit_upcast none does not work with (IA)3: PEFT's layers over quantized weights return fp32, so the rest "
                "must be fp32 too; leave it out"
            )
        strange = set(self.ia3_feedforward_modules or ()) - set(self.ia3_target_modules or ())
        if strange:
            raise UserError(
                f"--ia3_feedforward_modules {' '.join(sorted(strange))}: each of them must also be in --ia3_target_modules"
            )

    def configure(self, model: PreTrainedModel) -> IA3Config:
        """The configuration for PEFT."""
        targets = targets_of(model, "ia3_target_modules", self.ia3_target_modules, PEFTS_CHOICE)
        inputs = self.ia3_feedforward_modules or ([] if targets else None)
        return IA3Config(target_modules=targets, feedforward_modules=inputs, task_type=task_type(model))
