"""Prefix tuning: learned keys and values precede those of the input in every layer."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from peft import PrefixTuningConfig
from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values
from transformers import PreTrainedModel

from toolkit.errors import UserError
from toolkit.methods.base import EMBEDDED, PeftBased, check_least, task_type


@dataclass
class PrefixTuning(PeftBased):
    """Prefix tuning (Li and Liang 2021, arXiv:2101.00190): virtual tokens x layers x 2 x key width parameters.

    The prefix starts as the keys and values that the model computes for words of its vocabulary, as the paper advises:
    random values would dominate the input at first. In T5-like models it is in the decoder's self-attention.
    """

    _argument_group_name: ClassVar[str] = "prefix tuning"
    name: ClassVar[str] = "prefix_tuning"
    paper: ClassVar[str] = "arXiv:2101.00190"
    training_defaults: ClassVar[dict[str, Any]] = {"learning_rate": 1e-2}
    embedded_defaults: ClassVar[dict[str, Any]] = EMBEDDED | {"learning_rate": 0.3, "num_train_epochs": 5.0}

    num_virtual_tokens: int = field(default=20, metadata={"help": "Learned keys and values in each layer."})
    prefix_init: Literal["vocabulary", "zero", "random"] = field(
        default="vocabulary",
        metadata={"help": "Initial values: keys and values of random words, zeros, or random numbers."},
    )

    @property
    def virtual_tokens(self) -> int:
        """Number of positions that the method adds to those of the text."""
        return self.num_virtual_tokens

    def check(self, given: dict[str, Any]) -> None:
        """Raises UserError for an impossible number of tokens, and for gradient checkpointing."""
        super().check(given)
        check_least(self, 1, "num_virtual_tokens")
        if given.get("gradient_checkpointing") or given.get("activation_checkpointing"):
            raise UserError(
                "prefix tuning and --gradient_checkpointing exclude each other: the prefix is a cache of keys and values, "
                "which a recomputed layer would fill twice; leave it out, or use recipes/prompt_tuning.py"
            )

    def configure(self, model: PreTrainedModel) -> PrefixTuningConfig:
        """The configuration for PEFT."""
        return PrefixTuningConfig(
            num_virtual_tokens=self.num_virtual_tokens,
            init_weights="zero" if self.prefix_init == "zero" else None,
            task_type=task_type(model),
        )

    @torch.no_grad()
    def attach(self, model: PreTrainedModel) -> PreTrainedModel:
        """Returns `model` wrapped by PEFT, with frozen weights and the prefix initialized as `--prefix_init` says."""
        model = super().attach(model)
        if self.prefix_init != "vocabulary" or any(p.is_meta for p in model.parameters()):
            return model
        base, text = model.get_base_model(), model.config.get_text_config()
        words = torch.randint(0, text.vocab_size, (1, self.num_virtual_tokens), device=model.device)
        decoder = {"decoder_input_ids": words} if model.config.is_encoder_decoder else {}
        was_training = base.training
        base.train()  # in evaluation mode bitsandbytes would repack 4-bit weights for a CPU, permanently
        cache = base(input_ids=words, use_cache=True, **decoder).past_key_values
        base.train(was_training)
        cache = getattr(cache, "self_attention_cache", cache)
        initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
        return model
