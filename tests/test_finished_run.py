"""Finished runs: they answer, share a base, and their adapters are merged; a damaged file is a one-line error."""

import csv
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import recipe
from peft import IA3Config, PrefixTuningConfig, PromptTuningConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer

from toolkit.cli import main
from toolkit.errors import UserError
from toolkit.methods.adapter import BottleneckConfig
from toolkit.models.generation import generate
from toolkit.runs import finished_run
from toolkit.runs.finished_run import FinishedRun, Models
from toolkit.runs.merge import _check_mergeable, merge

SHORT = ("--max_steps", "2", "--per_device_train_batch_size", "2", "--max_length", "64", "--max_target_length", "12")


@pytest.fixture(scope="module")
def runs(small_csv, tmp_path_factory):
    """Two real LoRA runs on the embedded model, one of them as if over a 4-bit base, and a run folder with a whole model."""
    folder = tmp_path_factory.mktemp("runs")
    for name, flags in (("a", ("--lora_r", "2", "--learning_rate", "2e-3")), ("b", ("--learning_rate", "2e-2"))):
        rows = ("--dataset_name", small_csv, "--max_eval_samples", "3", "--save_strategy", "no")
        done = recipe("lora", *rows, *SHORT, *flags, "--output_dir", folder / name)
        assert done.returncode == 0, done.stderr
    shutil.copytree(folder / "b", folder / "nf4")
    settings = yaml.safe_load((folder / "nf4" / "config.yaml").read_text())
    (folder / "nf4" / "config.yaml").write_text(yaml.safe_dump(settings | {"load_in_4bit": True}))
    shutil.copytree(folder / "a", folder / "full", ignore=shutil.ignore_patterns("adapter_*"))
    FinishedRun(folder / "a").load_base().save_pretrained(folder / "full")
    return folder


@pytest.fixture(scope="module")
def small_labels(tmp_path_factory):
    """A data set of sentences with two classes."""
    folder = tmp_path_factory.mktemp("labels")
    for split in ("train", "validation", "test"):
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as stream:
            rows = [(f"I saw {n} cats.", "few" if n < 6 else "many") for n in range(2, 10)]
            csv.writer(stream).writerows([("sentence", "label"), *rows])
    return folder


def answers(folder, column=3):
    """Texts of the test split, and the answers of the tuned model (or, in column 2, of the base) at the end of the run."""
    with (folder / "completions.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.reader(stream))[1:]
    return [row[0] for row in rows], [row[column] for row in rows]


def footprint(*argv) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(one) for one in argv])
    return end.value.code or 0


@pytest.mark.slow
def test_several_runs_over_one_base_load_it_once_and_answer_as_before(runs, monkeypatch, capsys):
    loads = []
    real = finished_run.load_model
    monkeypatch.setattr(finished_run, "load_model", lambda *args: loads.append(1) or real(*args))
    texts, _ = answers(runs / "a")
    assert footprint("generate", runs / "a", runs / "b", runs / "full", runs / "a", texts[0]) == 0
    said = [line.strip().split("  ", 1) for line in capsys.readouterr().out.splitlines()]
    alone = {"a": answers(runs / "a")[1][0], "b": answers(runs / "b")[1][0], "full": answers(runs / "a", 2)[1][0]}
    assert said == [[name, alone[name]] for name in ("a", "b", "full", "a")]
    assert len(loads) == 1
    assert len(set(alone.values())) == 3  # otherwise this test could not fail


@pytest.mark.slow
def test_adapters_of_different_types_take_turns_on_one_base(runs, tmp_path):
    soft = tmp_path / "prompt"
    shutil.copytree(runs / "a", soft)
    (soft / "adapter_model.safetensors").unlink()
    config = PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=2, num_transformer_submodules=2)
    from peft import get_peft_model

    torch.manual_seed(3)
    get_peft_model(FinishedRun(runs / "a").load_base(), config).save_pretrained(soft)
    models, text = Models(), answers(runs / "a")[0][0]
    first, second = FinishedRun(runs / "a"), FinishedRun(soft)
    before = first.generate([text], models.of(first))
    second.generate([text], models.of(second))
    assert len(models.loaded) == 1
    assert first.generate([text], models.of(first)) == before == [answers(runs / "a")[1][0]]


@pytest.mark.slow
def test_interactive_answers_each_line(runs, monkeypatch, capsys):
    texts, _ = answers(runs / "a")
    lines = [text.replace("\n", " ") for text in texts]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([lines[0], "", lines[1]])))
    assert footprint("generate", runs / "a", "--interactive") == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert said == FinishedRun(runs / "a").generate(lines[:2])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("run.json", '{"method": ', "run.json is damaged: "),
        ("run.json", "[1]", "run.json is damaged: it holds a list"),
        ("run.json", '{"finished": true}', "run.json is damaged: it has no "),
        ("run.json", '{"finished": false}', "run.json is damaged: it has no "),
        ("config.yaml", "a: [1", "config.yaml is damaged: "),
        ("config.yaml", "text", "config.yaml is damaged: it holds a str"),
        ("adapter_config.json", "{", "adapter_config.json is damaged"),
        ("adapter_model.safetensors", "x", "adapter_model.safetensors: its 1 bytes are no whole safetensors file"),
    ],
)
def test_a_damaged_file_gives_one_line(runs, tmp_path, capsys, file, content, message):
    shutil.copytree(runs / "a", tmp_path / "run")
    (tmp_path / "run" / file).write_text(content)
    assert footprint("generate", tmp_path / "run", "text") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


