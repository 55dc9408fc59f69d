"""Any other PEFT method, by its name and a file with its configuration."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from transformers import PreTrainedModel

from toolkit.errors import UserError, did_you_mean
from toolkit.errors.reading import read_yaml
from toolkit.methods.adapter import Adapter, AdapterType
from toolkit.methods.base import EMBEDDED, PeftBased, left_out, targets_of, task_type
from toolkit.methods.lora import takes_from_base

# Methods that need more than a model, a configuration and rows, according to PEFT's documentation.
UNFIT = {
    "ADAPTION_PROMPT": "it only fits Llama-like models and is not saved with their task's head",
    "CARTRIDGE": "it is distilled from a text, not trained on rows",
    "CPT": "it needs the token ids of its context prompt for each model",
    "MULTITASK_PROMPT_TUNING": "it needs a task id with each row",
    "POLY": "it needs a task id with each row",
    "XLORA": "it mixes LoRA adapters that were trained before",
}
OTHER_TARGETS = {"IA3", "LN_TUNING", "TRAINABLE_TOKENS", "BOTTLENECK"}  # not all linear layers, if none are named
# Methods that support bitsandbytes' layers, or do not change linear layers.
OVER_QUANTIZED = {"ADALORA", "BOFT", "BOTTLENECK", "HIRA", "IA3", "LN_TUNING", "LORA", "MISS", "OFT", "PREFIX_TUNING"}
OVER_QUANTIZED |= {"PROMPT_TUNING", "PVERA", "P_TUNING", "RANDLORA", "ROAD", "SHIRA", "TRAINABLE_TOKENS", "VERA"}


@dataclass
class AnyPeft(PeftBased):
    """PEFT's method `--peft_type`, configured by `--peft_config FILE`.

    PEFT's documentation of the configuration class says what each method needs and costs.
    """

    _argument_group_name: ClassVar[str] = "a method of PEFT"
    name: ClassVar[str] = "peft_method"
    training_defaults: ClassVar[dict[str, Any]] = {"learning_rate": 1e-3}
    embedded_defaults: ClassVar[dict[str, Any]] = EMBEDDED | {"learning_rate": 5e-2}

    peft_type: str = field(default="VERA", metadata={"help": "PEFT's name of the method, such as VERA, LOHA or OFT."})
    peft_config: str | None = field(
        default=None, metadata={"help": "YAML or JSON file with the fields of its configuration class."}
    )

    def check(self, given: dict[str, Any]) -> None:
        """Raises UserError for a method that is unknown or needs more than rows, and for a file that does not configure it."""
        super().check(given)
        types = sorted(str(getattr(name, "value", name)) for name in PEFT_TYPE_TO_CONFIG_MAPPING)
        if self.peft_type not in types:
            raise UserError(
                f"--peft_type {self.peft_type} is not known{did_you_mean(self.peft_type.upper(), types)}; "
                f"PEFT has: {', '.join(name for name in types if name not in UNFIT)}"
            )
        if self.peft_type in UNFIT:
            raise UserError(f"--peft_type {self.peft_type} cannot be trained here: {UNFIT[self.peft_type]}")
        if self._quantizes(given) and self.peft_type not in OVER_QUANTIZED:
            raise UserError(
                f"PEFT's {self.peft_type} would treat a quantized weight as one of full precision; leave out quantized loading, "
                f"or give one of: {', '.join(sorted(OVER_QUANTIZED))}"
            )
        settings = self._settings()
        if self.peft_type == "TRAINABLE_TOKENS" and not settings.get("token_indices"):
            raise UserError("--peft_type TRAINABLE_TOKENS needs token_indices: [ids of tokens] in --peft_config FILE")
        self._made(settings)

    def configure(self, model: PreTrainedModel) -> PeftConfig:
        """The configuration for PEFT."""
        config = self._made({"task_type": task_type(model)} | self._settings())
        fits_linear = hasattr(config, "target_modules") and self.peft_type not in OTHER_TARGETS
        if fits_linear and not config.target_modules and "target_parameters" not in self._settings():
            known = getattr(PEFT_TYPE_TO_TUNER_MAPPING[self.peft_type], "target_module_mapping", None)
            if known and model.config.model_type not in known:
                config.target_modules = targets_of(model, "peft_config (target_modules)", None, known)
                config.exclude_modules = left_out(model)
        return config

    @classmethod
    def adapter_changes_base(cls, config: PeftConfig) -> bool:
        """The same as LoRA's, because `--peft_type` may be LORA."""
        return takes_from_base(config)

    @classmethod
    def merge_refusal(cls, config: PeftConfig) -> str:
        """As that of our adapters, where it is their type."""
        if config.peft_type == AdapterType.BOTTLENECK:
            return Adapter.merge_refusal(config)
        return super().merge_refusal(config)

    def _settings(self) -> dict[str, Any]:
        """The fields in the file `--peft_config`."""
        if self.peft_config is None:
            return {}
        path = Path(self.peft_config)
        settings = read_yaml(path, f"--peft_config {path}", "the file must hold `field: value` lines")  # JSON is YAML
        known = {f.name for f in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[self.peft_type])} - {"peft_type"}
        for name in settings:
            if name not in known:
                raise UserError(
                    f"{self.peft_config}: {self.peft_type} has no field {name}{did_you_mean(str(name), known)}; it has: "
                    f"{', '.join(sorted(known))}"
                )
        return settings

    def _made(self, settings: dict[str, Any]) -> PeftConfig:
        try:
            return PEFT_TYPE_TO_CONFIG_MAPPING[self.peft_type](**settings)
        except (ValueError, TypeError, ImportError) as error:
            raise UserError(f"--peft_type {self.peft_type}: {' '.join(str(error).split())[:300]}") from None
