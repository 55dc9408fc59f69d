"""Tokenizer and model: a hub id, a local folder, or the embedded default; in the precision that the machine allows."""

import copy
import importlib.util
import os
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils import logging

from toolkit.console import say
from toolkit.embedded import MODEL_DIR
from toolkit.engine import asked_engine, without_partitioning
from toolkit.errors import UserError
from toolkit.memory import catalogue
from toolkit.memory.meta import model_on_meta
from toolkit.memory.units import format_bytes
from toolkit.metrics import normalized

# T5 and its kin. Their activations leave the range of fp16 (65,504): they were trained in bf16, and give inf and NaN.
# Their positions are relative: lengths beyond the training length do run.
T5_FAMILY = {"t5", "mt5", "umt5", "longt5", "switch_transformers"}

# Models whose heads have the names of those that classify texts, and other meanings
OTHER_HEADS = ("ForTokenClassification", "ForMultipleChoice")

# Models whose heads read padding: FNet mixes all positions, YOSO's and Nystromformer's convolutions and CANINE's and XLNet's
# heads reach into it, so that the score of a row would depend on the other rows of its batch.
READS_PADDING = {"canine", "fnet", "nystromformer", "xlnet", "yoso"}

# What a task asks of its model: that it writes text, that it is a decoder (GPT-like), or that it takes a class head.
ModelKind = Literal["generating", "decoder", "head"]


@dataclass
class ModelArguments:
    """Which model, and in what form its weights are held."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder. Default: the tiny T5 that comes with footprint."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a hub model."})
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the tokenizer, where it is not the model's own."}
    )
    random_weights: bool = field(
        default=False, metadata={"help": "Make the model from its config alone, with random weights drawn from --seed."}
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata={"help": "Type of the weights. auto: bf16 for a frozen base on a card that has it, else fp32."},
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "sdpa, eager, flash_attention_2 ...; eager keeps every attention map in memory."},
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantize the frozen base to 4 bits (QLoRA)."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantize the frozen base to 8 bits (LLM.int8())."})
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = field(default="nf4", metadata={"help": "The 4-bit number format."})
    bnb_4bit_use_double_quant: bool = field(
        default=True, metadata={"help": "Quantize the quantization constants too: about 0.4 bits a weight less."}
    )

    def __post_init__(self) -> None:
        self.model_name_or_path = lasting_path(self.model_name_or_path)
        self.tokenizer_name = lasting_path(self.tokenizer_name)

    def check(self, given: dict[str, Any]) -> None:
        """Raises UserError for flags that exclude each other or would have no effect."""
        if self.load_in_4bit and self.load_in_8bit:
            raise UserError("--load_in_4bit and --load_in_8bit exclude each other; give one of them")
        for name in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant"):
            if name in given and not self.load_in_4bit:
                raise UserError(f"--{name} has no effect without --load_in_4bit; add it or leave --{name} out")
        if self.load_in_4bit or self.load_in_8bit:
            if importlib.util.find_spec("bitsandbytes") is None:
                raise UserError(
                    "quantized loading needs bitsandbytes, which is not installed: pip install bitsandbytes"
                )
            if "dtype" in given:
                raise UserError(
                    "--dtype has no effect with quantized loading, whose weights are integers; leave it out"
                )
            if self.random_weights:
                raise UserError(
                    "--random_weights cannot be quantized while loading; leave out --load_in_4bit / --load_in_8bit"
                )
        if "model_revision" in given and self.is_local:
            raise UserError("--model_revision has no effect on a local model; leave it out")

    @property
    def source(self) -> str:
        """The hub id or folder that is loaded."""
        return self.model_name_or_path or str(MODEL_DIR)

    @property
    def is_local(self) -> bool:
        """Whether the model is a folder, or is meant to be one."""
        return looks_like_path(self.source)

    @property
    def short_name(self) -> str:
        """The last part of its name, for folders and titles."""
        return Path(self.source).resolve().name if self.model_name_or_path else "embedded"


def looks_like_path(name: str) -> bool:
    """Whether `name` is a path rather than a hub id (`user/name`)."""
    return name.startswith((".", "/", "~")) or Path(name).exists() or name.count("/") > 1


def lasting_path(name: str | None) -> str | None:
    """An existing path as an absolute one, so that a run's config.yaml holds in any folder; a hub id as it is."""
    if name is None or not Path(name).expanduser().exists():
        return name
    return os.path.abspath(Path(name).expanduser())  # noqa: PTH100 - resolve() would follow links, absolute() keeps ".."


