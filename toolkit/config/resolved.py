"""Resolves flags into one frozen `Config`: every decision about a run is made here, once, before anything is loaded."""

import copy
import dataclasses
import itertools
import json
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

import toolkit.methods as methods
from toolkit.config import optimizers
from toolkit.config.arguments import (
    IN_BACKWARD,
    NEWEST,
    OVERRIDDEN,
    RENAMED,
    TrainArguments,
    by_given_names,
    by_new_names,
    check_training,
)
from toolkit.config.parser import Flags, RecipeParser, read_flags
from toolkit.data.loading import DataArguments
from toolkit.distributed.engine import Engine, EngineKind
from toolkit.distributed.launch_files import LaunchEnvironment, current_launch_environment
from toolkit.distributed.ranks import broadcast_from_main
from toolkit.distributed.request import requested_engine
from toolkit.errors import UserError, check_filled, words_of
from toolkit.memory.cuda.cards import Card
from toolkit.models.arguments import ModelArguments
from toolkit.models.loading import load_model_config, weights_dtype
from toolkit.tasks import TASKS, Task


@dataclass(frozen=True)
class Config:
    """One run: method, model, data, training and launch, and the decisions that follow from them, each with its reason.

    Preflight, prediction, training and the run folder all read this; none of them decides again.
    """

    method: methods.Method
    model: ModelArguments
    data: DataArguments
    training: TrainArguments
    launch: LaunchEnvironment = field(repr=False)  # of this process
    engine: Engine  # the requested one
    dtype: torch.dtype  # of the weights as loaded
    dtype_reason: str
    precision_reason: str
    optimizer: str  # its name
    optimizer_reason: str
    chooses_folder: bool = False  # --output_dir was not given, so that any new folder will do
    predict: bool = False  # show the predicted memory instead of training; needs a model's config, but no weights

    @property
    def task(self) -> Task:
        """What is learned."""
        return TASKS[self.data.task]

    @cached_property
    def model_config(self) -> PreTrainedConfig:
        """The model's own configuration, without the head of a classification task: the head's classes come from the data.

        Raises: UserError as `toolkit.models.loading.load_model_config` does.
        """
        needs_weights, kind = not self.predict, self.task.model_kind
        return load_model_config(self.model, fp16=self.training.fp16, needs_weights=needs_weights, kind=kind)

    @property
    def beside_packed(self) -> torch.dtype:
        """The type of the weights that bitsandbytes does not pack: fp32 under --kbit_upcast all, otherwise that of the model."""
        quantizes = self.model.load_in_4bit or self.model.load_in_8bit
        return torch.float32 if quantizes and getattr(self.method, "kbit_upcast", None) == "all" else self.dtype

    @property
    def snapshot_file(self) -> Path | None:
        """Where to record the first steps' allocations for PyTorch's memory viewer; None without --memory_snapshot."""
        return Path(self.training.output_dir) / "memory_snapshot.pickle" if self.training.memory_snapshot else None

    def as_dict(self) -> dict[str, Any]:
        """Every setting as flag name to plain value: the content of the run folder's `config.yaml`, which `--config` reads.

        The run's folder, secrets, unset values and flags without effect are left out.
        """
        flat: dict[str, Any] = {}
        for part in (self.method, self.model, self.data):
            flat |= dataclasses.asdict(part)
        hidden = {
            *OVERRIDDEN,
            *RENAMED,
            "output_dir",
            "resume_from_checkpoint",
            "allow_changed_data",
            "trust_checkpoint",
            "hub_token",
        }
        used = self.method.used_training_flags
        training = self.training.to_dict()
        flat |= {name: training[name] for name in training if name not in hidden and (used is None or name in used)}
        # copies, because YAML writes what two flags share as an alias, which `--config` and resumed runs refuse
        return {name: copy.deepcopy(value) for name, value in flat.items() if value not in (None, "", [], {})}

    def as_flags(self) -> Flags:
        """Flags that give another process the same configuration, for a prediction."""
        return Flags({}, self.as_dict() | {"memory_snapshot": False}, predict=True)


