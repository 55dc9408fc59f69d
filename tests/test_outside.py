"""What comes from outside (flags, files, folders) is refused in one line within a time limit, and runs no code."""

import contextlib
import io
import json
import os
import pickle
import shutil
import time
from dataclasses import replace

import pytest
import torch
from conftest import recipe
from peft import LoraConfig
from safetensors.torch import load, save_file
from transformers import TrainingArguments

from toolkit.cli import main as footprint
from toolkit.config import parse_config
from toolkit.console import PlainConsole, labelled
from toolkit.distributed.launch_files import read_launch_file
from toolkit.distributed.ranks import exits_cleanly
from toolkit.embedded import MODEL_DIR
from toolkit.errors import UserError, guarded, time_limit
from toolkit.errors.numbers import check_numbers
from toolkit.errors.reading import read_json, read_yaml
from toolkit.memory.ledger import Ledger, PhaseUse
from toolkit.methods.base import check_patterns
from toolkit.methods.lora import Lora
from toolkit.models.arguments import ModelArguments
from toolkit.models.generation import generation_error
from toolkit.models.loading import (
    build_on_meta,
    check_weight_files,
    load_model,
    load_model_config,
    load_tokenizer,
    read_tokenizer,
)
from toolkit.runs.finished_run import FinishedRun, Models

CPU = TrainingArguments(use_cpu=True, report_to="none")
SECONDS = 30  # on a busy machine; each takes a small part of one


@contextlib.contextmanager
def refused(*named):
    """Within it a UserError must be raised, in one line that contains each of `named`, and in time."""
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        yield
    said = str(caught.value)
    assert "\n" not in said and all(str(one) in said for one in named), said
    assert time.monotonic() - began < SECONDS


