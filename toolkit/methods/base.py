"""The interface of a method, and the shared parts of methods over a frozen base: PEFT, its errors, quantized bases."""

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from peft import PeftConfig, TaskType, get_peft_model, prepare_model_for_kbit_training
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, TrainingArguments

from toolkit.console import say
from toolkit.errors import UserError, did_you_mean, guarded, time_limit, words_of
from toolkit.models.heads import has_head, head_modules
from toolkit.models.language_part import unused_modules
from toolkit.models.quantization import is_packed, stacked_experts
from toolkit.models.soft_prompts import IN_THE_CACHE, fit_head
from toolkit.units import format_bytes

# Defaults for the tiny embedded model and its dialogues; each method adds its learning rate.
EMBEDDED = {
    "num_train_epochs": 2.0,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 50,
    "max_length": 256,
    "max_target_length": 48,
}
# Rows of one forward pass, and how many passes make one optimizer step: 8 rows a step, as Trainer's own default. Halves of it fit
# cards with 8 GB: LoRA of Llama-3.2-1B and, with checkpointing, QLoRA of Llama-3.1-8B.
CONSUMER_BATCH = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
KBIT_UPCAST = (
    "With a quantized base: hold what is not quantized in fp32 (all, PEFT's own preparation) or leave it in the type that it "
    "is computed in, which needs less memory (none, the default of recipes/qlora.py)."
)
PATTERN_SECONDS = 5.0  # matching the names of the largest model takes milliseconds
# Names that architectures give to the last linear layer of a feed-forward
FEED_FORWARD_OUTPUTS = (
    "wo",
    "down_proj",
    "fc2",
    "mlp.c_proj",
    "dense_4h_to_h",
    "fc_out",
    "feed_forward.output",
    "output.dense",
)
# Names of linear layers in the feed-forward of mixtures of experts. PEFT (0.21) takes them for those of the stacked experts too.
OF_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
# Their kernels read the weights of out_proj and conv1d themselves, so that adapters there have no effect; PEFT refuses them.
FUSED_MAMBA = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
NORMS = "Norm"  # in the class name of every normalization layer: LayerNorm, T5LayerNorm, LlamaRMSNorm