def parse_config(
    method: type[methods.Method],
    argv: Sequence[str] | None = None,
    card: Card | None = None,
    used: Collection[str] | None = None,
    engines: Collection[EngineKind] | None = None,
) -> Config:
    """Reads the command line (and `--config FILE`) of the recipe for `method` into a checked `Config`.

    A recipe with its own training loop names what that loop supports: `used`, the training flags that have an effect, and the
    `engines` under which it runs. None: all of them.

    Raises: UserError for flags that cannot be right, before data or model are read.
    """
    flags, other = read_flags(method, argv), f"recipes/{method.name}.py"
    if used is not None:
        training = {f.name for f in dataclasses.fields(TrainArguments)}
        with by_given_names(flags.given):
            for name in sorted(training.intersection(_merged(method, flags)[0]).difference(used)):
                raise UserError(f"--{name} has no effect in this recipe's own loop; leave it out, or use {other}")
    config = configure(method, flags, card)
    if engines is not None and config.engine.kind not in engines:
        raise UserError(f"this recipe's own loop does not run under {config.engine}; use launch/ddp.yaml, or {other}")
    return config


def configure(method: type[methods.Method], flags: Flags, card: Card | None = None) -> Config:
    """The configuration of a run of `method` with `flags`, launched as this process is.

    With a `card`, the configuration is for that GPU, which need not be in this machine. Such a run can only be predicted.

    Raises: UserError for flags that cannot be right, before data or model are read.
    """
    non_default, named = _merged(method, flags)
    launch, engine = current_launch_environment(), requested_engine(named.get("deepspeed"), named.get("fsdp"))
    if card is None and not named.get("use_cpu"):
        _check_gpus()
    optim, why = _choose_optimizer(method, engine, _on_gpu(named, card))
    settings = method.defaults(non_default) | ({"optim": optim} if optim else {})
    settings |= (IN_BACKWARD if named.get("optimizer_in_backward") else {}) | named
    if (own_optimizer := optimizers.OWN.get(settings.get("optim", ""))) is not None:
        settings |= {name: value for name, value in own_optimizer.defaults.items() if name not in named}
    check_filled(non_default)
    for name in non_default:
        if name in OVERRIDDEN:
            raise UserError(f"--{name} has no effect here: {OVERRIDDEN[name]}; leave it out")
    with by_given_names({*flags.given, *flags.from_file}):
        check_training(settings, non_default)
    model, data, own = (_build(part, settings) for part in (ModelArguments, DataArguments, method))
    for part in (model, data, own):
        part.check(non_default)
    if own_optimizer is not None and own_optimizer.one_learning_rate and own.learning_rates_flag:
        name = settings["optim"]
        raise UserError(f"--optim {name} allows only one learning rate; leave out {own.learning_rates_flag}")
    bf16, fp16, reason = choose_precision(settings, card)
    settings |= {"bf16": bf16, "fp16": fp16}
    if settings.get("memory_snapshot") and (flags.predict or card is not None or not _on_gpu(settings, None)):
        raise UserError("--memory_snapshot has no effect here: it records a training run on a GPU; leave it out")
    if card is not None:
        settings["use_cpu"] = True  # the prediction runs here
    training = _build_training(settings, own, model)
    if flags.predict or card is not None:
        # TrainingArguments sets these, and accelerate would compile what this process trains later
        for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):
            os.environ.pop(name, None)
    dtype, dtype_reason = weights_dtype(model, own.freezes_base, training.bf16, training.fp16)
    return Config(
        method=own,
        model=model,
        data=data,
        training=training,
        launch=launch,
        engine=engine,
        dtype=dtype,
        dtype_reason=dtype_reason,
        precision_reason=reason,
        optimizer=optimizers.name_of(training),
        optimizer_reason="as asked for" if "optim" in named else why,
        chooses_folder=not named.get("output_dir") and not training.resume_from_checkpoint,
        predict=flags.predict,
    )