def command(*argv):
    """Exit code, standard output and standard error of the footprint command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as caught:
        footprint([*map(str, argv)])
    return caught.value.code or 0, out.getvalue(), err.getvalue()


# ---- numbers

WRONG_NUMBERS = """
--num_train_epochs nan; --num_train_epochs inf; --num_train_epochs 1e300; --num_train_epochs -1
--max_steps 1000000000000000000000000000000; --per_device_train_batch_size 1000000000000; --per_device_eval_batch_size 10000000
--gradient_accumulation_steps 1000000000; --num_beams 1000000; --num_beams 0; --dataloader_num_workers -1; --weight_decay -1
--weight_decay nan; --max_grad_norm nan; --max_grad_norm -1; --label_smoothing_factor 2; --label_smoothing_factor -0.1
--save_total_limit -1; --save_total_limit 0; --logging_steps nan; --logging_steps 0; --save_steps 0; --save_steps -5
--eval_steps -2; --neftune_noise_alpha nan; --neftune_noise_alpha -3; --ddp_timeout -1; --ddp_timeout 0; --learning_rate nan
--learning_rate inf; --learning_rate 1e300; --warmup_steps -1; --warmup_steps nan; --adam_beta1 nan; --adam_beta2 1
--adam_epsilon -1; --adam_epsilon nan; --seed 99999999999999; --data_seed -1; --lora_r 1000000000; --lora_alpha -1
--lora_dropout nan; --lora_dropout -0.1; --loraplus_lr_ratio nan; --loraplus_lr_ratio inf; --max_length 1000000000
--max_length -5; --max_target_length 1000000000; --max_train_samples 0; --max_eval_samples 99999999999999999999
--eval_delay nan; --eval_delay -1; --dataloader_prefetch_factor 0; --torch_empty_cache_steps 0; --ddp_bucket_cap_mb -5
--early_stopping_threshold nan; --lr_scheduler_kwargs {"power":NaN}; --optim_args momentum=nan; --optim_args lr=-inf
--gradient_checkpointing_kwargs x; --gradient_checkpointing_kwargs {"a":1}; --torch_compile_backend foo
--torch_compile_mode foo; --optim foo; --save_strategy foo; --lr_scheduler_type foo; --attn_implementation user/kernel
--trust_remote_code; --fsdp_config /nowhere; --save_strategy no --load_best_model_at_end
"""


@pytest.mark.parametrize("flags", [one.strip() for one in WRONG_NUMBERS.replace("\n", ";").split(";") if one.strip()])
def test_a_flag_that_means_nothing_is_refused_by_its_name(flags, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = flags.split(" ")
    more = ["--save_strategy", "steps"] if words[0] == "--save_steps" else []
    more += ["--eval_strategy", "steps"] if words[0] == "--eval_steps" else []
    if words[0] == "--early_stopping_threshold":
        more += ["--early_stopping_patience", "2", "--eval_strategy", "epoch", "--load_best_model_at_end"]
    with refused(words[0].lstrip("-")) as _:
        parse_config(Lora, ["--use_cpu", *words, *more])


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (float("nan"), "give a number that is finite"),
        (float("-inf"), "give a number that is finite"),
        (1e300, "give a number that is finite"),
        (10**30, "1e+30 is not possible; give a whole number of at most 2,147,483,647"),
        (-(10**30), "give a whole number of at least -2,147,483,647"),
        ({"a": [1, float("nan")]}, "give a number that is finite"),
    ],
)
def test_a_flag_that_the_table_does_not_name_is_checked_by_its_type(value, said):
    with refused("--flag_of_tomorrow", said):
        check_numbers({"flag_of_tomorrow": value})
    check_numbers({"flag_of_tomorrow": -1, "another": 0.0, "third": None, "fourth": True, "fifth": [1, 2.5], "n": "x"})


@pytest.mark.parametrize("value", [0, -1])
def test_the_line_says_what_other_tools_mean_by_none_or_all(value):
    with refused("to keep every checkpoint, give a large number, such as 1000"):
        check_numbers({"save_total_limit": value})
    with refused("to use all rows, leave the flag out"):
        check_numbers({"max_train_samples": value})


def test_numbers_that_mean_something_are_accepted():
    check_numbers(
        {"num_train_epochs": 0.5, "max_grad_norm": 0.0, "weight_decay": 0.0, "max_steps": -1, "seed": 2**32 - 1}
    )
    check_numbers({"label_smoothing_factor": 0.1, "save_steps": 0.1, "adam_beta2": 0.999, "num_shots": [0, 4]})


# ---- YAML and JSON

WRONG_YAML = {
    "expands": "a: &a [x,x]\n"
    + "".join(f"{c}: &{c} [*{p},*{p}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)),
    "recursion": "a: &a [*a]",
    "deep": "a: " + "[" * 20000,
    "digits": "a: " + "1" * 5000,
    "duplicate": "lora_r: 1\nlora_r: 2",
    "base 60": "a: 1:30",
    "base 60, a float": "a: 1:30.5",
    "base 8": "a: 010",
    "tag": "a: !!python/object/apply:os.system [ls]",
    "date": "a: 2024-99-99",
    "zero byte": "a: \0",
    "list": "- a",
    "list as key": "? [1]\n: 2",
    "base64": "a: !!binary x",
    "large": "a: " + "x" * 300_000,
    "unclosed": "a: [",
}
WRONG_JSON = {
    "NaN": '{"a": NaN}',
    "infinite": '{"a": 1e999}',
    "deep": '{"a":' * 20000,
    "deep list": "[" * 200_000,
    "60 levels": '{"a":' * 60 + "1" + "}" * 60,
    "duplicate": '{"a": 1, "a": 2}',
    "digits": '{"a": ' + "1" * 5000 + "}",
    "pointer": "version https://git-lfs.github.com/spec/v1\noid sha256:0",
    "page": "<!DOCTYPE html><html></html>",
    "empty": "",
    "list": "[1]",
    "number": "1",
}


@pytest.mark.parametrize("name", WRONG_YAML)
def test_yaml_that_has_no_end_or_another_meaning_is_refused(name, tmp_path):
    (tmp_path / "a.yaml").write_text(WRONG_YAML[name], encoding="utf-8")
    with refused("a.yaml"):
        read_yaml(tmp_path / "a.yaml")


@pytest.mark.parametrize("name", WRONG_JSON)
def test_json_that_has_no_end_or_another_meaning_is_refused(name, tmp_path):
    (tmp_path / "a.json").write_text(WRONG_JSON[name], encoding="utf-8")
    with refused("a.json"):
        read_json(tmp_path / "a.json")


def not_regular(path, kind):
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "dangling": "nowhere", "itself": path.name}[kind])


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "dangling", "itself"])
def test_what_is_no_regular_file_is_refused_before_it_is_read(kind, tmp_path):
    not_regular(tmp_path / "a", kind)
    for read in (read_json, read_yaml):
        with refused(tmp_path / "a"):
            read(tmp_path / "a")


def test_ordinary_yaml_means_what_it_always_meant(tmp_path):
    (tmp_path / "a.yaml").write_text("a: 1\nb: 1.5e-4\nc: no\nd: [1, x]\ne: {f: .5}\ng: '1:30'\n", encoding="utf-8")
    assert read_yaml(tmp_path / "a.yaml") == {
        "a": 1,
        "b": 1.5e-4,
        "c": False,
        "d": [1, "x"],
        "e": {"f": 0.5},
        "g": "1:30",
    }


# ---- the guard


def test_the_guard_keeps_the_libraries_words_and_passes_our_own_mistakes_on():
    with refused("file.json (Expecting value", "; mend it"), guarded("file.json", "mend it"):
        json.loads("x")
    with pytest.raises(AttributeError), guarded("file.json", "mend it"):
        check_numbers(5)  # a line of ours raises
    with pytest.raises(OSError, match="full"), guarded("file.json", "mend it"):
        raise OSError(28, "full")


def test_what_takes_too_long_ends():
    with refused("too slow"), time_limit(0.2, "too slow"):
        time.sleep(20)


def test_the_line_names_a_file_with_the_traceback():
    @exits_cleanly
    def main():
        with guarded("file.json cannot be read", "mend it"):
            json.loads("x")

    err = io.StringIO()
    with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as caught:
        main()
    line = err.getvalue()
    assert caught.value.code == 2 and line.count("\n") == 1
    path = line.split("(traceback: ")[1].rstrip(")\n")
    with open(path, encoding="utf-8") as stream:  # noqa: PTH123
        assert "JSONDecodeError" in stream.read()
    os.unlink(path)  # noqa: PTH108


# ---- text as markup


@pytest.mark.parametrize("name", ["[/up]", "[/bold]", "[red]x", "[link=x]y", ":smile:", "a\x1b[31mb", "\x9b2J"])
def test_a_name_from_outside_is_printed_as_text(name):
    console = PlainConsole(file=io.StringIO(), width=200)
    console.print(name)
    console.print(labelled("folder", name))
    shown = console.file.getvalue()
    assert "\x1b" not in shown and "\x9b" not in shown
    assert shown.count(name if name.isprintable() else "\\x") == 2
    assert "\x1b" not in str(UserError(f"{name}\nsecond")) and "\n" not in str(UserError(f"{name}\nsecond"))


# ---- model folders


@pytest.fixture
def model(data, tmp_path):
    """A copy of a small model's folder, to be damaged."""
    folder = tmp_path / "model"
    shutil.copytree(data / "models" / "stories260k", folder)
    return folder


