"""The host's memory and the disks that are predicted, against real loads and real run folders."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from test_predict import flags, run
from tiny_models import save_with_tokenizer
from transformers import LlamaConfig

import toolkit
from toolkit.errors import UserError
from toolkit.memory.ledger import Ledger
from toolkit.memory.resources import HOST, Line, Resource
from toolkit.runs import machine
from toolkit.runs.resources import PROCESS_BYTES
from toolkit.runs.resources import _checkpoints_at_once as checkpoints_at_once
from toolkit.units import MIB

GIVEN = {"max_length": 64, "max_steps": 3, "save_strategy": "steps", "save_steps": 1, "use_cpu": True}


def lines_of(ledger: Ledger, resource: str) -> dict[str, Line]:
    return {line.name: line for one in ledger.resources if one.name == resource for line in one.lines}


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_files_of_a_run_are_predicted_within_2_percent(method, tmp_path):
    settings = GIVEN | {"output_dir": str(tmp_path / "run")}
    words = [f"--{name}={value}" for name, value in settings.items()]
    command = [
        sys.executable,
        ROOT / "recipes" / f"{method}.py",
        *words,
        "--max_train_samples=32",
        "--max_eval_samples=8",
    ]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    predicted = lines_of(toolkit.predict(method, **settings), "disk")
    checkpoints = sorted((tmp_path / "run").glob("checkpoint-*"))
    assert [one.name for one in checkpoints] == ["checkpoint-2", "checkpoint-3"]
    whole = sum(map(size, checkpoints))
    assert predicted["checkpoints"].nbytes / 3 == pytest.approx(
        whole / 2, rel=0.02
    )  # three while the oldest is deleted
    rest = size(tmp_path / "run") - whole
    assert predicted["run folder"].nbytes == pytest.approx(rest, rel=0.02, abs=64 * 1024)  # reports differ in length


@pytest.mark.parametrize(
    ("settings", "rows", "number"),
    [
        ({"save_strategy": "no"}, 100, 0),
        ({"num_train_epochs": 1}, None, 1),
        ({}, None, 3),
        ({"save_total_limit": None}, None, 3),
        ({"save_total_limit": None, "save_strategy": "steps", "save_steps": 5}, 80, 6),  # 30 steps
        ({"save_total_limit": None, "save_strategy": "steps", "save_steps": 0.25}, None, 4),
        ({"save_total_limit": 1, "save_strategy": "steps", "save_steps": 5, "max_steps": 100}, None, 2),
        ({"save_total_limit": 1, "load_best_model_at_end": True}, None, 3),
    ],
)
def test_as_many_checkpoints_are_counted_as_there_are_at_once(settings, rows, number):
    usual = {"save_strategy": "epoch", "save_total_limit": 2, "save_steps": 500, "load_best_model_at_end": False}
    usual |= {
        "num_train_epochs": 3,
        "max_steps": -1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
    }
    assert checkpoints_at_once(SimpleNamespace(**usual | settings), rows, processes=1) == number


LOADS = """
import sys, threading
import toolkit.runs.prediction
from toolkit.config import parse_config
from toolkit.methods.full import Full
from toolkit.models.loading import load_model

def own():  # what is not mapped from a file, in bytes
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

