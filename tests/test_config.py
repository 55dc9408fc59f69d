"""Flags and YAML: which setting wins, and which mistakes are one-line errors."""

import dataclasses
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoConfig, TrainingArguments

from toolkit.config import RecipeParser, parse_config
from toolkit.config.arguments import OVERRIDDEN
from toolkit.data.loading import DataArguments, lengths
from toolkit.errors import UserError
from toolkit.errors.reading import read_yaml
from toolkit.methods import METHODS
from toolkit.methods.full import Full
from toolkit.methods.in_context import InContext
from toolkit.methods.lora import Lora
from toolkit.methods.prompt_tuning import PromptTuning
from toolkit.methods.qlora import QLora


def refusal(*argv: str, method=Lora) -> str:
    with pytest.raises(UserError) as caught:
        parse_config(method, argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_every_training_argument_is_a_flag_by_its_own_name():
    flags = RecipeParser(Lora).flags()
    names = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
    assert len(names) > 90
    assert names <= set(flags)


def test_every_overridden_flag_exists_and_is_refused_with_its_reason():
    parser = RecipeParser(Full)
    known = {f.name for f in dataclasses.fields(TrainingArguments)}
    assert set(OVERRIDDEN) <= known
    for name, reason in OVERRIDDEN.items():
        action = parser.flags()[name]
        value = str(action.choices[0]) if action.choices else "1"
        if "dict" not in str(action.type) and "parallelism" not in name:
            assert reason in refusal(f"--{name}={value}")


def test_flags_win_over_yaml_and_yaml_over_the_recipe(yaml_file):
    path = yaml_file("learning_rate: 1e-4\nlora_r: 4\nlora_target_modules: [q, v]\n")
    config = parse_config(Lora, ["--config", path, "--lora_r", "8"])
    assert (config.training.learning_rate, config.method.lora_r) == (1e-4, 8)
    assert config.method.lora_target_modules == ["q", "v"]
    assert parse_config(Lora, ["--lora_r", "8"]).training.learning_rate != 1e-4


def test_a_runs_own_config_can_be_run_again(yaml_file):
    config = parse_config(Lora, ["--lora_r", "4", "--max_length", "64", "--warmup_steps", "3"])
    again = parse_config(Lora, ["--config", yaml_file(yaml.safe_dump(config.as_dict()))])
    assert again.as_dict() == config.as_dict()


@pytest.mark.parametrize("method", [Lora, QLora], ids=["lora", "qlora"])
def test_flags_that_share_a_value_are_written_twice(method, yaml_file):
    config = parse_config(method, ["--gradient_checkpointing"])
    path = yaml_file(yaml.safe_dump(config.as_dict()))
    assert read_yaml(Path(path)) == config.as_dict()  # it refuses aliases
    assert parse_config(method, ["--config", path]).as_dict() == config.as_dict()


@pytest.mark.parametrize(
    "flags",
    [
        "--save_strategy steps --save_steps 500 --eval_strategy steps --eval_steps 7",
        "--save_strategy best --eval_strategy steps",
        "--save_strategy best --eval_strategy epoch --metric_for_best_model eval_loss",
        "--lr_scheduler_type reduce_lr_on_plateau --eval_strategy epoch",
    ],
)
def test_a_runs_own_config_keeps_strategies(flags, yaml_file):
    config = parse_config(Lora, flags.split())
    again = parse_config(Lora, ["--config", yaml_file(yaml.safe_dump(config.as_dict()))])
    assert again.as_dict() == config.as_dict()
    assert (config.training.metric_for_best_model or "loss").endswith("loss")
    assert config.training.save_strategy != "best" or config.training.greater_is_better is False


def test_a_flag_overrides_the_files_setting_of_the_same_thing_under_another_name(yaml_file):
    path = yaml_file("num_train_epochs: 5\nsave_strategy: steps\nsave_steps: 7\n")
    config = parse_config(Lora, ["--config", path, "--max_steps", "3", "--save_strategy", "epoch"])
    assert (config.training.max_steps, config.training.save_strategy) == (3, "epoch")
    epochs = parse_config(Lora, ["--config", yaml_file("max_steps: 3\n"), "--num_train_epochs", "2"])
    assert (epochs.training.max_steps, epochs.training.num_train_epochs) == (-1, 2)


def test_flags_of_hub_and_reports_are_accepted_if_they_have_an_effect(yaml_file):
    hub = ["--push_to_hub", "--hub_model_id", "a/b", "--hub_strategy", "end", "--hub_private_repo", "true"]
    reports = ["--report_to", "tensorboard", "--run_name", "first"]
    config = parse_config(Lora, [*hub, *reports])
    again = parse_config(Lora, ["--config", yaml_file(yaml.safe_dump(config.as_dict()))])
    assert again.as_dict() == config.as_dict() and config.training.run_name == "first"


def test_a_methods_default_that_the_task_does_not_have_is_dropped(yaml_file, tmp_path):
    (tmp_path / "rows.csv").touch()
    flags = ["--task", "sequence_classification", "--dataset_name", str(tmp_path / "rows.csv")]
    config = parse_config(Lora, flags)  # on the embedded model, LoRA has a default for --max_target_length
    assert "max_target_length" not in config.as_dict()
    again = parse_config(Lora, ["--config", yaml_file(yaml.safe_dump(config.as_dict()))])
    assert again.as_dict() == config.as_dict()


def test_a_run_without_training_can_be_run_again(yaml_file):
    config = parse_config(InContext, [])
    again = parse_config(InContext, ["--config", yaml_file(yaml.safe_dump(config.as_dict()))])
    assert again.as_dict() == config.as_dict()


@pytest.mark.parametrize(
    "name",
    [
        "dataset_name",
        "model_name_or_path",
        "text_column",
        "lora_target_modules",
        "task",
        "optim_args",
        "fsdp",
        "output_dir",
    ],
)
@pytest.mark.parametrize("value", ["", " "], ids=["empty", "blank"])
def test_an_empty_value_is_refused(name, value, yaml_file):
    said = f"--{name} is empty; give a value, or leave it out"
    if name == "task":
        said = "invalid choice"
    assert said in refusal(f"--{name}={value}")
    assert said in refusal("--config", yaml_file(f"{name}: '{value}'"))


def test_paths_become_absolute_and_hub_ids_stay(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "rows.csv").touch()
    monkeypatch.chdir(tmp_path / "model")
    flags = ["--model_name_or_path", ".", "--tokenizer_name", "user/name", "--dataset_name", "../rows.csv"]
    settings = parse_config(Lora, flags).as_dict()
    assert settings["model_name_or_path"] == str(tmp_path / "model")
    assert settings["dataset_name"] == str(tmp_path / "rows.csv")
    assert settings["tokenizer_name"] == "user/name"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--lora_rr", "8"], "unknown flag --lora_rr (did you mean lora_r?)"),
        (["--lerning_rate", "1"], "did you mean learning_rate?"),
        (["oops"], "unexpected value 'oops'"),
        (["--per_device_train_batch_size", "eight"], "invalid int value: 'eight'"),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size 0 is not possible"),
        (["--per_device_train_batch_size", "-1"], "--per_device_train_batch_size -1 is not possible"),
        (["--per_device_eval_batch_size", "-4"], "--per_device_eval_batch_size -4 is not possible"),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps 0 is not possible"),
        (["--max_steps", "0"], "--max_steps 0 trains nothing"),
        (["--num_train_epochs", "0"], "--num_train_epochs 0 trains nothing"),
        (["--learning_rate", "-1"], "--learning_rate -1 is not possible"),
        (["--adam_beta1", "1.5"], "--adam_beta1 1.5 is not possible"),
        (["--adam_beta2", "-0.1"], "--adam_beta2 -0.1 is not possible"),
        (["--seed", "-1"], "--seed -1 is not possible"),
        (
            ["--max_steps", "3", "--num_train_epochs", "2"],
            "--num_train_epochs has no effect together with --max_steps 3",
        ),
        (["--bf16_full_eval"], "--bf16_full_eval has no effect here"),
        (["--fp16_full_eval", "true"], "--fp16_full_eval has no effect here"),
        (["--hub_model_id", "a/b"], "--hub_model_id has no effect without --push_to_hub"),
        (["--hub_strategy", "end"], "--hub_strategy has no effect without --push_to_hub"),
        (["--hub_private_repo", "true"], "--hub_private_repo has no effect without --push_to_hub"),
        (["--run_name", "a"], "--run_name has no effect without --report_to"),
        (["--run_name", "a", "--report_to", "none"], "--run_name has no effect without --report_to"),
        (["--lora_r", "0"], "--lora_r 0 is not possible"),
        (["--lora_dropout", "1"], "--lora_dropout 1 is not possible"),
        (["--max_length", "0"], "--max_length 0 is not possible"),
        (["--max_train_samples", "-1"], "--max_train_samples -1 is not possible"),
        (["--prompt_template", "{text} {labels}"], "has {labels}, and --task summarization has no classes"),
        (["--prompt_template", "Hi"], "has no {text}"),
        (["--bf16", "--fp16"], "--bf16 and --fp16 exclude each other"),
        (["--fp16"], "--fp16 needs a GPU"),
        (["--project", "x"], "--project has no effect without --report_to trackio"),
        (["--optim_target_modules", "x"], "--optim_target_modules has no effect with --optim adamw"),
        (["--init_lora_weights", "pissa_niter_999999"], "is not known; give default"),
        (["--lora_r", "100000"], "a whole number of at most 16,384"),
        (["--load_in_4bit", "--load_in_8bit"], "exclude each other"),
        (["--bnb_4bit_quant_type", "nf4"], "has no effect without --load_in_4bit"),
        (["--text_column", "x"], "--text_column has no effect without --dataset_name"),
        (["--task", "poetry"], "invalid choice: 'poetry'"),
        (["--task", "text"], "--task text needs --dataset_name"),
        (["--label_column", "x"], "--label_column has no effect with --task summarization (only with --task class"),
        (["--task", "text", "--dataset_name", "a/b", "--num_beams", "2"], "--num_beams has no effect with --task text"),
        (
            ["--task", "sequence_classification", "--dataset_name", "a/b", "--prompt_template", "{text}"],
            "no effect with",
        ),
        (["--task", "chat", "--dataset_name", "a/b", "--prompt_column", "x"], "give both --prompt_column and --resp"),
        (["--model_revision", "main"], "--model_revision has no effect on a local model"),
        (
            ["--memory_snapshot", "--use_cpu"],
            "--memory_snapshot has no effect here: it records a training run on a GPU",
        ),
        (["--early_stopping_patience", "2"], "add --eval_strategy epoch --load_best_model_at_end"),
        (["--early_stopping_threshold", "0.1"], "no effect without --early_stopping_patience"),
        (["--metric_for_best_model", "eval_loss"], "no effect without --load_best_model_at_end"),
        (
            ["--metric_for_best_model", "rougeL", "--load_best_model_at_end", "--eval_strategy", "epoch"],
            "rougeL is not known while training",
        ),
        (["--save_strategy", "best"], "--save_strategy best needs evaluations to compare; add --eval_strategy epoch"),
        (["--save_steps", "5"], "--save_steps has no effect with --save_strategy epoch; add --save_strategy steps"),
        (["--save_steps", "500"], "add --save_strategy steps"),
        (["--eval_steps", "5"], "--eval_steps has no effect with --eval_strategy no; add --eval_strategy steps"),
        (["--load_best_model_at_end"], "load_best_model_at_end"),
        (["--optim", "adam_best"], "adam_best"),
        (["--gradient_checkpointing_kwargs", "{broken"], "JSON"),
    ],
)
def test_a_flag_that_cannot_be_right_is_one_clear_line(argv, expected):
    if argv == ["--gradient_checkpointing_kwargs", "{broken"]:
        expected = "Expecting property name"
    assert expected in refusal(*argv)


