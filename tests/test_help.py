"""The first second of a command: short and long help, hints for what people type, and checks before PyTorch is imported."""

import dataclasses
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, recipe
from transformers import TrainingArguments

from toolkit.cli import main
from toolkit.config import RecipeParser, help, page, parse_config, sources, start
from toolkit.config.arguments import OVERRIDDEN
from toolkit.config.hints import INSTEAD, SAME
from toolkit.errors import UserError
from toolkit.methods import METHODS
from toolkit.methods.lora import Lora

HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate")
# Fields of TrainingArguments in transformers 4.20 to 5.16 that 5.17 to 5.24 do not have
REMOVED = [
    "adafactor",
    "dispatch_batches",
    "evaluation_strategy",
    "fp16_backend",
    "fp16_opt_level",
    "fsdp_min_num_params",
    "fsdp_transformer_layer_cls_to_wrap",
    "group_by_length",
    "half_precision_backend",
    "include_inputs_for_metrics",
    "include_tokens_per_second",
    "jit_mode_eval",
    "logging_dir",
    "mp_parameters",
    "no_cuda",
    "overwrite_output_dir",
    "past_index",
    "per_gpu_eval_batch_size",
    "per_gpu_train_batch_size",
    "push_to_hub_model_id",
    "push_to_hub_organization",
    "push_to_hub_token",
    "ray_scope",
    "save_safetensors",
    "sharded_ddp",
    "split_batches",
    "torchdynamo",
    "tpu_metrics_debug",
    "tpu_num_cores",
    "use_ipex",
    "use_legacy_prediction_loop",
    "use_mps_device",
    "warmup_ratio",
    "xpu_backend",
]


