"""The Python API of `import toolkit`: quick to import, equal to the command line, and documented by an example that runs."""

import doctest
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, recipe
from tiny_models import tiny_config

import toolkit
from toolkit.cli import main
from toolkit.errors import UserError
from toolkit.runs.finished_run import read_completions


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, str | int]:
    """Settings of a recipe with a tiny Llama without weights."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_config("llama").save_pretrained(folder)
    return {"model_name_or_path": str(folder), "max_length": 64, "per_device_train_batch_size": 2}


@pytest.fixture(scope="module")
def finished(small_csv, tmp_path_factory) -> Path:
    """A working directory with the folder of a short run, runs/demo."""
    folder = tmp_path_factory.mktemp("work") / "runs" / "demo"
    flags = ("--max_steps", "2", "--max_eval_samples", "3", "--max_target_length", "12", "--save_strategy", "no")
    done = recipe("lora", "--use_cpu", "--dataset_name", small_csv, *flags, "--output_dir", folder)
    assert done.returncode == 0, done.stderr
    return folder


def footprint(capfd: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        main(argv)
    return int(end.value.code or 0), capfd.readouterr().out


def in_a_fresh_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_toolkit_imports_nothing_heavy():
    code = (
        "import sys; import toolkit; from toolkit import predict, load_run, UserError; dir(toolkit)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'rich', 'yaml', 'peft'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "toolkit.Ledger; assert 'torch' in sys.modules and 'peft' not in sys.modules"
    )
    in_a_fresh_process(code)


@pytest.mark.parametrize("imports", [("toolkit", "huggingface_hub"), ("huggingface_hub", "toolkit")], ids="-".join)
def test_retries_of_the_hub_are_hidden_and_its_other_warnings_are_not(imports):
    code = (
        *(f"import {name}" for name in imports),
        "from huggingface_hub.utils import http_backoff, logging",
        "try:",
        "    http_backoff('HEAD', 'http://127.0.0.1:9', max_retries=2, base_wait_time=0.01)",
        "except Exception:  # in huggingface_hub 1.5 the second try fails because its client is closed",
        "    print('failed')",
        "logging.get_logger('huggingface_hub.utils._http').warning('another warning')",
    )
    env = os.environ | {"HF_HUB_OFFLINE": "0"}  # it asks only this machine, on a port on which nothing listens
    command = [sys.executable, "-c", "\n".join(code)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "failed\n"
    assert done.stderr == "another warning\n"


@pytest.mark.slow
def test_methods_is_callable_before_and_after_its_package_is_imported():
    code = (
        "import toolkit; first = toolkit.methods()\n"
        "import toolkit.methods, toolkit.methods.lora\n"
        "from toolkit import methods\n"
        "from toolkit.runs import api\n"
        "assert first == toolkit.methods() == methods() == api.methods() == toolkit.methods.METHODS\n"
        "assert first['lora'] is toolkit.methods.lora.Lora"
    )
    in_a_fresh_process(code)


def test_the_package_lists_its_names_and_has_no_others():
    assert set(toolkit.__all__) <= set(dir(toolkit))
    assert all(hasattr(toolkit, name) for name in toolkit.__all__)
    with pytest.raises(AttributeError, match="module 'toolkit' has no attribute 'prediction'"):
        toolkit.prediction  # noqa: B018
    toolkit.methods().clear()
    assert "lora" in toolkit.methods()


@pytest.mark.slow
def test_a_type_checker_sees_the_types(tmp_path):
    script = tmp_path / "notebook.py"
    script.write_text(
        "import toolkit\n"
        "reveal_type(toolkit.predict('lora', gpu='T4', bf16=True, lora_target_modules=['q', 'v']))\n"
        "reveal_type(toolkit.load_run('runs/demo').generate(['a text']))\n"
        "reveal_type(toolkit.load_run('runs/demo').ledger)\n"
        "reveal_type(toolkit.methods())\n"
        "toolkit.predict('lora', gpu=4090)\n"
        "toolkit.prediction\n"
    )
    command = [sys.executable, "-m", "mypy", "--follow-imports", "silent", "--cache-dir", str(tmp_path), str(script)]
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False).stdout
    said = said.replace("builtins.", "")  # as older versions of mypy call them
    for line, expected in (
        (2, 'note: Revealed type is "toolkit.memory.ledger.Ledger"'),
        (3, 'note: Revealed type is "list[str]"'),
        (4, 'note: Revealed type is "toolkit.memory.ledger.Ledger | None"'),
        (5, 'note: Revealed type is "dict[str, type[toolkit.methods.base.Method]]"'),
        (6, 'error: Argument "gpu" to "predict" has incompatible type "int"'),
        (7, 'error: Module has no attribute "prediction"'),
    ):
        assert f"notebook.py:{line}: {expected}" in said, said
    assert (ROOT / "toolkit" / "py.typed").exists() and '"toolkit" = ["py.typed"]' in (
        ROOT / "pyproject.toml"
    ).read_text()


@pytest.mark.parametrize(
    ("method", "settings", "own"),
    [
        ("lora", {"lora_target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1, "bf16": True}, {"gpu": "RTX 4090"}),
        ("ia3", {"optim_args": None, "gradient_checkpointing": True}, {"gpu_memory": "1MiB"}),
        (
            "full",
            {"lr_scheduler_kwargs": {"min_lr": 1e-5}, "lr_scheduler_type": "cosine_with_min_lr", "use_cpu": True},
            {},
        ),
    ],
)
def test_predict_returns_the_ledger_that_the_command_prints(method, settings, own, tiny, capfd):
    ledger = toolkit.predict(method, **tiny, **settings, **own).to_json()
    words = [f"--{name}={value}" for name, value in own.items()]
    for name, value in (tiny | settings).items():
        if isinstance(value, list):
            words += [f"--{name}", *value]
        elif value is not None:
            words += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    code, out = footprint(capfd, "predict", method, *words, "--json")
    assert code == (0 if ledger["fits"] else 1)
    assert ledger["fits"] == ("1MiB" not in own.values())
    printed = json.loads(out)
    assert printed.pop("seconds") > 0 and ledger.pop("seconds") > 0
    for resource in (*printed["resources"], *ledger["resources"]):
        resource.pop("budget_bytes")  # what this machine has free changes all the time
    if not ledger["fits"]:  # the command also searches what would fit
        assert "is enough for ia3" in printed["warnings"].pop(0)
    # rows while autocast frees its casts of weights, in the order of their addresses
    assert len(printed.pop("timeline")) == len(ledger.pop("timeline"))
    assert json.dumps(printed) == json.dumps(ledger)


def test_settings_override_words_of_the_command_line(tiny):
    ledger = toolkit.predict("lora", "--max_length", "32", "--lora_r", "4", gpu_memory=2**32, **(tiny | {"lora_r": 8}))
    assert (ledger.config["max_length"], ledger.config["lora_r"], ledger.budget_bytes) == (64, 8, 2**32)


def test_false_switches_a_flag_off_that_is_on_by_default():
    flags = {
        "load_in_4bit": True,
        "gpu": "RTX 4090",
        "model_name_or_path": "HuggingFaceTB/SmolLM2-135M",
        "max_length": 64,
    }
    on, off = (toolkit.predict("lora", bnb_4bit_use_double_quant=double, **flags) for double in (True, False))
    assert off.allocated_bytes > on.allocated_bytes


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: toolkit.predict("lorra"), "unknown method 'lorra' (did you mean lora?); there are: adapter, full"),
        (lambda: toolkit.predict("lora", lora_rr=8), "unknown flag --lora_rr (did you mean lora_r?)"),
        (lambda: toolkit.predict("lora", lora_r="many"), "invalid int value: 'many'"),
        (lambda: toolkit.predict("lora", max_length=[1, 2]), "unexpected value '2': every setting is a flag"),
        (lambda: toolkit.predict("lora", gpu="RTX 4909"), "RTX 4090"),
        (lambda: toolkit.predict("lora", gpu="T4", gpu_memory="24GiB"), "exclude each other"),
        (lambda: toolkit.predict("lora", launch="zero33"), "did you mean zero3"),
        (lambda: toolkit.predict("lora", num_processes=2), "no effect without --launch"),
        (lambda: toolkit.load_run("nowhere"), "nowhere is not a run folder"),
    ],
)
def test_a_mistake_is_a_user_error_in_one_line(call, says):
    with pytest.raises(toolkit.UserError) as caught:
        call()
    assert toolkit.UserError is UserError
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_use_cpu_ignores_this_machines_gpu_in_every_spelling(tiny, monkeypatch):
    from toolkit.memory.cuda.cards import find_card
    from toolkit.runs import prediction

    monkeypatch.setattr(prediction, "this_card", lambda: find_card("T4"))
    devices = [toolkit.predict("lora", use_cpu=value, **tiny).device for value in (True, False, None)]
    assert devices == ["cpu", "T4", "T4"]
    for words in (["--use_cpu"], ["--use_cpu", "true"], ["--use_cpu=true"]):
        assert toolkit.predict("lora", *words, **tiny).device == "cpu"


@pytest.mark.slow
def test_a_loaded_run_has_scores_memory_and_answers(finished, tmp_path):
    run = toolkit.load_run(str(finished))
    record = json.loads((finished / "run.json").read_text())
    assert run.record == record and run.scores == record["scores"]
    assert repr(run) == f"FinishedRun({str(finished)!r}, method='lora', scores={record['scores']})"
    rows = record["data"]["rows"]
    card = (finished / "README.md").read_text(encoding="utf-8")
    assert f"; {rows['train']:,} rows to train, {rows['validation']:,} to validate, {rows['test']:,} to test\n" in card
    assert run.ledger is not None and run.ledger == toolkit.Ledger.load(finished / "memory.json")
    completions = read_completions(finished)
    text = completions["text"][0]
    assert run.generate([text]) == completions["tuned"][:1]
    with pytest.raises(UserError, match=r"write \[text\]"):
        run.generate(text)
    (finished / "memory.json").rename(tmp_path / "memory.json")
    try:
        assert toolkit.load_run(finished).ledger is None
    finally:
        (tmp_path / "memory.json").rename(finished / "memory.json")


@pytest.mark.slow
def test_the_example_in_the_docstring_runs(finished, monkeypatch):
    monkeypatch.chdir(finished.parents[1])
    result = doctest.testmod(toolkit, report=True, raise_on_error=False)
    assert result.failed == 0 and result.attempted >= 8
