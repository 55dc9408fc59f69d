"""Prompt tuning: a few learned embeddings are put before the input's own."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from peft import PromptTuningConfig
from transformers import PreTrainedModel

from toolkit.errors import UserError
from toolkit.methods.base import EMBEDDED, PeftBased, check_least, task_type


@dataclass
class PromptTuning(PeftBased):
    """Soft prompts (Lester et al. 2021, arXiv:2104.08691): virtual tokens x width parameters, beside a frozen model.

    The prompt begins as embeddings of the model's own vocabulary, for random numbers train badly, and T5 worst of all;
    and it needs a learning rate a hundred times that of LoRA. PEFT holds as many virtual tokens again for a T5-like
    model's decoder, and counts them, though it uses the encoder's alone.
    """

    _argument_group_name: ClassVar[str] = "prompt tuning"
    name: ClassVar[str] = "prompt_tuning"
    paper: ClassVar[str] = "arXiv:2104.08691"
    training_defaults: ClassVar[dict[str, Any]] = {"learning_rate": 3e-2}
    embedded_defaults: ClassVar[dict[str, Any]] = EMBEDDED | {"learning_rate": 3e-2}

    num_virtual_tokens: int = field(
        default=20, metadata={"help": "Learned positions before the input; each makes the sequence one longer."}
    )
    prompt_tuning_init: Literal["vocabulary", "text", "random"] = field(
        default="vocabulary",
        metadata={
            "help": "What the virtual tokens begin as: random words, --prompt_tuning_init_text, or random numbers."
        },
    )
    prompt_tuning_init_text: str | None = field(
        default=None, metadata={"help": "A text in words of the model's vocabulary, such as an instruction."}
    )

    @property
    def virtual_tokens(self) -> int:
        """Positions that the method takes beside those of the text."""
        return self.num_virtual_tokens

    def check(self, given: dict[str, Any]) -> None:
        """Raises UserError for a number of tokens that is not possible, and a text that is missing or unused."""
        super().check(given)
        check_least(self, 1, "num_virtual_tokens")
        if self.prompt_tuning_init == "text" and not self.prompt_tuning_init_text:
            raise UserError("--prompt_tuning_init text needs --prompt_tuning_init_text 'a text'; add it")
        if self.prompt_tuning_init != "text" and self.prompt_tuning_init_text is not None:
            raise UserError("--prompt_tuning_init_text has no effect without --prompt_tuning_init text; add it")

    def configure(self, model: PreTrainedModel) -> PromptTuningConfig:
        """The configuration for PEFT; on the meta device, where no embedding can be copied, random numbers."""
        kinds = {"vocabulary": "SAMPLE_VOCAB", "text": "TEXT", "random": "RANDOM"}
        empty = any(p.is_meta for p in model.parameters())
        from_text = self.prompt_tuning_init == "text" and not empty
        return PromptTuningConfig(
            num_virtual_tokens=self.num_virtual_tokens,
            prompt_tuning_init="RANDOM" if empty else kinds[self.prompt_tuning_init],
            prompt_tuning_init_text=self.prompt_tuning_init_text if from_text else None,
            tokenizer_name_or_path=model.config._name_or_path if from_text else None,
            task_type=task_type(model),
        )
