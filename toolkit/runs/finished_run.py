"""Loads finished runs, and their models, from run folders; runs over the same base share it."""

import dataclasses
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, get_origin, get_type_hints

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, TrainingArguments

from toolkit.data.loading import DataArguments
from toolkit.errors import UserError, guarded
from toolkit.errors.numbers import check_numbers
from toolkit.errors.reading import check_regular, check_shape, read_json, read_yaml
from toolkit.files import read_csv
from toolkit.memory.ledger import Ledger
from toolkit.methods import METHODS, Method  # importing them also registers our own adapters with PEFT
from toolkit.methods.base import check_patterns
from toolkit.models.arguments import ModelArguments
from toolkit.models.heads import set_head
from toolkit.models.loading import (
    check_weight_files,
    check_weights,
    load_model,
    load_model_config,
    read_config,
    read_model,
    read_tokenizer,
)
from toolkit.models.soft_prompts import fit_head
from toolkit.tasks import TASKS
from toolkit.tasks.base import Task
from toolkit.tasks.tokenization import PromptTokenizer

# What run.json must hold to load a run, and the shape of what else is read from it.
RECORD = {
    "method": str,
    "task": str,
    "seed": int,
    "weights": str,
    "prompt_template": str,
    "label_names": [str],
    "max_length": int,
    "max_target_length": int,
    "finished?": bool,
    "command?": str,
    "precision?": str,
    "seconds?": float,
    "scores?": {str: {str: float}},
    "parameters?": {"trainable": int, "all": int},
    "versions?": {str: (str, None)},
    "data?": {"name": str, "rows": {str: int}, "sha256": {str: str}},
    "context?": {str: {str: float}},
}
AGAIN = "run the recipe again"
# Numbers of an adapter's configuration that make tensors: as large as a flag's
SIZES: tuple[str, ...] = (
    "r",
    "init_r",
    "target_r",
    "rank",
    "num_virtual_tokens",
    "num_layers",
    "num_attention_heads",
    "token_dim",
)
SIZES += ("encoder_hidden_size", "encoder_num_layers", "adapter_size")


