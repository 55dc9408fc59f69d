"""Flags and YAML become one checked `Config`, before anything is loaded.

A recipe is described by four flat dataclasses: its method's own, `ModelArguments`, `DataArguments` and `TrainArguments`
(all of Hugging Face's `TrainingArguments`, by its own flag names). Each field is a flag and a YAML key of the same name.
`--config FILE` reads YAML whose keys are flags; flags on the command line win.
"""

import dataclasses
import json
import os
import sys
from argparse import SUPPRESS, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from toolkit import methods
from toolkit.data.loading import DataArguments
from toolkit.distributed.ranks import broadcast_from_main
from toolkit.distributed.request import requested_engine
from toolkit.errors import UserError, did_you_mean
from toolkit.memory.cuda.cards import Card
from toolkit.models.arguments import ModelArguments
from toolkit.training.arguments import NEWEST, OVERRIDDEN, TrainArguments, check_training


@dataclass
class Config:
    """What one run is: its method, model, data and training, and why it computes in the precision that it does."""

    method: methods.Method
    model: ModelArguments
    data: DataArguments
    training: TrainArguments
    precision_reason: str
    optimizer_reason: str
    predict: bool = False  # show the predicted memory instead of training

    @property
    def snapshot_file(self) -> Path | None:
        """Where the GPU's allocations of the first steps are recorded for PyTorch's memory viewer, if they are to be."""
        return Path(self.training.output_dir) / "memory_snapshot.pickle" if self.training.memory_snapshot else None

    def as_dict(self) -> dict[str, Any]:
        """Every setting as flag name to plain value: what `config.yaml` in the run folder holds, and `--config` reads.

        Left out are the folder that the run is in, secrets, and whatever is unset.
        """
        flat: dict[str, Any] = {}
        for part in (self.method, self.model, self.data):
            flat |= dataclasses.asdict(part)
        hidden = {*OVERRIDDEN, "output_dir", "resume_from_checkpoint", "allow_changed_data", "hub_token"}
        flat |= {name: value for name, value in self.training.to_dict().items() if name not in hidden}
        return {name: value for name, value in flat.items() if value not in (None, "", [], {})}


class Parser(HfArgumentParser):
    """Hugging Face's parser, with one clear line instead of a usage page, and no guessing of abbreviated flags."""

    def __init__(self, method: type[methods.Method], **kwargs: Any) -> None:
        super().__init__([method, ModelArguments, DataArguments, TrainArguments], allow_abbrev=False, **kwargs)
        self.add_argument("--config", metavar="FILE", help="YAML file whose keys are these flags; flags here win.")
        next(a for a in self._actions if a.dest == "resume_from_checkpoint").__dict__ |= {"nargs": "?", "const": NEWEST}
        self.add_argument("--predict", action="store_true", help="Show what memory the run will need, and do not run.")

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))

    def given(self, argv: Sequence[str], where: str = "") -> dict[str, Any]:
        """The settings that `argv` names, as field name to typed value, without defaults.

        Raises: UserError for an unknown flag (with the nearest valid one), a missing or a mistyped value.
        """
        marker = object()
        names = {action.dest for action in self._actions if action.dest is not SUPPRESS}
        try:
            space, rest = self.parse_known_args(list(argv), Namespace(**dict.fromkeys(names, marker)))
        except UserError as error:
            raise UserError(f"{where}{error}") from None
        if rest:
            self._refuse_unknown(rest[0], where)
        return {name: value for name, value in vars(space).items() if value is not marker}

    def flags(self) -> dict[str, Any]:
        """Flag name (without dashes) to its argparse action."""
        return {
            option.lstrip("-"): action
            for action in self._actions
            for option in action.option_strings
            if "_" in option or "-" not in option[2:]
        }

    def _refuse_unknown(self, got: str, where: str) -> NoReturn:
        name = got.lstrip("-").split("=")[0].replace("-", "_")
        if not got.startswith("-"):
            raise UserError(f"{where}unexpected value {got!r}: every setting is a flag, --name value")
        owners = [m for m, cls in sorted(methods.METHODS.items()) if name in {f.name for f in dataclasses.fields(cls)}]
        hint = f" (it belongs to the method {owners[0]})" if owners else did_you_mean(name, self.flags())
        shown = name if where else f"--{name}"
        raise UserError(f"{where}unknown {'key' if where else 'flag'} {shown}{hint}; --help lists them all")


