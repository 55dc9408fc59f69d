"""A method is one file in toolkit/methods and one recipe, nothing else: shown with one that is added to a copy of the project."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from ledgers import assert_same
from safetensors.torch import load_file

from toolkit.memory.ledger import Ledger

# Of the hooks in toolkit/methods/base.py it uses `check`, `changes_base`, `configure`, `attach`, `make_optimizer` and
# `finish_saving`: it changes the base, has its own parameter groups, and rewrites what is saved.
METHOD = '''"""Vectors that rescale the layers of a halved base: of no use, but it needs everything that a method may need."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import IA3Config
from peft.tuners.ia3 import IA3Layer
from safetensors.torch import load_file, save_file

from toolkit.errors import UserError
from toolkit.methods.base import EMBEDDED, PeftBased, task_type


@dataclass
class Halved(PeftBased):
    """Half of each target's weight, times a vector that begins at two."""

    _argument_group_name: ClassVar[str] = "halved"
    name: ClassVar[str] = "halved"
    paper: ClassVar[str] = "arXiv:0000.00000"
    training_defaults: ClassVar[dict[str, Any]] = {"learning_rate": 1e-3}
    embedded_defaults: ClassVar[dict[str, Any]] = EMBEDDED | {"learning_rate": 1e-2}

    halved_modules: list[str] = field(default_factory=lambda: ["q", "wo"], metadata={"help": "Which layers."})
    halved_ratio: float = field(default=4.0, metadata={"help": "The decoder learns this many times faster."})

    def check(self, given):
        super().check(given)
        if self.halved_ratio <= 0:
            raise UserError(f"--halved_ratio {self.halved_ratio:g} is not possible; give a number above 0")

    @property
    def changes_base(self):
        return f"--halved_modules {' '.join(self.halved_modules)}"

    def configure(self, model):
        return IA3Config(target_modules=self.halved_modules, feedforward_modules=[], task_type=task_type(model))

    @torch.no_grad()
    def attach(self, model):
        model = super().attach(model)
        for layer in model.modules():
            if isinstance(layer, IA3Layer):
                layer.base_layer.weight.mul_(0.5)
                layer.ia3_l["default"].fill_(2.0)
        return model

    def make_optimizer(self, model, args, kind, options):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        fast = [p for name, p in trained.items() if "decoder" in name]
        slow = [p for name, p in trained.items() if "decoder" not in name]
        return kind([{"params": slow}, {"params": fast, "lr": self.halved_ratio * args.learning_rate}], **options)

    def finish_saving(self, model, folder):
        """Over the base as it is, each vector is half as large."""
        file = folder / "adapter_model.safetensors"
        save_file({name: tensor / 2 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
'''
SHORT = ["--max_train_samples", "64", "--max_eval_samples", "4", "--max_steps", "2", "--use_cpu"]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project with one more file in toolkit/methods, and one more recipe."""
    copy = tmp_path_factory.mktemp("project")
    for folder in ("toolkit", "recipes", "launch"):
        shutil.copytree(ROOT / folder, copy / folder)
    (copy / "toolkit" / "methods" / "halved.py").write_text(METHOD, encoding="utf-8")
    lora = (ROOT / "recipes" / "lora.py").read_text(encoding="utf-8")
    _, code = lora.split('"""\n', 1)
    before, places = code, ("from toolkit.methods.lora import Lora\n", "parse_config(Lora)")
    for place in places:
        assert code.count(place) == 1
        code = code.replace(place, place.replace("lora", "halved").replace("Lora", "Halved"))
    assert len(set(code.splitlines()) - set(before.splitlines())) == len(places)
    recipe = f'"""Halved: nobody needs it.\n\n    accelerate launch recipes/halved.py\n"""\n{code}'
    (copy / "recipes" / "halved.py").write_text(recipe, encoding="utf-8")
    return copy


def run(project: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """`python WORDS` in the copy, with the copy's package."""
    path = os.pathsep.join([str(project), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=project,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


# Runs each command of a JSON list, as `footprint` or as a recipe, and prints exit code and outputs of each as JSON.
IN_TURN = """
import json, os, runpy, sys, tempfile
from toolkit.cli import main
kept, results = [os.dup(1), os.dup(2)], []
for words in json.loads(sys.argv.pop()):
    streams, code = [tempfile.TemporaryFile() for _ in kept], 0
    for number, stream in enumerate(streams, 1):
        os.dup2(stream.fileno(), number)
    try:
        if words[0] == "footprint":
            main(words[1:])
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    sys.stdout.flush()
    for number, descriptor in enumerate(kept, 1):
        os.dup2(descriptor, number)
    for stream in streams:
        stream.seek(0)
    out, err = (stream.read().decode() for stream in streams)
    results.append({"returncode": code, "stdout": out, "stderr": err})
print(json.dumps(results))
"""


def in_turn(project: Path, *commands: Sequence[str | Path]) -> list[SimpleNamespace]:
    """The results of commands in one process of the copy, which imports everything once."""
    done = run(project, "-c", IN_TURN, json.dumps([[str(word) for word in words] for words in commands]))
    assert done.returncode == 0, done.stderr
    return [SimpleNamespace(**result) for result in json.loads(done.stdout)]


@pytest.fixture(scope="module")
def trained(project) -> tuple[Path, str]:
    """The folder of a run with the new recipe, and what it printed."""
    done = run(project, "recipes/halved.py", *SHORT, "--output_dir", "run")
    assert done.returncode == 0, done.stderr
    return project / "run", done.stdout


@pytest.mark.slow
def test_a_new_method_has_its_flags_their_help_and_their_errors(project):
    shown, wrong, listed, elsewhere = in_turn(
        project,
        ["recipes/halved.py", "--help"],
        ["recipes/halved.py", "--halved_ratio", "0"],
        ["footprint", "methods", "--json"],
        ["recipes/lora.py", "--halved_ratio", "2"],
    )
    assert shown.returncode == 0, shown.stderr
    assert "Vectors that rescale the layers" in " ".join(shown.stdout.split()) and "--halved_ratio" in shown.stdout
    assert (wrong.returncode, wrong.stderr) == (2, "error: --halved_ratio 0 is not possible; give a number above 0\n")
    entries = {entry["name"]: entry for entry in json.loads(listed.stdout)["methods"]}
    assert entries["halved"]["paper"] == "arXiv:0000.00000" and entries["halved"]["trains"]
    assert "unknown flag --halved_ratio (it belongs to the method halved)" in elsewhere.stderr


@pytest.mark.slow
def test_a_new_method_trains_by_its_own_optimizer_and_is_saved_for_the_unchanged_base(trained):
    folder, said = trained
    record = json.loads((folder / "run.json").read_text())
    assert record["finished"] and record["method"] == "halved" and set(record["scores"]) == {"base", "tuned"}
    saved = load_file(folder / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == record["parameters"]["trainable"] == 1280
    assert "halved: 1,280 of 907,648 parameters are trained" in said
    moved = {name: float((tensor - 1).abs().max()) for name, tensor in saved.items()}
    assert all(0 < distance < 0.1 for distance in moved.values())  # around one, not around the two of training
    decoder = [distance for name, distance in moved.items() if "decoder" in name]
    encoder = [distance for name, distance in moved.items() if "decoder" not in name]
    assert min(decoder) > 2 * max(encoder)  # both about one learning rate a step, under AdamW


@pytest.mark.slow
def test_a_new_method_is_predicted_before_and_after_the_run(project, trained):
    folder, said = trained
    assert_same(*(Ledger.load(folder / f"{name}.json") for name in ("predicted_memory", "memory")))
    assert re.search(r"memory +.* at the peak, predicted", said)
    alone, two, sharded = in_turn(
        project,
        ["recipes/halved.py", "--predict", "--use_cpu"],
        ["footprint", "predict", "halved", "--use_cpu", "--launch", "ddp", "--num_processes", "2"],
        ["footprint", "predict", "halved", "--gpu", "RTX 4090", "--launch", "zero3"],
    )
    assert alone.returncode == 0 and "Memory by phase (predicted, cpu)" in alone.stdout, alone.stderr
    assert two.returncode == 0 and "each of 2 processes (DDP)" in two.stdout, two.stderr
    assert "error: --halved_modules q wo under ZeRO-3: it needs whole weights" in sharded.stderr


@pytest.mark.slow
def test_the_run_of_a_new_method_describes_itself_answers_and_merges(project, trained):
    folder, _ = trained
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "fine-tuned with halved" in card and "(arXiv:0000.00000); 1,280 of" in card and "library_name: peft" in card
    answer, merged = in_turn(
        project,
        ["footprint", "generate", folder, "#Person1#: Is it raining? #Person2#: Yes."],
        ["footprint", "merge", folder],
    )
    assert answer.returncode == 0 and answer.stdout.strip(), answer.stderr
    assert merged.returncode == 0, merged.stderr
    about = json.loads((project / "run-merged" / "merge.json").read_text())
    assert about["logits_difference"] < 1e-3 and about["tune_survived"] > 0.99


@pytest.mark.slow
def test_a_new_method_is_compared_with_others(project):
    flags = ["--halved_ratio", "2", *SHORT]
    words = ["footprint", "compare", "--methods", "halved", "--seeds", "1", *flags, "--output_dir", "compared"]
    (done,) = in_turn(project, words)
    assert done.returncode == 0, done.stdout + done.stderr
    compared = json.loads((project / "compared" / "compare.json").read_text())
    assert [entry["method"] for entry in compared["entries"]] == ["base", "halved"]
