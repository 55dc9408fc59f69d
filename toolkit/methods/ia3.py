"""(IA)3: multiplies chosen activations by learned vectors."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import IA3Config
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as PEFTS_INPUTS
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as PEFTS_CHOICE
from transformers import PreTrainedModel

from toolkit.errors import UserError
from toolkit.methods.base import (
    EMBEDDED,
    FEED_FORWARD_OUTPUTS,
    PeftBased,
    left_out,
    linear_names,
    linear_paths,
    say_in_run,
    targets_of,
    task_type,
)
from toolkit.models.quantization import stacked_experts

# Names that architectures give to the layers that make keys and values, some together with the queries
KEYS_AND_VALUES: tuple[str, ...] = (
    "k",
    "v",
    "k_proj",
    "v_proj",
    "key_proj",
    "value_proj",
    "key",
    "value",
    "kv_b_proj",
    "qkv_proj",
    "kv_proj",
)
KEYS_AND_VALUES += ("query_key_value", "c_attn", "Wqkv")


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
        metadata={
            "help": "Names of the modules to rescale. Default: PEFT's choice for the architecture, else by their usual names."
        },
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
        architecture = model.config.model_type
        if self.ia3_target_modules or architecture in PEFTS_CHOICE:
            targets = targets_of(model, "ia3_target_modules", self.ia3_target_modules, PEFTS_CHOICE)
            inputs = (self.ia3_feedforward_modules or []) if self.ia3_target_modules else PEFTS_INPUTS[architecture]
        else:
            targets, inputs = _by_their_names(model)
        return IA3Config(
            target_modules=targets,
            feedforward_modules=inputs,
            exclude_modules=left_out(model),
            task_type=task_type(model),
        )


def _by_their_names(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """All targets and, of these, those whose input is rescaled: the layers that have a usual name of the paper's three places.

    Raises: UserError if no keys and values are found.
    """
    linear = linear_paths(model)

    def found(names: tuple[str, ...]) -> list[str]:
        return [name for name in names if any(f".{path}".endswith(f".{name}") for path in linear)]

    keys_and_values, inputs = found(KEYS_AND_VALUES), found(FEED_FORWARD_OUTPUTS)
    if not keys_and_values:
        raise UserError(
            f"the keys and values of {model.config.model_type!r} have no usual names; name them with --ia3_target_modules (and the "
            f"last layers of its feed-forwards also with --ia3_feedforward_modules), from: {', '.join(linear_names(model))}"
        )
    experts = "; the experts' vectors are left out, because they are stacked tensors" if stacked_experts(model) else ""
    say_in_run(
        model,
        "targets",
        f"PEFT names none for {model.config.model_type}: keys and values ({', '.join(keys_and_values)}) and the feed-forward's inner "
        f"activations ({', '.join(inputs) or 'none'}){experts} (--ia3_target_modules chooses others)",
    )
    return [*keys_and_values, *inputs], inputs
