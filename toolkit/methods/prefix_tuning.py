"""Prefix tuning: learned keys and values precede those of the input in every layer."""

import copy
import inspect
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from peft import PrefixTuningConfig
from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values
from transformers import DynamicCache, PreTrainedModel

from toolkit.errors import UserError
from toolkit.methods.base import EMBEDDED, PeftBased, check_least, task_type
from toolkit.models.heads import auto_class
from toolkit.models.meta import model_on_meta

ONE_TOKEN_AT_A_TIME = {
    "prophetnet"
}  # with a cache they take a single token, so that no row of text can follow a prefix


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
        """Raises UserError for an impossible number of tokens, and for activation checkpointing."""
        super().check(given)
        check_least(self, 1, "num_virtual_tokens")
        if given.get("activation_checkpointing"):
            raise UserError(
                "prefix tuning and --activation_checkpointing exclude each other: the prefix is a cache of keys and values, "
                "which a recomputed layer would fill twice; leave it out, or use recipes/prompt_tuning.py"
            )

    def configure(self, model: PreTrainedModel) -> PrefixTuningConfig:
        """The configuration for PEFT, with the shape of the keys and values that the model really caches.

        PEFT (0.21) reads it from fields that not every config has under the same name: Falcon, whose heads share one key.

        Raises: UserError if layers cache keys and values of different shapes, or none.
        """
        if model.config.model_type in ONE_TOKEN_AT_A_TIME:
            raise UserError(
                f"prefix_tuning does not fit this {model.config.model_type} model; use prompt tuning or LoRA"
            )
        return PrefixTuningConfig(
            num_virtual_tokens=self.num_virtual_tokens,
            init_weights="zero" if self.prefix_init == "zero" else None,
            task_type=task_type(model),
            **_cached(model),
        )

    @torch.no_grad()
    def attach(self, model: PreTrainedModel) -> PreTrainedModel:
        """Returns `model` wrapped by PEFT, with frozen weights and the prefix initialized as `--prefix_init` says."""
        model = super().attach(model)
        if self.prefix_init != "vocabulary" or any(p.is_meta for p in model.parameters()):
            return model
        base = model.get_base_model()
        vocabulary = base.get_input_embeddings().weight.shape[0]
        words = torch.randint(0, vocabulary, (1, self.num_virtual_tokens), device=model.device)
        was_training = base.training
        base.train()  # in evaluation mode bitsandbytes would repack 4-bit weights for a CPU, permanently
        try:
            cache = _cache_of(base, words)
            base.train(was_training)
            initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
        except (ValueError, AssertionError, AttributeError) as error:
            raise UserError(
                f"prefix_tuning does not fit this {base.config.model_type} model: {error}; use LoRA"
            ) from None
        return model


def _cache_of(model: PreTrainedModel, words: torch.Tensor) -> Any:
    """The keys and values of `words` (1, length) in the layers that generate, a `DynamicCache` of whole rows."""
    if model.config.is_encoder_decoder:
        return model(input_ids=words, decoder_input_ids=words, use_cache=True).past_key_values.self_attention_cache
    # a model's own cache would drop what is outside of a sliding window
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return model(input_ids=words, use_cache=True, **{name: DynamicCache()}).past_key_values


@torch.no_grad()
def _cached(model: PreTrainedModel) -> dict[str, int]:
    """PEFT's fields for the keys that `model` caches; none if it only computes on real weights, where PEFT reads its config."""
    what = f"prefix_tuning does not fit this {model.config.model_type} model"
    # grouped products of experts want bf16; FlashAttention wants a GPU
    empty = model_on_meta(auto_class(model.config), copy.deepcopy(model.config), torch.bfloat16, "eager")
    try:
        layers = _cache_of(empty, torch.zeros(1, 1, dtype=torch.long, device="meta")).layers
    except IndexError:  # of the model's own cache, in which layers without attention keep a state
        raise UserError(f"{what}, whose layers do not all cache keys and values; use LoRA") from None
    except (AssertionError, AttributeError, TypeError, ValueError, RuntimeError, NotImplementedError):
        if model.config.sub_configs:  # two models, in whose config PEFT finds no shape
            raise UserError(f"{what}; use prompt tuning or LoRA") from None
        return {}
    shapes = {tuple(part.shape) if part is not None else () for one in layers for part in (one.keys, one.values)}
    if len(shapes) != 1 or shapes == {()}:
        raise UserError(f"{what}: its layers do not all cache keys and values of one shape; use prompt tuning or LoRA")
    (_, heads, _, width), *_ = shapes
    return {"num_layers": len(layers), "num_attention_heads": heads, "token_dim": heads * width}
