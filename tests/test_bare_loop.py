"""recipes/bare_loop.py, the loop without Trainer: the same steps as recipes/lora.py, and no flag that would have no effect."""

import json
import math
import re
import runpy

import pytest
import torch
from conftest import ROOT, recipe
from reliability import Run
from safetensors.torch import load_file
from tiny_models import tiny_model
from transformers import Trainer

from toolkit.cli import main as footprint
from toolkit.config import TrainArguments, parse_config
from toolkit.memory.ledger import Ledger
from toolkit.methods import METHODS

SHORT = [
    "--max_train_samples",
    "60",
    "--max_eval_samples",
    "2",
    "--max_length",
    "96",
    "--logging_steps",
    "1",
    "--use_cpu",
]
OWN = runpy.run_path(str(ROOT / "recipes" / "bare_loop.py"))
CASES = {
    "as it stands": ["--max_steps", "3"],
    "accumulated": [
        *("--max_steps", "3", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "3"),
        *("--weight_decay", "0.1", "--warmup_steps", "1", "--max_grad_norm", "0.5"),
    ],
    # 8 batches an epoch, of which the last two make a step of their own, and dropout
    "epochs": [
        *("--num_train_epochs", "2", "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "3"),
        *("--lora_dropout", "0.1", "--lr_scheduler_type", "cosine", "--max_grad_norm", "0"),
    ],
    "lora+": ["--max_steps", "3", "--loraplus_lr_ratio", "16", "--weight_decay", "0.1"],
}


def metrics(folder):
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def assert_same_steps(folder, other, steps):
    """The same losses, and so the same batches; the same gradients, learning rates and weights."""
    bare, trainer = metrics(folder), metrics(other)
    assert len(bare) == len(trainer) == steps
    for mine, its in zip(bare, trainer, strict=True):
        assert (mine["step"], mine["tokens"]) == (its["step"], its["tokens"])
        for name in ("loss", "grad_norm", "learning_rate"):
            assert math.isclose(mine[name], its[name], rel_tol=1e-6), (mine, its)
    assert bare[0]["loss"] != bare[-1]["loss"]
    saved, wanted = (load_file(path / "adapter_model.safetensors") for path in (folder, other))
    assert saved.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_bare_loop_takes_the_steps_of_the_trainer(case, tmp_path):
    for name in ("bare_loop", "lora"):
        done = recipe(name, *SHORT, *CASES[case], "--output_dir", tmp_path / name)
        assert done.returncode == 0, done.stderr
    assert_same_steps(tmp_path / "bare_loop", tmp_path / "lora", steps=6 if case == "epochs" else 3)
    measured, its = (Ledger.load(tmp_path / name / "memory.json") for name in ("bare_loop", "lora"))
    for phase in ("forward", "backward", "optimizer_step"):
        mine, wanted = (ledger.phases[phase].categories for ledger in (measured, its))
        for states in ("parameters_frozen", "parameters_trainable", "gradients", "optimizer_state"):
            assert mine.get(states) == wanted.get(states), (phase, states)
    assert math.isclose(measured.allocated_bytes, its.allocated_bytes, rel_tol=0.01)


@pytest.mark.slow
def test_the_bare_loop_is_the_trainer_on_two_processes_too(tmp_path):
    flags = [*SHORT, "--max_steps", "3", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]
    for name in ("bare_loop", "lora"):
        argv = (f"recipes/{name}.py", *flags, "--output_dir", tmp_path / name)
        ranks = Run(*argv, log=tmp_path / f"{name}-log", processes=2, preset="ddp")
        assert ranks.wait() == [0, 0], ranks.text()
        assert "16 rows a step: 4 x 2 accumulated x 2 processes" in ranks.text()
        assert ranks.text().count("Scores on") == 1
    assert_same_steps(tmp_path / "bare_loop", tmp_path / "lora", steps=3)


@pytest.mark.slow
def test_the_run_of_a_bare_loop_answers_like_any_other(tmp_path, capsys):
    done = recipe("bare_loop", *SHORT, "--max_steps", "2", "--output_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert re.search(r"memory .* predicted for the (forward|backward) of rows of", done.stdout)
    assert "gemm_4bit" not in done.stderr  # of bitsandbytes, on some CPUs
    assert "step  2/2  loss" in done.stdout and "Memory by phase (measured, cpu)" in done.stdout
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["finished"] and set(record["scores"]) == {"base", "tuned"}
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        footprint(["generate", str(tmp_path / "run"), "#Person1#: Is it raining? #Person2#: Yes."])
    out, err = capsys.readouterr()
    assert not end.value.code and out.strip(), err


@pytest.mark.slow
def test_a_bare_loop_whose_saved_adapter_is_empty_is_refused(tmp_path, monkeypatch):
    def empty(self, model, folder):
        (folder / "adapter_model.safetensors").write_bytes(b"")

    monkeypatch.setattr(METHODS["lora"], "finish_saving", empty)
    done = recipe("bare_loop", *SHORT, "--max_steps", "1", "--output_dir", tmp_path / "run")
    assert done.returncode == 2 and "error: guard 'saved': " in done.stderr, done.stderr


@pytest.mark.parametrize(
    "flags",
    [
        ["--eval_strategy", "epoch"],
        ["--optim", "sgd"],
        ["--resume_from_checkpoint"],
        ["--gradient_checkpointing"],
        ["--save_strategy", "no"],
    ],
    ids=lambda flags: flags[0],
)
def test_a_flag_that_the_bare_loop_does_not_use_is_an_error(flags):
    done = recipe("bare_loop", *flags)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {flags[0]} has no effect in this recipe's own loop; leave it out, or use recipes/lora.py\n"
    )


def test_a_setting_of_a_file_that_is_at_its_default_is_none_that_would_have_no_effect(tmp_path):
    """So that the config.yaml of a run can be run again."""
    (tmp_path / "config.yaml").write_text("save_strategy: epoch\noptim: adamw_torch_fused\nlora_r: 0\n")
    done = recipe("bare_loop", "--config", tmp_path / "config.yaml")
    assert done.stderr == "error: --lora_r 0 is not possible; give a whole number of at least 1\n"


def test_the_bare_loop_refuses_other_engines(monkeypatch):
    for name, value in {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}.items():
        monkeypatch.setenv(name, value)
    done = recipe("bare_loop", "--use_cpu")
    assert (done.returncode, done.stderr) == (
        2,
        "error: this recipe's own loop does not run under ZeRO-3 on 1 process; use launch/ddp.yaml, or recipes/lora.py\n",
    )


def test_the_bare_loop_shows_a_prediction_lists_its_flags_and_says_when_to_choose_it():
    text = (ROOT / "recipes" / "bare_loop.py").read_text(encoding="utf-8")
    assert "    accelerate launch recipes/bare_loop.py\n" in text and "Choose it" in text
    done = recipe("bare_loop", "--predict", "--use_cpu", "--max_length", "32", "--per_device_train_batch_size", "1")
    assert done.returncode == 0 and "Memory by phase (predicted, cpu)" in done.stdout, done.stderr
    assert OWN["USED"] <= set(TrainArguments.__dataclass_fields__)
    assert "bare_loop" not in METHODS


@pytest.mark.parametrize("name", ["t5", "llama", "gpt2"])
def test_the_weights_that_decay_are_those_of_the_trainer(name):
    config = parse_config(METHODS["lora"], ["--weight_decay", "0.1", "--use_cpu"])
    model = tiny_model(name)  # all of which trains
    groups = OWN["adamw"](model, config).param_groups
    wanted = Trainer(model, config.training).create_optimizer().param_groups
    assert [group["weight_decay"] for group in groups] == [group["weight_decay"] for group in wanted] == [0.1, 0.0]
    for mine, its in zip(groups, wanted, strict=True):
        assert mine["params"] and {*map(id, mine["params"])} == {*map(id, its["params"])}
