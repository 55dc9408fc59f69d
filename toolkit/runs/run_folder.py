"""The run folder: config, versions, data, metrics, memory, completions, model card and weights.

config.yaml       every setting by its flag name; `--config` reads it
run.json          method, command, seed, versions, fingerprint of the data, parameters, scores, time
metrics.jsonl     a line for each logged step
memory.json       the measured memory ledger
completions.csv   text, reference, base answer and tuned answer for each row of the test split
README.md         the model card
adapter_model.safetensors or model.safetensors, the tokenizer, and checkpoint-N folders
"""

import json
import os
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

import yaml

from toolkit.config import Config
from toolkit.console import console, is_main, say, table
from toolkit.distributed.launcher import command, command_that_continues, without_secrets
from toolkit.distributed.ranks import broadcast_from_main, interruption, raise_on_all_ranks
from toolkit.errors import UserError
from toolkit.files import atomic_write, csv_text
from toolkit.memory.environment import stack_versions
from toolkit.memory.ledger import Ledger
from toolkit.memory.report import print_ledger
from toolkit.runs.claim import claim, release
from toolkit.runs.evaluation import Completions
from toolkit.runs.model_card import model_card
from toolkit.runs.preflight import Preflight
from toolkit.tasks.metrics import score_title
from toolkit.training.checkpoints import readable_write_errors
from toolkit.version import __version__


class RunFolder:
    """The folder of one run. Only rank 0 writes, and every write is atomic."""

    def __init__(self, path: Path, record: dict[str, Any], checkpoint: str | None = None) -> None:
        self.path = path
        self.checkpoint = checkpoint
        self.record = record
        self.began = time.monotonic()

    @classmethod
    def create(cls, config: Config, ready: Preflight) -> "RunFolder":
        """Makes the folder of `config`, with its config.yaml and run.json.

        `checkpoint` is the folder to resume from; None if the run starts from the beginning.

        Raises: UserError if the folder cannot be written, is not empty and not resumed, is being written by another process, or
            cannot be resumed; NothingToDo if its run is finished.
        """
        path, checkpoint, mark, resumed = broadcast_from_main(lambda: claim(config, ready))
        config.training.output_dir = str(path)
        raise_on_all_ranks(lambda: _check_shared(mark, config, resumes=checkpoint is not None))
        run = cls(path, _record(config, ready) | ({"resumed": resumed} if resumed else {}), checkpoint)
        try:
            if is_main:
                mark.unlink()
            run.write("config.yaml", yaml.safe_dump(config.as_dict(), sort_keys=True, allow_unicode=True))
            run.write("run.json", json.dumps(run.record, indent=2))
        except BaseException:
            if is_main and config.training.resume_from_checkpoint is None:
                release(path)
                shutil.rmtree(path, ignore_errors=True)  # it was new or empty
            raise
        interruption.continue_with, interruption.folder = command_that_continues(str(path)), path
        say("folder", str(path))
        return run

    def write(self, name: str, text: str) -> None:
        """Writes one file of the folder, from rank 0.

        Raises: UserError if it cannot be written.
        """
        if is_main:
            with readable_write_errors(name, self.path):
                atomic_write(self.path / name, text)

    def end(self) -> None:
        """Records that everything of the run is written; it can no longer be resumed."""
        self.record |= {"finished": True, "seconds": round(time.monotonic() - self.began, 1)}
        self.write("run.json", json.dumps(self.record, indent=2))
        interruption.continue_with = ""
        if is_main:
            release(self.path)

    def finish(
        self, config: Config, ready: Preflight, base: Completions, tuned: Completions, ledger: Ledger | None
    ) -> None:
        """Writes scores, completions, memory ledger and model card, and prints scores and memory."""
        if ledger is not None:
            self.write("memory.json", ledger.to_text())
        elif is_main and self.checkpoint is not None and (self.path / "memory.json").is_file():
            ledger = Ledger.load(self.path / "memory.json")  # no step was left to measure: an earlier start wrote it
        self.record["scores"] = {"base": base.scores, "tuned": tuned.scores}
        self.record["seconds"] = round(time.monotonic() - self.began, 1)
        self.write("completions.csv", _completions(ready, base, tuned))
        self.write("README.md", model_card(config, self.record, ledger))
        self.end()
        if not is_main:
            return
        kinds = list(base.scores)
        rows = [[who, *(f"{scores[k]:.4f}" for k in kinds)] for who, scores in self.record["scores"].items()]
        title = f"Scores on the test split ({len(ready.data.test):,} row{'s' * (len(ready.data.test) != 1)})"
        table(title, ["model", *map(score_title, kinds)], rows)
        if ledger is not None:
            print_ledger(console, ledger)
        say("folder", str(self.path))
        example = "#Person1#: ..." if config.data.dataset_name is None else "a text"
        say("next", f'footprint generate {self.path} "{example}"')


def _check_shared(mark: Path, config: Config, resumes: bool) -> None:
    """Raises UserError if this process does not see rank 0's folder, and the run needs it."""
    training, kind = config.training, config.engine.kind
    needs = {
        "--resume_from_checkpoint": resumes,
        "--load_best_model_at_end": training.load_best_model_at_end,
        f"checkpoints under {kind}": not kind.replicates_checkpoints and training.save_strategy != "no",
    }
    needing = [what for what, needed in needs.items() if needed]
    if needing and not mark.exists():
        raise UserError(
            f"--output_dir {mark.parent} of rank 0 is not the folder that rank {os.environ.get('RANK')} sees, and "
            f"{', '.join(needing)} must be read and written by all: give a folder on a disk that the machines share"
        )


def _record(config: Config, ready: Preflight) -> dict[str, Any]:
    data, training = ready.data, config.training
    return {
        "footprint": __version__,
        "method": config.method.name,
        "task": data.task.name,
        "command": without_secrets(shlex.join(command())),
        "seed": training.seed,
        "processes": training.world_size,
        "versions": stack_versions(),
        "precision": config.precision_reason,
        "weights": str(config.dtype).removeprefix("torch."),
        "parameters": {"trainable": ready.trainable_parameters, "all": ready.all_parameters},
        "data": {
            "name": config.data.dataset_name or "embedded",
            "rows": {"train": len(data.train), "validation": len(data.validation), "test": len(data.test)},
            "sha256": data.fingerprint,
            "truncated": {split: vars(lost) for split, lost in data.truncation.items()},
        },
        "label_names": list(data.prompt_tokenizer.label_names),
        "prompt_template": data.prompt_tokenizer.template,
        "max_length": data.prompt_tokenizer.max_length,
        "max_target_length": data.prompt_tokenizer.max_target_length,
        "finished": False,
    }


def _completions(ready: Preflight, base: Completions, tuned: Completions) -> str:
    columns = (ready.data.test_texts, ready.data.references, base.texts, tuned.texts)
    return csv_text(["text", "reference", "base", "tuned"], zip(*columns, strict=True))