def _merged(method: type[methods.Method], flags: Flags) -> tuple[dict[str, Any], dict[str, Any]]:
    """The user's settings that differ from the defaults (`non_default`), and all of the user's settings (`named`).

    Flags are always in both. A key of the file with its default value is only in `named`. So a run's own config.yaml, which
    has every setting, can be used as `--config` again.
    """
    on_command_line = by_new_names(flags.given)
    from_file = _not_replaced(by_new_names(flags.from_file), on_command_line)
    named = from_file | on_command_line
    if not from_file:
        return named, named
    defaults, parser = method.defaults(named), RecipeParser(method)
    changed = {k: v for k, v in from_file.items() if v != defaults.get(k, parser.get_default(k))}
    return changed | on_command_line, named


def _not_replaced(from_file: dict[str, Any], on_command_line: dict[str, Any]) -> dict[str, Any]:
    """The file's settings without those that a flag of another name replaces.

    --max_steps and --num_train_epochs each replace the other, because both set the length of the run. A --save_strategy or
    --eval_strategy other than `steps` replaces save_steps or eval_steps, --activation_checkpointing false its options, and
    --optimizer_in_backward false what it had excluded.
    """
    replaced = set()
    for flag, other in (("max_steps", "num_train_epochs"), ("num_train_epochs", "max_steps")):
        if flag in on_command_line:
            replaced.add(other)
    for what in ("save", "eval"):
        if on_command_line.get(f"{what}_strategy", "steps") != "steps":
            replaced.add(f"{what}_steps")
    if on_command_line.get("activation_checkpointing") is False:
        replaced.add("activation_checkpointing_kwargs")
    if on_command_line.get("optimizer_in_backward") is False and from_file.get("optimizer_in_backward"):
        replaced.update(IN_BACKWARD)
    return {name: value for name, value in from_file.items() if name not in replaced}


def _choose_optimizer(method: type[methods.Method], engine: Engine, on_gpu: bool) -> tuple[str | None, str]:
    """The default optimizer (None: Trainer's own default), and why."""
    optim, why = method.optimizer(on_gpu)
    if optim and engine.kind.is_zero and engine.offloads_optimizer:
        return None, "its state is offloaded, so that it need not be small or paged"
    if optim and engine.kind is EngineKind.FSDP2:
        return None, "bitsandbytes' optimizers do not update FSDP2's shards"
    return optim, why


def _check_gpus() -> None:
    """Raises UserError if two processes of this machine would use the same GPU."""
    local, there = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if 0 < there < local:
        raise UserError(
            f"{local} processes were started on this machine, which has {there} GPU{'s' if there > 1 else ''}: launch with "
            f"--num_processes {there}"
        )


def _on_gpu(settings: dict[str, Any], card: Card | None) -> bool:
    return card is not None or (torch.cuda.is_available() and not settings.get("use_cpu"))


def choose_precision(settings: dict[str, Any], card: Card | None = None) -> tuple[bool, bool, str]:
    """Whether to compute in bf16 or fp16 (neither: fp32), and why. Without flags: bf16 on every card that supports it.

    Raises: UserError for flags that exclude each other, and for fp16 without a GPU.
    """
    bf16, fp16 = settings.get("bf16"), settings.get("fp16")
    if bf16 and fp16:
        raise UserError("--bf16 and --fp16 exclude each other; give one of them")
    on_gpu = _on_gpu(settings, card)
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", "bf16", "fp16"):
        raise UserError(
            f"the launch configuration has mixed_precision {launched}, in which no recipe computes; give bf16, fp16 or no"
        )
    if bf16 is None and fp16 is None and launched in ("bf16", "fp16"):
        return launched == "bf16", launched == "fp16", f"{launched}: the launch configuration"
    if fp16 and not on_gpu:
        raise UserError("--fp16 needs a GPU, and there is none here (or --use_cpu was given); use --bf16 or fp32")
    if bf16 is not None or fp16 is not None:
        name = "bf16" if bf16 else "fp16" if fp16 else "fp32"
        return bool(bf16), bool(fp16), f"{name}: as asked for"
    if not on_gpu:
        return False, False, "fp32: " + ("--use_cpu" if settings.get("use_cpu") else "no GPU")
    if card is not None:
        (major, minor), has_bf16 = card.capability, card.has_bf16
    else:
        # The process has not selected its device yet.
        major, minor = torch.cuda.get_device_capability(int(os.environ.get("LOCAL_RANK", "0")))
        has_bf16 = major >= 8  # Ampere and later
    return has_bf16, False, f"{'bf16' if has_bf16 else 'fp32'}: compute capability {major}.{minor}"


