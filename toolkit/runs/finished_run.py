"""Loads finished runs, and their models, from run folders; runs over the same base share it."""

import dataclasses
import json
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, TrainingArguments

from toolkit.errors import UserError
from toolkit.files import read_csv
from toolkit.memory.ledger import Ledger
from toolkit.methods import METHODS, Method  # importing them also registers our own adapters with PEFT
from toolkit.models.arguments import ModelArguments
from toolkit.models.heads import auto_class, set_head
from toolkit.models.loading import check_weights, load_model, load_model_config
from toolkit.models.soft_prompts import fit_head
from toolkit.tasks import TASKS
from toolkit.tasks.base import Task
from toolkit.tasks.tokenization import PromptTokenizer

# The keys of run.json that are needed to load a run.
NEEDED = ("method", "task", "seed", "weights", "prompt_template", "label_names", "max_length", "max_target_length")


class FinishedRun:
    """The run in `path`: `settings` by flag name, `record` (run.json), `scores`, measured `ledger`, and the model.

    The model is loaded at its first use.

    Raises: UserError if the folder is not that of a finished run, or its files are damaged.
    """

    def __init__(self, path: Path, must_be_finished: bool = True) -> None:
        self.path = path
        self.record = read_json(path / "run.json")
        self.settings = read_yaml(path / "config.yaml")
        if must_be_finished and not self.record.get("finished"):
            raise UserError(f"{path}: the run did not finish; continue it with --resume_from_checkpoint true")
        if missing := [name for name in NEEDED if name not in self.record]:
            raise UserError(f"{path / 'run.json'} is damaged: it has no {missing[0]!r}; run the recipe again")
        if self.record["task"] not in TASKS:
            raise UserError(
                f"{path}: its task {self.record['task']!r} is unknown; there are {', '.join(sorted(TASKS))}"
            )

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
        return Ledger.load(path) if path.is_file() else None

    @cached_property
    def adapter(self) -> PeftConfig | None:
        """The configuration of the saved adapter; None if a whole model was saved."""
        if not (self.path / "adapter_config.json").is_file():
            return None
        try:
            return PeftConfig.from_pretrained(self.path)
        except (ValueError, TypeError, KeyError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{self.path / 'adapter_config.json'} is damaged: {reason}; run the recipe again") from None

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
            config = AutoConfig.from_pretrained(self.path)
            model, found = auto_class(config).from_pretrained(self.path, config=config, output_loading_info=True)
            check_weights(str(self.path), model, found)
            return model.to(_device()).eval()
        config = load_model_config(self.base, kind=self.task.model_kind)
        if self.task.model_kind == "head":
            set_head(config, self.record["label_names"], AutoTokenizer.from_pretrained(self.path).pad_token_id)
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
            AutoTokenizer.from_pretrained(self.path),
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

    def score(self, model: PreTrainedModel, sample: Sequence[tuple[str, str]]) -> dict[str, float]:
        """The scores of `model`'s answers to the texts of `sample`."""
        prompts = [self.prompt_tokenizer.prompt(text)[0] for text, _ in sample]
        answers = self.task.answers(model, self.prompt_tokenizer, prompts, 8)
        return self.task.score(answers, [reference for _, reference in sample], self.prompt_tokenizer.label_names)

    @torch.inference_mode()
    def logits(self, model: PreTrainedModel, sample: Sequence[tuple[str, str]]) -> torch.Tensor:
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


class Models:
    """The models of several runs. A shared base is loaded once, and adapters are switched without loading it again."""

    def __init__(self) -> None:
        self.loaded: dict[str, PreTrainedModel | PeftModel] = {}

    def of(self, run: FinishedRun) -> PreTrainedModel:
        """The tuned model of `run`, with its adapter active. A model from an earlier call may have lost its adapter."""
        key, name = run.shares_with, str(run.path.resolve()).replace(".", "_")  # module names have no dots
        model = self.loaded[key] if key in self.loaded else run.load_base()
        try:
            if run.adapter is None:
                pass
            elif not isinstance(model, PeftModel):
                model = _with_adapter(model, run.path, name)
            elif model.peft_type != run.adapter.peft_type:  # PEFT holds adapters of one type at a time
                base = model.get_base_model() if model.active_peft_config.is_prompt_learning else model.unload()
                model = _with_adapter(base, run.path, name)
            else:
                if name not in model.peft_config and (lost := model.load_adapter(run.path, name).missing_keys):
                    raise ValueError(f"it lacks {len(lost)} tensors, {lost[0]} among them")
                model.set_adapter(name, inference_mode=True)
        except Exception as error:  # PEFT, safetensors and torch raise exceptions of their own
            raise UserError(
                f"{run.path}: its adapter cannot be loaded ({' '.join(str(error).split())[:200]})"
            ) from None
        self.loaded[key] = model
        return model.eval()


def _with_adapter(base: PreTrainedModel, path: Path, name: str) -> PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        model = PeftModel.from_pretrained(base, path, adapter_name=name)
    fit_head(model)
    return model


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def is_run_folder(path: Path) -> bool:
    """Whether `path` looks like a run folder, finished or not; also safe for texts that are too long to be a path."""
    try:
        return (path / "run.json").is_file() or (path / "config.yaml").is_file()
    except (OSError, ValueError):
        return False


def read_completions(folder: Path) -> dict[str, list[str]]:
    """The columns of the run's completions.csv: text, reference, and the answers of each model.

    Raises: UserError if the file is missing or damaged.
    """
    try:
        columns = read_csv(folder / "completions.csv")
        if columns.keys() >= {"text", "reference"}:
            return columns
    except (OSError, ValueError):
        pass
    raise UserError(f"{folder} has no readable completions.csv; give the folder of a finished run")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a run folder.

    Raises: UserError if the file is missing or damaged.
    """
    return _mapping(path, json.loads, json.JSONDecodeError)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file of a run folder.

    Raises: UserError if the file is missing or damaged.
    """
    return _mapping(path, yaml.safe_load, yaml.YAMLError)


def _mapping(path: Path, parse: Any, damage: type[Exception]) -> dict[str, Any]:
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(
            f"{path.parent} is not a run folder: it has no {path.name}; give the output folder of a recipe"
        ) from None
    except (damage, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path} is damaged: {reason}; run the recipe again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds a {type(content).__name__}; run the recipe again")
    return content
