"""The training flags: Hugging Face's `TrainingArguments`, our defaults, and which values are refused."""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

from accelerate.utils import DynamoBackend
from transformers import TrainingArguments

from toolkit.config import optimizers
from toolkit.errors import UserError, words_of
from toolkit.errors.numbers import check_numbers

# TrainingArguments without effect here, because this project or accelerate decides them. Giving one is an error.
OVERRIDDEN = {
    "accelerator_config": "accelerate's settings come from its own configuration file: `accelerate launch --config_file FILE`",
    "auto_find_batch_size": "the run must use the batch size that was requested and predicted",
    "average_tokens_across_devices": "the loss is always averaged over the tokens of all processes",
    "batch_eval_metrics": "metrics are computed from generated text, once, at the end",
    "bf16_full_eval": "evaluation computes in the precision of training: --bf16",
    "disable_tqdm": "progress is a live line in a terminal and plain lines elsewhere",
    "do_eval": "use --eval_strategy to evaluate on the validation split while training",
    "do_predict": "the test split is always scored once, at the end",
    "do_train": "a recipe trains",
    "eval_accumulation_steps": "evaluation keeps no logits, so there is nothing to accumulate",
    "eval_do_concat_batches": "evaluation keeps no logits, so there is nothing to concatenate",
    "enable_jit_checkpoint": "SIGTERM and Ctrl-C always save a checkpoint and end the run",
    "eval_use_gather_object": "evaluation keeps no logits, so there is nothing to gather",
    "fp16_full_eval": "evaluation computes in the precision of training: --fp16",
    "include_for_metrics": "metrics are computed from generated text, once, at the end",
    "include_num_input_tokens_seen": "real (unpadded) tokens are always counted",
    "label_names": "the labels of every task here are in `labels`",
    "length_column_name": "lengths are taken from the tokenized rows",
    "liger_kernel_config": "it cannot be written as a flag; --use_liger_kernel takes the defaults",
    "local_rank": "accelerate launch gives each process its rank",
    "log_on_each_node": "only rank 0 logs",
    "logging_nan_inf_filter": "a loss that is not finite stops the run",
    "parallelism_config": "it comes from accelerate's own configuration file: `accelerate launch --config_file FILE`",
    "prediction_loss_only": "evaluation never keeps logits",
    "remove_unused_columns": "the tokenized rows have no unused columns",
    "save_on_each_node": "only rank 0 writes the run folder",
    "skip_memory_metrics": "footprint measures memory itself: see memory.json in the run folder",
}


# Names that transformers has replaced, and the new ones; both are accepted
RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
# With --optimizer_in_backward, where no step has the gradients of all weights
IN_BACKWARD = {"gradient_accumulation_steps": 1, "max_grad_norm": 0.0}
NEWEST = "true"  # the value of --resume_from_checkpoint when it names no folder