def change(file, **fields):
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps(content | fields), encoding="utf-8")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("hidden_size", value) for value in (0, -64, "64", 63.5, [64, 0], True, 10**30)),
        *(("num_hidden_layers", value) for value in (100_000, 0, "5")),
        *(("num_attention_heads", value) for value in (0, -8, "8")),
        *(("vocab_size", value) for value in (0, 10**12, "512")),
        ("max_position_embeddings", 0),
        ("hidden_act", "foo"),
        ("hidden_act", 5),
        ("rope_parameters", {"rope_type": "foo", "rope_theta": 1e4}),
        ("rope_parameters", 5),
        *(("rms_norm_eps", value) for value in ("x", float("nan"), -1e-5, 5.0)),
        ("num_key_value_heads", 3),
        ("sliding_window", -5),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 0}),
        ("initializer_range", float("nan")),
        ("quantization_config", {"quant_method": "foo"}),
        ("attention_dropout", 5),
        ("model_type", 5),
        ("model_type", ["llama"]),
        ("dtype", "foo"),
        ("quantization_config", 5),
        ("id2label", 5),
        ("head_dim", 0),
        ("intermediate_size", "x"),
        ("layer_types", ["foo"]),
        ("is_encoder_decoder", "x"),
    ],
)
def test_a_config_with_an_impossible_value_is_refused(field, value, model):
    change(model / "config.json", **{field: value})
    with refused(model):
        args = ModelArguments(str(model))
        build_on_meta(args, load_model_config(args), torch.float32)


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
)
@pytest.mark.parametrize(
    "content", ["", "[1]", "{", "[" * 20000, "version https://git-lfs.github.com/spec/v1\n", "<html>"]
)
def test_a_damaged_file_of_a_model_is_named(name, content, model):
    (model / name).write_text(content, encoding="utf-8")
    with refused(model):
        load_model_config(ModelArguments(str(model)))
        read_tokenizer(str(model))