def footprint(capfd: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(argv)
    return int(end.value.code or 0), *capfd.readouterr()


def used_defaults(method):
    return method.defaults({"model_name_or_path": "any"})


# ---- help


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_short_help_of_a_recipe_fits_a_terminal_and_shows_the_defaults_that_are_used(name):
    done = recipe(name, "--help")
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert len(lines) <= 40 and max(map(len, lines)) <= 80
    for flag in ("model_name_or_path", "dataset_name", "max_length", "output_dir", "seed"):
        assert f"  --{flag} " in done.stdout
    shown = dict(re.findall(r"^  --(\w+) (\S+)", done.stdout, re.MULTILINE))
    for flag, value in used_defaults(METHODS[name]).items():
        if flag in shown and value not in (None, False):
            assert shown[flag] == help.spelt(value), flag
    assert ("--learning_rate" in done.stdout) is METHODS[name].trains
    assert not re.search(r"--\w+-\w", done.stdout)  # one spelling


def test_the_defaults_of_lora_and_qlora_are_those_of_the_recipe():
    assert "  --learning_rate 0.0003\n" in page.short_help("lora")
    qlora = page.short_help("qlora")
    assert "  --learning_rate 0.0002\n" in qlora and "  --load_in_4bit true " in qlora
    assert "  --activation_checkpointing true " in qlora and "paged_adamw_8bit" in qlora


@pytest.mark.parametrize("name", ["lora", "qlora", "in_context", "full"])
def test_help_all_lists_every_flag_that_has_an_effect_once(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    done = recipe(name, "--help", "all")
    assert (done.returncode, done.stderr) == (0, "")
    listed = re.findall(r"^  --([\w-]+)", done.stdout, re.MULTILINE)
    assert len(listed) == len({*listed}) > 120
    fields = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
    assert fields - {*OVERRIDDEN} <= {*listed} and not {*OVERRIDDEN} & {*listed}
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert "Deprecated alias" not in done.stdout


@pytest.mark.parametrize("command", ["predict", "train"])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_help_of_a_command_with_a_method_has_both_kinds_of_flags(command, name, capfd):
    code, out, err = footprint(capfd, command, name, "--help")
    lines = out.splitlines()
    assert (code, err) == (0, "") and len(lines) <= 40 and max(map(len, lines)) <= 80
    assert lines[0].startswith(f"usage: footprint {command} {name} ")
    assert "  --launch FILE" in out and "  --max_length N" in out and ("--gpu " in out) is (command == "predict")


def test_the_long_help_of_a_command_has_both_kinds_of_flags(capfd):
    code, out, _ = footprint(capfd, "predict", "lora", "--help", "all")
    assert code == 0 and "\n  --gpu NAME" in out and "\n  --lora_r 16" in out and "\n  --adam_beta1 0.9" in out


def test_the_committed_short_help_matches_the_parsers():
    written = runpy.run_path(str(ROOT / "benchmarks" / "cli_reference.py"))["short_help"]()
    assert page.SHORT_HELP.read_text(encoding="utf-8") == written, "run: python benchmarks/cli_reference.py"


# ---- the flags as their sources declare them


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_quick_parser_has_the_flags_of_the_recipes_own(name):
    def shape(parser):
        return {
            option: (action.dest, action.nargs, action.const, action.type in (int, float) and action.type)
            for action in parser._actions
            for option in action.option_strings
            if action.dest != "help"
        }

    assert shape(start.QuickParser(name)) == shape(RecipeParser(METHODS[name]))


def test_the_names_of_methods_and_of_flags_without_effect_are_read_from_their_sources():
    assert sources.methods() == sorted(METHODS)
    assert sources.training_names_without_effect() == OVERRIDDEN


@pytest.mark.parametrize(
    "words",
    [
        "--lr 1",
        "--lora_rr 8",
        "--num_virtual_tokens 4",
        "stray",
        "--lora_r eight",
        "--dtype float8",
        "--lora_target_modules",
        "--load_in_4bit maybe",
        "--do_train",
        "--lora_r 0",
        "--weight_decay -1",
        "--model_name_or_path ./none",
        "--dataset_name ./none.csv",
        "--config none.yaml",
        "--report_to nothing",
    ],
)
def test_a_mistake_has_the_same_line_early_and_late(words, monkeypatch, tmp_path):
    from toolkit.runs.preflight import prepare

    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as early:
        start.check("lora", words.split())
    with pytest.raises(UserError) as late:
        prepare(parse_config(Lora, words.split()))
    assert str(early.value) == str(late.value)


def test_keys_of_a_file_are_checked_early(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("lora_rank: 8\n")
    with pytest.raises(UserError, match=r"c\.yaml: unknown key lora_rank: use --lora_r"):
        start.check("lora", ["--config", str(file)])


# ---- hints


@pytest.mark.parametrize(
    ("typed", "flag"),
    [
        ("lr", "learning_rate"),
        ("batch_size", "per_device_train_batch_size"),
        ("lora_rank", "lora_r"),
        ("rank", "lora_r"),
        ("alpha", "lora_alpha"),
        ("epochs", "num_train_epochs"),
        ("steps", "max_steps"),
        ("max_seq_length", "max_length"),
        ("dataset", "dataset_name"),
        ("model", "model_name_or_path"),
        ("output", "output_dir"),
        ("evaluation_strategy", "eval_strategy"),
        ("per_gpu_train_batch_size", "per_device_train_batch_size"),
        ("Max-Seq-Length", "max_length"),
        ("LR", "learning_rate"),
    ],
)
def test_what_people_type_has_a_hint(typed, flag):
    for spelling in (f"--{typed}", f"--{typed}=1"):
        with pytest.raises(UserError, match=rf"unknown flag --[\w-]+: use --{flag}\b"):
            start.check("lora", [spelling, *([] if "=" in spelling else ["1"])])


@pytest.mark.parametrize("name", REMOVED)
def test_every_name_of_transformers_4_says_what_takes_its_place(name):
    assert name not in {f.name for f in dataclasses.fields(TrainingArguments)}
    with pytest.raises(UserError, match=rf"unknown flag --{name}: (use|leave it out)"):
        start.check("full", [f"--{name}", "1"])


def test_hints_name_flags_that_exist():
    known = {name for method in METHODS for name in sources.fields_of(method)} | {"config", "predict"}
    assert not {flag.split()[0] for flag in SAME.values()} - known
    assert not (SAME.keys() | INSTEAD.keys()) & known
    for text in INSTEAD.values():
        for flag in re.findall(r"--(\w+)", text):
            assert flag in known | {"num_processes", "gpu"}, text


@pytest.mark.parametrize("typed", ["local_rnk", "zzz", "trainer_type", "evil"])
def test_a_name_that_is_near_nothing_useful_has_no_suggestion(typed):
    with pytest.raises(UserError) as error:
        start.check("lora", [f"--{typed}", "1"])
    assert str(error.value) == f"unknown flag --{typed}; --help all lists them all"


@pytest.mark.parametrize("name", sorted(start.TRACKERS))
def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_loaded(name, monkeypatch):
    monkeypatch.setattr(start, "is_installed", lambda module: False)
    with pytest.raises(
        UserError, match=rf"--report_to {name}: .* is not installed; pip install [\w -]+, or leave it out"
    ):
        start.check("lora", ["--report_to", name])
    start.check("lora", ["--report_to", name, "--predict"])
    monkeypatch.setattr(start, "is_installed", lambda module: True)
    start.check("lora", ["--report_to", name])


# ---- nothing heavy is imported

FOOTPRINT = ("-c", "from toolkit.cli import main; main()")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["recipes/lora.py", "--lr", "1"], 2),
        (["recipes/full.py", "--dataset_name", "none.csv"], 2),
        (["recipes/qlora.py", "--report_to", "clearml"], 2),
        (["recipes/lora.py", "--help"], 0),
        ([*FOOTPRINT, "predict", "lora", "--gpu", "RTX 9999"], 2),
        ([*FOOTPRINT, "predict", "lora", "--max_lenght", "9"], 2),
        ([*FOOTPRINT, "predict", "lora", "--help"], 0),
        ([*FOOTPRINT, "train", "lora", "--launch", "zero9"], 2),
        ([*FOOTPRINT, "recipe", "bare_loop"], 0),
        ([*FOOTPRINT, "evaluate", "none"], 2),
        ([*FOOTPRINT, "generate", "none", "text"], 2),
        ([*FOOTPRINT, "merge", "none"], 2),
    ],
)
def test_help_and_mistakes_need_no_heavy_import(words, code):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert not {*HEAVY} & imported
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == code and len(said) == (1 if code else 0), said


