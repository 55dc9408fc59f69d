"""Prompt tuning: a few learned embeddings precede those of the input."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from peft import PromptTuningConfig
from transformers import PreTrainedModel

from toolkit.errors import UserError
from toolkit.methods.base import EMBEDDED, PeftBased, check_least, embedding_shape, task_type
from toolkit.models.loading import read_tokenizer


@dataclass
class PromptTuning(PeftBased):
    """Soft prompts (Lester et al. 2021, arXiv:2104.08691): virtual tokens x width parameters, with a frozen model.

    The prompt starts as embeddings of the model's own vocabulary, because random numbers train badly, worst of all on T5.
    It needs a learning rate a hundred times that of LoRA. For a T5-like model PEFT stores (and counts) the same number of
    virtual tokens again for the decoder, but only uses those of the encoder.
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
        metadata={"help": "Initial virtual tokens: random words, --prompt_tuning_init_text, or random numbers."},
    )
    prompt_tuning_init_text: str | None = field(
        default=None, metadata={"help": "Initial text, such as an instruction; needs --prompt_tuning_init text."}
    )

    @property
    def virtual_tokens(self) -> int:
        """Number of positions that the method adds to those of the text."""
        return self.num_virtual_tokens

    def check(self, given: dict[str, Any]) -> None:
        """Raises UserError for an impossible number of tokens, and for an initial text that is missing or unused."""
        super().check(given)
        check_least(self, 1, "num_virtual_tokens")
        if self.prompt_tuning_init == "text" and not self.prompt_tuning_init_text:
            raise UserError("--prompt_tuning_init text needs --prompt_tuning_init_text 'a text'; add it")
        if self.prompt_tuning_init != "text" and self.prompt_tuning_init_text is not None:
            raise UserError("--prompt_tuning_init_text has no effect without --prompt_tuning_init text; add it")

    def configure(self, model: PreTrainedModel) -> PromptTuningConfig:
        """The configuration for PEFT. On the meta device, where no embedding can be copied, it starts from random numbers."""
        kinds = {"vocabulary": "SAMPLE_VOCAB", "text": "TEXT", "random": "RANDOM"}
        empty = any(p.is_meta for p in model.parameters())
        from_text = self.prompt_tuning_init == "text" and not empty
        if from_text:
            read_tokenizer(model.config._name_or_path)  # refuses one with code of its own, for which PEFT would ask
        return PromptTuningConfig(
            num_virtual_tokens=self.num_virtual_tokens,
            prompt_tuning_init="RANDOM" if empty else kinds[self.prompt_tuning_init],
            prompt_tuning_init_text=self.prompt_tuning_init_text if from_text else None,
            tokenizer_name_or_path=model.config._name_or_path if from_text else None,
            task_type=task_type(model),
            **embedding_shape(model),
        )