class FinishedRun:
    """The run in `path`: `settings` by flag name, `record` (run.json), `scores`, measured `ledger`, and the model.

    The model is loaded at its first use.

    Raises: UserError if the folder is not that of a finished run, or its files are damaged.
    """

    def __init__(self, path: Path, must_be_finished: bool = True) -> None:
        self.path = path
        self.record = read_record(path)
        self.settings = _read_settings(path)
        if must_be_finished and not self.record.get("finished"):
            raise UserError(f"{path}: the run did not finish; continue it with --resume_from_checkpoint true")

    def __repr__(self) -> str:
        return f"FinishedRun({str(self.path)!r}, method={self.record['method']!r}, scores={self.scores})"

    @property
    def task(self) -> Task:
        """The task that the run learned."""
        return TASKS[self.record["task"]]

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """The scores on the test split: by model (base, tuned) or number of shots, then by metric."""
        return self.record.get("scores", {})

    @cached_property
    def ledger(self) -> Ledger | None:
        """The measured memory of the training steps; None if none was measured.

        Raises: UserError if memory.json is damaged.
        """
        path = self.path / "memory.json"
        return Ledger.load(path) if path.exists() else None

    @cached_property
    def adapter(self) -> PeftConfig | None:
        """The configuration of the saved adapter; None if a whole model was saved."""
        file = self.path / "adapter_config.json"
        if not file.exists():
            return None
        content = read_json(file, f"{file} is damaged", AGAIN)
        for name in SIZES:
            value = content.get(name)
            if isinstance(value, int) and not 0 < value <= 10**6:
                raise UserError(f"{file} is damaged: {name} {value} is not possible; {AGAIN}")
        if content.get("megatron_config") is not None:  # PEFT would import a module that the file names
            raise UserError(f"{file} asks PEFT to import {content.get('megatron_core')!r}, which footprint never does")
        with guarded(f"{file} is damaged", AGAIN):
            return PeftConfig.from_pretrained(self.path)

    @cached_property
    def base(self) -> ModelArguments:
        """The arguments of the base model."""
        names = {f.name for f in dataclasses.fields(ModelArguments)}
        return ModelArguments(**{name: value for name, value in self.settings.items() if name in names})

    @property
    def is_quantized(self) -> bool:
        """Whether the base was quantized while loading."""
        return self.base.load_in_4bit or self.base.load_in_8bit

    def load_base(self) -> PreTrainedModel:
        """The base model in the run's precision, or the whole tuned model if that was saved."""
        if self.adapter is None and any(self.path.glob("*.safetensors")):
            config = read_config(str(self.path))
            model, found = read_model(str(self.path), config)
            check_weights(str(self.path), model, found)
            return model.to(device()).eval()
        config = load_model_config(self.base, kind=self.task.model_kind)
        if self.task.model_kind == "head":
            set_head(config, self.record["label_names"], read_tokenizer(str(self.path)).pad_token_id)
        training = TrainingArguments(seed=self.record["seed"], report_to="none")
        return load_model(self.base, config, getattr(torch, self.record["weights"]), training).eval()

    @property
    def shares_with(self) -> str:
        """A key: runs with an equal key can share one loaded base, each with its own adapter."""
        method = METHODS.get(self.record["method"], Method)
        if self.adapter is None or method.adapter_changes_base(self.adapter) or self.base.random_weights:
            return str(self.path)
        head = f"{self.record['label_names']} {self.record['seed']}" if self.task.model_kind == "head" else ""
        return f"{self.base} {self.record['weights']} {head}"

    @cached_property
    def model(self) -> PreTrainedModel:
        """The tuned model."""
        return Models().of(self)

    @cached_property
    def prompt_tokenizer(self) -> PromptTokenizer:
        """Makes the same prompts as the run did."""
        config = load_model_config(self.base, needs_weights=False, kind=self.task.model_kind)
        return self.task.prompt_tokenizer(
            read_tokenizer(str(self.path)),
            self.record["prompt_template"],
            config.is_encoder_decoder,
            self.record["max_length"],
            self.record["max_target_length"],
            tuple(self.record["label_names"]),
        )

    def generate(self, texts: Sequence[str], model: PreTrainedModel | None = None, num_beams: int = 1) -> list[str]:
        """The answers of the run's model to `texts`, each in the run's prompt; with a classification head, the labels.

        Raises: UserError if `texts` is a single text, or the model cannot be loaded.
        """
        if isinstance(texts, str):
            raise UserError("generate takes a list of texts and got one text; write [text]")
        prompts = [self.prompt_tokenizer.prompt(text)[0] for text in texts]
        model = self.model if model is None else model
        return self.task.continuations(model, self.prompt_tokenizer, prompts, 8, num_beams)

    def sample(self, rows: int) -> list[tuple[str, str]]:
        """(text, reference) of the first `rows` distinct texts of the test split."""
        columns = read_completions(self.path)
        return list(dict(zip(columns["text"], columns["reference"], strict=True)).items())[:rows]

    def score(self, model: PreTrainedModel, sample: Sequence[tuple[Any, str]]) -> dict[str, float]:
        """The scores of `model`'s answers to the texts of `sample`."""
        prompts = [self.prompt_tokenizer.prompt(text)[0] for text, _ in sample]
        answers = self.task.answers(model, self.prompt_tokenizer, prompts, 8)
        return self.task.score(answers, [reference for _, reference in sample], self.prompt_tokenizer.label_names)

    @torch.inference_mode()
    def logits(self, model: PreTrainedModel, sample: Sequence[tuple[Any, str]]) -> torch.Tensor:
        """The fp32 logits of `model` on each prompt: (tokens of all rows, vocabulary), or (rows, classes) for a head.

        A T5-like model that generates text gets the reference as its decoder's input.
        """
        found = []
        for text, reference in sample:
            batch = {"input_ids": self.prompt_tokenizer.prompt(text)[0]}
            if self.prompt_tokenizer.is_encoder_decoder and self.task.model_kind != "head":
                batch["labels"] = self.prompt_tokenizer.target_ids(reference)
            tensors = {name: torch.tensor([ids], device=model.device) for name, ids in batch.items()}
            found.append(model(**tensors).logits.float().cpu().flatten(0, -2))
        return torch.cat(found)


class HoldsModel(Protocol):
    """What `Models` needs to know of a folder."""

    path: Path

    @property
    def adapter(self) -> PeftConfig | None:
        """The configuration of the adapter; None for a whole model."""

    @property
    def shares_with(self) -> str:
        """A key: folders with an equal key can share one loaded base."""

    def load_base(self) -> PreTrainedModel:
        """The base model, or the whole model."""


