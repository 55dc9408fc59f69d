"""A run folder read back: its model, ready to write, from the folder alone."""

import dataclasses
import json
from functools import cached_property
from pathlib import Path

import torch
import yaml
from peft import PeftModel
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, TrainingArguments

from toolkit.errors import UserError
from toolkit.models import ModelArguments, auto_class, load_model, load_model_config, set_head
from toolkit.tasks import TASKS
from toolkit.tasks.tokenization import Encoder


class FinishedRun:
    """The run in `path`.

    Raises: UserError where the folder is not that of a finished run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.record = json.loads((path / "run.json").read_text(encoding="utf-8"))
            self.settings = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        except OSError:
            raise UserError(
                f"{path} is not a run folder: it has no run.json and config.yaml; give one that a recipe left"
            ) from None
        if not self.record.get("finished"):
            raise UserError(f"{path}: the run did not finish; continue it with --resume_from_checkpoint true")

    @cached_property
    def model(self) -> PreTrainedModel:
        """The tuned model: the saved one, or its base with the saved adapter on it."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if not (self.path / "adapter_config.json").is_file():
            config = AutoConfig.from_pretrained(self.path)
            return auto_class(config).from_pretrained(self.path, config=config).to(device)
        names = {f.name for f in dataclasses.fields(ModelArguments)}
        args = ModelArguments(**{name: value for name, value in self.settings.items() if name in names})
        kind = TASKS[self.record["task"]].model_kind
        config = load_model_config(args, kind=kind)
        if kind == "head":
            set_head(config, self.record["label_names"], AutoTokenizer.from_pretrained(self.path).pad_token_id)
        training = TrainingArguments(seed=self.record["seed"], report_to="none")
        dtype = getattr(torch, self.record["weights"])
        return PeftModel.from_pretrained(load_model(args, config, dtype, training), self.path)

    @cached_property
    def encoder(self) -> Encoder:
        """Makes prompts as the run did."""
        return TASKS[self.record["task"]].encoder(
            AutoTokenizer.from_pretrained(self.path),
            self.record["prompt_template"],
            self.model.config.is_encoder_decoder,
            self.record["max_length"],
            self.record["max_target_length"],
            tuple(self.record["label_names"]),
        )

    def generate(self, texts: list[str], num_beams: int = 1, batch_size: int = 8) -> list[str]:
        """What the model writes for each of `texts`, put into the run's prompt."""
        prompts = [self.encoder.prompt(text)[0] for text in texts]
        return TASKS[self.record["task"]].continuations(self.model, self.encoder, prompts, batch_size, num_beams)
