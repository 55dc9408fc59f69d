"""Loads the tokenizer and the model from a hub id, a local folder, or the embedded default."""

import copy
import math
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    Mxfp4Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import cached_file, logging

from toolkit.console import say
from toolkit.distributed.deepspeed import without_partitioning
from toolkit.distributed.engine import NO_ENGINE, Engine, EngineKind
from toolkit.errors import UserError, guarded, time_limit, words_of
from toolkit.errors.reading import check_regular, check_shape, read_json, stands_for_another
from toolkit.models import catalogue
from toolkit.models.arguments import ModelArguments
from toolkit.models.generation import TAKEN_OVER
from toolkit.models.heads import (
    OTHER_HEADS,
    ModelKind,
    auto_class,
    check_kind,
    has_head,
    has_own_head,
    head_modules,
    keeps_head,
)
from toolkit.models.hub import check_reachable, did_you_mean, unreachable
from toolkit.models.language_part import NAMES, language_part, save_under_own_names
from toolkit.models.meta import model_on_meta
from toolkit.models.quantization import quantization_config
from toolkit.models.stored import check_name, check_stored, method_of

BUILD_SECONDS = 120.0  # without weights the largest model of today takes a few
# T5-like models. They were trained in bf16; in fp16 their activations exceed the largest number (65,504) and become inf or NaN.
# Their positions are relative, so inputs longer than in training work.
T5_FAMILY = {"t5", "mt5", "umt5", "longt5", "switch_transformers"}
ORDINARY_TOKEN_ID = 5  # a token id that no tokenizer in use gives to a padding, beginning or end token


def _instead_of(folder: Path) -> str:
    """What to give instead of a folder that holds no model."""
    if folder.name.startswith("models--"):
        return (
            f"it is in the hub's cache: give the model's id, {folder.name.removeprefix('models--').replace('--', '/')}"
        )
    inside = sorted(folder.glob("*/config.json"))
    if inside:
        return f"give {inside[0].parent}"
    return "give a folder with config.json, tokenizer and weights as transformers saves them, or a hub id (user/name)"


def load_model_config(
    args: ModelArguments, fp16: bool = False, needs_weights: bool = True, kind: ModelKind = "generating"
) -> PreTrainedConfig:
    """Reads the model's config, the only file that is downloaded before the flags are checked; of a multimodal model its language part.

    Without `needs_weights` a folder with only a config is enough, and models of the catalogue need no hub.

    Raises: UserError for a missing or gated model, a folder without a config, an architecture that transformers does not
    know or that is not of the `kind` that the task needs, T5 in fp16, or a checkpoint that is stored in a form that is
    not trained.
    """
    source = args.source
    check_name(source)
    if args.is_local:
        folder = Path(source).expanduser()
        if folder.is_file():
            raise UserError(f"--model_name_or_path {source}: it is a file; give its folder, {folder.parent}")
        if not folder.is_dir():
            raise UserError(
                f"--model_name_or_path {source}: no such folder; give an existing one or a hub id (user/name)"
            )
        if (folder / "adapter_config.json").is_file():
            raise UserError(
                f"--model_name_or_path {source}: the folder holds an adapter, which transformers would load into the model before "
                "tuning; give its base model, or a folder that footprint merge wrote"
            )
        if not (folder / "config.json").is_file():
            raise UserError(
                f"--model_name_or_path {source}: the folder has no config.json, so it holds no model; {_instead_of(folder)}"
            )
        has_weights = args.random_weights or not needs_weights
        if not has_weights and any(folder.glob("*.index.json")):
            check_weight_files(folder)  # names the files that are missing
        if not has_weights and not any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin")):
            raise UserError(f"{source} holds a config but no weights; add --random_weights to train from random ones")
    known = None if needs_weights or args.is_local else catalogue.config_of(source)
    if known is None and not args.is_local:
        check_reachable(source, args.model_revision)
    config = known or read_config(source, args.model_revision)
    config = language_part(config)
    check_kind(source, config, kind)
    config.return_dict = True  # what every caller here reads
    config.problem_type = None  # the checkpoint's value does not count: `set_head` decides
    if fp16 and config.model_type in T5_FAMILY:
        raise UserError(
            f"--fp16 with {config.model_type}: T5's activations exceed fp16's largest number (65,504) and turn to NaN; "
            "use --bf16 on a card that has it, or fp32"
        )
    if args.dtype == "float16" and config.model_type in T5_FAMILY:
        raise UserError(f"--dtype float16 with {config.model_type} overflows; use bfloat16 or float32")
    check_stored(args, config)
    if args.is_local and needs_weights and not args.random_weights:
        check_weight_files(Path(source).expanduser())
    return config