def parse_config(method: type[methods.Method], argv: Sequence[str] | None = None, card: Card | None = None) -> Config:
    """Reads the command line (and `--config FILE`) of the recipe for `method` into a checked `Config`.

    With a `card`, the configuration is the one for that card, which need not be in this machine: it can be predicted.

    Raises: UserError for anything that cannot be right, before data or model are touched.
    """
    parser = Parser(method, description=sys.modules[method.__module__].__doc__)
    given = parser.given(sys.argv[1:] if argv is None else argv)
    predict = given.pop("predict", False)
    from_file: dict[str, Any] = {}
    if (path := given.pop("config", None)) is not None:
        from_file = _from_yaml(parser, Path(path))
        # A key at its default says nothing: a run's own config.yaml, which names every setting, can be run again.
        for flag, other in (("max_steps", "num_train_epochs"), ("num_train_epochs", "max_steps")):
            if flag in given and other not in given:
                from_file.pop(other, None)  # the file's length of the run is overruled
        for what in ("save", "eval"):
            if given.get(f"{what}_strategy", "steps") != "steps":
                from_file.pop(f"{what}_steps", None)
        usual = method.defaults(from_file | given)
        given = {k: v for k, v in from_file.items() if v != usual.get(k, parser.get_default(k))} | given
    named = from_file | given
    optim, why = method.optimizer(_on_gpu(named, card))
    engine = requested_engine(named.get("deepspeed"), named.get("fsdp"))
    if optim and engine.kind.startswith("ZeRO") and engine.optimizer_state != "with the model":
        optim, why = None, "its state is offloaded, so that it need not be small or paged"
    if optim and engine.kind == "FSDP2":
        optim, why = None, "bitsandbytes' optimizers do not update FSDP2's shards"
    if card is None and not named.get("use_cpu"):
        _check_gpus()
    settings = method.defaults(given) | ({"optim": optim} if optim else {}) | named
    if settings.get("optim") == "prodigy" and "learning_rate" not in named:
        settings["learning_rate"] = 1.0  # it finds the step size itself, and this multiplies it
    for name in given:
        if name in OVERRIDDEN:
            raise UserError(f"--{name} has no effect here: {OVERRIDDEN[name]}; leave it out")
    check_training(settings, given)
    model, data, own = (_build(part, settings) for part in (ModelArguments, DataArguments, method))
    for part in (model, data, own):
        part.check(given)
    settings["bf16"], settings["fp16"], reason = choose_precision(settings, card)
    if settings.get("memory_snapshot") and (predict or card is not None or not _on_gpu(settings, None)):
        raise UserError("--memory_snapshot has no effect here: it records a run on a GPU, as it trains; leave it out")
    if card is not None:
        settings["use_cpu"] = True  # the prediction runs here
    why = "as asked for" if "optim" in named else why
    return Config(own, model, data, _build_training(settings, own, model), reason, why, predict)


def _check_gpus() -> None:
    """Raises UserError where two processes of this machine would take the same GPU."""
    local, there = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if 0 < there < local:
        raise UserError(
            f"{local} processes were started on this machine, which has {there} GPU{'s' if there > 1 else ''}: launch with "
            f"--num_processes {there}"
        )


def _on_gpu(settings: dict[str, Any], card: Card | None) -> bool:
    return card is not None or (torch.cuda.is_available() and not settings.get("use_cpu"))


