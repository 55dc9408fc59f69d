"""The files of launch/ on two real processes: they train, save whole models, and end together."""

import json
import os
import re
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import BIN, ROOT, recipe, run
from reliability import Run
from safetensors.torch import load_file
from transformers import LlamaConfig, T5Config

from toolkit.distributed.deepspeed import read_deepspeed
from toolkit.distributed.engine import Engine
from toolkit.distributed.launch_files import read_launch_file
from toolkit.distributed.request import requested_engine
from toolkit.errors import UserError
from toolkit.methods.lora import Lora
from toolkit.runs.preflight import check_combination

PRESETS = sorted(path.stem for path in (ROOT / "launch").glob("*.yaml"))
TINY = ("--max_train_samples", "8", "--max_eval_samples", "3", "--max_steps", "2", "--per_device_train_batch_size", "2")
SHORT = (*TINY, "--max_target_length", "8", "--logging_steps", "1", "--save_strategy", "no")
ENGINES = {  # the engine that each preset must give on two processes
    "ddp": Engine(2, "DDP"),
    "fsdp2": Engine(2, "FSDP2"),
    "fsdp2_qlora": Engine(2, "FSDP2"),
    "sequence_parallel": Engine(2, "ZeRO-3", sequence_parallel_size=2),
    "single": Engine(1, "no engine"),
    "two_machines": Engine(2, "DDP"),
    "zero1": Engine(2, "ZeRO-1"),
    "zero2": Engine(2, "ZeRO-2"),
    "zero2_offload": Engine(2, "ZeRO-2", "cpu"),
    "zero3": Engine(2, "ZeRO-3"),
    "zero3_nvme": Engine(2, "ZeRO-3", "nvme", "nvme"),
    "zero3_offload": Engine(2, "ZeRO-3", "cpu", "cpu"),
}


