"""Selective fine-tuning: trains a part of the model's own weights and freezes the rest."""

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel

from toolkit.errors import UserError
from toolkit.methods.base import (
    EMBEDDED,
    NORMS,
    Method,
    check_least,
    check_names,
    refuse_quantized,
    refuse_quantized_model,
)
from toolkit.models.heads import has_head, head_modules
from toolkit.models.language_part import unused_modules

LAST_LAYERS = 2
CHOICES = ("train_last_layers", "train_modules", "train_biases", "train_norms")


@dataclass
class Selective(Method):
    """Trains the last layers, chosen modules, the biases (BitFit, Ben Zaken et al. 2021, arXiv:2106.10199) or the norms.

    Only the trained part needs gradients and optimizer state. If only the last layers are trained, the earlier layers keep no
    activations either, which no adapter can save. No modules are added, so the result is a plain model.
    """

    _argument_group_name: ClassVar[str] = "selective fine-tuning"
    name: ClassVar[str] = "selective"
    paper: ClassVar[str] = "arXiv:2106.10199"
    freezes_base: ClassVar[bool] = False  # so that all weights are held in fp32: the trained part, and the rest with it
    training_defaults: ClassVar[dict[str, Any]] = {"learning_rate": 1e-4}
    embedded_defaults: ClassVar[dict[str, Any]] = EMBEDDED | {"learning_rate": 3e-3}

    train_last_layers: int | None = field(
        default=None,
        metadata={
            "help": "Train the N layers nearest to the output; in a T5-like model the decoder's come before the encoder's. "
            f"Default, if nothing else is chosen: {LAST_LAYERS}."
        },
    )
    train_modules: list[str] | None = field(
        default=None, metadata={"help": "Train the modules with these names, such as lm_head or q."}
    )
    train_biases: bool = field(default=False, metadata={"help": "Train the biases only (BitFit)."})
    train_norms: bool = field(default=False, metadata={"help": "Train the normalization layers only."})

    def check(self, given: dict[str, Any]) -> None:
        """Raises UserError for several choices at once, and for a quantized base."""
        refuse_quantized(given, "selective fine-tuning")
        check_least(self, 1, "train_last_layers")
        chosen = [f"--{name}" for name in CHOICES if getattr(self, name)]
        if len(chosen) > 1:
            raise UserError(f"{' and '.join(chosen)} exclude each other; give one of them")

    def attach(self, model: PreTrainedModel) -> PreTrainedModel:
        """Returns `model` with the chosen part trainable, and also a classification head, because that is new.

        Raises: UserError for names or numbers of layers that the model does not have, and for --train_biases without biases.
        """
        refuse_quantized_model(model)
        model.requires_grad_(False)
        for part in self._chosen(model):
            part.requires_grad_(True)
        if has_head(model.config):
            for name in head_modules(model):
                model.get_submodule(name).requires_grad_(True)
        return model

    def _chosen(self, model: PreTrainedModel) -> list[nn.Module] | list[nn.Parameter]:
        modules = dict(model.named_modules())
        if self.train_modules:
            valid = sorted({last for name in modules if not (last := name.rsplit(".", 1)[-1]).isdigit() and last})
            check_names(model, "train_modules", self.train_modules, valid)
            return [
                module
                for name, module in modules.items()
                if any(name == wanted or name.endswith(f".{wanted}") for wanted in self.train_modules)
            ]
        if self.train_norms:
            return [module for module in modules.values() if NORMS in type(module).__name__]
        if self.train_biases:
            biases = [p for name, p in model.named_parameters() if name.rsplit(".", 1)[-1] == "bias"]
            if not biases:
                raise UserError(
                    f"--train_biases: this {model.config.model_type} model has no biases; use --train_norms or --train_last_layers"
                )
            return biases
        unused = unused_modules(model)
        layers = [layer for name, layer in layers_of(model) if not (unused and re.fullmatch(unused, name))]
        wanted = LAST_LAYERS if self.train_last_layers is None else self.train_last_layers
        if wanted > len(layers):
            if self.train_last_layers is not None:
                raise UserError(f"--train_last_layers {wanted}: this model has {len(layers)} layers; give at most that")
            wanted = len(layers)
        return layers[len(layers) - wanted :]


def layers_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The model's layers with their names, from input to output: the outermost ModuleLists with modules of one class, encoder before decoder.

    T5 has `encoder.block` and `decoder.block`, BART `encoder.layers` and `decoder.layers`, Llama and Qwen2 `layers`, GPT-2 `h`.
    """
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    outer = [(name, m) for name, m in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    kinds = {name: {_plain_class(layer) for layer in stack} for name, stack in outer}
    return [(f"{name}.{i}", layer) for name, stack in outer if len(kinds[name]) == 1 for i, layer in enumerate(stack)]


def _plain_class(layer: nn.Module) -> str:
    """The class of a layer; a layer with cross-attention to images counts as one of the others."""
    return type(layer).__name__.replace("CrossAttention", "SelfAttention")