@pytest.mark.parametrize(
    "fields",
    [{"num_return_sequences": 3}, {"cache_implementation": "foo"}, {"max_new_tokens": 0}, {"compile_config": 5}],
)
def test_settings_of_generation_that_transformers_refuses_are_overruled_with_a_line(fields, model, capsys):
    change(model / "generation_config.json", **fields, suppress_tokens=[7])
    args = ModelArguments(str(model))
    loaded = load_model(args, load_model_config(args), torch.float32, CPU)
    said = " ".join(capsys.readouterr().out.split())
    assert "transformers refuses generation_config.json (" in said and said.endswith("only its tokens are used")
    settings = loaded.generation_config
    assert settings.suppress_tokens == [7]
    assert not any(getattr(settings, name) for name in fields)
    assert generation_error(loaded, load_tokenizer(args), [5, 6]) < 1e-3


@pytest.mark.parametrize(
    "field", [{"bad_words_ids": [5]}, {"begin_suppress_tokens": ["a"]}, {"suppress_tokens": 5}, {"num_beams": "a"}]
)
def test_settings_of_generation_of_another_type_are_named(field, model):
    change(model / "generation_config.json", **field)
    with refused(model / "generation_config.json"):
        load_model_config(ModelArguments(str(model)))


@pytest.mark.parametrize(
    ("file", "fields", "named"),
    [
        ("config.json", {"text_config": {"a": 1}}, "text_config"),
        ("config.json", {"model_type": "t5"}, "with which token a target begins"),
        ("config.json", {"rope_scaling": {"type": "linear", "factor": 0}}, "the factor 0 of its rotary embeddings"),
        ("tokenizer_config.json", {"model_max_length": "x"}, "model_max_length is 'x'"),
        ("tokenizer_config.json", {"model_max_length": -1}, "model_max_length -1"),
        ("tokenizer_config.json", {"model_max_length": 0}, "model_max_length 0"),
    ],
)
def test_fields_that_no_model_can_have_are_named(file, fields, named, model):
    change(model / file, **fields)
    args = ModelArguments(str(model))
    with refused(named):
        build_on_meta(args, load_model_config(args, needs_weights=False), torch.float32)


def test_a_file_in_a_models_folder_and_a_folder_that_lacks_a_part_are_told_apart(model):
    with refused(f"it is a file; give its folder, {model}"):
        load_model_config(ModelArguments(str(model / "config.json")))
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    with refused("model-00001-of-00002.safetensors, which is no file of this folder"):
        load_model_config(ModelArguments(str(model)))


@pytest.mark.slow
def test_weights_that_are_not_finite_are_named_rather_than_the_learning_rate(model, tmp_path):
    weights = load((model / "model.safetensors").read_bytes())
    weights["model.layers.0.mlp.up_proj.weight"][0] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    flags = ["--max_steps", "1", "--max_train_samples", "8", "--max_eval_samples", "1", "--use_cpu"]
    done = recipe("lora", "--model_name_or_path", model, *flags, "--output_dir", tmp_path / "run")
    assert (
        done.returncode == 2
        and "Weights were not finite before the first step (" in done.stderr
        and "up_proj" in done.stderr
    )


def test_noise_for_an_embedding_that_the_model_does_not_call_is_refused(tmp_path):
    done = recipe("lora", "--use_cpu", "--neftune_noise_alpha", "5", "--output_dir", tmp_path / "run")
    assert done.returncode == 2 and "--neftune_noise_alpha has no effect on t5" in done.stderr