def launched(preset, *command, timeout=400, **env) -> subprocess.CompletedProcess[str]:
    """Runs a script on two processes under a preset; after the time limit the launcher ends them."""
    path = f"launch/{preset}.yaml"
    started = subprocess.Popen(
        [str(BIN / "accelerate"), "launch", "--config_file", path, "--num_processes", "2", *map(str, command)],
        cwd=ROOT,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = started.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        started.terminate()
        out, err = started.communicate(timeout=60)
        pytest.fail(f"{preset} {command} took more than {timeout} s\n{out[-3000:]}\n{err[-3000:]}")
    return subprocess.CompletedProcess(started.args, started.returncode, out, err)


def on_cpu(preset, script):
    """The script, wrapped if accelerate would not run the preset's engine without a GPU."""
    return ("tests/fsdp_on_cpu.py", script) if preset.startswith("fsdp2") else (script,)


# ---- the files themselves


def test_there_are_twelve_presets_and_each_begins_with_its_command_and_says_when_to_choose_it():
    assert sorted(ENGINES) == PRESETS
    for name in PRESETS:
        text = (ROOT / "launch" / f"{name}.yaml").read_text(encoding="utf-8")
        head = [line for line in text.splitlines() if line.startswith("#")]
        assert text.startswith("\n".join(head)), name
        assert any(
            re.match(rf"#   accelerate launch --config_file launch/{name}\.yaml .*recipes/\w+\.py", h) for h in head
        )
        assert any(line.startswith("# Choose it") for line in head), name


@pytest.mark.parametrize("name", PRESETS)
def test_accelerate_reads_each_preset_and_none_fixes_a_precision_or_batch(name):
    path = ROOT / "launch" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.num_processes == ENGINES[name].processes
    assert config.mixed_precision in (None, "no")
    source = config.deepspeed_config.get("deepspeed_config_file")
    if source:
        assert "mixed_precision" not in yaml.safe_load(path.read_text())  # accelerate takes it only from the JSON
        settings = read_deepspeed(ROOT / source)
        left = (
            "gradient_clipping",
            "gradient_accumulation_steps",
            "train_micro_batch_size_per_gpu",
            "train_batch_size",
        )
        assert {settings[key] for key in left} == {"auto"}
        assert settings["bf16"] == settings["fp16"] == {"enabled": "auto"}
        assert settings["zero_optimization"]["reduce_bucket_size"] == "auto"


@pytest.mark.parametrize("name", [n for n in PRESETS if n not in ("single",)])
def test_a_preset_requests_the_engine_of_its_name(name):
    """Uses the environment that accelerate's own launcher prepares for the file."""
    assert read_launch_file(name, 2).engine == ENGINES[name]


# ---- two processes


@pytest.mark.slow
def test_lora_runs_under_zero2_and_only_rank_0_prints_and_writes(tmp_path):
    folder = tmp_path / "run"
    argv = ("--use_cpu", *SHORT, "--output_dir", folder)
    run = Run("recipes/lora.py", *argv, log=tmp_path / "log", processes=2, preset="zero2")
    assert run.wait() == [0, 0], run.text()
    assert len(re.findall(r"^ +engine  ZeRO-2 on 2 processes$", run.text(), re.M)) == 1
    assert run.text().count("2/2  loss") == 1
    record = json.loads((folder / "run.json").read_text())
    assert record["finished"] and record["processes"] == 2
    assert sum(tensor.numel() for tensor in load_file(folder / "adapter_model.safetensors").values()) == 172_032
    assert "Traceback" not in run.text() and "Warning" not in run.logs[0].read_text()


@pytest.mark.slow
def test_predict_under_a_launcher_shows_the_memory_of_each_process_and_does_not_run(tmp_path):
    more = ("--use_cpu", "--predict", *SHORT, "--output_dir", tmp_path / "run")
    run = Run("recipes/full.py", *more, log=tmp_path / "log", processes=2, preset="zero3")
    assert run.wait() == [0, 0], run.text()
    assert run.text().count("predicted, each of 2 processes (ZeRO-3)") == 1 and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_error_on_one_rank_ends_all_of_them_and_is_printed_once(tmp_path):
    check_failing_rank("user", "error: rank 1: no room is left", tmp_path, "zero2")


@pytest.mark.slow
@pytest.mark.long
def test_a_bug_on_one_rank_ends_all_of_them_and_is_printed_once(tmp_path):
    check_failing_rank("bug", "ZeroDivisionError: a bug", tmp_path)


@pytest.mark.slow
@pytest.mark.long
def test_diverging_ranks_are_stopped_after_the_first_step_with_the_parameter_named(tmp_path):
    check_failing_rank("drift", "error: after the first step the ranks hold different values of base_model.", tmp_path)


def check_failing_rank(kind, said, tmp_path, preset="ddp"):
    when = tmp_path / "when"
    done = launched(
        preset,
        "tests/failing_rank.py",
        kind,
        when,
        "recipes/lora.py",
        "--use_cpu",
        *SHORT,
        "--output_dir",
        tmp_path / "run",
    )
    ended = time.time()
    assert done.returncode == 1
    assert done.stderr.count(said) == 1, done.stderr[-4000:]
    assert ended - float(when.read_text()) < 30
    assert "Connection closed" not in done.stderr and "rank 0" not in done.stderr.split("ChildFailedError")[0]


@pytest.mark.slow
@pytest.mark.long
def test_a_world_in_which_nothing_is_wrapped_is_refused(tmp_path):
    """`--ddp_backend gloo` without `--use_cpu`, on a machine without GPUs."""
    if torch.cuda.is_available():
        pytest.skip("with GPUs, DDP is what runs")
    done = launched("ddp", "recipes/lora.py", "--ddp_backend", "gloo", *SHORT, "--output_dir", tmp_path / "run")
    assert done.returncode == 1
    expected = "error: the launch requests DDP on 2 processes, but no engine runs on the 2 processes"
    assert done.stderr.count(expected) == 1, done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("flags", [[], ["--use_cpu"]])
def test_fsdp_without_gpus_is_refused_before_anything_is_loaded(flags, tmp_path):
    if torch.cuda.is_available() and not flags:
        pytest.skip("with GPUs, FSDP is what runs")
    done = launched("fsdp2", "recipes/lora.py", *flags, *SHORT, "--output_dir", tmp_path / "run")
    assert done.returncode == 1 and not (tmp_path / "run").exists()
    expected = "error: the launch requests FSDP2 on 2 processes, which accelerate only runs on GPUs"
    assert done.stderr.count(expected) == 1, done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.long
def test_a_launch_of_two_processes_that_starts_one_is_refused_before_anything_is_loaded(tmp_path):
    launch = ("accelerate", "launch", "--cpu", "--num_processes", "2", "recipes/lora.py", *SHORT)
    done = run(*launch, "--output_dir", tmp_path / "run")
    assert done.returncode == 1 and not (tmp_path / "run").exists()
    assert done.stderr.count("error: several processes were requested, but 1 runs") == 1


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_that_share_each_row_have_the_loss_of_one(data, small_csv, tmp_path):
    model = ("--model_name_or_path", data / "models" / "stories260k", "--lora_dropout", "0")
    rows_of = ("--dataset_name", small_csv, *SHORT[:6], "--per_device_train_batch_size", "2", *SHORT[8:])
    together, alone = tmp_path / "two", tmp_path / "one"
    shared = ("--use_cpu", *model, *rows_of, "--output_dir")
    run = Run("recipes/lora.py", *shared, together, log=tmp_path / "log", processes=2, preset="sequence_parallel")
    assert run.wait() == [0, 0], run.text()
    assert re.search(r"^ +engine  ZeRO-3 on 2 processes, 2 sharing each row$", run.text(), re.M)
    done = recipe("lora", *shared, alone)
    assert done.returncode == 0, done.stderr
    first = [json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["loss"] for folder in (together, alone)]
    assert first[0] == pytest.approx(first[1], rel=1e-4)


def config_with(model, method=None, **training):
    """The parts of a Config that `check_combination` reads."""
    usual = {"optim": "adamw_torch", "bf16": False, "load_best_model_at_end": False, "optimizer_in_backward": False}
    usual |= training
    return SimpleNamespace(
        model=model, method=method or Lora(), training=SimpleNamespace(**usual), optimizer=usual["optim"]
    )


def combined(engine, config, model_config):
    check_combination(SimpleNamespace(**vars(config), engine=engine, model_config=model_config))


def test_rows_are_shared_only_for_models_that_support_it(monkeypatch):
    env = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "PARALLELISM_CONFIG_SP_SIZE": "2",
    }
    for name, value in (env | {"WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    requested = requested_engine()
    model = SimpleNamespace(load_in_8bit=False, model_name_or_path="a-model")
    config = T5Config(num_heads=4)
    with pytest.raises(UserError, match="a-model is an encoder-decoder model; sharing rows among 2 processes"):
        combined(requested, config_with(model), config)
    default = SimpleNamespace(load_in_8bit=False, model_name_or_path=None)
    with pytest.raises(UserError, match="the embedded tiny T5 is an encoder-decoder model"):
        combined(requested, config_with(default), config)
    with pytest.raises(UserError, match="a model of 3 attention heads"):
        combined(requested, config_with(model), LlamaConfig(num_attention_heads=3, hidden_size=48))
    combined(requested, config_with(model), LlamaConfig(num_attention_heads=4, hidden_size=48))
    with pytest.raises(UserError, match="--load_in_8bit under ZeRO-3: its integer weights cannot be sharded"):
        combined(Engine(2, "ZeRO-3"), config_with(SimpleNamespace(load_in_8bit=True)), config)
    pissa = config_with(model, Lora(init_lora_weights="pissa"))
    with pytest.raises(UserError, match="--init_lora_weights pissa under FSDP2: it needs whole weights"):
        combined(Engine(2, "FSDP2"), pissa, config)
    combined(Engine(2, "ZeRO-2"), pissa, config)


@pytest.mark.parametrize(
    ("kind", "optim"),
    [("FSDP2", name) for name in ("adafactor", "ademamix", "lion_32bit", "paged_adamw_8bit", "rmsprop_bnb")]
    + [("ZeRO-2", "adagrad"), ("ZeRO-3", "adagrad")],
)
def test_an_optimizer_that_an_engine_cannot_run_is_refused(kind, optim):
    model = SimpleNamespace(load_in_8bit=False)
    with pytest.raises(UserError, match=f"--optim {optim} under {kind}: .*use adamw_torch_fused"):
        combined(Engine(2, kind), config_with(model, optim=optim), LlamaConfig())


def test_the_best_of_several_checkpoints_is_not_read_back_from_a_disk():
    nvme = Engine(2, "ZeRO-3", "nvme", "nvme")
    model = SimpleNamespace(load_in_8bit=False, load_in_4bit=False)
    config = config_with(model, load_best_model_at_end=True)
    with pytest.raises(UserError, match=r"--load_best_model_at_end under ZeRO-3 .* reads back .* only a part"):
        combined(nvme, config, T5Config(num_heads=4))


def test_a_4_bit_base_is_only_offloaded_to_a_disk_in_bf16():
    """In fp32, the first matrix product would mix fp32 with the bf16 weights from the disk."""
    nvme = Engine(2, "ZeRO-3", "nvme", "nvme")
    model, config = SimpleNamespace(load_in_8bit=False, load_in_4bit=True), T5Config(num_heads=4)
    with pytest.raises(UserError, match=r"--load_in_4bit in fp32 under ZeRO-3 on 2 processes, .* add --bf16"):
        combined(
            nvme,
            config_with(model),
            config,
        )
    combined(
        nvme,
        config_with(model, bf16=True),
        config,
    )
