"""The kind of model that a task needs, and classification heads with their class names."""

import re
from collections.abc import Sequence
from typing import Any, Literal

from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from toolkit.errors import UserError

# Heads whose weights have the names of a text classification head, but another meaning
OTHER_HEADS = ("ForTokenClassification", "ForMultipleChoice")


# Models whose classification head reads padding, so that the score of a row depends on the other rows of its batch: FNet mixes
# all positions; the convolutions of YOSO and Nystromformer and the heads of CANINE and XLNet reach into the padding.
READS_PADDING = {"canine", "fnet", "nystromformer", "xlnet", "yoso"}


# What a task needs: a model that generates text, a decoder (GPT-like), or a model that can have a classification head.
ModelKind = Literal["generating", "decoder", "head"]


def check_kind(source: str, config: PreTrainedConfig, kind: ModelKind) -> None:
    """Raises UserError for a model that is not of the kind that the task needs."""
    name = config.model_type
    if kind == "head":
        if name not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
            raise UserError(
                f"{source} is a {name} model, for which transformers has no classification head; give another model, "
                "or --task classification if it generates text"
            )
        if name in READS_PADDING:
            raise UserError(
                f"{source} is a {name} model, whose classification head reads padding, so the score of a row would depend on the "
                "other rows of its batch; give another model"
            )
        return
    seq2seq = name in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES and config.is_encoder_decoder
    if not seq2seq and (type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder):
        raise UserError(
            f"{source} is a {name} model, which does not generate text; "
            "give a T5-like (encoder-decoder) or GPT-like (decoder) model"
        )
    if kind == "decoder" and seq2seq:
        raise UserError(
            f"{source} is a {name} model, an encoder-decoder, and this task continues one sequence; "
            "give a GPT-like (decoder) model, or --task summarization or classification"
        )


def normalized(name: str) -> str:
    """The name of a class for comparisons: without surrounding space, case folded."""
    return name.strip().casefold()


def class_order(config: PreTrainedConfig, label_names: Sequence[str]) -> tuple[str, ...]:
    """The classes of the head in their order: that of the checkpoint's own head if it fits `label_names`, otherwise as given.

    The checkpoint's head fits if it has a class for each name (case does not matter). If all labels are the numbers from 0 to
    one less than its number of classes, the classes are in numerical order.
    """
    if not has_own_head(config):
        return tuple(label_names)
    own = [str(config.id2label[number]) for number in range(config.num_labels)]
    given = {normalized(name): name for name in label_names}
    if given.keys() <= {*map(normalized, own)} and len({*map(normalized, own)}) == len(own):
        return tuple(given.get(normalized(name), name) for name in own)
    if {*label_names} == {*map(str, range(len(own)))}:
        return tuple(map(str, range(len(own))))
    return tuple(label_names)


def keeps_head(config: PreTrainedConfig, label_names: Sequence[str]) -> bool:
    """Whether the checkpoint of `config` has a head for exactly the classes `label_names`, in this order (see `class_order`).

    A head without class names (LABEL_0, LABEL_1 ...) matches any names that are not numbers, if their number is the same.
    """
    if not has_own_head(config) or config.num_labels != len(label_names):
        return False
    own = [str(config.id2label[number]) for number in range(config.num_labels)]
    unnamed = own == [f"LABEL_{number}" for number in range(len(own))]
    numbers = list(label_names) == [*map(str, range(len(own)))]
    of_numbers = all(re.fullmatch(r"[+-]?\d+(\.\d+)?", name) for name in label_names)
    return [*map(normalized, own)] == [*map(normalized, label_names)] or numbers or (unnamed and not of_numbers)


def has_own_head(config: PreTrainedConfig) -> bool:
    """Whether the checkpoint of `config` was saved with a classification head."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def set_head(config: PreTrainedConfig, label_names: Sequence[str], pad_token_id: int | None) -> None:
    """Sets up `config` for a classification head with one class per label, in the order of `class_order`.

    A GPT-like model needs the padding token to find the last token of a text, which its head reads.
    """
    names = class_order(config, label_names)
    config.problem_type = "single_label_classification"
    config.id2label = dict(enumerate(names))  # sets num_labels too
    config.label2id = {name: number for number, name in enumerate(names)}
    config.pad_token_id = config.get_text_config().pad_token_id = pad_token_id


def has_head(config: PreTrainedConfig) -> bool:
    """Whether the model of `config` has a classification head instead of generating text."""
    return getattr(config, "problem_type", None) == "single_label_classification"


def head_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules that form the head: those with weights outside the base model."""
    body = model.base_model_prefix
    return [name for name, child in model.named_children() if name != body and any(True for _ in child.parameters())]


def auto_class(config: PreTrainedConfig) -> Any:
    """`AutoModelForSequenceClassification` with a head, otherwise `AutoModelForSeq2SeqLM` (T5-like) or `AutoModelForCausalLM`."""
    if has_head(config):
        return AutoModelForSequenceClassification
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