def test_a_target_begins_as_config_json_says_where_generation_config_json_does_not(tmp_path):
    model = shutil.copytree(MODEL_DIR, tmp_path / "model")
    (model / "generation_config.json").write_text("{}")
    args = ModelArguments(str(model))
    loaded = load_model(args, load_model_config(args), torch.float32, CPU)
    assert generation_error(loaded, load_tokenizer(args), [5, 6]) < 1e-3


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_device_or_a_pipe_in_a_models_folder_is_refused(name, kind, model):
    (model / name).unlink(missing_ok=True)
    not_regular(model / name, kind)
    with refused(model):
        load_model_config(ModelArguments(str(model)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b"\x64" + bytes(7) + b"x" * 200),
        ("model.safetensors", (2**62).to_bytes(8, "little") + b"x" * 100),
        ("model.safetensors.index.json", b"hello"),
        ("model.safetensors.index.json", b'{"weight_map": 5}'),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "../a.safetensors"}}'),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "/etc/passwd"}}'),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'),
        ("pytorch_model.bin", pickle.dumps({"a": 1})),
        ("pytorch_model.bin", b"hello"),
    ],
)
def test_weights_that_are_none_are_refused_before_they_are_loaded(name, content, model):
    if name.endswith(".bin"):
        (model / "model.safetensors").unlink()
    (model / name).write_bytes(content)
    with refused(model / name):
        check_weight_files(model)