@dataclass
class TrainArguments(TrainingArguments):
    """Hugging Face's `TrainingArguments`, with defaults for one consumer GPU and flags for early stopping."""

    _argument_group_name = "training (all of transformers.TrainingArguments)"

    logging_steps: float = field(
        default=10, metadata={"help": "Log every N optimizer steps (below 1: a share of all)."}
    )
    save_strategy: str = field(
        default="epoch", metadata={"help": "When to write a checkpoint: no, steps, epoch, best."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Keep the newest N checkpoints, and the best."})
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after N evaluations without a better --metric_for_best_model on the validation split."},
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "By how much that metric must improve to count as better."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Resume from a checkpoint-N folder, or (true, or no value) from the newest complete one in --output_dir."
        },
    )
    allow_changed_data: bool = field(
        default=False,
        metadata={"help": "Resume even if the rows, their order or the rows per step changed since the checkpoint."},
    )
    trust_checkpoint: bool = field(
        default=False,
        metadata={
            "help": "Resume from a checkpoint that another user or machine wrote. Loading it may run code that is hidden in it."
        },
    )
    optim: str = field(
        default=TrainingArguments.__dataclass_fields__["optim"].default,
        metadata={
            "help": "An optimizer of transformers.training_args.OptimizerNames, or "
            + ", ".join(f"{name} ({own.paper})" for name, own in optimizers.OWN.items())
            + "."
        },
    )
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Recompute activations in the backward pass: less memory, one more forward pass. The older name is "
            "--gradient_checkpointing.",
            "nargs": "?",
            "const": True,
        },
    )
    activation_checkpointing_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'JSON. {"offload": true}: hold the inputs of layers in pinned host memory; the step waits for the copies. '
            '{"every_n_layers": 2}: recompute only every second layer. Others are those of torch.utils.checkpoint.checkpoint.'
        },
    )
    loss_chunk_tokens: int = field(
        default=512,
        metadata={
            "help": "Compute the loss over N label tokens at a time, and only over those, so that the logits of a batch are never in "
            "memory at once; the loss is the same. 0: over all positions at once."
        },
    )
    mlp_tile_tokens: int = field(
        default=0,
        metadata={
            "help": "Compute feed-forward layers N tokens at a time, and each tile again in the backward pass: keeps the intermediate "
            "results of one tile instead of all, and costs one more forward pass of these layers. Try 2048 for long rows. 0: off."
        },
    )
    optimizer_in_backward: bool = field(
        default=False,
        metadata={
            "help": "Update each weight in the backward pass, as soon as its gradient is complete, and free the gradient: one gradient "
            "is in memory instead of all. For one process; without gradient accumulation, clipping and fp16."
        },
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": "Lay the rows of each batch end to end instead of padding them, for GPT-like models; rows do not see each other, so "
            "that the training is the same. Saves the time and the memory that padding takes. A batch has as many rows as without."
        },
    )
    memory_snapshot: bool = field(
        default=False,
        metadata={
            "help": "Also record every allocation on the GPU, for https://pytorch.org/memory_viz (slows the run's start)."
        },
    )

    def __post_init__(self) -> None:
        """Accepts our own optimizers, which transformers' list of names does not have, and names of checkpointing that 5.17 has not."""
        for old, new in RENAMED.items():
            if new not in TrainingArguments.__dataclass_fields__:
                chosen = getattr(self, new)
                setattr(self, old, getattr(self, old) if chosen is None else chosen)
                setattr(self, new, getattr(self, old))
        name = optimizers.name_of(self)
        own = optimizers.OWN.get(name)
        if own is not None:
            self.optim = "adamw_torch"
        super().__post_init__()
        if own is not None:
            self.optim = name
            own.arguments(self)

    def __copy__(self) -> Self:
        """The same arguments, with the hub's token: a copy is not pickled."""
        same = object.__new__(type(self))
        same.__dict__.update(self.__dict__)
        return same

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the hub's token out of the pickle: Trainer writes it to training_args.bin, which is pushed with the weights."""
        return self.__dict__ | {"hub_token": None}


