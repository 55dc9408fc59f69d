"""The language part of multimodal checkpoints: images, video and audio have no place in rows of text, so only it is loaded.

It is a causal language model of its own class with its own config, so that it is trained, predicted and saved like any other.
"""

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, MllamaForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from toolkit.errors import UserError

# transformers has this class, but maps only the whole config to it
AutoModelForCausalLM.register(MllamaTextConfig, MllamaForCausalLM, exist_ok=True)

# Language parts without a class of their own, and a class that computes the same: for text the three position ids of
# their rotary embeddings are equal, which is an ordinary rotary embedding.
COMPUTES_AS = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
OF_POSITIONS = ("mrope_section", "mrope_interleaved")  # in the parameters of a rotary embedding

# From the names of the weights in a multimodal file to those in a file of its language part
NAMES = {
    r"^model\.(language|text)_model\.": "model.",
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}


def language_part(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the language part of a multimodal `config`; `config` itself if it has no such part.

    The part keeps what the whole config says of its weights: the name, the quantization, whether the embeddings are tied.
    """
    text = config.get_text_config()
    if not isinstance(text, PreTrainedConfig):
        raise UserError(
            f"{config._name_or_path}: its config.json has a text_config that is no model's; mend it, or give a model that transformers loads"
        )
    if text is config or config.is_encoder_decoder:
        return config
    if (other := COMPUTES_AS.get(text.model_type)) is not None:
        fields = text.to_dict()
        rotary = {name: value for name, value in fields["rope_parameters"].items() if name not in OF_POSITIONS}
        rotary["rope_type"] = "default" if rotary.get("rope_type") == "mrope" else rotary["rope_type"]
        text = AutoConfig.for_model(
            other, **{k: v for k, v in fields.items() if k != "model_type"} | {"rope_parameters": rotary}
        )
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return config
    if (tied := getattr(config, "tie_word_embeddings", None)) is not None:
        text.tie_word_embeddings = tied
    text.architectures = None
    text._name_or_path = config._name_or_path
    if getattr(config, "quantization_config", None) is not None:
        text.quantization_config = config.quantization_config
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(text, name, None) is None:
            setattr(text, name, getattr(config, name, None))
    return text


def unused_modules(model: nn.Module) -> str:
    """A regular expression for the names of modules that no text passes through; empty if there are none.

    The layers with cross-attention to images in Llama 3.2 Vision are skipped in rows without images.
    """
    layers = getattr(model.config.get_text_config(), "cross_attention_layers", None) or ()
    return rf"(.*\.)?layers\.({'|'.join(map(str, layers))})(\..*)?" if layers else ""


def save_under_own_names(model: PreTrainedModel) -> None:
    """Makes `save_pretrained` write the names of the language part's class; transformers would undo the renaming by `NAMES`."""
    conversions = getattr(model, "_weight_conversions", None) or []
    model._weight_conversions = [one for one in conversions if not NAMES.keys() & {*one.source_patterns}] or None