@dataclass
class Method(ABC):
    """A way to fine-tune. Its fields are its flags; its class variables are its name, paper and defaults."""

    name: ClassVar[str]
    paper: ClassVar[str] = ""  # arXiv id
    freezes_base: ClassVar[bool]
    trains: ClassVar[bool] = True  # in-context learning does not
    needs_import: ClassVar[str] = ""  # a module of this package that PEFT needs to load the result
    used_training_flags: ClassVar[frozenset[str] | None] = None  # those with an effect; None: all
    training_defaults: ClassVar[dict[str, Any]]  # by flag name
    embedded_defaults: ClassVar[dict[str, Any]]  # override those for the tiny embedded model

    @property
    def virtual_tokens(self) -> int:
        """Number of positions that the method adds to those of the text."""
        return 0

    @property
    def changes_base(self) -> str:
        """The flag that makes `attach` change the base's weights, such as `--init_lora_weights pissa`; empty if none does."""
        return ""

    @property
    def learning_rates_flag(self) -> str:
        """The flag that gives some weights a learning rate of their own; empty if none is set."""
        return ""

    @classmethod
    def defaults(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Default settings, by flag name; `given` holds the user's flags.

        Trainer's own accumulation (1) goes with a batch size that the user gives.
        """
        if given.get("model_name_or_path") is None:
            return cls.training_defaults | cls.embedded_defaults
        batch = CONSUMER_BATCH if cls.trains and "per_device_train_batch_size" not in given else {}
        return batch | cls.training_defaults

    @classmethod
    def optimizer(cls, on_gpu: bool) -> tuple[str | None, str]:
        """The default optimizer (None: Trainer's own default), and why."""
        return None, "the default"

    def check(self, given: dict[str, Any]) -> None:  # noqa: B027 - most methods have something to check, not all
        """Raises UserError if the user's flags (`given`) contradict each other."""

    @abstractmethod
    def attach(self, model: PreTrainedModel) -> PreTrainedModel:
        """Returns `model` with this method attached and `requires_grad` set. It must also work on the meta device.

        Raises: UserError if the method does not fit the model.
        """

    def make_optimizer(
        self, model: PreTrainedModel, args: TrainingArguments, kind: type[Optimizer], options: dict[str, Any]
    ) -> Optimizer | None:
        """An optimizer with the method's own parameter groups; None: with those of `transformers.Trainer`.

        `kind` is the class that `--optim` names, `options` its keyword arguments, with the learning rate.
        """
        return None

    def finish_saving(self, model: PreTrainedModel, folder: Path) -> None:  # noqa: B027 - few methods have something to do
        """Rank 0 calls this after the trained weights were saved to `folder`. Adapts the files if `attach` changed the base."""

    @classmethod
    def adapter_changes_base(cls, config: PeftConfig) -> bool:
        """Whether loading a saved adapter with `config` changes the base's weights; runs do not share such a base."""
        return False

    @classmethod
    def merge_refusal(cls, config: PeftConfig) -> str:
        """Why a saved adapter with `config` cannot be merged into the base's weights; empty if PEFT may try."""
        if not config.is_prompt_learning:
            return ""
        if config.peft_type in IN_THE_CACHE:
            return "its keys and values stand before those of the text, they change no weight"
        return "its virtual tokens are inputs to the model, not changes of its weights"


@dataclass
class PeftBased(Method):
    """A PEFT method over a frozen base, which may be quantized."""

    freezes_base: ClassVar[bool] = True

    kbit_upcast: Literal["none", "all"] = field(default="all", metadata={"help": KBIT_UPCAST})

    def check(self, given: dict[str, Any]) -> None:
        """Raises UserError if the user's flags (`given`) contradict each other."""
        if "kbit_upcast" in given and not (self._quantizes(given)):
            raise UserError("--kbit_upcast has no effect without --load_in_4bit or --load_in_8bit; leave it out")

    def _quantizes(self, given: dict[str, Any]) -> bool:
        return bool(given.get("load_in_4bit") or given.get("load_in_8bit"))

    @abstractmethod
    def configure(self, model: PreTrainedModel) -> PeftConfig:
        """The configuration for PEFT."""

    def attach(self, model: PreTrainedModel) -> PreTrainedModel:
        """Returns `model` wrapped by PEFT, with the base's weights frozen.

        Raises: UserError with PEFT's reason if the method does not fit the model.
        """
        prepare_quantized(model, self.kbit_upcast)
        return wrap(model, self.configure(model), self.name)


def wrap(model: PreTrainedModel, config: PeftConfig, name: str) -> PreTrainedModel:
    """`get_peft_model`, with PEFT's errors as a one-line UserError. A classification head is trained and saved as well."""
    if has_head(model.config) and config.is_prompt_learning and model.config.is_encoder_decoder:
        raise UserError(
            f"{name} does not fit the head of this {model.config.model_type} model, which takes token ids alone; "
            "use --task classification, or another method"
        )
    if has_head(model.config) and hasattr(config, "modules_to_save"):
        config.modules_to_save = [*(config.modules_to_save or []), *head_modules(model)]
    check_patterns(config, model, "the configuration for PEFT")
    with guarded(
        f"{name} does not fit this {model.config.model_type} model", "change its flags, or give another model"
    ):
        wrapped = get_peft_model(model, config)
    _train_heads_in_float32(wrapped)
    fit_head(wrapped)
    return wrapped


def check_patterns(config: PeftConfig, model: nn.Module, what: str) -> None:
    """Matches the patterns in `config` against the names of the model's modules, as PEFT will; `what` names their source.

    Raises: UserError for text that is no regular expression, and for one that does not end within `PATTERN_SECONDS`.
    """
    names = [name for name, _ in model.named_modules()]
    for field_name, value in config.to_dict().items():
        if not re.search("modules|pattern|layers|target|parameters", field_name):
            continue
        texts = value if isinstance(value, str | list | tuple | set | dict) else []
        for text in [texts] if isinstance(texts, str) else [one for one in texts if isinstance(one, str)]:
            if re.fullmatch(r"[\w.-]*", text):
                continue  # a name
            shown = f"{what}: {field_name} {text[:60]!r}"
            too_slow = (
                f"{shown} is a pattern that does not end on the names of this model's modules; write a simpler one"
            )
            with time_limit(PATTERN_SECONDS, too_slow):
                try:
                    pattern = re.compile(rf"(.*\.)?({text})")
                    for name in names:
                        pattern.match(name)
                        pattern.fullmatch(name)
                except (re.error, RecursionError, OverflowError, MemoryError) as error:
                    raise UserError(f"{shown} is no regular expression ({words_of(error)}); write another") from None


def _train_heads_in_float32(model: nn.Module) -> None:
    """Keeps a trained head in fp32 over a 16-bit base. PEFT (0.21) does this for adapters, but not for whole modules.

    In 16 bits small updates would be rounded away, and the gradient scaler of --fp16 refuses 16-bit gradients. DeepSpeed
    keeps its own fp32 copy, so it may convert the head to 16 bits again.
    """
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            parameters = list(module.modules_to_save.parameters())
            if any(p.dtype.itemsize == 2 for p in parameters) and not any(hasattr(p, "ds_tensor") for p in parameters):
                module.modules_to_save.float()
                module.register_forward_pre_hook(_as_its_weights)


def _as_its_weights(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(module.modules_to_save.parameters()).dtype
    return tuple(arg.to(dtype) if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg for arg in args)


def task_type(model: PreTrainedModel) -> TaskType:
    """PEFT's task type for the model. With SEQ_CLS, PEFT trains the new head and saves it with the adapter."""
    if has_head(model.config):
        return TaskType.SEQ_CLS
    return TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM


def embedding_shape(model: PreTrainedModel) -> dict[str, int]:
    """The fields of PEFT's soft prompts that depend on the model; PEFT (0.21) does not find them in the config of two models.

    Only the width matters for tokens before the input; PEFT requires the others.

    Raises: UserError for a table of embeddings with more rows than the vocabulary, which PEFT does not find, and for a model that
        does not generate from embeddings, which soft prompts are.
    """
    generates = not (has_head(model.config) or model.config.is_encoder_decoder)
    if generates and "inputs_embeds" not in inspect.signature(model.prepare_inputs_for_generation).parameters:
        raise UserError(
            f"soft prompts do not fit this {model.config.model_type} model, which does not generate from embeddings; use LoRA"
        )
    text, table = model.config.get_text_config(decoder=True), model.get_input_embeddings().weight
    if model.config.model_type == "mllama_text_model":
        raise UserError(
            f"soft prompts do not fit {model.config.model_type}: its table of embeddings has {table.shape[0] - text.vocab_size} rows "
            "more than its vocabulary, and PEFT looks for one of the same size; use LoRA"
        )
    return {
        "token_dim": table.shape[1],
        "num_layers": 1,
        "num_attention_heads": 1,
    }


def prepare_quantized(model: PreTrainedModel, upcast: str) -> None:
    """Freezes a quantized base, upcasts the rest to fp32 if `upcast` is "all", and prints what that costs.

    PEFT's `prepare_model_for_kbit_training` upcasts every weight that is not quantized to fp32: norms, but also embeddings
    and the output head. These then need twice the memory, and make each layer's input fp32 too. None of this is necessary:
    the weights are frozen, so no small update can be rounded away, and norms compute in fp32 by themselves (T5LayerNorm
    and LlamaRMSNorm in their code, `nn.LayerNorm` inside its kernel). So QLoRA's recipe does not upcast. For other methods
    PEFT's preparation is the default, because published runs over quantized bases used it.
    """
    if not getattr(model, "is_quantized", False):
        return
    short = [p for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16) and not is_packed(p)]
    if upcast == "all":
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    else:
        model.requires_grad_(False)
    if any(p.is_meta for p in model.parameters()):
        return  # a prediction or a count, not a run
    size = format_bytes(2 * sum(p.numel() for p in short))  # 4 bytes instead of 2 for each weight
    if not short:
        say("quantized", "weights that are not quantized are held in fp32, the type that the run computes in")
    elif upcast == "all":
        say("quantized", f"{len(short)} tensors that are not quantized are upcast to fp32, which costs {size}")
    else:
        say("quantized", f"nothing is upcast to fp32 (--kbit_upcast all would cost {size} and longer activations)")


def refuse_quantized(given: dict[str, Any], what: str) -> None:
    """Raises UserError for flags that quantize the base, which a method that trains the base's weights cannot use."""
    for flag in ("load_in_4bit", "load_in_8bit"):
        if given.get(flag):
            raise UserError(
                f"--{flag} and {what} exclude each other: quantized weights cannot be trained; "
                "leave the flag out, or use recipes/qlora.py"
            )


def refuse_quantized_model(model: PreTrainedModel) -> None:
    """Raises UserError for a checkpoint that is already quantized."""
    if getattr(model, "is_quantized", False):
        raise UserError(
            "this model is already quantized, and quantized weights cannot be trained; use recipes/qlora.py"
        )


def check_least(method: Method, least: int, *names: str) -> None:
    """Raises UserError for a whole number below `least`."""
    for name in names:
        value = getattr(method, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value} is not possible; give a whole number of at least {least}")


def linear_paths(model: PreTrainedModel, head: bool = False) -> list[str]:
    """The full names of the model's linear layers, with or without the output head."""
    output = None if head else model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if ("Linear" in type(module).__name__ or type(module).__name__ == "Conv1D") and module is not output
    ]


def linear_names(model: PreTrainedModel) -> list[str]:
    """The valid targets: the distinct last names of the model's linear layers, such as `q` or `o_proj`."""
    return sorted({path.rsplit(".", 1)[-1] for path in linear_paths(model, head=True)})


def _say_absent(model: nn.Module, flag: str, names: Any) -> None:
    """Warns about default targets of PEFT that this model lacks, for example because its experts are one stacked tensor."""
    if isinstance(names, str):
        return  # a pattern
    there = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    if absent := [name for name in names if name.rsplit(".", 1)[-1] not in there]:
        say_in_run(
            model,
            "warning",
            f"PEFT's default targets {', '.join(absent)} are not in this model and are left out; --{flag} names others",
        )


def check_names(model: nn.Module, flag: str, names: Iterable[str], valid: list[str]) -> None:
    """Raises UserError for a name that matches no module; the message lists the names in `valid`."""
    there = [name for name, _ in model.named_modules()]
    for wanted in names:
        if not any(name == wanted or name.endswith(f".{wanted}") for name in there):
            raise UserError(
                f"--{flag} {wanted} matches no module{did_you_mean(wanted, valid)}; this model has: {', '.join(valid)}"
            )


def targets_of(model: PreTrainedModel, flag: str, names: list[str] | None, mapping: dict[str, Any]) -> Any:
    """The value of PEFT's `target_modules`: the user's `names`, or PEFT's default targets (`mapping`), or all linear layers.

    Raises: UserError for a name that does not exist.
    """
    if names == ["all-linear"]:
        return "all-linear"
    if names:
        merged = OF_EXPERTS if stacked_experts(model) else set()
        check_names(model, flag, [name for name in names if name not in merged], linear_names(model))
        return names
    if (known := mapping.get(model.config.model_type)) is not None:
        _say_absent(model, flag, known)
        return known
    return _all_linear(model, flag)


def _all_linear(model: PreTrainedModel, flag: str) -> Any:
    """PEFT's all-linear, which leaves out the output head; of a mixture of stacked experts the layers outside of the experts."""
    what, architecture = "all linear layers", model.config.model_type
    targets: Any = "all-linear"
    if experts := stacked_experts(model):
        targets = sorted({path.rsplit(".", 1)[-1] for path in linear_paths(model)} - OF_EXPERTS)
        share = sum(p.numel() for p in experts.values()) / sum(p.numel() for p in model.parameters())
        what = f"the linear layers outside of the experts ({', '.join(targets)}); the experts, {share:.0%} of the weights, are left out"
    say_in_run(model, "targets", f"PEFT names none for {architecture}: {what} (--{flag} chooses others)")
    return targets


def say_in_run(model: nn.Module, topic: str, text: str) -> None:
    """Prints a line, but not where `model` has no weights: then it is only counted or predicted."""
    if not any(p.is_meta for p in model.parameters()):
        say(topic, text)


def left_out(model: PreTrainedModel) -> str | None:
    """PEFT's `exclude_modules`: a classification head, which is trained whole, and layers that no text passes through."""
    heads = [rf"{re.escape(name)}(\..*)?" for name in head_modules(model)] if has_head(model.config) else []
    mamba = [r".*\.(out_proj|conv1d)"] if model.config.model_type in FUSED_MAMBA else []
    return "|".join(filter(None, [*heads, *mamba, unused_modules(model)])) or None