def check_training(settings: dict[str, Any], given: dict[str, Any]) -> None:
    """Raises UserError for impossible or useless training flags.

    `given` holds the flags that the user set, `settings` those and the recipe's defaults.
    """
    steps = settings.get("max_steps", -1)
    if steps == 0 or steps < -1:
        raise UserError(f"--max_steps {steps} trains nothing; give at least 1, or leave it out to train by epochs")
    if steps > 0 and "num_train_epochs" in given:
        raise UserError(f"--num_train_epochs has no effect together with --max_steps {steps}; leave one of them out")
    epochs = settings.get("num_train_epochs", 3.0)
    if epochs <= 0:
        raise UserError(f"--num_train_epochs {epochs:g} trains nothing; give a number above 0")
    rate = settings.get("learning_rate", 1.0)
    if not 0 < rate < float("inf"):
        raise UserError(f"--learning_rate {rate:g} is not possible; give a number above 0, for instance 1e-4")
    check_numbers(settings)
    if settings.get("early_stopping_patience") is not None:
        if not settings.get("load_best_model_at_end") or str(settings.get("eval_strategy", "no")) == "no":
            raise UserError(
                "--early_stopping_patience needs something to watch: add --eval_strategy epoch --load_best_model_at_end"
            )
    elif "early_stopping_threshold" in given:
        raise UserError(
            "--early_stopping_threshold has no effect without --early_stopping_patience; add it or leave it out"
        )
    for name in ("allow_changed_data", "trust_checkpoint"):
        if settings.get(name) and not settings.get("resume_from_checkpoint"):
            raise UserError(f"--{name} has no effect without --resume_from_checkpoint; add it or leave it out")
    if settings.get("mlp_tile_tokens") and settings.get("use_liger_kernel"):
        raise UserError(
            "--mlp_tile_tokens and --use_liger_kernel exclude each other: both replace feed-forward layers; give one"
        )
    if settings.get("optimizer_in_backward"):
        for name, least in IN_BACKWARD.items():
            if settings.get(name, least) > least:
                raise UserError(
                    f"--{name} {settings[name]} and --optimizer_in_backward exclude each other: the one needs the gradients of all "
                    f"weights at once, and the other frees each when its weight is updated; give --{name} {least:g}, or leave one of them out"
                )
        if settings.get("torch_compile"):
            raise UserError(
                "--torch_compile and --optimizer_in_backward exclude each other: a compiled backward pass gives all gradients at its end; "
                "give one"
            )
    if settings.get("packing"):
        _check_packing(settings)
    _check_strategies(settings, given)
    _check_texts(settings, given)
    reports = settings.get("report_to") not in (None, "none", ["none"], [])
    if "run_name" in given and not reports:
        raise UserError("--run_name has no effect without --report_to, since nothing reads it; add it or leave it out")
    tracks = re.search("trackio|all", str(settings.get("report_to")))
    for name in ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"):
        if name in given and not tracks:
            raise UserError(f"--{name} has no effect without --report_to trackio; add it or leave --{name} out")
    if str(settings.get("optim", "")).startswith(("galore", "apollo")) and not settings.get("optim_target_modules"):
        raise UserError(
            f"--optim {settings['optim']} needs --optim_target_modules: the linear layers whose gradients it projects, such as all-linear"
        )
    if "optim_target_modules" in given and not str(settings.get("optim", "")).startswith(("galore", "apollo", "lomo")):
        raise UserError(
            f"--optim_target_modules has no effect with --optim {settings.get('optim') or 'adamw_torch'}; leave it out"
        )
    for name in ("hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"):
        trackio = name == "hub_private_repo" and reports  # trackio reads this flag too
        if name in given and not settings.get("push_to_hub") and not trackio:
            raise UserError(f"--{name} has no effect without --push_to_hub; add it or leave it out")


def _check_packing(settings: dict[str, Any]) -> None:
    """Raises UserError for flags that would do nothing, or something else, in a batch whose rows are laid end to end."""
    if settings.get("train_sampling_strategy") == "group_by_length":
        raise UserError(
            "--train_sampling_strategy group_by_length saves padding, and with --packing there is none; leave one of them out"
        )
    if settings.get("neftune_noise_alpha"):
        raise UserError(
            "--neftune_noise_alpha scales its noise by the length of a row, which --packing changes; leave one of them out"
        )
    if settings.get("use_cache"):
        raise UserError(
            "--use_cache keeps keys and values, and with them transformers does not tell the rows of --packing apart; leave it out"
        )
    if settings.get("per_device_train_batch_size") == 1:
        raise UserError("--packing has no effect on batches of one row, which have no padding; leave it out")
    if settings.get("torch_compile"):
        raise UserError(
            "--torch_compile would compile again for the lengths of each batch of --packing; leave one of them out"
        )


CHECKPOINTING = {"every_n_layers", "offload", "use_reentrant", "preserve_rng_state", "determinism_check", "debug"}
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def _check_texts(settings: dict[str, Any], given: dict[str, Any]) -> None:
    """Raises UserError for texts that libraries would refuse only while training."""
    for name in ("activation_checkpointing_kwargs", "lr_scheduler_kwargs"):
        value = settings.get(name) or {}
        try:
            content = json.loads(value) if isinstance(value, str) else value
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"--{name} {value} is no JSON ({words_of(error)}); give an object, names with values"
            ) from None
        if not isinstance(content, dict):
            raise UserError(f"--{name} {value} is no JSON object; give names with values")
        if unknown := sorted(content.keys() - CHECKPOINTING) if "checkpointing" in name else []:
            raise UserError(f"--{name} has no {unknown[0]!r}; give some of {', '.join(sorted(CHECKPOINTING))}")
        if "checkpointing" in name:
            _check_checkpointing(name, content, settings)
    if "fsdp_config" in given and not settings.get("fsdp"):
        raise UserError("--fsdp_config has no effect without --fsdp; add it or leave it out")
    backend, mode = settings.get("torch_compile_backend"), settings.get("torch_compile_mode")
    if backend and backend.upper() not in (backends := [str(one.value) for one in DynamoBackend]):
        names = ", ".join(sorted(name.lower() for name in backends))
        raise UserError(f"--torch_compile_backend {backend} is not known; there are {names}")
    if mode and mode not in COMPILE_MODES:
        raise UserError(f"--torch_compile_mode {mode} is not known; there are {', '.join(COMPILE_MODES)}")


