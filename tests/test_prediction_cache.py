"""A prediction that was made before is read from a file, unless anything that it depends on has changed."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import toolkit
from toolkit.cli import main as footprint
from toolkit.runs import api, prediction_cache

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture
def made(monkeypatch, tmp_path):
    """The predictions that were really made, while a folder keeps them."""
    monkeypatch.setenv("FOOTPRINT_CACHE", str(tmp_path / "cache"))
    predict, found = api._predict, []

    def noted(**asked):
        found.append(asked)
        return predict(**asked)

    monkeypatch.setattr(api, "_predict", noted)
    return found


@pytest.fixture
def model(tmp_path):
    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config |= {"num_hidden_layers": 2, "vocab_size": 256, "max_position_embeddings": 128}
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    return tmp_path / "model"


def test_the_same_prediction_is_made_once(made, model):
    asked = {"gpu": "RTX 4090", "model_name_or_path": model, "max_length": 64}
    first, second = (toolkit.predict("lora", **asked) for _ in range(2))
    assert len(made) == 1
    assert second.to_json() == first.to_json()


@pytest.mark.parametrize(
    "change",
    [{"max_length": 32}, {"gpu": "RTX 3090"}, {"disk": "1GiB"}, {"method": "full"}, {"advise": True}],
    ids=lambda change: next(iter(change)),
)
def test_another_question_is_another_prediction(change, made, model):
    asked = {"method": "lora", "gpu": "RTX 4090", "model_name_or_path": model, "max_length": 64}
    toolkit.predict(**asked)
    toolkit.predict(**asked | change)
    assert len(made) == 2


def test_a_changed_model_allocator_or_code_is_predicted_again(made, model, monkeypatch, tmp_path):
    asked = {"gpu": "RTX 4090", "model_name_or_path": model, "max_length": 64}
    before = toolkit.predict("lora", **asked)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert toolkit.predict("lora", **asked).allocated_bytes > before.allocated_bytes
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    toolkit.predict("lora", **asked)
    assert len(made) == 3
    (tmp_path / "code").mkdir()
    monkeypatch.setattr(prediction_cache, "PACKAGE", tmp_path / "code")
    toolkit.predict("lora", **asked)
    assert len(made) == 4


@pytest.mark.parametrize("flags", [{"gpu": None}, {"dataset_name": "rows.jsonl"}], ids=["this machine", "data"])
def test_what_depends_on_more_is_not_kept(flags, made, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"dialogue": "a", "summary": "b"}\n' * 20)
    asked = {"gpu": "RTX 4090", "model_name_or_path": model, "max_length": 64}
    for _ in range(2):
        with pytest.raises(toolkit.UserError) if "dataset_name" in flags else contextlib.nullcontext():
            toolkit.predict("lora", **asked | flags)
    assert len(made) == 2
    assert not list(tmp_path.glob("cache/predictions/*.json"))


def test_a_damaged_file_is_predicted_again(made, model, tmp_path):
    asked = {"gpu": "RTX 4090", "model_name_or_path": model, "max_length": 64}
    first = toolkit.predict("lora", **asked)
    (file,) = tmp_path.glob("cache/predictions/*.json")
    file.write_text("{")
    assert toolkit.predict("lora", **asked).reserved_bytes == first.reserved_bytes
    assert len(made) == 2


def test_a_folder_that_cannot_be_written_costs_only_the_copy(made, model, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FOOTPRINT_CACHE", str(tmp_path / "file"))
    for _ in range(2):
        toolkit.predict("lora", gpu="RTX 4090", model_name_or_path=model, max_length=64)
    assert len(made) == 2


def test_the_cache_is_shown_and_cleared(made, model, capsys, tmp_path):
    toolkit.predict("lora", gpu="RTX 4090", model_name_or_path=model, max_length=64)
    capsys.readouterr()
    for words, said in (
        (["cache"], "kept: 1 predictions, "),
        (["cache", "--clear"], "deleted: 1 predictions, "),
        (["cache"], "kept: 0 predictions, 0 B"),
    ):
        with pytest.raises(SystemExit):
            footprint(words)
        assert capsys.readouterr().out.startswith(said)
    assert not (tmp_path / "cache/predictions").exists()


def test_a_kept_prediction_is_shown_without_transformers(model, tmp_path):
    """The libraries that take most of a prediction's time are not imported."""
    code = (
        "import atexit, sys; from toolkit.cli import main\n"
        "atexit.register(lambda: print('transformers' in sys.modules, file=sys.stderr))\n"
        "main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "predict", "lora", "--gpu", "RTX 4090", "--json", "--max_length", "64"]
    command += ["--model_name_or_path", str(model)]
    env = os.environ | {"FOOTPRINT_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    runs = [subprocess.run(command, env=env, capture_output=True, text=True, check=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout
    assert [run.stderr.split()[-1] for run in runs] == ["True", "False"]