def test_weights_that_are_cut_off_or_of_another_model_are_refused(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = model / "model.safetensors"
    content = whole.read_bytes()
    tensors = load(content)
    whole.write_bytes(content[:5000])
    with refused(whole):
        check_weight_files(model)
    save_file({f"foo.{name}": tensor for name, tensor in tensors.items()}, whole, metadata={"format": "pt"})
    flags = ("--model_name_or_path", model, "--use_cpu", "--max_train_samples", "4", "--max_target_length", "8")
    done = recipe("lora", *flags, "--max_eval_samples", "2")
    assert done.returncode == 2 and "its weights do not fit its config.json" in done.stderr


# ---- patterns


@pytest.mark.parametrize("pattern", ["(a|b|ab|.)*(.|[a-z_.0-9])*!", "([a-z_.0-9]+)+!", "(", "*"])
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern"])
def test_a_pattern_without_end_is_refused(field, pattern, monkeypatch):
    monkeypatch.setattr("toolkit.methods.base.PATTERN_SECONDS", 0.3)
    layer = torch.nn.ModuleDict({"self_attention_projection_of_the_queries_in_the_layer": torch.nn.Linear(2, 2)})
    value = {pattern: 4} if field == "rank_pattern" else pattern
    with refused("file", field):
        check_patterns(LoraConfig(**({"target_modules": "x"} | {field: value})), layer, "file")


# ---- launch files


@pytest.mark.parametrize(
    "text",
    [
        "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config: {zero_stage: x}",
        "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config: 5",
        "num_processes: 1000000000",
        "num_processes: 2\nnum_machines: 0",
        "num_processes: -1",
        "num_processes: x",
        "num_processes: true",
        "distributed_type: [1]",
        "distributed_type: MULTI_GPU\nnum_processes: 2\nfoo: 1",
        "distributed_type: MULTI_GPU\nnum_processes: 1:30",
    ],
)
def test_a_launch_file_that_cannot_be_right_is_refused(text, tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(text, encoding="utf-8")
    with refused():
        assert read_launch_file(str(file)).engine.kind


@pytest.mark.parametrize("zero", [5, {"stage": "x"}, {"stage": True}, {"stage": 2, "offload_optimizer": 5}])
def test_a_configuration_of_deepspeed_that_cannot_be_right_is_refused(zero, tmp_path):
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": zero}), encoding="utf-8")
    file = tmp_path / "own.yaml"
    config = f"deepspeed_config: {{deepspeed_config_file: {tmp_path / 'zero.json'}, zero3_init_flag: false}}"
    file.write_text(f"distributed_type: DEEPSPEED\nnum_processes: 2\n{config}\n", encoding="utf-8")
    with refused("zero_optimization"):
        assert read_launch_file(str(file)).engine.kind


# ---- run folders

RECORD = {
    "method": "lora",
    "task": "summarization",
    "seed": 0,
    "weights": "float32",
    "prompt_template": "{text}",
    "label_names": [],
    "max_length": 64,
    "max_target_length": 8,
    "finished": True,
    "scores": {"tuned": {"rougeL": 0.5}},
    "parameters": {"trainable": 1, "all": 2},
}


@pytest.fixture
def run_folder(data, tmp_path):
    """A run folder with an adapter of the small model, as footprint would write it."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, folder = data / "models" / "stories260k", tmp_path / "run"
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    (folder / "run.json").write_text(json.dumps(RECORD), encoding="utf-8")
    (folder / "config.yaml").write_text(f"model_name_or_path: {base}\n", encoding="utf-8")
    use = PhaseUse(10, 5, {"parameters_frozen": {"": 10}})
    ledger = Ledger("measured", "cpu", {"load": use}, {}, 10, {"trainable": 1, "all": 2})
    ledger.save(folder / "memory.json")
    return folder


WRONG = (5, "x", [1], {"a": []}, None, -1, 10**12, float("nan"))


def test_a_field_of_any_wrong_type_in_a_run_folder_is_refused_and_never_hangs(run_folder):
    wrong, good = 0, json.loads((run_folder / "memory.json").read_text())
    assert FinishedRun(run_folder).ledger is not None
    for field, right in RECORD.items():
        for value in WRONG:
            same = (type(value) is type(right) and value in (5, "x")) or (field == "label_names" and value == "x")
            if same and field not in ("task", "weights"):
                continue
            (run_folder / "run.json").write_text(json.dumps(RECORD | {field: value}), encoding="utf-8")
            if field == "finished" and value is None:
                continue
            with refused(run_folder):
                FinishedRun(run_folder)
            wrong += 1
    (run_folder / "run.json").write_text(json.dumps(RECORD), encoding="utf-8")
    for field in good.keys() & {
        "source",
        "device",
        "phases",
        "first_step",
        "peak",
        "parameters",
        "timeline",
        "notes",
        "seconds",
    }:
        for value in WRONG:
            if (type(value) is type(good[field]) and field in ("device",)) or (
                field == "seconds" and value in (5, 10**12)
            ):
                continue
            (run_folder / "memory.json").write_text(json.dumps(good | {field: value}), encoding="utf-8")
            with refused("memory.json"):
                Ledger.load(run_folder / "memory.json")
            wrong += 1
    assert wrong > 120


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", "model_name_or_path: 5"),
        ("config.yaml", "load_in_4bit: maybe"),
        ("config.yaml", "dtype: foo"),
        ("config.yaml", "a: &a [*a]"),
        ("adapter_config.json", '{"peft_type": "LORA", "r": 1000000000}'),
        ("adapter_config.json", '{"peft_type": "FOO"}'),
        ("adapter_config.json", '{"peft_type": "LORA", "target_modules": "([a-z_.0-9]+)+!"}'),
        ("adapter_config.json", '{"peft_type": "LORA", "r": "x", "target_modules": ["q_proj"]}'),
        ("adapter_model.safetensors", ""),
        ("adapter_model.safetensors", "<html>"),
    ],
)
def test_a_damaged_file_of_a_run_folder_is_refused(name, content, run_folder, monkeypatch):
    monkeypatch.setattr("toolkit.methods.base.PATTERN_SECONDS", 0.3)
    (run_folder / name).write_text(content, encoding="utf-8")
    with refused(run_folder):
        Models().of(FinishedRun(run_folder))


@pytest.mark.parametrize("name", ["run.json", "config.yaml", "adapter_config.json", "memory.json"])
def test_a_link_to_a_device_in_a_run_folder_is_refused(name, run_folder):
    (run_folder / name).unlink()
    (run_folder / name).symlink_to("/dev/zero")
    with refused(name):
        run = FinishedRun(run_folder)
        assert run.ledger and run.adapter


@pytest.mark.parametrize("beams", ["0", "-1", "1000000"])
def test_generating_with_impossible_beams_is_refused(beams, run_folder):
    code, _, err = command("generate", run_folder, "text", "--num_beams", beams)
    assert code == 2 and err.startswith(f"error: --num_beams {beams} is not possible") and err.count("\n") == 1


def test_a_report_on_a_folder_that_is_named_like_markup(run_folder, tmp_path):
    folder = tmp_path / "[bold]"
    folder.mkdir()
    ledger = Ledger.load(run_folder / "memory.json")
    replace(ledger, device="[/up]\x1b[31m").save(folder / "memory.json")
    code, out, _ = command("report", folder)
    assert code == 0 and "[/up]" in out and "\x1b[31m" not in out
    assert command("report", folder, run_folder)[0] == 0


# ---- nothing from a stranger executes


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """Code that writes a file; a "y" waits on standard input for whoever asks. The file must not be there at the end."""
    file = tmp_path / "canary"
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.chdir(tmp_path)
    yield f"from pathlib import Path\nPath({str(file)!r}).touch()\nraise ImportError\n"
    assert not file.exists()


class Touch:
    """A pickle that writes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


MAPS = {
    "config": (
        "config.json",
        {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}},
    ),
    "config of a known type": (
        "config.json",
        {"auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}},
    ),
    "tokenizer": (
        "tokenizer_config.json",
        {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}},
    ),
    "tokenizer of the config": ("config.json", {"auto_map": {"AutoTokenizer": ["own.Own", None]}}),
}


SLOW = (
    "config of a known type",
    "tokenizer of the config",
    "custom_generate",
)  # they train, with transformers' own classes


@pytest.mark.parametrize("how", ["config", "tokenizer", *(pytest.param(how, marks=pytest.mark.slow) for how in SLOW)])
def test_code_in_a_models_folder_is_never_run(how, canary, model):
    (model / "own.py").write_text(canary, encoding="utf-8")
    if how == "custom_generate":
        (model / "custom_generate").mkdir()
        (model / "custom_generate" / "generate.py").write_text(canary, encoding="utf-8")
        change(model / "generation_config.json", custom_generate=str(model))
    else:
        change(model / MAPS[how][0], **MAPS[how][1])
    flags = ("--model_name_or_path", model, "--use_cpu", "--max_length", "64")
    code, *_ = command("predict", "lora", *flags)
    assert code in (0, 2)
    tiny = ("--max_steps", "1", "--max_train_samples", "2", "--max_eval_samples", "1", "--max_target_length", "4")
    done = recipe("lora", *flags, *tiny, "--num_beams", "1")
    assert done.returncode in (0, 2), done.stderr
    if how in ("config", "tokenizer"):
        assert "which footprint never runs" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("how", ["whole model", "tokenizer", "adapter", "pickled adapter", "pickled model", "tag"])
def test_code_in_a_run_folder_is_never_run(how, canary, run_folder, data, tmp_path):
    (run_folder / "own.py").write_text(canary, encoding="utf-8")
    if how in ("whole model", "pickled model"):
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (run_folder / name).unlink()
        shutil.copytree(data / "models" / "stories260k", run_folder, dirs_exist_ok=True)
        change(run_folder / "config.json", **MAPS["config"][1])
        if how == "pickled model":
            (run_folder / "model.safetensors").unlink()
            torch.save({"a": Touch(tmp_path / "canary")}, run_folder / "pytorch_model.bin")
            shutil.copy(data / "models" / "stories260k" / "config.json", run_folder)
            (run_folder / "config.yaml").write_text(f"model_name_or_path: {run_folder}\n", encoding="utf-8")
    elif how == "tokenizer":
        change(run_folder / MAPS["tokenizer"][0], **MAPS["tokenizer"][1])
    elif how == "adapter":
        change(run_folder / "adapter_config.json", megatron_config={"a": 1}, megatron_core="own")
    elif how == "pickled adapter":
        (run_folder / "adapter_model.safetensors").unlink()
        torch.save({"a": Touch(tmp_path / "canary")}, run_folder / "adapter_model.bin")
    else:
        tag = f"!!python/object/apply:os.system ['touch {tmp_path / 'canary'}']"
        (run_folder / "config.yaml").write_text(f"model_name_or_path: {tag}\n", encoding="utf-8")
    before = {path for path in tmp_path.iterdir() if path.name != "modules"}
    for words in (("generate", run_folder, "text"), ("merge", run_folder)):
        code, _, err = command(*words)
        assert code == 2 and err.strip().count("\n") == 0, err
    assert command("report", run_folder)[0] == 0
    assert {path for path in tmp_path.iterdir() if path.name != "modules"} == before


def test_showing_a_strangers_comparison_runs_nothing_and_leaves_its_folder_alone(canary, run_folder, tmp_path):
    folder = tmp_path / "comparison"
    folder.mkdir()
    for content in (
        '{"methods": ["../../run"], "seeds": 1, "launch": "x"}',
        '{"methods": ["lora"], "seeds": 1000000000, "launch": "x"}',
    ):
        (folder / "comparison.json").write_text(content, encoding="utf-8")
        code, _, err = command("compare", "--show", "--output_dir", folder)
        assert code == 2 and "comparison.json is damaged" in err and err.count("\n") == 1
    assert [path.name for path in folder.iterdir()] == ["comparison.json"]