def test_a_flag_of_another_method_names_its_owner():
    assert "it belongs to the method lora" in refusal("--lora_r", "8", method=Full)


def test_full_fine_tuning_of_a_quantized_base_is_refused():
    assert "quantized weights cannot be trained" in refusal("--load_in_4bit", method=Full)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lora_rr: 8", "unknown key lora_rr (did you mean lora_r?)"),
        ("lora_r: eight", "invalid int value: 'eight'"),
        ("lora_r: [1, 2]", "lora_r takes one value, got a list of 2"),
        ("lora_r: {a: 1}", "lora_r takes one value, got a mapping with a"),
        ("max_steps: true", "invalid int value: 'true'"),
        ("gradient_checkpointing: perhaps", "perhaps"),
        ("- lora_r", "it holds a list"),
        ("lora_r: [", "not valid YAML"),
        ("max_steps: 0", "--max_steps 0 trains nothing"),
        ("remove_unused_columns: false", "--remove_unused_columns has no effect here"),
    ],
)
def test_a_yaml_file_that_cannot_be_right_is_one_clear_line(text, expected, yaml_file):
    message = refusal("--config", yaml_file(text))
    assert expected in message


def test_a_missing_yaml_file_is_named():
    assert "nowhere.yaml: cannot be read" in refusal("--config", "nowhere.yaml")