def load_model_config(
    args: ModelArguments, fp16: bool = False, needs_weights: bool = True, kind: ModelKind = "generating"
) -> PreTrainedConfig:
    """Reads the model's config: the only thing that is fetched before the flags are known to be right.

    Where `needs_weights` is false a folder with a config alone will do, and models of the catalogue need no hub.

    Raises: UserError for a missing or gated model, a folder without config, an architecture that transformers does not
    know or that is not of the `kind` that the task needs, T5 in fp16, or quantization of a model that is already
    quantized.
    """
    source = args.source
    if args.is_local:
        folder = Path(source).expanduser()
        if not folder.is_dir():
            raise UserError(
                f"--model_name_or_path {source}: no such folder; give an existing one or a hub id (user/name)"
            )
        if (folder / "adapter_config.json").is_file():
            raise UserError(
                f"--model_name_or_path {source}: the folder holds an adapter, which transformers would put into the model that is tuned; "
                "give its base model, or a folder that footprint merge wrote"
            )
        if not (folder / "config.json").is_file():
            raise UserError(f"--model_name_or_path {source}: the folder has no config.json, so it holds no model")
        has_weights = args.random_weights or not needs_weights
        if not has_weights and not any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin")):
            raise UserError(f"{source} holds a config but no weights; add --random_weights to train from random ones")
    try:
        known = None if needs_weights or args.is_local else catalogue.config_of(source)
        config = known or AutoConfig.from_pretrained(source, revision=args.model_revision)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(_why_not(source, error)) from None
    _check_kind(source, config, kind)
    config.problem_type = None  # a checkpoint that had a head may say else: `set_head` alone decides
    if fp16 and config.model_type in T5_FAMILY:
        raise UserError(
            f"--fp16 with {config.model_type}: T5's activations exceed fp16's largest number (65,504) and turn to NaN; "
            "use --bf16 on a card that has it, or fp32"
        )
    if args.dtype == "float16" and config.model_type in T5_FAMILY:
        raise UserError(f"--dtype float16 with {config.model_type} overflows; use bfloat16 or float32")
    if (args.load_in_4bit or args.load_in_8bit) and getattr(config, "quantization_config", None) is not None:
        flag = "--load_in_4bit" if args.load_in_4bit else "--load_in_8bit"
        method = config.quantization_config.get("quant_method", "some method")
        raise UserError(f"{flag}: {source} is already quantized (by {method}); leave the flag out")
    return config


def _check_kind(source: str, config: PreTrainedConfig, kind: ModelKind) -> None:
    """Raises UserError for a model that cannot do what the task asks."""
    name = config.model_type
    if kind == "head":
        if name not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
            raise UserError(
                f"{source} is a {name} model, for which transformers has no classification head; give another model, "
                "or --task classification where it generates text"
            )
        if name in READS_PADDING:
            raise UserError(
                f"{source} is a {name} model, whose classification head reads padding: the score of a row would depend on the other "
                "rows of its batch; give another model"
            )
        return
    seq2seq = name in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES and config.is_encoder_decoder
    if not seq2seq and (name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or config.is_encoder_decoder):
        raise UserError(
            f"{source} is a {name} model, which does not generate text; "
            "give a T5-like (encoder-decoder) or GPT-like (decoder) model"
        )
    if kind == "decoder" and seq2seq:
        raise UserError(
            f"{source} is a {name} model, an encoder-decoder, and this task continues one sequence; "
            "give a GPT-like (decoder) model, or --task summarization or classification"
        )