def choose_precision(settings: dict[str, Any], card: Card | None = None) -> tuple[bool, bool, str]:
    """Whether to compute in bf16 or fp16 (neither: fp32), and why: bf16 wherever the card has it, unless flags say else.

    Raises: UserError for flags that exclude each other, and for fp16 without a GPU.
    """
    bf16, fp16 = settings.get("bf16"), settings.get("fp16")
    if bf16 and fp16:
        raise UserError("--bf16 and --fp16 exclude each other; give one of them")
    on_gpu = _on_gpu(settings, card)
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
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
        major, minor = torch.cuda.get_device_capability(int(os.environ.get("LOCAL_RANK", "0")))  # not chosen yet
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
    if settings.get("gradient_checkpointing") or settings.get("activation_checkpointing"):
        ours["gradient_checkpointing_kwargs"] = settings.get("gradient_checkpointing_kwargs") or {
            "use_reentrant": False
        }
    usual = {"dataloader_pin_memory": torch.cuda.is_available()}
    if "per_device_train_batch_size" in settings:  # for Trainer's own 8 may need more memory than training does
        usual["per_device_eval_batch_size"] = settings["per_device_train_batch_size"]
    settings = usual | settings | ours
    if settings.get("save_strategy") == "best":  # Trainer's own default where --load_best_model_at_end asks
        settings.setdefault("metric_for_best_model", "loss")
    resume = settings.get("resume_from_checkpoint")
    if resume is not None and resume.lower() in ("true", "1", "false", "0"):
        resume = settings["resume_from_checkpoint"] = NEWEST if resume.lower() in ("true", "1") else None
    if not settings.get("output_dir"):
        names_folder = resume is not None and resume != NEWEST
        settings["output_dir"] = str(Path(str(resume)).parent) if names_folder else _new_output_dir(method, model)
    try:
        training = _build(TrainArguments, settings)
    except (ValueError, ImportError) as error:
        raise UserError(" ".join(str(error).split())) from None
    training.output_dir = broadcast_from_main(lambda: training.output_dir)  # its time stamp must be one for all ranks
    if training.use_cpu and torch.distributed.is_available() and torch.distributed.is_initialized():
        # TrainingArguments passes it on for GPUs alone; before torch 2.14 the function is private
        c10d = torch.distributed.distributed_c10d
        set_timeout = c10d.set_timeout if hasattr(c10d, "set_timeout") else c10d._set_pg_timeout
        set_timeout(timedelta(seconds=training.ddp_timeout))
    training._n_gpu = min(training.n_gpu, 1)  # one process drives one GPU; torch's DataParallel is never what runs
    return training


def _new_output_dir(method: methods.Method, model: ModelArguments) -> str:
    """`runs/<method>-<model>-<time>`: a folder that no earlier run has used."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = Path("runs") / f"{method.name}-{model.short_name}-{stamp}"
    names = [folder] + [folder.with_name(f"{folder.name}-{n}") for n in range(2, 100)]
    return str(next(name for name in names if not name.exists()))


def _from_yaml(parser: Parser, path: Path) -> dict[str, Any]:
    """The settings of a YAML file. Each goes through the flag of its name, so types are checked by the same rules."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror}); give an existing YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--config {path}: not valid YAML ({reason})") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: got a {type(content).__name__}; the file must hold `flag_name: value` lines")
    given: dict[str, Any] = {}
    flags = parser.flags()
    where = f"{path}: "
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in flags or name in ("config", "help", "h"):
            parser._refuse_unknown(f"--{name}", where)
        if value is None:
            continue  # as if the key were not there
        if name == "report_to" and isinstance(value, list):  # as a run's own config.yaml has it; the flag takes one
            given[name] = [str(one) for one in value]
            continue
        given |= parser.given(_as_argv(name, value, flags[name], where), where)
    return given


def _as_argv(name: str, value: Any, action: Any, where: str) -> list[str]:
    takes_list = action.nargs == "+"
    if isinstance(value, list):
        if not takes_list:
            raise UserError(f"{where}{name} takes one value, got a list of {len(value)}")
        return [f"--{name}", *map(str, value)]
    if isinstance(value, dict):
        if name not in TrainingArguments._VALID_DICT_FIELDS:
            raise UserError(
                f"{where}{name} takes one value, got a mapping with {', '.join(map(str, value)) or 'no keys'}"
            )
        return [f"--{name}", json.dumps(value)]
    return [f"--{name}={str(value).lower() if isinstance(value, bool) else value}"]
