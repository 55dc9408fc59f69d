"""Each recipe really runs, from the command line, on T5-like and GPT-like models, and leaves a complete run folder."""

import csv
import json
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, recipe, run
from ledgers import assert_same
from safetensors.torch import load_file
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration

from toolkit.config import parse_config
from toolkit.distributed.launcher import STARTED_AS, command, command_that_continues, without_secrets
from toolkit.errors import UserError
from toolkit.memory.ledger import Ledger
from toolkit.methods import METHODS
from toolkit.methods.in_context import InContext
from toolkit.models.generation import make_saveable
from toolkit.runs.in_context import prompts_with_examples
from toolkit.runs.preflight import prepare

RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.py") if path.stem != "bare_loop")  # test_bare_loop.py
SHORT = ("--max_eval_samples", "4", "--max_target_length", "8", "--logging_steps", "1")


def weights(folder):
    name = "adapter_model.safetensors" if (folder / "adapter_model.safetensors").exists() else "model.safetensors"
    return load_file(folder / name)


def test_there_is_a_recipe_for_each_method_and_none_shadows_a_library():
    assert [path.stem for path in RECIPES] == sorted(METHODS)
    assert len(RECIPES) >= 11  # so that the search has found them
    assert not {"profile", "datasets", "peft", "types", "evaluate"} & {path.stem for path in RECIPES}


def test_recipes_only_differ_in_their_method():
    """Each recipe spells out the whole run for its readers; this test keeps the copies equal."""

    def story(path):
        text = path.read_text(encoding="utf-8")
        code = text[text.index("from toolkit") :]
        return re.sub(r"toolkit\.methods\.\w+ import \w+|parse_config\(\w+\)", "METHOD", code)

    stories = {story(path) for path in RECIPES if METHODS[path.stem].trains}
    assert len(stories) == 1
    assert len(stories.pop().splitlines()) < 50


def test_each_recipe_starts_with_its_command_and_says_when_to_choose_it():
    for path in RECIPES:
        text = path.read_text(encoding="utf-8")
        assert f"    accelerate launch recipes/{path.name}\n" in text
        assert "Choose it" in text
        paper = METHODS[path.stem].paper
        assert paper in text


@pytest.fixture(scope="module")
def llama_run(data, tmp_path_factory):
    """LoRA on a real pretrained Llama and real text, with a checkpoint after 2 of 4 steps."""
    folder = tmp_path_factory.mktemp("runs") / "llama"
    arguments = llama_arguments(data, folder)
    done = recipe("lora", *arguments)
    assert done.returncode == 0, done.stderr
    return folder, done


