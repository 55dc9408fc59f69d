"""`footprint evaluate`, `footprint generate` on model folders, and the lines of the model card that load what was trained."""

import csv
import hashlib
import json
import re
import shutil

import pytest
import torch
from conftest import recipe, write_csv
from test_help import footprint
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from toolkit import load_run
from toolkit.runs.model_folder import ModelFolder

SHORT = ("--max_train_samples", "12", "--max_eval_samples", "4", "--max_steps", "2", "--use_cpu")
SHORT += ("--per_device_train_batch_size", "2", "--save_strategy", "no")
CHAT = ("--chat_template", "chatml", "--prompt_column", "prompt", "--response_column", "completion")


def state_of(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """The same rows for every task: a text, its summary, its class, and the two turns of a conversation."""
    file = tmp_path_factory.mktemp("texts") / "rows.jsonl"
    rows = [
        {
            "text": f"Tom saw {n} {'cats' if n % 2 else 'dogs'} in the park.",
            "summary": f"Tom saw {n}.",
            "label": "ab"[n % 2],
        }
        for n in range(40)
    ]
    rows = [row | {"prompt": row["text"], "completion": row["summary"]} for row in rows]
    for row in rows:
        turns = ("user", "Hello"), ("assistant", "Hi."), ("user", row["text"]), ("assistant", row["summary"])
        row["turns"] = [{"role": role, "content": content} for role, content in turns]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


RUNS = {
    "lora-summarization": ("lora", "--text_column", "text", "--max_length", "96", "--max_target_length", "8"),
    "full-text": ("full", "--task", "text", "--max_length", "64"),
    "lora-chat": ("lora", "--task", "chat", *CHAT, "--max_length", "160", "--max_target_length", "8"),
    "lora-turns": ("lora", "--task", "chat", *CHAT[:2], "--messages_column", "turns", "--max_length", "200"),
    "ia3-head": ("ia3", "--task", "sequence_classification", "--text_column", "text", "--max_length", "64"),
    "adapter-classes": ("adapter", "--task", "classification", "--text_column", "text", "--max_length", "160"),
}


@pytest.fixture(scope="module")
def runs(data, texts, tmp_path_factory):
    """The folder of a run of each kind in `RUNS`; each is made when it is first asked for."""
    there = {}

    def run(name):
        if name not in there:
            method, *flags = RUNS[name]
            folder = tmp_path_factory.mktemp("runs") / name
            model = ("--model_name_or_path", data / "models" / "stories260k", "--dataset_name", texts)
            if "--task" not in flags:
                model += ("--task", "summarization")
            done = recipe(method, *model, *flags, *SHORT, "--output_dir", folder)
            assert done.returncode == 0, done.stderr
            there[name] = folder
        return there[name]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RUNS))
def test_a_run_is_scored_again_with_the_same_scores_and_stays_as_it_is(name, runs, capfd, tmp_path):
    folder = runs(name)
    before, recorded = state_of(folder), json.loads((folder / "run.json").read_text())["scores"]["tuned"]
    file = tmp_path / "answers.csv"
    code, out, _ = footprint(capfd, "evaluate", str(folder), "--json", "--output_file", str(file))
    assert code == 0
    found = json.loads(out)
    assert found["scores"] == pytest.approx(recorded) and found["rows"] == 4
    assert state_of(folder) == before
    with file.open(newline="", encoding="utf-8") as stream, (folder / "completions.csv").open(newline="") as own:
        assert [row["answer"] for row in csv.DictReader(stream)] == [row["tuned"] for row in csv.DictReader(own)]