def _check_checkpointing(name: str, content: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raises UserError for values of `--activation_checkpointing_kwargs` that are not possible, or without effect."""
    every = content.get("every_n_layers", 1)
    if content and not settings.get("activation_checkpointing"):
        raise UserError(f"--{name} has no effect without --activation_checkpointing; add it or leave it out")
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise UserError(f"--{name}: every_n_layers {every!r} is not possible; give a whole number of at least 1")
    for key in ("offload", "use_reentrant", "preserve_rng_state", "debug"):
        if not isinstance(content.get(key, False), bool):
            raise UserError(f"--{name}: {key} {content[key]!r} is not possible; give true or false")
    if content.get("determinism_check", "none") not in ("default", "none"):
        raise UserError(
            f"--{name}: determinism_check {content['determinism_check']!r} is not possible; give default or none"
        )
    if content.get("use_reentrant") and (content.get("debug") or "determinism_check" in content):
        raise UserError(f"--{name}: debug and determinism_check need use_reentrant false; leave them out")


def by_new_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` by the names of `RENAMED`. Raises: UserError for two values under both names."""
    for old, new in RENAMED.items():
        if old in settings and new in settings and settings[old] != settings[new]:
            raise UserError(
                f"--{old} is the older name of --{new}, and both are given, with other values; give --{new} alone"
            )
    return {RENAMED.get(name, name): value for name, value in settings.items()}


@contextmanager
def by_given_names(given: Collection[str]) -> Iterator[None]:
    """While open, an error names a flag of `RENAMED` as the user does, who gave the flags `given`."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for old, new in RENAMED.items():
            if old in given and new not in given:
                text = re.sub(rf"--{new}\b", f"--{old}", text)
        raise UserError(text) from error.__cause__


def _check_strategies(settings: dict[str, Any], given: dict[str, Any]) -> None:
    """Raises UserError for evaluation and checkpoint flags without effect, and for those that fail at the first evaluation."""
    evaluates, saves = str(settings.get("eval_strategy", "no")), str(settings.get("save_strategy", "epoch"))
    for what, strategy in (("save", saves), ("eval", evaluates)):
        if f"{what}_steps" in given and strategy != "steps":
            raise UserError(
                f"--{what}_steps has no effect with --{what}_strategy {strategy}; add --{what}_strategy steps, or leave it out"
            )
    if settings.get("load_best_model_at_end") and saves != "best" and (evaluates != saves or saves == "no"):
        raise UserError(
            f"--load_best_model_at_end chooses among saved checkpoints that were evaluated, and got --eval_strategy {evaluates} "
            f"and --save_strategy {saves}; give both the same, epoch or steps"
        )
    if saves == "best" and evaluates == "no":
        raise UserError("--save_strategy best needs evaluations to compare; add --eval_strategy epoch (or steps)")
    if "metric_for_best_model" in given:
        watched = settings.get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy")
        if not (settings.get("load_best_model_at_end") or saves == "best" or watched):
            raise UserError(
                "--metric_for_best_model has no effect without --load_best_model_at_end or --save_strategy best; add one "
                "or leave it out"
            )
        if given["metric_for_best_model"] not in ("loss", "eval_loss"):
            raise UserError(
                f"--metric_for_best_model {given['metric_for_best_model']} is not known while training: validation only "
                "computes the loss (generated text is scored once, at the end); give loss, or leave it out"
            )