def _why_not(source: str, error: Exception) -> str:
    """One line for a config that could not be read."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    if any(isinstance(c, GatedRepoError) for c in causes):
        return (
            f"{source} is gated: accept its licence on its hub page and log in with `hf auth login`, "
            "or give a model that is open"
        )
    if any(isinstance(c, RepositoryNotFoundError) for c in causes):
        return f"{source} is not on the hub (or is private: `hf auth login`); check the spelling of user/name"
    if any(isinstance(c, LocalEntryNotFoundError | OfflineModeIsEnabled | ConnectionError) for c in causes):
        return (
            f"{source} is not in the local cache and the hub cannot be reached; go online once, or give a local folder"
        )
    if "does not recognize this architecture" in str(error) or "Unrecognized model" in str(error):
        import transformers

        model_type = str(error).split("`")[1] if "`" in str(error) else "unknown"
        return (
            f"{source}: transformers {transformers.__version__} does not know the architecture {model_type!r}; "
            "check model_type in its config.json, or upgrade transformers"
        )
    return f"{source}: its config cannot be read ({' '.join(str(error).split())[:200]})"


def load_tokenizer(args: ModelArguments) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token (the end-of-text token where the model has none of its own).

    Raises: UserError where there is none, or it has no token to pad with.
    """
    source = args.tokenizer_name or args.source
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=None if args.tokenizer_name else args.model_revision)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{source}: no tokenizer can be loaded ({reason}); name one with --tokenizer_name") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(
            f"{source}: its tokenizer has neither a padding token nor an end-of-text token, so rows of different lengths make no "
            "batch; name another with --tokenizer_name, or set pad_token (and eos_token) in its tokenizer_config.json"
        )
    tokenizer.padding_side = "right"  # the first token of a text is then predicted from nothing; generation has its own
    return tokenizer