@pytest.mark.slow
def test_a_run_that_did_not_finish_is_continued_rather_than_asked(runs, tmp_path, capsys):
    shutil.copytree(runs / "a", tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(record | {"finished": False}))
    assert footprint("generate", tmp_path / "run", "text") == 2
    assert "the run did not finish; continue it with --resume_from_checkpoint true" in capsys.readouterr().err


@pytest.mark.slow
def test_run_folders_come_first_and_missing_arguments_are_reported(runs, tmp_path, capsys):
    assert footprint("generate", "a text", runs / "a") == 2
    assert "a text is not a run folder" in capsys.readouterr().err
    assert footprint("generate", runs / "a") == 2
    assert "no text was given" in capsys.readouterr().err
    assert footprint("generate", runs / "a", "text", "--beams", "2") == 2
    assert "unknown flag --beams (did you mean --num_beams?)" in capsys.readouterr().err


@pytest.mark.slow
def test_transformers_alone_loads_a_merged_model_which_answers_as_the_adapter_did(runs, tmp_path, capsys):
    merge(runs / "b", tmp_path / "merged")
    assert "100.0% of what the adapter does" in capsys.readouterr().out
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    texts, tuned = answers(runs / "b")
    prompts = [FinishedRun(runs / "b").prompt_tokenizer.prompt(text)[0] for text in texts]
    assert generate(model, tokenizer, prompts, 8, 12) == tuned
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(UserError, match="is not empty; give a new folder"):
        merge(runs / "b", tmp_path / "merged")


@pytest.mark.slow
def test_a_4_bit_base_is_dequantized_and_merged_with_scores_before_and_after(runs, tmp_path):
    merge(runs / "nf4", tmp_path / "merged")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    about = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert about["dequantized"] and set(about["scores"]) == {"adapter", "merged"}
    assert about["tune_survived"] > 0.9


@pytest.mark.slow
def test_a_merge_that_rounding_would_erase_is_refused_and_float32_keeps_it(runs, tmp_path):
    weak = tmp_path / "weak"
    shutil.copytree(runs / "a", weak)
    weights = load_file(weak / "adapter_model.safetensors")
    save_file(
        {name: tensor * (1e-3 if "lora_B" in name else 1) for name, tensor in weights.items()},
        weak / "adapter_model.safetensors",
    )
    with pytest.raises(UserError, match=r"rounding to bfloat16 would leave .* merge in float32 \(--dtype float32\)"):
        merge(weak, tmp_path / "merged", "bfloat16")
    assert not (tmp_path / "merged").exists()
    merge(weak, tmp_path / "merged", "float32")


MERGES = {  # flags of a run; its adapter must merge into its base
    "lora-int8": ("lora", "--load_in_8bit"),
    "lora-head": ("lora", "--task", "sequence_classification"),
    "lora-nf4-head": ("qlora", "--task", "sequence_classification"),
    "dora": ("lora", "--use_dora"),
    "pissa": ("lora", "--init_lora_weights", "pissa"),
    "rslora": ("lora", "--use_rslora"),
    "ia3": ("ia3",),
    "ia3-int8": ("ia3", "--load_in_8bit"),
    "ia3-nf4": ("ia3", "--load_in_4bit"),
    "vera": ("peft_method",),
    "loha": ("peft_method", "--peft_type", "LOHA"),
}


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("case", MERGES)
def test_every_mergeable_adapter_answers_as_before_after_merging(case, small_csv, small_labels, tmp_path):
    name, *flags = MERGES[case]
    rows, task = (small_labels, ("--max_steps", "4")) if "head" in case else (small_csv, SHORT)
    done = recipe(
        name,
        *("--dataset_name", rows, *task, *flags, "--learning_rate", "2e-2", "--max_eval_samples", "4", "--use_cpu"),
        *("--save_strategy", "no", "--output_dir", tmp_path / "run"),
    )
    assert done.returncode == 0, done.stderr
    merge(tmp_path / "run", tmp_path / "merged")
    about = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert about["tune_survived"] > 0.5 and about["dequantized"] == ("int8" in case or "nf4" in case)
    family = AutoModelForSequenceClassification if "head" in case else AutoModelForSeq2SeqLM
    model, report = family.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    if case in ("dora", "ia3", "lora-head", "pissa", "rslora", "vera"):
        run = FinishedRun(tmp_path / "run")
        sample = run.sample(4)
        torch.testing.assert_close(
            run.logits(model.eval(), sample), run.logits(run.model, sample), rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize(
    ("method", "config", "reason"),
    [
        ("in_context", None, "leaves no adapter, .* it trains nothing"),
        ("prompt_tuning", PromptTuningConfig(num_virtual_tokens=2), "inputs to the model"),
        ("prefix_tuning", PrefixTuningConfig(num_virtual_tokens=2), "they change no weight"),
        ("of_an_older_version", PrefixTuningConfig(num_virtual_tokens=2), "they change no weight"),
        ("adapter", BottleneckConfig(), "is not linear"),
        ("peft_method", BottleneckConfig(), "is not linear"),
    ],
)
def test_methods_that_cannot_be_merged_say_why(method, config, reason):
    with pytest.raises(UserError, match=reason):
        _check_mergeable(SimpleNamespace(adapter=config, path=Path("run"), record={"method": method}))
    _check_mergeable(SimpleNamespace(adapter=IA3Config(), path=Path("run"), record={"method": "ia3"}))