STOP = f"""import builtins, runpy, sys
real = builtins.__import__
def stopping(name, *rest):
    if name.split('.')[0] in {HEAVY!r}:
        print('STOP', flush=True)
        sys.exit(3)
    return real(name, *rest)
builtins.__import__ = stopping
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.mark.parametrize("name", ["lora", "bare_loop"])
def test_the_first_line_comes_before_the_heavy_imports(name):
    words = [sys.executable, "-c", STOP, f"recipes/{name}.py"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [f"  footprint  {name}: loading PyTorch and transformers", "STOP"], done.stderr


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("a" * 300, "a name of 300 bytes, and 255 are possible"),
        ("\u00e4" * 130, "260 bytes"),
        ("b/" + "a" * 256 + "/c", "256 bytes"),
        ("a\0b", "no possible path"),
        ("a\udcff", "no possible path"),
    ],
)
def test_a_path_that_no_file_system_takes_is_refused(name, why):
    with pytest.raises(UserError, match=f"^--output_dir .*{why}"):
        start.check_name("--output_dir", Path(name))


def test_the_folder_of_this_process_is_a_possible_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start.check_paths({"output_dir": "."})


def test_a_misspelt_file_is_told_the_one_beside_it(tmp_path):
    (tmp_path / "alpaca.json").touch()
    with pytest.raises(UserError, match=r"no such folder or file \(did you mean alpaca.json\?\)"):
        start.check_paths({"dataset_name": str(tmp_path / "alpca.json")})