# A model's files in JSON that transformers reads before its weights.
JSON_FILES: tuple[str, ...] = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
JSON_FILES += (
    "added_tokens.json",
    "adapter_config.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
# (fields of config.json, least, most): what no model has, and what building would not end with.
RANGES = (
    (r"(num_(hidden_|encoder_|decoder_)?|n_|encoder_|decoder_)layers?", 1, 1000),
    (r"(num_attention_|num_|n_|(de|en)coder_attention_)heads?|num_(key_value|kv)_heads", 1, 10**4),
    (
        r"(hidden|intermediate|embedding)_size|d_(model|ff|kv|inner)|n_(embd|inner)|(en|de)coder_ffn_dim|head_dim",
        1,
        10**6,
    ),
    (r"vocab_size", 1, 10**8),
    (r"max_position_embeddings|n_positions|n_ctx", 1, 10**9),
    (r"sliding_window", 0, 10**9),  # 0: there is none
    (r"num_(local_)?experts|num_labels|type_vocab_size", 0, 10**5),
)


IDS = (int, None)
TOKENS = (*TAKEN_OVER, "pad_token_id", "eos_token_id")
GENERATION: dict[str, Any] = {  # the fields of generation_config.json that scoring takes over
    **{f"{name}_token_id?": IDS for name in ("bos", "pad", "decoder_start", "forced_bos")},
    "eos_token_id?": (int, [int], None),
    "forced_eos_token_id?": (int, [int], None),
    "bad_words_ids?": ([[int]], None),
    "suppress_tokens?": ([int], None),
    "begin_suppress_tokens?": ([int], None),
    "num_beams?": (int, None),
    "do_sample?": (bool, None),
    "temperature?": (float, None),
    "no_repeat_ngram_size?": (int, None),
}


def _check_folder(folder: Path) -> None:
    """Raises UserError for what could not end in a model's folder: devices, pipes, and JSON without limits."""
    for file in folder.iterdir():
        check_regular(file)
    read = {
        name: read_json(folder / name, duplicates=True, finite=False) for name in JSON_FILES if (folder / name).exists()
    }
    if "generation_config.json" in read:
        file, remedy = folder / "generation_config.json", "mend it, or remove the file"
        check_shape(read["generation_config.json"], GENERATION, str(file), remedy)
    if "tokenizer_config.json" in read:
        file, remedy = folder / "tokenizer_config.json", "mend it, or remove the field"
        check_shape(read["tokenizer_config.json"], {"model_max_length?": (int, float, None)}, str(file), remedy)
        if (longest := read["tokenizer_config.json"].get("model_max_length")) is not None and not longest >= 1:
            raise UserError(f"{file}: model_max_length {longest} is not possible; give at least 1, or remove the field")
    if "config.json" in read:
        _check_sizes(folder / "config.json", read["config.json"])


def _check_sizes(file: Path, config: dict[str, Any]) -> None:
    heads, shared = config.get("num_attention_heads"), config.get("num_key_value_heads")
    for name, value in config.items():
        if isinstance(value, dict):
            _check_sizes(file, value)
        if re.search("dropout|pdrop", name) and isinstance(value, int | float) and not 0 <= value <= 1:
            raise UserError(f"{file}: {name} {value} is not possible; give a number from 0 to 1")
        if name.endswith(("eps", "epsilon")) and isinstance(value, float) and not 0 <= value < 1:
            raise UserError(f"{file}: {name} {value} is not possible; give a number from 0 to below 1, such as 1e-6")
        of_rotary = name == "factor" and {"rope_type", "type"} & config.keys()
        if of_rotary and isinstance(value, int | float) and not value > 0:
            raise UserError(
                f"{file}: the factor {value} of its rotary embeddings is not possible; give a number above 0"
            )
        if name == "rope_theta" and isinstance(value, int | float) and not value > 0:
            raise UserError(f"{file}: rope_theta {value} is not possible; give a number above 0, such as 10000.0")
        if isinstance(value, float) and math.isnan(value):
            raise UserError(f"{file}: {name} is not a number (NaN); give one")
        for pattern, least, most in RANGES:
            if value is None or not re.fullmatch(pattern, name):
                continue
            for one in value if isinstance(value, list) else [value]:
                if not isinstance(one, int) or isinstance(one, bool) or not least <= one <= most:
                    shown = repr(one)[:40]
                    raise UserError(
                        f"{file}: {name} {shown} is not possible; give a whole number from {least} to {most:,}"
                    )
    # now both are numbers above 0, or lists with a number for each layer
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        raise UserError(
            f"{file}: num_attention_heads {heads} cannot share num_key_value_heads {shared}; give a number that divides {heads}"
        )


def read_config(source: str, revision: str | None = None) -> PreTrainedConfig:
    """The config of a hub id or folder. No code that comes with a model is ever run.

    Raises: UserError for a config that cannot be read, holds impossible sizes, or needs code of its own.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        _check_folder(folder)
    try:
        with _quiet(), guarded(f"{source}: its config cannot be read", "give a model that transformers loads"):
            return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except UserError as error:
        if error.__cause__ is None:
            raise
        known = isinstance(error.__cause__, OSError) or _needs_code(error.__cause__)
        raise UserError(_why_not(source, error.__cause__)) from (None if known else error.__cause__)


def read_tokenizer(source: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub id or folder. No code that comes with it is ever run.

    Raises: UserError if there is none, or it needs code of its own.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        _check_folder(folder)
    try:
        with guarded(f"{source}: no tokenizer can be loaded", "name one with --tokenizer_name"):
            return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except UserError as error:
        if _needs_code(error.__cause__):
            raise UserError(_own_code(f"the tokenizer of {source}")) from None
        raise


def read_model(source: str, config: PreTrainedConfig, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model with its weights, and what `from_pretrained` found. Pickles are only read as tensors, and no code is run.

    Raises: UserError for weights that cannot be loaded.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        check_weight_files(folder)
    options |= _overruled_generation(source, options.get("revision"))
    try:
        with guarded(f"{source}: its weights cannot be loaded", "give a whole checkpoint of this architecture"):
            return auto_class(config).from_pretrained(
                source, config=config, output_loading_info=True, trust_remote_code=False, **options
            )
    except UserError as error:
        if isinstance(error.__cause__, OSError):
            raise UserError(_why_not(source, error.__cause__)) from error.__cause__
        raise


def _overruled_generation(source: str, revision: str | None) -> dict[str, GenerationConfig]:
    """Where transformers refuses a model's generation_config.json, what scoring takes over of it, as `generation_config`.

    Greedy search with several answers is such a contradiction. Nothing is given for a file that loads.
    """
    try:
        with _quiet():
            GenerationConfig.from_pretrained(source, revision=revision)
    except OSError:  # there is none
        return {}
    except Exception as error:  # of any kind: a setting of a wrong type fails where transformers compares it
        reason = words_of(error)
    else:
        return {}
    file = cached_file(source, "generation_config.json", revision=revision)
    asked = read_json(Path(file), remedy="mend it, or remove the file")
    say("generation", f"transformers refuses generation_config.json ({reason}); only its tokens are used")
    return {"generation_config": GenerationConfig(**{name: asked.get(name) for name in TOKENS})}


def check_weight_files(folder: Path) -> None:
    """Raises UserError for files of weights that are none: pointers, web pages, cut files, pickles that are no tensors' archive.

    Also for an index that names a file which is missing or outside of `folder`.
    """
    remedy = "download it again"
    for file in sorted(folder.glob("*.index.json")):
        weights = read_json(file, remedy=remedy).get("weight_map")
        if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights.values()):
            raise UserError(f"{file}: it has no weight_map of names to files; {remedy}")
        for name in sorted(set(weights.values())):
            if Path(name).name != name or not (folder / name).is_file():
                raise UserError(f"{file}: it names {name}, which is no file of this folder; {remedy}")
    tensors = sorted(file for start in ("model", "adapter_model") for file in folder.glob(f"{start}*.safetensors"))
    for file in tensors or sorted(folder.glob("*model*.bin")):
        check_regular(file)
        if not file.is_file():
            raise UserError(f"{file}: it is a folder, or a link that leads nowhere; {remedy}")
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(200)
        if not start:
            what = "it is empty"
        elif other := stands_for_another(start):
            what, remedy = other
        elif file.suffix == ".safetensors" and not 2 <= int.from_bytes(start[:8], "little") <= size - 8:
            what = f"its {size:,} bytes are no whole safetensors file"
        elif file.suffix == ".bin" and start[:2] not in (b"PK", b"\x80\x02"):
            what = (
                "it is a pickle of an unknown kind, which could run code"
                if start[:1] == b"\x80"
                else "it holds no weights"
            )
        else:
            if file.suffix == ".safetensors":
                with guarded(f"{file}: its list of tensors cannot be read", remedy), safe_open(file, "pt"):
                    pass
            continue
        raise UserError(f"{file}: {what}; {remedy}")


def _needs_code(error: BaseException | None) -> bool:
    return "trust_remote_code" in str(error) or "custom code" in str(error)


def _own_code(what: str) -> str:
    return (
        f"{what} needs code of its own (auto_map), which footprint never runs; give a model that transformers knows without "
        "--trust_remote_code"
    )


def _why_not(source: str, error: BaseException) -> str:
    """One line that says why a config could not be read."""
    if _needs_code(error):
        return _own_code(source)
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    if any(isinstance(c, GatedRepoError) for c in causes):
        return (
            f"{source} is gated: accept its licence on its hub page and log in with `hf auth login`, "
            "or give a model that is open"
        )
    if any(isinstance(c, RepositoryNotFoundError) for c in causes):
        return f"{source} is not on the hub (or is private: `hf auth login`){did_you_mean(source)}; check the spelling of user/name"
    if any(isinstance(c, LocalEntryNotFoundError | OfflineModeIsEnabled | ConnectionError) for c in causes):
        return unreachable(source)
    if "does not recognize this architecture" in str(error) or "Unrecognized model" in str(error):
        import transformers

        model_type = str(error).split("`")[1] if "`" in str(error) else "unknown"
        return (
            f"{source}: transformers {transformers.__version__} does not know the architecture {model_type!r}; "
            "check model_type in its config.json, or upgrade transformers"
        )
    return f"{source}: its config cannot be read ({words_of(error)}); give a model that transformers loads"


def load_tokenizer(args: ModelArguments) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token (the end-of-text token if it has no padding token).

    Raises: UserError if there is no tokenizer, or if it has neither of these tokens.
    """
    source = args.tokenizer_name or args.source
    tokenizer = read_tokenizer(source, None if args.tokenizer_name else args.model_revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(
            f"{source}: its tokenizer has neither a padding token nor an end-of-text token, so rows of different lengths cannot be "
            "batched; name another with --tokenizer_name, or set pad_token (and eos_token) in its tokenizer_config.json"
        )
    # for training: no padding comes before the first token; generation pads on the left
    tokenizer.padding_side = "right"
    return tokenizer


def longest_input(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> int | None:
    """The largest number of tokens in one sequence, or None if neither the model nor its tokenizer has a limit.

    Absolute (GPT-2, BART) and rotary (Llama) position embeddings end at `max_position_embeddings`. T5's relative positions
    have no limit; its tokenizer has the length that the model was trained with.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    if tokenizer is not None and tokenizer.model_max_length < 10**9:
        limit = min(limit or tokenizer.model_max_length, tokenizer.model_max_length)
    return limit


def weights_dtype(args: ModelArguments, frozen: bool, bf16: bool, fp16: bool) -> tuple[torch.dtype, str]:
    """The type of the weights, and the reason for it.

    Trained weights stay in fp32: mixed precision computes in a shorter type, in which small updates would be rounded away.
    A frozen base loses nothing in the type in which it computes.
    """
    if args.dtype != "auto":
        return getattr(torch, args.dtype), "--dtype"
    if frozen and (bf16 or fp16):
        return (torch.bfloat16 if bf16 else torch.float16), "a frozen base is held in the type that it is computed in"
    return torch.float32, "trained weights are held in fp32" if not frozen else "no mixed precision"


def build_on_meta(
    args: ModelArguments, config: PreTrainedConfig, dtype: torch.dtype, sharded: bool = False
) -> PreTrainedModel:
    """The model without weights: shapes, names and quantized layers, in about a second for any size.

    `sharded`: see `quantization_config`.
    """
    remedy = "change its config.json, or give another model"
    too_slow = f"{args.source}: building the model of its config.json takes more than {BUILD_SECONDS:g} s; {remedy}"
    what = f"{args.source}: no model can be built from its config.json"
    if args.attn_implementation:
        what, remedy = (
            f"{what} with --attn_implementation {args.attn_implementation}",
            "leave it out, or give sdpa or eager",
        )
    with (
        _quiet(),
        time_limit(BUILD_SECONDS, too_slow),
        guarded(what, remedy),
        without_partitioning(),
    ):
        model = model_on_meta(
            auto_class(config),
            copy.deepcopy(config),
            dtype,
            args.attn_implementation,
            quantization_config(args, config, dtype, sharded),
        )
    _check_beginning(args.source, model)
    keep_packing(model)
    return model


def keep_packing(model: PreTrainedModel) -> None:
    """Keeps bitsandbytes from packing 4-bit weights once more to answer on a CPU: that packing only supports widths divisible by 32."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _check_beginning(source: str, model: PreTrainedModel) -> None:
    """Raises UserError for an encoder-decoder whose config does not say with which token a target begins."""
    config = model.config
    if not config.is_encoder_decoder:
        return
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    try:
        if shift is not None:
            shift(torch.tensor([[ORDINARY_TOKEN_ID]]))
        elif has_head(config) and config.decoder_start_token_id is None:
            raise ValueError
    except (AttributeError, ValueError, TypeError, AssertionError, RuntimeError):
        raise UserError(
            f"{source}: its config.json does not say with which token a target begins; add decoder_start_token_id to it (T5: its "
            "pad_token_id; BART: its eos_token_id) and pad_token_id"
        ) from None


def _make_head_anew(args: ModelArguments, model: PreTrainedModel, missing: Collection[str]) -> None:
    """Initializes the head anew if the checkpoint's own head is for other classes, or classifies something other than texts.

    If that head has the same number of classes, its rows were loaded, and each would stand for the wrong class. `missing` holds
    the names of the weights that the checkpoint lacks: a checkpoint whose config names no architecture, or an unknown one, can
    contain a whole head.
    """
    shipped, config = read_config(args.source, args.model_revision), model.config
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


LANGUAGE_PART = "the model is multimodal: only its language part is loaded and trained, not what reads images or sound"


def is_multimodal(args: ModelArguments) -> bool:
    """Whether the checkpoint is that of a multimodal model, so that only its language part is loaded."""
    whole = None if args.is_local else catalogue.config_of(args.source)
    whole = whole or read_config(args.source, args.model_revision)
    return language_part(whole) is not whole


@contextmanager
def _quiet() -> Iterator[None]:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def check_weights(source: str, model: PreTrainedModel, found: dict[str, Any], is_part: bool = False) -> None:
    """Checks the loading info `found` of `from_pretrained`, and warns of tensors that were not loaded; the head may be new.

    `is_part`: the file is that of a multimodal model, of which only the language part is wanted.

    Raises: UserError if weights of the model are missing in `source` or have other shapes there: transformers would initialize
    them randomly.
    """
    heads = tuple(f"{name}." for name in head_modules(model)) if has_head(model.config) else ()
    missing = sorted(name for name in found["missing_keys"] if not name.startswith(heads))
    missing += sorted(name for name, *_ in found["mismatched_keys"] if not name.startswith(heads))
    unknown = sorted(found["unexpected_keys"])
    if not missing and is_part:
        return
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
    args: ModelArguments,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    training: TrainingArguments,
    engine: Engine = NO_ENGINE,
) -> PreTrainedModel:
    """The model with its weights, on the training device.

    Raises: UserError if weights are missing.
    """
    if args.random_weights:
        set_seed(training.seed)
        with guarded(f"{args.source}: no model can be built from its config.json", "give another model"):
            model = auto_class(config).from_config(
                config, dtype=dtype, attn_implementation=args.attn_implementation, trust_remote_code=False
            )
        set_seed(training.seed)
        return model.to(training.device)
    options: dict[str, Any] = {"revision": args.model_revision, "dtype": dtype}
    # a head of another size is initialized anew; `check_weights` checks the rest
    options["ignore_mismatched_sizes"] = True
    if args.attn_implementation:
        options["attn_implementation"] = args.attn_implementation
    stored = method_of(config)
    quantization: Any
    if stored == "mxfp4":
        options["quantization_config"] = Mxfp4Config(dequantize=True)
    if args.load_in_4bit or args.load_in_8bit:
        quantization = quantization_config(args, config, dtype, sharded=engine.kind.shards_parameters)
        if stored is None or quantization is None:
            options["quantization_config"] = quantization
        else:
            config.quantization_config = quantization.to_dict()
        # under ZeRO-3 transformers itself puts weights on the process's device
        if engine.kind is not EngineKind.ZERO_3:
            options["device_map"] = {"": training.device}
    is_part = is_multimodal(args)
    if is_part:
        options["key_mapping"] = NAMES
    set_seed(training.seed)  # for a new head
    with _quiet():  # `check_weights` says what is missing or left out
        model, found = read_model(args.source, config, **options)
    check_weights(args.source, model, found, is_part)
    if is_part:
        save_under_own_names(model)
    if has_head(config):
        set_seed(training.seed)
        _make_head_anew(args, model, found["missing_keys"])
    keep_packing(model)
    set_seed(training.seed)  # for the weights that the method adds
    return model if args.load_in_4bit or args.load_in_8bit else model.to(training.device)