config = parse_config(Full, sys.argv[1:])
model_config, before, peaks, done = config.model_config, own(), [], threading.Event()
watch = threading.Thread(target=lambda: [peaks.append(own()) for _ in iter(lambda: done.wait(0.002), True)])
watch.start()
model = load_model(config.model, model_config, config.dtype, config.training)
done.set()
watch.join()
print(before, max(peaks) - before)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 219 MiB in float32."""
    sizes = {"hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 3072}
    config = LlamaConfig(**sizes, tie_word_embeddings=True, max_position_embeddings=512)
    return save_with_tokenizer(config, tmp_path_factory.mktemp("large"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the process's memory is read from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_memory_of_loading_is_predicted(dtype, model):
    """A type that the file has is mapped from it; another one is a copy, which takes its size."""
    words = ["--model_name_or_path", str(model), "--dtype", dtype, "--bf16", "true"]
    done = subprocess.run(
        [sys.executable, "-c", LOADS, *words, "--use_cpu"], check=True, capture_output=True, text=True
    )
    before, peak = map(int, done.stdout.split()[-2:])
    lines = lines_of(toolkit.predict("full", *words, "--max_length", "16", gpu="RTX 4090"), HOST)
    assert lines["processes"].nbytes == PROCESS_BYTES == pytest.approx(before, rel=0.25)
    predicted = lines["loading"].nbytes if dtype == "bfloat16" else 0
    assert ("loading" in lines) == (dtype == "bfloat16")
    assert predicted == pytest.approx(peak, rel=0.05, abs=8 * MIB)


def test_needs_are_those_of_the_moment_that_needs_the_most():
    lines = (
        Line("processes", 4, ""),
        Line("loading", 8, "", "loading"),
        Line("rows", 1, ""),
        Line("a", 5, "", "training"),
    )
    resource = Resource("host memory", lines, 12)
    assert resource.needed_bytes == 13 and not resource.fits
    assert Resource.from_json(json.loads(json.dumps(resource.to_json()))) == resource


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "first"),
    [
        (["--host_memory", "100MiB"], "host memory"),
        (["--disk", "100KiB"], "disk"),
        (["--host_memory", "100MiB", "--disk", "100KiB", "--gpu_memory", "1MiB"], "host memory"),
    ],
)
def test_the_first_that_runs_out_is_named_and_the_exit_code_is_1(given, first, tmp_path, capfd):
    LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=512).save_pretrained(tmp_path)
    code, out, _ = run(capfd, "predict", "lora", *flags(tmp_path), *given)
    assert code == 1 and re.match(rf"does not fit: {first} [\d.]+ \wiB of [\d.]+ \wiB\n", out) and "next:" not in out
    code, out, _ = run(capfd, "predict", "lora", *flags(tmp_path), *given, "--json")
    printed = json.loads(out)
    assert code == 1 and not printed["fits"]
    assert next(one.name for one in Ledger.from_json(printed).resources if not one.fits) == first
    assert Ledger.from_json(printed).to_json() == printed


def test_only_this_machine_is_compared_without_budgets(tmp_path):
    here = toolkit.predict("lora", max_length=32, output_dir=str(tmp_path / "run"), use_cpu=True)
    elsewhere = toolkit.predict("lora", max_length=32, gpu="RTX 4090")
    assert all(one.budget_bytes is None for one in elsewhere.resources) and elsewhere.fits
    assert {one.name for one in here.resources} == {HOST, "disk"}
    host, disk = here.resources
    assert host.budget_bytes == pytest.approx(machine.host_memory().available_bytes, rel=0.2)
    assert disk.budget_bytes == pytest.approx(machine.disk(tmp_path).free_bytes, rel=0.05)
    assert lines_of(here, HOST)["training"].nbytes == here.needed_bytes  # a CPU's memory is the host's


def test_rows_and_workers_are_counted_for_each_process(tmp_path):
    rows = [{"dialogue": f"text {n} " * 5, "summary": f"short {n}"} for n in range(2000)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {"dataset_name": str(tmp_path / "rows.jsonl"), "gpu": "RTX 4090", "dataloader_num_workers": 1}
    lines = lines_of(toolkit.predict("lora", **settings), HOST)
    assert lines["rows"].nbytes > 2000 * 3 * 5 * 4  # ids, masks and labels of more than 5 tokens
    assert 16 * MIB < lines["workers"].nbytes < 17 * MIB
    assert "rows" not in lines_of(toolkit.predict("lora", gpu="RTX 4090"), HOST)


def test_what_no_size_is_refused_with_its_flag():
    with pytest.raises(UserError, match="--disk: '12 apples' is not a size"):
        toolkit.predict("lora", disk="12 apples")


def test_a_containers_limit_counts_without_what_can_be_reclaimed(tmp_path, monkeypatch):
    (tmp_path / "own").write_text("0::/\n")
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)

    def left_in_container():
        return [limit - used for limit, used in machine._cgroup_limits()]

    files = {"memory.max": "1000", "memory.current": "700", "memory.stat": "anon 400\ninactive_file 250\n"}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert left_in_container() == [550]
    (tmp_path / "memory.max").write_text("max")
    assert left_in_container() == []