@pytest.mark.slow
def test_other_data_is_scored_with_its_test_split_or_all_its_rows(runs, capfd, tmp_path):
    folder = runs("lora-summarization")
    few = tmp_path / "few.jsonl"
    few.write_text('{"text": "Ann saw a cat.", "summary": "Ann saw it."}\n')
    code, out, _ = footprint(capfd, "evaluate", str(folder), "--dataset_name", str(few), "--json")
    assert code == 0 and json.loads(out)["rows"] == 1
    split = write_csv(tmp_path / "split", train=[("a b", "c")] * 5, test=[("d e", "f"), ("g h", "i")])
    code, out, _ = footprint(capfd, "evaluate", str(folder), "--dataset_name", str(split), "--json")
    assert code == 0 and json.loads(out)["rows"] == 2
    code, out, _ = footprint(capfd, "evaluate", str(folder))
    assert code == 0 and "in run.json" in out and "ROUGE-L" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags", "says"),
    [
        ("lora-summarization", "--dataset_name none.csv", "--dataset_name none.csv: no such folder or file"),
        ("lora-summarization", "--lora_r 4", "--lora_r has no effect here: the run's own is used"),
        ("lora-summarization", "--max_length 4", "--max_length has no effect here"),
        ("lora-summarization", "--per_device_eval_batch_size 0", "--per_device_eval_batch_size 0 is not possible"),
        ("lora-summarization", "--output_file {file}", "exists; give a new file"),
        ("ia3-head", "--dataset_name {file}", "has the label 'z', which"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_a_line(name, flags, says, runs, capfd, tmp_path):
    file = tmp_path / "other.jsonl"
    file.write_text('{"text": "Ann.", "label": "z"}\n{"text": "Tom.", "label": "a"}\n')
    code, out, err = footprint(capfd, "evaluate", str(runs(name)), *flags.format(file=file).split())
    errors = [line for line in err.splitlines() if not line.startswith("  footprint ")]
    assert code == 2 and "Scores" not in out and len(errors) == 1 and says in errors[0], err


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RUNS))
def test_the_lines_of_the_model_card_load_what_was_trained(name, runs):
    folder = runs(name)
    card = (folder / "README.md").read_text(encoding="utf-8")
    lines, *asking = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len([line for line in lines.splitlines() if line and "toolkit" not in line]) <= 5
    made: dict = {}
    exec(lines, made)
    run = load_run(folder)
    ids = torch.tensor([made["tokenizer"]("Tom saw 3 cats.").input_ids])
    with torch.inference_mode():
        one, other = (model.eval()(input_ids=ids).logits.float() for model in (made["model"], run.model))
    assert torch.allclose(one, other, atol=1e-4)
    assert len(asking) == (run.task.name == "chat")
    for part in asking:
        exec(part, made)
        ids = made["tokenizer"](made["prompt"], add_special_tokens=False).input_ids
        assert ids == run.prompt_tokenizer.prompt("text")[0]


@pytest.mark.slow
def test_a_merged_model_of_several_turns_has_the_scores_of_its_run(runs, capfd, tmp_path):
    folder = runs("lora-turns")
    assert footprint(capfd, "merge", str(folder), "--output_dir", str(tmp_path / "merged"))[0] == 0
    about = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert about["rows"] == 4 and about["scores"]["adapter"] == pytest.approx(load_run(folder).scores["tuned"])
    assert about["scores"]["merged"] == about["scores"]["adapter"]


@pytest.mark.slow
def test_a_merged_folder_answers_as_its_run(runs, capfd):
    folder = runs("lora-summarization")
    merged = folder.with_name("merged")
    assert footprint(capfd, "merge", str(folder), "--output_dir", str(merged))[0] == 0
    answers = [footprint(capfd, "generate", str(one), "Tom saw 3 cats.") for one in (folder, merged)]
    assert answers[0][0] == answers[1][0] == 0
    assert answers[0][1] == answers[1][1] != ""


@pytest.mark.slow
def test_a_model_folder_answers_in_its_chat_template_or_goes_on_with_the_text(data, capfd, tmp_path):
    plain, chat = data / "models" / "stories260k", tmp_path / "chat"
    code, out, _ = footprint(capfd, "generate", str(plain), "Once upon a time")
    assert code == 0 and out.strip() and ModelFolder(plain).task.name == "text"
    shutil.copytree(plain, chat)
    tokenizer = AutoTokenizer.from_pretrained(plain)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    tokenizer.save_pretrained(chat)
    folder = ModelFolder(chat)
    assert folder.task.name == "chat"
    assert "<user>Hello<assistant>" in tokenizer.decode(folder.prompt_tokenizer.prompt("Hello")[0])
    assert footprint(capfd, "generate", str(chat), "Hello")[0] == 0


@pytest.mark.slow
def test_a_classifier_folder_answers_with_its_classes(data, capfd, tmp_path):
    plain, folder = data / "models" / "stories260k", tmp_path / "head"
    model = AutoModelForSequenceClassification.from_pretrained(plain, id2label={0: "good", 1: "bad"}, pad_token_id=0)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(plain).save_pretrained(folder)
    code, out, _ = footprint(capfd, "generate", str(folder), "Once upon a time")
    assert code == 0 and out.strip() in ("good", "bad")


def test_an_adapter_without_its_run_is_refused(capfd, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    code, _, err = footprint(capfd, "generate", str(tmp_path), "Hello")
    assert code == 2 and "holds an adapter without the files of its run" in err
