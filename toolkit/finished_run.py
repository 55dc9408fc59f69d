"""Run folders read back: their models, ready to write, from the folders alone; runs over one base share it."""

import csv
import dataclasses
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, TrainingArguments

from toolkit.errors import UserError
from toolkit.evaluation import generate
from toolkit.guards import ALTERS_BASE
from toolkit.methods import METHODS  # noqa: F401 - a tuner of ours is known to PEFT once it is imported
from toolkit.models import ModelArguments, auto_class, load_model, load_model_config
from toolkit.tasks.tokenization import Encoder, Truncation


class FinishedRun:
    """The run in `path`.

    Raises: UserError where the folder is not that of a finished run, or its files are damaged.
    """

    def __init__(self, path: Path, must_be_finished: bool = True) -> None:
        self.path = path
        self.record = read_json(path / "run.json")
        self.settings = _read_yaml(path / "config.yaml")
        if must_be_finished and not self.record.get("finished"):
            raise UserError(f"{path}: the run did not finish; continue it with --resume_from_checkpoint true")
        for file, holds, names in (
            ("run.json", self.record, ("method", "seed", "weights", "max_length", "max_target_length")),
            ("config.yaml", self.settings, ("prompt_template",)),
        ):
            if missing := [name for name in names if name not in holds]:
                raise UserError(f"{path / file} is damaged: it has no {missing[0]!r}; run the recipe again")

    @cached_property
    def adapter(self) -> PeftConfig | None:
        """The configuration of the saved adapter; None where a whole model was saved."""
        if not (self.path / "adapter_config.json").is_file():
            return None
        try:
            return PeftConfig.from_pretrained(self.path)
        except (ValueError, TypeError, KeyError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{self.path / 'adapter_config.json'} is damaged: {reason}; run the recipe again") from None

    @cached_property
    def base(self) -> ModelArguments:
        """The model that was tuned."""
        names = {f.name for f in dataclasses.fields(ModelArguments)}
        return ModelArguments(**{name: value for name, value in self.settings.items() if name in names})

    @property
    def is_quantized(self) -> bool:
        """Whether the base was quantized while loading."""
        return self.base.load_in_4bit or self.base.load_in_8bit

    def load_base(self) -> PreTrainedModel:
        """The untuned model, as the run held it; or the whole tuned one where that was saved."""
        if self.adapter is None and any(self.path.glob("*.safetensors")):
            config = AutoConfig.from_pretrained(self.path)
            return auto_class(config).from_pretrained(self.path, config=config).to(_device()).eval()
        training = TrainingArguments(seed=self.record["seed"], report_to="none")
        dtype = getattr(torch, self.record["weights"])
        return load_model(self.base, load_model_config(self.base), dtype, training).eval()

    @property
    def shares_with(self) -> str:
        """Runs of which this is the same take the same base, each with its own adapter."""
        taken = str(getattr(self.adapter, "init_lora_weights", "")).startswith(ALTERS_BASE)
        if self.adapter is None or taken or self.base.random_weights:
            return str(self.path)
        return f"{self.base} {self.record['weights']}"

    @cached_property
    def model(self) -> PreTrainedModel:
        """The tuned model."""
        return Models().of(self)

    @cached_property
    def encoder(self) -> Encoder:
        """Makes prompts as the run did."""
        is_encoder_decoder = load_model_config(self.base, needs_weights=False).is_encoder_decoder
        return Encoder(
            AutoTokenizer.from_pretrained(self.path),
            self.settings["prompt_template"],
            is_encoder_decoder,
            self.record["max_length"],
            self.record["max_target_length"],
        )

    def generate(self, texts: Sequence[str], model: PreTrainedModel | None = None, num_beams: int = 1) -> list[str]:
        """What the run's model writes for each of `texts`, put into the run's prompt."""
        prompts = [self.encoder.prompt(text)[0] for text in texts]
        tokenizer, length = self.encoder.tokenizer, self.encoder.max_target_length
        return generate(self.model if model is None else model, tokenizer, prompts, 8, length, num_beams)

    def sample(self, rows: int) -> list[tuple[str, str]]:
        """(text, reference) of the first `rows` different texts of the test split."""
        try:
            with (self.path / "completions.csv").open(newline="", encoding="utf-8") as stream:
                rows_of_test = list(csv.DictReader(stream))
            found = {row.get("text", row.get("dialogue", "")): row["reference"] for row in rows_of_test}
        except (OSError, csv.Error, KeyError):
            raise UserError(f"{self.path} has no readable completions.csv; give a folder that a recipe left") from None
        return list(found.items())[:rows]

    def score(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        """The scores of the run's task."""
        from toolkit.metrics.rouge import rouge

        return rouge(list(predictions), list(references))

    @torch.inference_mode()
    def logits(self, model: PreTrainedModel, sample: Sequence[tuple[str, str]]) -> torch.Tensor:
        """The logits (tokens of all rows, vocabulary) of `model` while it reads each text and its reference, fp32."""
        found = []
        for text, reference in sample:
            row = self.encoder.row(text, reference, Truncation())
            batch = {name: torch.tensor([ids], device=model.device) for name, ids in row.items()}
            found.append(model(**batch).logits.float().cpu().flatten(0, -2))
        return torch.cat(found)


class Models:
    """The models of several runs: a base is loaded once, and adapters over it are switched without loading it again."""

    def __init__(self) -> None:
        self.loaded: dict[str, PreTrainedModel | PeftModel] = {}

    def of(self, run: FinishedRun) -> PreTrainedModel:
        """The tuned model of `run`, its adapter active; the one that an earlier call gave is no longer of its run."""
        key, name = run.shares_with, str(run.path.resolve()).replace(".", "_")  # a name of a module has no dots
        model = self.loaded[key] if key in self.loaded else run.load_base()
        try:
            if run.adapter is None:
                pass
            elif not isinstance(model, PeftModel):
                model = PeftModel.from_pretrained(model, run.path, adapter_name=name)
            elif model.peft_type != run.adapter.peft_type:  # PEFT holds adapters of one type at a time
                base = model.get_base_model() if model.active_peft_config.is_prompt_learning else model.unload()
                model = PeftModel.from_pretrained(base, run.path, adapter_name=name)
            else:
                if name not in model.peft_config:
                    model.load_adapter(run.path, name)
                model.set_adapter(name, inference_mode=True)
        except Exception as error:  # PEFT, safetensors and torch raise their own kinds
            raise UserError(
                f"{run.path}: its adapter cannot be loaded ({' '.join(str(error).split())[:200]})"
            ) from None
        self.loaded[key] = model
        return model.eval()


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def is_run_folder(path: Path) -> bool:
    """Whether `path` looks like a folder that a recipe left, finished or not."""
    return (path / "run.json").is_file() or (path / "config.yaml").is_file()


def read_json(path: Path) -> dict[str, Any]:
    """The object in one of a run folder's files.

    Raises: UserError where it is missing or damaged.
    """
    return _mapping(path, json.loads, json.JSONDecodeError)


def _read_yaml(path: Path) -> dict[str, Any]:
    return _mapping(path, yaml.safe_load, yaml.YAMLError)


def _mapping(path: Path, parse: Any, damage: type[Exception]) -> dict[str, Any]:
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(
            f"{path.parent} is not a run folder: it has no {path.name}; give one that a recipe left"
        ) from None
    except (damage, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path} is damaged: {reason}; run the recipe again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds a {type(content).__name__}; run the recipe again")
    return content