def test_a_dict_in_yaml_reaches_trainer(yaml_file):
    path = yaml_file("gradient_checkpointing: true\ngradient_checkpointing_kwargs: {use_reentrant: true}\n")
    assert parse_config(Lora, ["--config", path]).training.gradient_checkpointing_kwargs == {"use_reentrant": True}


def test_the_default_output_folder_is_new_for_each_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = parse_config(Lora, []).training.output_dir
    (tmp_path / first).mkdir(parents=True)
    assert parse_config(Lora, []).training.output_dir != first


def test_each_method_says_what_it_is():
    assert set(METHODS) >= {"full", "lora"}
    for name, method in METHODS.items():
        assert method.name == name
        assert method.__doc__
        assert sys.modules[method.__module__].__doc__


def test_a_yaml_file_that_turns_off_a_methods_core_setting_is_refused(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("load_in_4bit: false\n")
    with pytest.raises(UserError, match="neither 4 nor 8 bits"):
        parse_config(QLora, ["--config", str(path), "--use_cpu"])


def test_virtual_tokens_take_positions_from_a_model_with_a_limit():
    config = AutoConfig.for_model("gpt2", n_positions=128)
    arguments = DataArguments(max_length=120)
    assert lengths(arguments, config)[0] == 120
    with pytest.raises(UserError, match=r"at most 108 \(20 positions are virtual tokens\)"):
        lengths(arguments, config, virtual_tokens=20)
    assert lengths(DataArguments(), config, virtual_tokens=PromptTuning().virtual_tokens)[0] == 108
    assert lengths(arguments, AutoConfig.for_model("t5"), virtual_tokens=20)[0] == 120
