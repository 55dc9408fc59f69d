"""A model's name: pages of the hub are understood, and without a network an unknown name is refused at once, with similar names."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT

from toolkit.data.loading import DataArguments
from toolkit.errors import UserError
from toolkit.models import hub
from toolkit.models.arguments import ModelArguments


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("https://huggingface.co/meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("https://huggingface.co/meta-llama/Llama-3.2-1B/tree/main", "meta-llama/Llama-3.2-1B"),
        ("https://huggingface.co/google/gemma-2b/blob/main/config.json", "google/gemma-2b"),
        ("http://www.huggingface.co/google/gemma-2b/", "google/gemma-2b"),
        ("https://huggingface.co/Qwen/Qwen3-4B?library=transformers", "Qwen/Qwen3-4B"),
        ("hf.co/Qwen/Qwen3-4B", "Qwen/Qwen3-4B"),
        ("https://huggingface.co/gpt2", "gpt2"),
        ("Qwen/Qwen3-4B", "Qwen/Qwen3-4B"),
        ("gpt2", "gpt2"),
        ("Qwen/Qwen3-4B/", "Qwen/Qwen3-4B"),
        ("Qwen//Qwen3-4B", "Qwen/Qwen3-4B"),
        ("hf://Qwen/Qwen3-4B", "Qwen/Qwen3-4B"),
    ],
)
def test_the_page_of_a_model_is_its_id(given, name):
    assert hub.hub_id(given) == name
    assert ModelArguments(model_name_or_path=given, tokenizer_name=given).source == name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("https://huggingface.co/datasets/squad/tree/main", "not the page of a model"),
        ("https://huggingface.co/spaces/a/b", "not the page of a model"),
        ("https://huggingface.co/a/b/tree/v2", "--model_name_or_path a/b --model_revision v2"),
    ],
)
def test_other_pages_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        hub.hub_id(given)


def test_the_page_of_a_data_set_is_its_id():
    page = "https://huggingface.co/datasets/a/b"
    for given in (page, f"{page}/viewer/default/train?p=1", f"{page}/tree/main", "a/b"):
        assert DataArguments(dataset_name=given).dataset_name == "a/b"
    for given, message in (
        ("https://huggingface.co/a/b", "not the page of a data set"),
        (f"{page}/tree/v2", "read from main"),
    ):
        with pytest.raises(UserError, match=message):
            DataArguments(dataset_name=given)


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """The environment of a process whose hub refuses every connection, and an empty cache."""
    return {
        **{name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"},
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path),
        "NO_PROXY": "127.0.0.1",
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("Llama-3.2-3B", "did you mean meta-llama/Llama-3.2-3B?"),
        ("meta-lama/Llama-3.2-1B-Instuct", "did you mean meta-llama/Llama-3.2-1B-Instruct"),
        ("https://huggingface.co/nobody/nothing/tree/main", "nobody/nothing is not in the local cache"),
        ("TheBloke/Mistral-7B-v0.1-GGUF", "made for inference alone; give the original, mistralai/Mistral-7B-v0.1"),
        (
            "RedHatAI/Qwen3-8B-FP8-dynamic",
            "a model in FP8, a format that is made for inference alone; give the original, Qwen",
        ),
        ("two words", "neither a folder nor a hub id"),
    ],
)
def test_a_prediction_of_an_unknown_model_is_refused_within_seconds_without_a_network(given, said, no_network):
    start = time.monotonic()
    command = "import sys; from toolkit.cli import main; sys.exit(main())"
    flags = ["predict", "lora", "--model_name_or_path", given, "--gpu", "RTX 3060"]
    done = subprocess.run([sys.executable, "-c", command, *flags], env=no_network, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    first, *others = done.stderr.splitlines()
    assert "loading PyTorch" in first and len(others) == 1 and others[0].startswith("error: ")
    assert time.monotonic() - start < 15  # about one on an idle machine


@pytest.mark.slow
def test_a_recipe_checks_the_name_before_anything_else(no_network):
    done = subprocess.run(
        [sys.executable, "recipes/lora.py", "--model_name_or_path", "qwen3-4b", "--use_cpu"],
        env=no_network,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "did you mean Qwen/Qwen3-4B?" in done.stderr.splitlines()[-1]
    assert "Retrying" not in done.stderr


def test_the_hub_is_asked_once(monkeypatch):
    asked = []

    class Session:
        def head(self, url, timeout):
            asked.append((url, timeout))
            raise ConnectionError

    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_session", Session)
    hub.hub_is_reachable.cache_clear()
    try:
        for _ in range(2):
            with pytest.raises(UserError, match="the hub cannot be reached"):
                hub.check_reachable("nobody/nothing")
    finally:
        hub.hub_is_reachable.cache_clear()
    assert len(asked) == 1 and asked[0][0] == hub.constants.ENDPOINT and asked[0][1] <= 3


@pytest.mark.parametrize(("status", "there"), [(200, True), (404, True), (503, False)])
def test_the_error_of_a_gateway_is_no_answer_of_the_hub(status, there, monkeypatch):
    session = SimpleNamespace(head=lambda url, timeout: SimpleNamespace(status_code=status))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_session", lambda: session)
    hub.hub_is_reachable.cache_clear()
    try:
        assert hub.hub_is_reachable() is there
    finally:
        hub.hub_is_reachable.cache_clear()


def test_the_name_of_a_model_is_checked_without_pytorch_and_transformers():
    code = (
        "import sys; from toolkit.runs.api import _check_model_name; from toolkit.errors import UserError\n"
        "try: _check_model_name(['--model_name_or_path', 'meta-llama/Lama-3.2-1B'])\n"
        "except UserError as error: assert 'did you mean meta-llama/Llama-3.2-1B' in str(error)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr


def test_a_cached_model_needs_no_hub(monkeypatch, tmp_path):
    folder = tmp_path / "models--some--body"
    (folder / "snapshots" / "1").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("1")
    (folder / "snapshots" / "1" / "config.json").write_text(json.dumps({}))
    cached = hub.try_to_load_from_cache
    monkeypatch.setattr(
        hub, "try_to_load_from_cache", lambda name, file, revision: cached(name, file, tmp_path, revision)
    )
    hub.check_reachable("some/body")