def longest_input(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> int | None:
    """The most tokens that the model can take in one sequence, or None where neither it nor its tokenizer has a limit.

    Absolute position embeddings (GPT-2, BART) and rotary ones (Llama) end at `max_position_embeddings`; T5's relative
    positions have no end, and its tokenizer says what it was made for.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    if tokenizer is not None and tokenizer.model_max_length < 10**9:
        limit = min(limit or tokenizer.model_max_length, tokenizer.model_max_length)
    return limit


def weights_dtype(args: ModelArguments, frozen: bool, bf16: bool, fp16: bool) -> tuple[torch.dtype, str]:
    """The type in which the weights are held, and the reason.

    Trained weights stay in fp32 (mixed precision computes in a shorter type, but small updates would be rounded away);
    a frozen base loses nothing in the type that it is computed in.
    """
    if args.dtype != "auto":
        return getattr(torch, args.dtype), "--dtype"
    if frozen and (bf16 or fp16):
        return (torch.bfloat16 if bf16 else torch.float16), "a frozen base is held in the type that it is computed in"
    return torch.float32, "trained weights are held in fp32" if not frozen else "no mixed precision"


def class_order(config: PreTrainedConfig, label_names: Sequence[str]) -> tuple[str, ...]:
    """The classes of the head that `config` will have: as the checkpoint's own head has them where it is for these, else as given.

    It is where each name is one of its names, whatever their case. Labels that are numbers, and a checkpoint without names
    (LABEL_0, LABEL_1 ...), go by number: then there must be as many classes on both sides.
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
    """Whether the checkpoint of `config` has a head whose classes are `label_names` in their order (see `class_order`)."""
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
    """Makes `config` that of a model with a classification head, one class a label, in the order of `class_order`.

    The padding token is how a GPT-like model finds the last token of a text, which its head reads.
    """
    names = class_order(config, label_names)
    config.problem_type = "single_label_classification"
    config.id2label = dict(enumerate(names))  # sets num_labels too
    config.label2id = {name: number for number, name in enumerate(names)}
    config.pad_token_id = config.get_text_config().pad_token_id = pad_token_id


def has_head(config: PreTrainedConfig) -> bool:
    """Whether the model of `config` has a classification head instead of writing text."""
    return getattr(config, "problem_type", None) == "single_label_classification"


def head_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules that form the head: those outside the body, with weights that no checkpoint of it holds."""
    body = model.base_model_prefix
    return [name for name, child in model.named_children() if name != body and any(True for _ in child.parameters())]


def auto_class(config: PreTrainedConfig) -> Any:
    """`AutoModelForSequenceClassification` for a head, else `AutoModelForSeq2SeqLM` (T5-like) or `AutoModelForCausalLM`."""
    if has_head(config):
        return AutoModelForSequenceClassification
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def build_on_meta(
    args: ModelArguments, config: PreTrainedConfig, dtype: torch.dtype, sharded: bool = False
) -> PreTrainedModel:
    """The model without weights: shapes, names and quantized layers, in about a second for any size.

    `sharded`: see `quantization_config`.
    """
    try:
        with without_partitioning():
            return model_on_meta(
                auto_class(config),
                copy.deepcopy(config),
                dtype,
                args.attn_implementation,
                quantization_config(args, config, dtype, sharded),
            )
    except (ValueError, ImportError) as error:
        raise UserError(f"{args.source}: {' '.join(str(error).split())[:300]}") from None


def quantization_config(
    args: ModelArguments, config: PreTrainedConfig, dtype: torch.dtype, sharded: bool = False
) -> BitsAndBytesConfig | None:
    """How the weights are quantized while loading, computing in `dtype`; None where they are not. A head never is.

    Packed 4-bit weights are stored as bytes, or, where the engine shards them, in `dtype`: it takes floating point alone.
    """
    if not (args.load_in_4bit or args.load_in_8bit):
        return None
    heads = None
    if has_head(config):
        with without_partitioning():
            heads = head_modules(model_on_meta(auto_class(config), copy.deepcopy(config), dtype))
    return BitsAndBytesConfig(
        load_in_4bit=args.load_in_4bit,
        load_in_8bit=args.load_in_8bit,
        bnb_4bit_quant_type=args.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=args.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=heads,  # of both, in spite of its name
        bnb_4bit_quant_storage=dtype if sharded and args.load_in_4bit else None,
    )


def _make_head_anew(args: ModelArguments, model: PreTrainedModel, missing: Collection[str]) -> None:
    """Draws the head again where the checkpoint's own is for other classes, or classifies something else than texts.

    Where it has as many classes, its rows were loaded, and each would stand for another class. `missing`: the weights that the
    checkpoint lacks; one whose config names no architecture, or one of its own, may bring a whole head.
    """
    shipped, config = AutoConfig.from_pretrained(args.source, revision=args.model_revision), model.config
    other = any(name.endswith(OTHER_HEADS) for name in shipped.architectures or ())
    whole = not any(name.startswith(tuple(f"{head}." for head in head_modules(model))) for name in missing)
    if not (whole or other or has_own_head(shipped)):
        return
    if keeps_head(shipped, [config.id2label[number] for number in range(config.num_labels)]):
        return
    heads = [model.get_submodule(name) for name in head_modules(model)]
    drawn = [one for head in heads for one in (*head.modules(), *head.parameters())]
    for one in (model, *drawn):
        one._is_hf_initialized = False
    if is_deepspeed_zero3_enabled():
        import deepspeed

        with deepspeed.zero.GatheredParameters([p for head in heads for p in head.parameters()], modifier_rank=0):
            model.initialize_weights()
    else:
        model.initialize_weights()


def is_packed(parameter: nn.Parameter) -> bool:
    """Whether bitsandbytes holds it in 4 or 8 bits."""
    return type(parameter).__name__ in ("Params4bit", "Int8Params")


@dataclass(frozen=True)
class Packed:
    """How many elements of a quantized model's weights bitsandbytes packs: those of linear layers alone."""

    packed: int
    all: int
    experts: int  # of experts that are stacked in one tensor, and stay in the type they are computed in

    @classmethod
    def of(cls, model: nn.Module) -> "Packed":
        """Those of a model without adapters, as `build_on_meta` gives it."""
        weights = dict(model.named_parameters())
        packed = {name for name, p in weights.items() if is_packed(p)}
        experts = {name for name, p in weights.items() if ".experts." in name and p.dim() == 3} - packed
        return cls(*(sum(weights[name].numel() for name in names) for names in (packed, weights, experts)))

    def warning(self, dtype: torch.dtype) -> str | None:
        """What to say of experts; None where there are none."""
        if not self.experts:
            return None
        size = format_bytes(self.experts * dtype.itemsize)
        return (
            f"{self.experts / self.all:.0%} of the weights are not quantized: bitsandbytes packs linear layers alone, and this model's "
            f"experts are stacked tensors, which stay in {str(dtype).removeprefix('torch.')} ({size})"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def check_weights(source: str, model: PreTrainedModel, found: dict[str, Any]) -> None:
    """Checks what `from_pretrained` has `found`, and says what of the file it has left out; a head may be new.

    Raises: UserError where weights of the model are not in `source`, or have other shapes there: transformers begins them random.
    """
    heads = tuple(f"{name}." for name in head_modules(model)) if has_head(model.config) else ()
    missing = sorted(name for name in found["missing_keys"] if not name.startswith(heads))
    missing += sorted(name for name, *_ in found["mismatched_keys"] if not name.startswith(heads))
    unknown = sorted(found["unexpected_keys"])
    if not missing:
        body = [name for name in unknown if name.startswith(f"{model.base_model_prefix}.")]
        if body:
            say(
                "warning",
                f"{source}: {len(body)} tensors of the file have no place in the model of its config.json ({body[0]} ...)",
            )
        return
    names = f", and has {len(unknown)} that it does not ({unknown[0]} ...)" if unknown else ""
    raise UserError(
        f"{source}: its weights do not fit its config.json: the file lacks {len(missing)} tensors that the model has "
        f"({missing[0]} ...){names}; give a whole checkpoint of this architecture, or --random_weights to train from random ones"
    )


def load_model(
    args: ModelArguments, config: PreTrainedConfig, dtype: torch.dtype, training: TrainingArguments
) -> PreTrainedModel:
    """The model with its weights, on the device that trains it.

    Raises: UserError where the weights are missing.
    """
    if args.random_weights:
        set_seed(training.seed)
        model = auto_class(config).from_config(config, dtype=dtype, attn_implementation=args.attn_implementation)
        set_seed(training.seed)
        return model.to(training.device)
    options: dict[str, Any] = {"config": config, "revision": args.model_revision, "dtype": dtype}
    options["ignore_mismatched_sizes"] = True  # a head of another size is made anew; `check_weights` sees the rest
    if args.attn_implementation:
        options["attn_implementation"] = args.attn_implementation
    if args.load_in_4bit or args.load_in_8bit:
        engine = asked_engine(training.deepspeed, training.fsdp)
        options["quantization_config"] = quantization_config(args, config, dtype, sharded=engine.shards_parameters)
        if engine.kind != "ZeRO-3":  # for it, transformers puts the weights on the process's own device by itself
            options["device_map"] = {"": training.device}
    set_seed(training.seed)  # for a head, which no checkpoint holds
    try:
        with _quiet() if has_head(config) else nullcontext():  # that a head is new is no warning
            model, found = auto_class(config).from_pretrained(args.source, output_loading_info=True, **options)
    except OSError as error:
        raise UserError(_why_not(args.source, error)) from None
    check_weights(args.source, model, found)
    if has_head(config):
        set_seed(training.seed)
        _make_head_anew(args, model, found["missing_keys"])
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # its packed weights are for widths that 32 divides alone
            module.support_avx512bf16_for_cpu = False
    set_seed(training.seed)  # for the weights that a method adds
    return model if args.load_in_4bit or args.load_in_8bit else model.to(training.device)