def llama_arguments(data, folder):
    model, rows = data / "models" / "stories260k", data / "dialogsum"
    steps = ("--max_train_samples", "16", "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2")
    lengths = ("--max_length", "128", "--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "2")
    return ["--model_name_or_path", model, "--dataset_name", rows, *steps, *lengths, *SHORT, "--output_dir", folder]


@pytest.mark.slow
def test_a_run_leaves_a_folder_that_explains_itself(llama_run):
    folder, done = llama_run
    names = {path.name for path in folder.iterdir()}
    expected = {"config.yaml", "run.json", "metrics.jsonl", "memory.json", "completions.csv", "README.md"}
    assert expected | {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "checkpoint-4"} <= names
    assert not [name for name in names if name.startswith(".")]

    record = json.loads((folder / "run.json").read_text())
    assert record["finished"] and record["method"] == "lora" and record["seed"] == 42
    assert record["versions"]["torch"] == torch.__version__
    assert set(record["data"]["sha256"]) == {"train", "validation", "test"}
    assert record["data"]["truncated"]["train"]["rows"] > 0 and "truncated" in done.stdout

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 and line["learning_rate"] >= 0 for line in lines)
    assert lines[0]["tokens"] < lines[-1]["tokens"] <= 4 * 4 * 128

    with (folder / "completions.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 4 and list(rows[0]) == ["text", "reference", "base", "tuned"]
    assert all(row["text"].startswith("#Person1#") for row in rows)

    card = (folder / "README.md").read_text()
    assert "stories260k" in card and "ROUGE-L" in card and "Memory at the peak" in card


@pytest.mark.slow
def test_the_terminal_shows_trained_parameters_scores_and_memory_in_plain_lines(llama_run):
    _, done = llama_run
    for expected in ("17,920 of 277,952 parameters", "16 to train", "fp32: no GPU", "4/4  loss", "tokens/s", "│ tuned"):
        assert expected in done.stdout, expected
    assert "optimizer state" in done.stdout and "\x1b[" not in done.stdout
    assert "Warning" not in done.stderr and "Loading weights" not in done.stderr, done.stderr


@pytest.mark.slow
def test_the_measured_memory_counts_the_states_exactly(llama_run):
    folder, _ = llama_run
    ledger = Ledger.load(folder / "memory.json")
    trainable = sum(tensor.numel() for tensor in weights(folder).values())
    assert ledger.parameters == {"trainable": trainable, "all": 277_952}
    step = ledger.phases["optimizer_step"].categories
    assert step["parameters_trainable"] == 4 * trainable
    assert step["gradients"] == 4 * trainable
    # AdamW keeps two moments for each element, and a step count for each tensor
    assert step["optimizer_state"] == 8 * trainable + 4 * len(weights(folder))


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_weights(llama_run, data, tmp_path):
    folder, _ = llama_run
    resumed = tmp_path / "resumed"  # as the run was when it had just written its first checkpoint and one more line
    shutil.copytree(folder / "checkpoint-2", resumed / "checkpoint-2")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (resumed / "metrics.jsonl").write_text("".join(lines[:3]))
    done = recipe("lora", *llama_arguments(data, resumed), "--resume_from_checkpoint", "true")
    assert done.returncode == 0, done.stderr
    for name, tensor in weights(folder).items():
        assert torch.equal(tensor, weights(resumed)[name]), name
    lines = (resumed / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


@pytest.mark.slow
def test_generate_loads_a_run_from_its_folder_alone(llama_run):
    folder, _ = llama_run
    with (folder / "completions.csv").open(newline="", encoding="utf-8") as stream:
        row = next(csv.DictReader(stream))
    done = run("footprint", "generate", folder, row["text"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == row["tuned"].strip()


@pytest.mark.slow
def test_full_fine_tuning_of_a_t5_with_random_weights(data, tiny_t5, tmp_path):
    folder = tmp_path / "run"
    arguments = ["--model_name_or_path", tiny_t5, "--random_weights", "--dataset_name", data / "dialogsum"]
    chosen = ("--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1")
    best = ("--load_best_model_at_end", "--early_stopping_patience", "3", "--metric_for_best_model", "eval_loss")
    steps = ("--max_train_samples", "8", "--max_steps", "3", "--per_device_train_batch_size", "4", "--max_length", "64")
    done = recipe("full", *arguments, *steps, *chosen, *best, *SHORT, "--output_dir", folder)
    assert done.returncode == 0, done.stderr
    assert "best eval_loss on the validation split" in done.stdout
    record = json.loads((folder / "run.json").read_text())
    assert (
        record["parameters"]["trainable"]
        == record["parameters"]["all"]
        == sum(t.numel() for t in weights(folder).values())
    )


@pytest.mark.slow
def test_the_folder_has_no_token_only_the_best_weights_and_a_consistent_generation_config(data, small_csv, tmp_path):
    model, folder, token = tmp_path / "model", tmp_path / "run", "hf_" + "Secret" * 5
    shutil.copytree(data / "models" / "stories260k", model)
    (model / "generation_config.json").write_text(json.dumps({"temperature": 0.9, "top_p": 0.6, "bos_token_id": 1}))
    arguments = ["--model_name_or_path", model, "--dataset_name", small_csv, "--max_steps", "2", "--hub_token", token]
    best = ("--save_strategy", "best", "--eval_strategy", "steps", "--eval_steps", "1")
    done = recipe("full", *arguments, *best, *SHORT, "--output_dir", folder)
    assert done.returncode == 0, done.stderr
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files if path.name == "training_args.bin"} >= {"run", "checkpoint-2"}
    assert not [path for path in files if token.encode() in path.read_bytes()]
    command = json.loads((folder / "run.json").read_text())["command"]
    assert command.startswith("python ") and "--hub_token HIDDEN --save_strategy best" in command
    saved = json.loads((folder / "generation_config.json").read_text())
    assert (saved["temperature"], saved["top_p"], saved["do_sample"]) == (0.9, 0.6, True)


def test_the_recorded_command_is_the_launchers_without_secrets(monkeypatch):
    words = ["recipes/lora.py", "--hub_token=hf_x", "--lora_r", "4"]
    monkeypatch.setattr("sys.argv", words)
    for launcher, expected in (
        (["/bin/python", "/bin/accelerate", "launch", "--config_file", "a b"], "accelerate launch --config_file 'a b'"),
        (["/bin/python", "-m", "accelerate.commands.launch", "--cpu"], "accelerate launch --cpu"),
        (["/bin/python", "/bin/torchrun", "--nproc_per_node", "2"], "torchrun --nproc_per_node 2"),
        (["timeout", "9", "python"], "python"),
    ):
        parents = [SimpleNamespace(pid=1, cmdline=lambda w=w: w) for w in (["bash"], [*launcher, *words], ["init"])]
        monkeypatch.setattr("psutil.Process", lambda parents=parents: SimpleNamespace(parents=lambda: parents))
        assert without_secrets(shlex.join(command())) == f"{expected} recipes/lora.py --hub_token=HIDDEN --lora_r 4"
        assert command_that_continues("a b").endswith("--lora_r 4 --output_dir 'a b' --resume_from_checkpoint")
    monkeypatch.setenv(STARTED_AS, "footprint train lora --launch ddp --hub_token=hf_x")
    assert without_secrets(shlex.join(command())) == "footprint train lora --launch ddp --hub_token=HIDDEN"
    assert command_that_continues("a b") == (
        "footprint train lora --launch ddp --hub_token=HIDDEN --output_dir 'a b' --resume_from_checkpoint"
    )
    assert without_secrets("accelerate launch a.py --hub-token hf_x") == "accelerate launch a.py --hub-token HIDDEN"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"temperature": 0.9}, {"temperature": 0.9, "do_sample": True}),
        (
            {"do_sample": False, "temperature": 0.9, "top_k": 9, "num_beams": 1, "length_penalty": 2.0},
            {"do_sample": False},
        ),
        ({"num_beams": 4, "length_penalty": 2.0, "early_stopping": True}, None),
    ],
)
def test_a_generation_config_that_contradicts_itself_becomes_one_that_can_be_saved(before, after, tmp_path):
    settings = GenerationConfig(**before)
    make_saveable(settings)
    settings.save_pretrained(tmp_path)
    saved = GenerationConfig.from_pretrained(tmp_path)
    for name in before:
        expected = before[name] if after is None else after.get(name)
        assert getattr(saved, name) == expected or (name == "num_beams" and expected is None), name
    assert after is None or saved.do_sample == after["do_sample"]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(data, small_csv, tmp_path):
    folder = tmp_path / "run"
    arguments = ["--model_name_or_path", data / "models" / "stories260k", "--dataset_name", small_csv]
    steps = ("--max_steps", "20", "--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "1")
    wild = ("--learning_rate", "1000", "--max_grad_norm", "0", "--optim", "sgd", "--lr_scheduler_type", "constant")
    done = recipe("full", *arguments, *steps, *wild, *SHORT, "--output_dir", folder)
    assert done.returncode == 2
    assert re.search(
        r"error: the loss became (nan|inf) at step \d+; the last good checkpoint is .*checkpoint-\d+", done.stderr
    )
    assert list(folder.glob("checkpoint-*/model.safetensors"))


@pytest.mark.slow
def test_lora_on_a_4_bit_base_trains_generates_and_is_predicted(data, small_csv, tmp_path):
    arguments = ["--model_name_or_path", data / "models" / "stories260k", "--dataset_name", small_csv, "--load_in_4bit"]
    done = recipe("lora", *arguments, "--max_steps", "2", *SHORT, "--output_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "weights 4-bit nf4 for" in done.stdout
    ledger = Ledger.load(tmp_path / "run" / "memory.json")
    assert ledger.phases["forward"].categories["parameters_quantization_state"] > 0
    assert re.search(r"allocated, peak +│.*exact", done.stdout)


@pytest.mark.slow
def test_dora_over_a_4_bit_base_trains_and_is_predicted(data, small_csv, tmp_path):
    arguments = ["--model_name_or_path", data / "models" / "stories260k", "--dataset_name", small_csv, "--use_dora"]
    done = recipe("qlora", *arguments, "--max_steps", "2", *SHORT, "--use_cpu", "--output_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    predicted, measured = (Ledger.load(tmp_path / "run" / f"{name}.json") for name in ("predicted_memory", "memory"))
    assert_same(predicted, measured)
    magnitudes = [t for name, t in weights(tmp_path / "run").items() if "magnitude" in name]
    assert magnitudes and all(t.dim() == 1 and (t > 0).all() for t in magnitudes)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_recipe_runs_on_its_defaults_and_is_predicted(name, tmp_path):
    folder = tmp_path / "run"
    few = ("--max_train_samples", "32", "--max_eval_samples", "4", "--output_dir", folder)
    done = recipe(name, *few, *(("--max_steps", "2") if METHODS[name].trains else ()))
    assert done.returncode == 0, done.stderr
    record = json.loads((folder / "run.json").read_text())
    assert record["finished"]
    if METHODS[name].trains:
        assert record["scores"].keys() == {"base", "tuned"}
        assert sum(tensor.numel() for tensor in weights(folder).values()) > 1000
        assert re.search(r"allocated, peak +│.*(exact|[ -]0\.\d+ %)", done.stdout)
    else:
        costs = record["context"]
        assert list(record["scores"]) == list(costs) == ["0-shot", "1-shot", "4-shot"]
        tokens = [cost["prompt_tokens"] for cost in costs.values()]
        assert tokens[1] > 1.5 * tokens[0] and tokens[2] > 4 * tokens[0]
        assert all(cost["seconds_a_row"] > 0 for cost in costs.values())


@pytest.fixture(scope="module")
def tiny_t5_with_weights(tiny_t5, tmp_path_factory) -> Path:
    """`tiny_t5` with random weights in a file, so that it can be quantized while loading."""
    folder = shutil.copytree(tiny_t5, tmp_path_factory.mktemp("weights") / "tiny_t5")
    T5ForConditionalGeneration(T5Config.from_pretrained(folder)).save_pretrained(folder)
    return folder


ON_DATA = {  # a model's folder (None: a tiny T5), a data set's, and the task
    "dialogsum": (None, "dialogsum", "summarization"),
    "phrasebank as text": ("stories260k", "financial_phrasebank", "classification"),
    "phrasebank with a head": ("stories260k", "financial_phrasebank", "sequence_classification"),
}


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("what", ON_DATA)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_recipe_trains_on_real_data(name, what, data, tiny_t5_with_weights, tmp_path):
    model, rows, task = ON_DATA[what]
    source = data / "models" / model if model else tiny_t5_with_weights
    few = ("--max_train_samples", "16", "--max_eval_samples", "6", "--max_length", "128", "--use_cpu")
    done = recipe(
        name,
        *(
            "--model_name_or_path",
            source,
            "--dataset_name",
            data / rows,
            "--task",
            task,
            *few,
            "--output_dir",
            tmp_path / "run",
        ),
        *(("--max_steps", "2") if METHODS[name].trains else ("--num_shots", "0", "1")),
        *(("--max_target_length", "8") if task == "summarization" else ()),
    )
    if not METHODS[name].trains and task == "sequence_classification":
        assert done.returncode == 2 and "generates no answer" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["finished"]
    metric = "rougeL" if task == "summarization" else "accuracy"
    assert all(0 <= score[metric] <= 1 for score in record["scores"].values())
    assert len((tmp_path / "run" / "completions.csv").read_text(encoding="utf-8").splitlines()) >= 7


def test_examples_precede_the_question_in_the_same_form():
    config = parse_config(InContext, ["--num_shots", "0", "2", "--max_train_samples", "3", "--max_eval_samples", "2"])
    ready = prepare(config)
    plain, two = (prompts_with_examples(ready, shots, seed=0) for shots in (0, 2))
    assert plain == ready.data.test_prompts
    text = ready.data.tokenizer.decode(two[0])
    question = ready.data.tokenizer.decode(plain[0])
    assert text.endswith(question) and text.count("Summarize the following conversation.") == 3
    assert text.count("</s>") == question.count("</s>") == 1
    answers = [ready.data.tokenizer.decode(labels, skip_special_tokens=True) for labels in ready.data.train["labels"]]
    assert sum(answer in text for answer in answers) == 2
    assert two[0][: -len(plain[0])] == two[1][: -len(plain[1])]
    with pytest.raises(UserError, match="the train split has 3 rows"):
        prompts_with_examples(ready, 4, seed=0)
