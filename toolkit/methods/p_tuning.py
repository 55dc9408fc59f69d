"""P-tuning: a small network, trained with the soft prompt, produces the prompt's embeddings."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PromptEncoderConfig
from transformers import PreTrainedModel

from toolkit.methods.base import EMBEDDED, PeftBased, check_least, embedding_shape, task_type


@dataclass
class PTuning(PeftBased):
    """P-tuning (Liu et al. 2021, arXiv:2103.10385): virtual tokens through a three-layer perceptron.

    The network connects the virtual tokens, so that they train at ordinary learning rates. After training only its output
    is kept. Its last layer starts with the mean and spread of the vocabulary's embeddings, as the model expects.
    """

    _argument_group_name: ClassVar[str] = "P-tuning"
    name: ClassVar[str] = "p_tuning"
    paper: ClassVar[str] = "arXiv:2103.10385"
    training_defaults: ClassVar[dict[str, Any]] = {"learning_rate": 1e-3}
    embedded_defaults: ClassVar[dict[str, Any]] = EMBEDDED | {"learning_rate": 3e-3}

    num_virtual_tokens: int = field(
        default=20, metadata={"help": "Learned positions before the input; each makes the sequence one longer."}
    )
    encoder_hidden_size: int = field(default=128, metadata={"help": "Width of the network that makes the prompt."})

    @property
    def virtual_tokens(self) -> int:
        """Number of positions that the method adds to those of the text."""
        return self.num_virtual_tokens

    def check(self, given: dict[str, Any]) -> None:
        """Raises UserError for impossible sizes."""
        super().check(given)
        check_least(self, 1, "num_virtual_tokens", "encoder_hidden_size")

    def configure(self, model: PreTrainedModel) -> PromptEncoderConfig:
        """The configuration for PEFT."""
        return PromptEncoderConfig(
            num_virtual_tokens=self.num_virtual_tokens,
            encoder_hidden_size=self.encoder_hidden_size,
            task_type=task_type(model),
            **embedding_shape(model),
        )

    @torch.no_grad()
    def attach(self, model: PreTrainedModel) -> PreTrainedModel:
        """Returns `model` wrapped by PEFT, with frozen weights and prompts scaled like the vocabulary's embeddings."""
        model = super().attach(model)
        encoder = model.prompt_encoder["default"]
        if model.word_embeddings.weight.is_meta or encoder.embedding.weight.is_meta:
            return model
        last = encoder.mlp_head[-1]
        vocabulary = model.word_embeddings.weight.float()  # (vocabulary, width)
        made = encoder(torch.arange(encoder.total_virtual_tokens, device=vocabulary.device))  # (tokens, width)
        scale = vocabulary.std() / (made - made.mean(0)).std()
        last.weight.mul_(scale)
        last.bias.copy_(vocabulary.mean(0) - scale * (made.mean(0) - last.bias))
        return model