class Models:
    """The models of several runs. A shared base is loaded once, and adapters are switched without loading it again."""

    def __init__(self) -> None:
        self.loaded: dict[str, PreTrainedModel | PeftModel] = {}

    def of(self, run: HoldsModel) -> PreTrainedModel:
        """The tuned model of `run`, with its adapter active. A model from an earlier call may have lost its adapter."""
        key, name = run.shares_with, str(run.path.resolve()).replace(".", "_")  # module names have no dots
        model = self.loaded[key] if key in self.loaded else run.load_base()
        if run.adapter is not None:
            check_patterns(run.adapter, model, f"{run.path / 'adapter_config.json'}")
            check_weight_files(run.path)
        with guarded(f"{run.path}: its adapter cannot be loaded", AGAIN):
            if run.adapter is None:
                pass
            elif not isinstance(model, PeftModel):
                model = _with_adapter(model, run.path, name)
            elif model.peft_type != run.adapter.peft_type:  # PEFT holds adapters of one type at a time
                base = model.get_base_model() if model.active_peft_config.is_prompt_learning else model.unload()
                model = _with_adapter(base, run.path, name)
            else:
                if name not in model.peft_config and (lost := model.load_adapter(run.path, name).missing_keys):
                    raise UserError(
                        f"{run.path}: its adapter cannot be loaded (it lacks {len(lost)} tensors, {lost[0]} among them)"
                    )
                model.set_adapter(name, inference_mode=True)
        self.loaded[key] = model
        return model.eval()


def _with_adapter(base: PreTrainedModel, path: Path, name: str) -> PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        model = PeftModel.from_pretrained(base, path, adapter_name=name)
    fit_head(model)
    return model


def device() -> torch.device:
    """Where models answer: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def is_run_folder(path: Path) -> bool:
    """Whether `path` looks like a run folder, finished or not; also safe for texts that are too long to be a path."""
    try:
        return (path / "run.json").exists() or (path / "config.yaml").exists()
    except (OSError, ValueError):
        return False


def read_completions(folder: Path) -> dict[str, list[str]]:
    """The columns of the run's completions.csv: text, reference, and the answers of each model.

    Raises: UserError if the file is missing or damaged.
    """
    check_regular(folder / "completions.csv")
    try:
        columns = read_csv(folder / "completions.csv")
        if columns.keys() >= {"text", "reference"}:
            return columns
    except (OSError, ValueError):
        pass
    raise UserError(f"{folder} has no readable completions.csv; give the folder of a finished run")


def read_record(folder: Path) -> dict[str, Any]:
    """The content of a run's run.json; its scores may be infinite or no number.

    Raises: UserError if the folder is not that of a run, or the file is damaged.
    """
    path = _there(folder, "run.json")
    what = f"{path} is damaged"
    record = read_json(path, what, AGAIN, finite=False)
    check_shape(record, RECORD, what, AGAIN)
    if record["task"] not in TASKS:
        raise UserError(f"{folder}: its task {record['task']!r} is unknown; there are {', '.join(sorted(TASKS))}")
    if record["weights"] not in ("float32", "bfloat16", "float16"):
        raise UserError(f"{what}: weights {record['weights']!r} is none of float32, bfloat16, float16; {AGAIN}")
    names = ("seed", "max_length", *(["max_target_length"] if record["max_target_length"] else []))
    try:
        check_numbers({name: record[name] for name in names})
    except UserError as error:
        raise UserError(f"{what}: {str(error).removeprefix('--')}") from None
    return record


def _read_settings(folder: Path) -> dict[str, Any]:
    """The settings in a run's config.yaml, by flag name.

    Raises: UserError if the folder is not that of a run, or the file is damaged.
    """
    path = _there(folder, "config.yaml")
    what = f"{path} is damaged"
    settings = read_yaml(path, what, AGAIN)
    shapes: dict[str, Any] = {}
    for name, kind in (get_type_hints(ModelArguments) | get_type_hints(DataArguments)).items():
        kinds = tuple(one if isinstance(one, type) and one is not type(None) else None for one in get_args(kind))
        literal = get_origin(kind) is Literal
        shapes[f"{name}?"] = str if literal else kinds or kind
        if literal and settings.get(name, get_args(kind)[0]) not in get_args(kind):
            raise UserError(f"{what}: {name} {settings[name]!r} is none of {', '.join(get_args(kind))}; {AGAIN}")
    check_shape(settings, shapes, what, AGAIN)
    return settings


def _there(folder: Path, name: str) -> Path:
    if not (folder / name).exists():
        raise UserError(f"{folder} is not a run folder: it has no {name}; give the output folder of a recipe")
    return folder / name