def _build(cls: type, settings: dict[str, Any]) -> Any:
    names = {f.name for f in dataclasses.fields(cls) if f.init}
    return cls(**{name: value for name, value in settings.items() if name in names})


def _build_training(settings: dict[str, Any], method: methods.Method, model: ModelArguments) -> TrainArguments:
    ours = {
        "disable_tqdm": True,
        "include_num_input_tokens_seen": "non_padding",
        "logging_nan_inf_filter": False,
        "prediction_loss_only": True,
    }
    if settings.get("activation_checkpointing"):
        given = settings.get("activation_checkpointing_kwargs") or {}
        ours["activation_checkpointing_kwargs"] = {"use_reentrant": False} | (
            json.loads(given) if isinstance(given, str) else given
        )
    usual = {"dataloader_pin_memory": torch.cuda.is_available()}
    if "per_device_train_batch_size" in settings:  # Trainer's default of 8 may need more memory than training does
        usual["per_device_eval_batch_size"] = settings["per_device_train_batch_size"]
    settings = usual | settings | ours
    if settings.get("save_strategy") == "best":  # the default that Trainer itself uses with --load_best_model_at_end
        settings.setdefault("metric_for_best_model", "loss")
    resume = settings.get("resume_from_checkpoint")
    if resume is not None and resume.lower() in ("true", "1", "false", "0"):
        resume = settings["resume_from_checkpoint"] = NEWEST if resume.lower() in ("true", "1") else None
    if not settings.get("output_dir"):
        names_folder = resume is not None and resume != NEWEST
        settings["output_dir"] = str(Path(str(resume)).parent) if names_folder else str(new_output_dir(method, model))
    try:
        training = _build(TrainArguments, settings)
    except (ValueError, ImportError) as error:  # in transformers' words, without the names of its enumerations
        reason = re.sub(r"\b[A-Z]\w+\.([A-Z_]+)\b", lambda name: name[1].lower(), " ".join(str(error).split()))
        wrong = re.match(r"'?(.+?)'? is not a valid ", reason)
        flag = next((f"--{name} " for name, value in settings.items() if wrong and value == wrong[1]), "")
        raise UserError(f"{flag}{reason}") from None
    except (TypeError, KeyError, AttributeError, OSError, ArithmeticError) as error:
        raise UserError(f"the flags of training are refused by transformers ({words_of(error)}); see --help") from error
    training.output_dir = broadcast_from_main(lambda: training.output_dir)  # all ranks must use the same time stamp
    if training.use_cpu and torch.distributed.is_available() and torch.distributed.is_initialized():
        # TrainingArguments passes the timeout on only for GPUs; before torch 2.14 the function is private
        c10d = torch.distributed.distributed_c10d
        set_timeout = c10d.set_timeout if hasattr(c10d, "set_timeout") else c10d._set_pg_timeout
        set_timeout(timedelta(seconds=training.ddp_timeout))
    training._n_gpu = min(training.n_gpu, 1)  # one process drives one GPU, so torch's DataParallel never runs
    return training


def new_output_dir(method: methods.Method, model: ModelArguments) -> Path:
    """`runs/<method>-<model>-<time>`: a folder that no earlier run has used."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = Path("runs") / f"{method.name}-{model.short_name}-{stamp}"
    names = (folder.with_name(f"{folder.name}-{n}") for n in itertools.count(2))
    return next(name for name in itertools.chain([folder], names) if not name.exists())
