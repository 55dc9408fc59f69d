"""Each task: how rows are tokenized, how a model answers, how answers are scored, and which mistakes are one-line errors."""

import csv
import json
import logging
import math
import random
import shutil
from collections import Counter

import pytest
import torch
from conftest import recipe
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, TrainingArguments

from toolkit.config import parse_config
from toolkit.data.loading import DataArguments, label_names, load_data
from toolkit.data.rows import load_rows
from toolkit.errors import UserError
from toolkit.methods.full import Full
from toolkit.models.arguments import ModelArguments
from toolkit.models.generation import classify, generate, losses
from toolkit.models.heads import auto_class, head_modules, set_head
from toolkit.models.loading import load_model, load_model_config, load_tokenizer
from toolkit.models.losses import IGNORE_INDEX
from toolkit.runs.finished_run import FinishedRun
from toolkit.runs.in_context import prompts_with_examples
from toolkit.runs.prediction import predict_run
from toolkit.runs.preflight import Preflight, prepare
from toolkit.tasks import TASKS, row_scores
from toolkit.tasks.metrics.classification import classification
from toolkit.tasks.tokenization import Truncation

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is it raining?"},
    {"role": "assistant", "content": "Yes, it is."},
    {"role": "user", "content": "And cold?"},
    {"role": "assistant", "content": "Very cold."},
]


@pytest.fixture(scope="module")
def llama(data):
    """Config and tokenizer of a real tiny Llama."""
    return AutoConfig.from_pretrained(data / "models" / "stories260k"), tokenizer_of(data)


def tokenizer_of(data, chat_template=None):
    tokenizer = AutoTokenizer.from_pretrained(data / "models" / "stories260k")
    tokenizer.chat_template = chat_template
    return tokenizer


def labelled(folder, **splits):
    """A data set folder with csv files with the columns sentence and label."""
    folder.mkdir(exist_ok=True)
    for split, rows in splits.items():
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([("sentence", "label"), *rows])
    return str(folder)


def jsonl(folder, rows):
    folder.mkdir(exist_ok=True)
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


LABELLED = {"text_column": "sentence", "label_column": "label"}
GOOD, BAD = [("profit rose", "up")] * 6, [("profit fell", "down")] * 3


# Scores


def test_accuracy_and_macro_f1_derived_by_hand():
    # up: TP 2, FP 1, FN 1 -> F1 4/6; down: TP 0, FN 1, FP 0 -> 0; flat: TP 1, no FP, no FN -> 1
    scores = classification(
        [" UP ", "up", "no idea", "up", "flat"], ["up", "up", "up", "down", "flat"], ["up", "down", "flat"]
    )
    assert scores == pytest.approx(
        {"accuracy": 3 / 5, "macro_f1": (4 / 6 + 0 + 1) / 3, "unknown": 1 / 5, "majority_class": 3 / 5}
    )


def test_a_known_label_that_the_test_split_lacks_is_wrong_but_not_unknown():
    assert classification(["down"], ["up"], ["up", "down"])["unknown"] == 0
    assert classification(["down"], ["up"], ["up", "down"])["accuracy"] == 0


@pytest.mark.parametrize("name", sorted(TASKS))
def test_the_score_of_rows_is_the_score_of_all(name):
    predictions, references = {
        "text": (["2.0", "4.0"], ["10", "10"]),
        "classification": (["Up", "x", "down"], ["up", "up", "up"]),
    }.get(name, (["up", "a cat sat"], ["up", "the cat sat"]))
    task = TASKS[name]
    mean = sum(row_scores(name, predictions, references)) / len(references)
    assert 0 < mean == pytest.approx(task.score(predictions, references, ["up", "down"])[task.metric])
    assert task.higher_is_better is (name != "text")


def test_perplexity_weighs_texts_by_their_tokens():
    scores = TASKS["text"].score(["1.0", "4.0"], ["30", "10"], [])
    assert scores == pytest.approx({"loss": 70 / 40, "perplexity": math.exp(70 / 40)})


# Files and labels


def test_sentences_with_labels_are_read_in_latin_1_and_split_by_class(tmp_path, llama):
    lines = [f"caf\xe9 {n} @ home@up" for n in range(60)] + [f"loss {n} .@down" for n in range(40)]
    (tmp_path / "Sentences_AllAgree.txt").write_bytes("\r\n".join(lines).encode("latin-1"))
    (tmp_path / "License.txt").write_text("free")
    loaded = load_data(DataArguments("classification", str(tmp_path)), *llama)
    assert {split: len(rows) for split, rows in loaded.rows.items()} == {"train": 81, "validation": 10, "test": 9}
    for split, up in (("validation", 6), ("test", 5)):
        assert loaded.rows[split]["label"].count("up") == up
    texts = [text for split in loaded.rows for text in loaded.rows[split]["sentence"]]
    assert len(set(texts)) == 100 and "caf\xe9 7 @ home" in texts
    assert loaded.test_texts == loaded.test["sentence"] and loaded.references == loaded.test["label"]


@pytest.mark.parametrize("task", ["classification", "text"])
def test_runs_with_several_seeds_are_scored_on_the_same_held_out_rows(task, tmp_path, llama):
    rows = [(f"profit {n}", "up" if n % 3 else "down") for n in range(60)]
    arguments = DataArguments(task, labelled(tmp_path / "d", train=rows), text_column="sentence")
    torch.manual_seed(0)  # as a run's --seed would
    one = load_data(arguments, *llama)
    torch.manual_seed(1)
    other = load_data(arguments, *llama)
    assert one.fingerprint == other.fingerprint
    assert not set(one.test_texts) & set(one.rows["train"]["sentence"])


@pytest.mark.parametrize(("classes", "rows_each"), [(77, 4), (30, 2), (3, 50)])
def test_held_out_splits_have_their_size_however_small_the_classes(classes, rows_each, tmp_path):
    rows = [(f"text {n} of {kind}", f"class{kind:02}") for kind in range(classes) for n in range(rows_each)]
    splits, _ = load_rows(labelled(tmp_path / "d", train=rows), None, LABELLED)
    left = len(rows)
    for split in ("validation", "test"):
        size = round(0.1 * left)
        assert len(splits[split]) == size
        held = Counter(splits[split]["label"])
        assert max(held.values()) <= -(-size // classes) + 1
        left -= size
    assert len(set(splits["train"]["label"])) == classes
    assert sum(map(len, splits.values())) == len(rows)
    of_both = {*splits["validation"]["label"], *splits["test"]["label"]}
    assert len(of_both) >= min(classes, 0.15 * len(rows))
    assert max(of_both) > f"class{classes // 2:02}"  # not only the first classes


@pytest.mark.parametrize("kept_back", ["all", "one"])
def test_rows_without_a_published_label_are_not_scored(kept_back, tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["down", "up"])})
    for split, labels in {
        "train": [0, 1] * 20,
        "validation": [1, 0],
        "test": [-1] * 3 if kept_back == "all" else [-1, 0, 1],
    }.items():
        sentences = [f"{split} {n}" for n in range(len(labels))]
        table = Dataset.from_dict({"sentence": sentences, "label": labels}, features)
        table.to_parquet(tmp_path / f"{split}.parquet")
    splits, remarks = load_rows(str(tmp_path), None, LABELLED)
    if kept_back == "all":
        assert remarks[0] == "the test split is not used: none of its rows has a label"
        assert remarks[1].startswith("no test split: 4 rows of train held out for it")
        assert Counter(splits["test"]["label"]) == {"up": 2, "down": 2}
    else:
        assert remarks == ["1 rows of test left out: empty sentence or label"]
        assert splits["test"]["label"][:] == ["down", "up"]


def test_the_whole_financial_phrasebank(data):
    splits, remarks = load_rows(str(data / "financial_phrasebank"), None, LABELLED)
    labels = [label for split in splits for label in splits[split]["label"]]
    assert {name: labels.count(name) for name in sorted(set(labels))} == {
        "negative": 303,
        "neutral": 1391,
        "positive": 570,
    }
    assert len(splits["test"]) > 200 and len(remarks) == 2
    first = list(splits["test"]["label"][:50])
    assert len(set(first)) == 3  # mixed, so that the first N rows are a fair sample


@pytest.mark.parametrize(
    ("splits", "flags", "expected"),
    [
        ({"train": GOOD}, {}, "column label has only one value ('up')"),
        (
            {"train": GOOD + BAD, "test": [("x", "flat")]},
            {},
            "the test split has the label 'flat', which train does not have",
        ),
        ({"train": GOOD + BAD}, {"max_target_length": 1}, "truncates labels: the longest has"),
        (
            {"train": GOOD + BAD},
            {"label_column": "mood"},
            "no column 'mood'; it has sentence, label; name yours with --label_column",
        ),
    ],
)
def test_labels_that_cannot_be_learned_are_refused(splits, flags, expected, tmp_path, llama):
    with pytest.raises(UserError) as caught:
        load_data(DataArguments("classification", labelled(tmp_path / "d", **splits), **flags), *llama)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_a_line_without_a_label_is_named(tmp_path, llama):
    (tmp_path / "rows.txt").write_text("a@up\n\nno label here\n")
    with pytest.raises(UserError, match="line 3 has no @label at its end"):
        load_data(DataArguments("classification", str(tmp_path / "rows.txt")), *llama)


def test_one_of_several_files_of_sentences_must_be_chosen(tmp_path, llama):
    for share in ("50Agree", "AllAgree"):
        (tmp_path / f"Sentences_{share}.txt").write_text("a@up\n")
    with pytest.raises(
        UserError, match=r"several files hold the same sentences \(Sentences_50Agree.txt, Sentences_AllAgree.txt\)"
    ):
        load_data(DataArguments("classification", str(tmp_path)), *llama)


# Classification as text, and by a head


def test_the_prompt_names_the_classes_and_the_target_is_one(tmp_path, llama):
    loaded = load_data(DataArguments("classification", labelled(tmp_path / "d", train=GOOD + BAD * 4)), *llama)
    row = loaded.train[0]
    target = [label for label in row["labels"] if label != IGNORE_INDEX]
    assert loaded.prompt_tokenizer.tokenizer.decode(target, skip_special_tokens=True).strip() in ("up", "down")
    text = loaded.prompt_tokenizer.tokenizer.decode(loaded.test_prompts[0])
    assert "one of: down, up." in text and loaded.test_texts[0] in text


def test_the_rows_of_a_head_are_only_the_text_and_a_class(tmp_path, llama):
    config, tokenizer = llama
    folder = labelled(tmp_path / "d", train=[*GOOD, ("word " * 90, "down")] * 3, validation=BAD, test=GOOD)
    loaded = load_data(DataArguments("sequence_classification", folder, max_length=64), config, tokenizer)
    assert loaded.prompt_tokenizer.label_names == ("down", "up")
    assert loaded.supervised_tokens == len(loaded.train) == 21
    rows = {tokenizer.decode(row["input_ids"], skip_special_tokens=True).strip(): row for row in loaded.train}
    assert rows["profit rose"]["labels"] == 1
    assert max(len(row["input_ids"]) for row in loaded.train) == 64
    assert loaded.truncation["train"].rows == 3 and loaded.truncation["train"].text_tokens > 0
    assert loaded.truncation["test"].rows == 0


def test_a_head_classifies_a_batch_like_single_texts(llama):
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=512
    )
    set_head(config, ["a", "b", "c"], llama[1].pad_token_id)
    torch.manual_seed(3)
    model = auto_class(config).from_config(config)
    assert type(model).__name__ == "LlamaForSequenceClassification" and head_modules(model) == ["score"]
    prompts = [torch.randint(3, 500, (length,)).tolist() for length in (3, 17, 9, 30, 1, 12)]
    alone = [classify(model, llama[1], [prompt], 1)[0] for prompt in prompts]
    assert len(set(alone)) > 1
    assert classify(model, llama[1], prompts, 4) == alone
    assert TASKS["sequence_classification"].answers(
        model,
        TASKS["sequence_classification"].prompt_tokenizer(llama[1], "{text}", False, 64, 0, ("a", "b", "c")),
        prompts,
        4,
    ) == ["abc"[number] for number in alone]


MOODS = ["very bad", "good", "bad", "very good", "even"]  # in no order of the alphabet


def perfect_classifier(folder, data, id2label=None):
    """A checkpoint with a head of five classes, and texts with the class indices that it gives them."""
    tokenizer = load_tokenizer(ModelArguments(str(data / "models" / "stories260k")))
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=512, num_labels=5
    )
    config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    texts = [
        f"{one} {other}"
        for one in ("a", "big", "red", "cat", "sun")
        for other in ("ran", "sat", "was", "had", "saw", "is")
    ]
    ids = [tokenizer(text).input_ids for text in texts]
    with torch.no_grad():
        states = torch.stack([model.model(torch.tensor([one])).last_hidden_state[0, -1] for one in ids])
        model.score.weight.copy_((states[:5] - states.mean(0)) / 32)
    classes = classify(model, tokenizer, ids, 4)
    assert set(classes) == set(range(5))
    if id2label:
        model.config.id2label, model.config.label2id = id2label, {name: n for n, name in id2label.items()}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return texts, classes


def loaded_with_head(folder, rows, path):
    """The data and the initial model of a run on these rows."""
    name = labelled(path, train=rows, validation=rows, test=rows)
    flags = [
        "--task",
        "sequence_classification",
        "--model_name_or_path",
        str(folder),
        "--dataset_name",
        name,
        "--use_cpu",
    ]
    config = parse_config(Full, flags)
    ready = prepare(config)
    return ready.data, ready.load_model()


@pytest.mark.parametrize(
    ("shipped", "labels", "expected"),
    [
        (MOODS, MOODS, MOODS),
        (
            MOODS,
            [None, "GOOD", "BAD", None, "EVEN"],
            ["very bad", "GOOD", "BAD", "very good", "EVEN"],
        ),  # three of the five
        (MOODS, list("01234"), list("01234")),
        (list("43210"), list("43210"), list("43210")),
        (None, sorted(MOODS), sorted(MOODS)),  # LABEL_0, LABEL_1 ...
    ],
)
def test_a_checkpoints_own_head_keeps_the_order_of_its_classes(shipped, labels, expected, data, tmp_path):
    texts, classes = perfect_classifier(tmp_path / "model", data, dict(enumerate(shipped)) if shipped else None)
    rows = [(text, labels[number]) for text, number in zip(texts, classes, strict=True) if labels[number]]
    loaded, model = loaded_with_head(tmp_path / "model", rows, tmp_path / "d")
    assert loaded.prompt_tokenizer.label_names == tuple(expected)
    assert loaded.task.answers(model, loaded.prompt_tokenizer, loaded.test_prompts, 4) == loaded.references
    assert any(remark.startswith("the checkpoint's own head is kept") for remark in loaded.remarks)
    numbers = {loaded.prompt_tokenizer.label_names[row["labels"]] for row in loaded.train}
    assert numbers == {name for name in labels if name}


@pytest.mark.parametrize("labels", [["x", *MOODS[1:]], list("12345")])
def test_a_new_head_is_made_for_other_classes_and_reported(labels, data, tmp_path):
    shipped = None if labels[0] == "1" else dict(enumerate(MOODS))
    texts, _ = perfect_classifier(tmp_path / "model", data, shipped)
    rows = [(text, labels[n % len(labels)]) for n, text in enumerate(texts)]
    loaded, model = loaded_with_head(tmp_path / "model", rows, tmp_path / "d")
    assert set(loaded.prompt_tokenizer.label_names) == set(labels)
    own = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert torch.equal(model.model.embed_tokens.weight, own.model.embed_tokens.weight)
    assert model.score.weight.shape[0] == len(labels)
    assert not any(torch.equal(row, other) for row in model.score.weight for other in own.score.weight)
    assert 0.01 < model.score.weight.std() < 0.04  # as a head that no checkpoint brings: 0.02
    assert any("the checkpoint's head has other classes" in remark for remark in loaded.remarks)


@pytest.mark.parametrize("architecture", ["roberta", "t5", "gpt2", "deberta-v2"])
def test_a_head_of_any_architecture_is_kept_or_replaced_as_a_whole(architecture, tmp_path):
    sizes = {
        "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64},
        "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 64},
    }.get(architecture, {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64})
    training = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    saved = AutoConfig.for_model(architecture, **sizes, num_labels=3)
    saved.id2label, saved.label2id = dict(enumerate("bca")), {"b": 0, "c": 1, "a": 2}
    AutoModelForSequenceClassification.from_config(saved).save_pretrained(tmp_path)
    shipped = AutoModelForSequenceClassification.from_pretrained(tmp_path).state_dict()
    for names, order, kept in (
        ("abc", "bca", True),
        ("abx", "abx", False),
        ("ab", "bca", True),
        ("abcd", "abcd", False),
    ):
        arguments = ModelArguments(str(tmp_path))
        config = load_model_config(arguments, kind="head")
        set_head(config, names, 0)
        assert "".join(config.id2label[n] for n in range(config.num_labels)) == order
        model = load_model(arguments, config, torch.float32, training)
        heads = tuple(head_modules(model))
        for name, weight in model.named_parameters():
            if weight.dim() > 1:  # biases begin at 0 in each
                same = weight.shape == shipped[name].shape and torch.equal(weight, shipped[name])
                assert same is (kept or not name.startswith(heads)), name


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([str(n) for n in range(12)], [str(n) for n in range(12)]),
        (["10", "9", "-1"], ["-1", "9", "10"]),
        (["1.5", "10", "9.25"], ["1.5", "9.25", "10"]),
        (["10", "9", "x"], ["10", "9", "x"]),
    ],
)
def test_classes_that_are_numbers_are_sorted_as_numbers(labels, expected, tmp_path, llama):
    rows = [(f"text {n}", name) for n, name in enumerate(labels * 3)]
    folder = labelled(tmp_path / "d", train=rows, validation=rows[:1], test=rows[:1])
    loaded = load_data(DataArguments("sequence_classification", folder), *llama)
    assert loaded.prompt_tokenizer.label_names == tuple(expected) == label_names(folder, None, "label")


def test_declared_classes_keep_the_data_sets_order(tmp_path, llama):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["up", "even", "down"])})
    for split in ("train", "validation", "test"):
        rows = {"sentence": [f"{split} {n}" for n in range(6)], "label": [2, 1, 0] * 2}
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    loaded = load_data(DataArguments("sequence_classification", str(tmp_path)), *llama)
    assert loaded.prompt_tokenizer.label_names == ("up", "even", "down")
    assert [row["labels"] for row in loaded.train] == [2, 1, 0] * 2
    assert loaded.references == ["down", "even", "up"] * 2


@pytest.mark.parametrize("task", ["classification", "sequence_classification"])
def test_a_sample_of_a_sorted_file_has_each_class(task, tmp_path, llama):
    rows = [
        (f"text {name} {n}", name) for name, count in (("up", 60), ("even", 30), ("down", 10)) for n in range(count)
    ]
    folder = labelled(tmp_path / "d", train=rows, validation=rows, test=rows)

    def load(size, seed):
        torch.manual_seed(seed)
        return load_data(DataArguments(task, folder, max_train_samples=size, max_eval_samples=size), *llama)

    one, other = load(20, 0), load(20, 1)
    for split in one.rows:
        assert Counter(one.rows[split]["label"]) == {"up": 12, "even": 6, "down": 2}
        assert one.rows[split]["sentence"][:] == other.rows[split]["sentence"][:]
    assert len({*one.train.map(lambda row: {"text": str(row["input_ids"])})["text"]}) == 20
    assert not any("no row of" in remark for remark in one.remarks)
    few = load(2, 0)
    assert "--max_train_samples 2: no row of down among those of train" in few.remarks
    assert few.prompt_tokenizer.label_names == one.prompt_tokenizer.label_names == ("down", "even", "up")


def test_labels_that_only_differ_in_case_are_refused(tmp_path, llama):
    folder = labelled(tmp_path / "d", train=[("a", "Up"), ("b", "up"), ("c", "down")] * 3)
    for task in ("classification", "sequence_classification"):
        with pytest.raises(UserError, match=r"has the labels 'Up' and 'up', .* without regard to case"):
            load_data(DataArguments(task, folder), *llama)


def test_labels_that_the_tokenizer_cannot_write_are_refused_and_unknown_tokens_counted(data, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizers" / "t5-small")
    rows = [("a \u732b sat", "\u732b"), ("a dog sat", "dog")] * 3
    folder = labelled(tmp_path / "d", train=rows, validation=rows, test=rows)
    config = AutoConfig.for_model("t5")
    with pytest.raises(UserError, match="cannot write the label '\u732b' of column label"):
        load_data(DataArguments("classification", folder), config, tokenizer)
    loaded = load_data(DataArguments("sequence_classification", folder), config, tokenizer)
    assert "3 tokens of train are unknown to the tokenizer (<unk>)" in loaded.remarks
    assert "6 of 6 rows of test have a text that train has too" in loaded.remarks


def test_a_column_of_lists_is_not_text(tmp_path, llama):
    rows = jsonl(tmp_path / "d", [{"sentence": ["a", "b"], "label": "up"}, {"sentence": "c", "label": "down"}])
    with pytest.raises(
        UserError, match=r"row 1 of train: its text_column has .* not text; name another column with --text_column"
    ):
        load_data(DataArguments("classification", rows), *llama)
    rows = jsonl(tmp_path / "e", [{"sentence": "a", "label": ["up"]}, {"sentence": "c", "label": "down"}])
    with pytest.raises(UserError, match=r"column label has .*, which is no class name"):
        load_data(DataArguments("classification", rows), *llama)


def test_a_model_that_does_not_fit_the_task_is_refused(tmp_path, tiny_t5):
    arguments = ModelArguments(str(tiny_t5), random_weights=True)
    with pytest.raises(UserError, match="an encoder-decoder, and this task continues one sequence"):
        load_model_config(arguments, kind="decoder")
    assert load_model_config(arguments, kind="head").model_type == "t5"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(UserError, match="vit model, for which transformers has no classification head"):
        load_model_config(ModelArguments(str(tmp_path), random_weights=True), kind="head")


def test_a_head_of_t5_which_looks_for_the_end_of_each_text_is_predicted(tmp_path):
    folder = labelled(tmp_path / "d", train=[*GOOD, *BAD, ("even", "flat")])
    flags = ["--task", "sequence_classification", "--dataset_name", folder, "--max_length", "32"]
    ledger = predict_run(parse_config(Full, flags))
    head = 128 * 128 + 128 + 128 * 3 + 3  # dense and out_proj with their biases, 3 classes, on the embedded T5
    assert ledger.parameters == {"trainable": 906_368 + head, "all": 906_368 + head}
    assert ledger.phases["backward"].categories["activations_saved"] > 2**20


# Chat


def chat(data, tmp_path, rows, template=CHATML, **flags):
    config = AutoConfig.from_pretrained(data / "models" / "stories260k")
    arguments = DataArguments("chat", jsonl(tmp_path / "chat", rows), **flags)
    return load_data(arguments, config, tokenizer_of(data, template))


def test_the_loss_is_on_the_assistants_turns_only(data, tmp_path):
    loaded = chat(data, tmp_path, [{"messages": TALK}] * 3)
    tokenizer, row = loaded.prompt_tokenizer.tokenizer, loaded.train[0]
    spans, open_span = [], []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (IGNORE_INDEX, token)
        if label == IGNORE_INDEX and open_span:
            spans.append(tokenizer.decode(open_span))
            open_span = []
        elif label != IGNORE_INDEX:
            open_span.append(token)
    spans.append(tokenizer.decode(open_span)) if open_span else None
    assert [span.strip() for span in spans] == ["Yes, it is.</s>", "Very cold.</s>"]
    assert loaded.supervised_tokens == 3 * sum(label != IGNORE_INDEX for label in row["labels"])


def test_the_last_turn_is_what_is_generated_and_scored(data, tmp_path):
    loaded = chat(data, tmp_path, [{"messages": [*TALK, {"role": "user", "content": "Bye."}]}] * 3)
    assert loaded.references == ["Very cold."] * 3
    assert loaded.test_texts[0].endswith("assistant: Yes, it is.\nuser: And cold?")
    prompt = loaded.prompt_tokenizer.tokenizer.decode(loaded.test_prompts[0])
    assert prompt.rstrip().endswith("<|assistant|>") and "Very cold" not in prompt and "Bye" not in prompt
    assert (
        loaded.prompt_tokenizer.prompt("Hi.")[0]
        == loaded.prompt_tokenizer.prompt([{"role": "user", "content": "Hi."}])[0]
    )


def test_prompt_and_response_make_a_conversation(data, tmp_path):
    rows = [{"q": "Is it raining?", "a": "Yes, it is."}] * 3
    loaded = chat(data, tmp_path, rows, prompt_column="q", response_column="a")
    assert loaded.references == ["Yes, it is."] * 3 and loaded.test_texts == ["Is it raining?"] * 3


def test_a_too_long_conversation_loses_its_end_in_training_and_its_beginning_as_a_prompt(data, tmp_path):
    long = [{"role": "user", "content": "word " * 60}, *TALK[2:]]
    loaded = chat(data, tmp_path, [{"messages": TALK}, {"messages": long}], max_length=80, max_target_length=8)
    assert len(loaded.train) == 1 and "1 rows of train left out: no label within --max_length 80" in loaded.remarks
    assert [len(ids) for ids in loaded.test_prompts] == [72, 72]
    assert loaded.prompt_tokenizer.tokenizer.decode(loaded.test_prompts[1]).rstrip().endswith("<|assistant|>")
    assert loaded.truncation["train"].rows >= 1 and loaded.truncation["test"].rows == 2


@pytest.mark.parametrize(
    ("rows", "template", "expected"),
    [
        ([{"messages": TALK}], None, "its tokenizer has no chat template"),
        ([{"messages": TALK[:2]}], CHATML, r"row 1 of train: its conversation has no turn of the role assistant \(it has system, user\)"),
        ([{"messages": "Hi."}], CHATML, "row 1 of train: its conversation is not a list of"),
        ([{"messages": [{"role": "user", "content": "word " * 600}, TALK[2]]}], CHATML, "every label of the train split is masked"),
        ([{"messages": TALK}], "{{ messages | length }}" + CHATML, "rewrites earlier turns"),
        ([{"messages": TALK}], "{{ raise_exception('no system turn') }}", "refuses a conversation of system, user"),
        ([{"text": "Hi."}], CHATML, "name yours with --messages_column"),
    ],
)  # fmt: skip
def test_conversations_that_cannot_be_learned_are_refused(rows, template, expected, data, tmp_path):
    with pytest.raises(UserError, match=expected) as caught:
        chat(data, tmp_path, rows * 2, template)
    assert "\n" not in str(caught.value)


CHAT_END = CHATML.replace("</s>", "<|im_end|>")


def test_examples_in_a_chat_are_turns_before_the_question(data, tmp_path):
    rows = [{"messages": [*TALK[:2], {"role": "assistant", "content": f"Answer {n}."}]} for n in range(4)]
    loaded = chat(data, tmp_path, rows, "<|begin|>" + CHATML, max_target_length=8)
    config = AutoConfig.from_pretrained(data / "models" / "stories260k")
    ready = Preflight(None, config, loaded, 0, 0)
    plain, one, two = (prompts_with_examples(ready, number, seed=0) for number in (0, 1, 2))
    assert plain == loaded.test_prompts
    picked = random.Random(0).sample(range(4), 4)
    for prompts, count in ((one, 1), (two, 2)):
        turns = [
            turn for index in picked[:count] for turn in (TALK[1], {"role": "assistant", "content": f"Answer {index}."})
        ]
        assert prompts == [loaded.prompt_tokenizer.prompt([TALK[0], *turns, TALK[1]], 10_000)[0]] * 4
        text = loaded.prompt_tokenizer.tokenizer.decode(prompts[0])
        assert text.count("<|system|>") == text.count("<|begin|>") == 1 and text.count("<|user|>") == count + 1
    with pytest.raises(UserError, match="--num_shots 5: the train split has 4 rows"):
        prompts_with_examples(ready, 5, seed=0)
    config.max_position_embeddings = len(two[0]) + 7  # the answer takes 8
    with pytest.raises(UserError, match=r"--num_shots 2 makes a prompt of .* give fewer$"):
        prompts_with_examples(ready, 2, seed=0)


def test_the_last_label_of_a_turn_ends_an_answer(data):
    tokenizer = tokenizer_of(data, CHAT_END)
    assert TASKS["chat"].prompt_tokenizer(tokenizer, "", False, 64, 8).end_tokens() == []  # words are no end
    tokenizer.add_tokens("<|im_end|>", special_tokens=True)
    prompt_tokenizer = TASKS["chat"].prompt_tokenizer(tokenizer, "", False, 64, 8)
    assert prompt_tokenizer.end_tokens() == [512] != [tokenizer.eos_token_id]
    assert [
        label for label in prompt_tokenizer.row(TALK[1:2], "Yes.", Truncation())["labels"] if label != IGNORE_INDEX
    ][-1] == 512
    prompt_tokenizer = TASKS["chat"].prompt_tokenizer(
        tokenizer_of(data, "{{ raise_exception('no') }}"), "", False, 64, 8
    )
    assert prompt_tokenizer.end_tokens() == []
    assert TASKS["summarization"].prompt_tokenizer(tokenizer, "{text}", False, 64, 8).end_tokens() == []


def counting_llama(**settings):
    """A Llama with a real `generate`; after n its most probable token is n + 1, its second n + 7."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4, vocab_size=64, pad_token_id=0
    )
    model = auto_class(config).from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "layers" in name:
            parameter.data.zero_()
    model.model.embed_tokens.weight.data = torch.eye(64)
    model.lm_head.weight.data = torch.eye(64).roll(1, 0) * 3 + torch.eye(64).roll(7, 0) * 2
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    return model


class Digits:
    """A tokenizer with only what `generate` needs."""

    eos_token_id, pad_token_id = 40, 0

    def pad(self, features, **kwargs):
        ids = torch.tensor(features["input_ids"])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def batch_decode(self, ids, **kwargs):
        return [" ".join(str(token) for token in row.tolist() if token) for row in ids]


@pytest.mark.parametrize(
    ("eos", "end_tokens", "last"),
    [(None, [], 40), ([30, 50], [], 30), (30, [], 30), (50, [25], 25)],
)
def test_an_answer_ends_with_an_end_token_of_the_model_the_tokenizer_or_the_chat(eos, end_tokens, last):
    model = counting_llama(eos_token_id=eos)
    (text,) = generate(model, Digits(), [[20]], 1, 40, end_tokens=end_tokens)
    assert text.split() == [str(n) for n in range(21, last + 1)]
    assert model.generation_config.eos_token_id == eos


STEERING = {
    "min_length": 30,
    "min_new_tokens": 30,
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "length_penalty": -3.0,
    "max_length": 26,
    "do_sample": True,
    "temperature": 3.0,
    "top_k": 2,
    "top_p": 0.5,
}


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("wrapped", [lambda m: m, lambda m: get_peft_model(m, LoraConfig(target_modules=["q_proj"]))])
def test_a_models_own_decoding_settings_are_ignored(num_beams, wrapped):
    from transformers.utils import logging as transformers_logging

    steering, said = wrapped(counting_llama(**STEERING)), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    transformers_logging.get_logger().addHandler(handler)
    try:
        plain, steered = (
            generate(model, Digits(), [[20, 21, 22, 21], [39, 38, 37, 36]], 2, 24, num_beams)
            for model in (counting_llama(), steering)
        )
    finally:
        transformers_logging.get_logger().removeHandler(handler)
    assert steered == plain
    assert num_beams > 1 or plain == [" ".join(map(str, range(22, 41))), "37 38 39 40"]
    assert said == []
    assert all(getattr(steering.generation_config, name) == value for name, value in STEERING.items())


# Chat: the text that the template writes is learned and scored

SPACED = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
TOOLS = """{% if tools %}tools {{ tools | tojson }}
{% endif %}{% for m in messages %}<|{{ m.role }}|>
{% if m.tool_calls %}{% for c in m.tool_calls %}<call>{{ c.function | tojson }}</call>{% endfor %}{% endif %}{{ m.content }}</s>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
THOUGHTS = """{% for m in messages %}<|{{ m.role }}|>
{% if m.role == "assistant" and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}</s>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
DROPS = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
MARKED = CHATML.replace(
    "{{ m.content }}</s>",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}",
)
CLOSED = CHATML.replace(
    "\n{% endfor %}", "\n{% if loop.last and not add_generation_prompt %}(closed){% endif %}{% endfor %}"
)
ASKS_MORE = CHATML.replace(
    "{% if add_generation_prompt %}<|assistant|>\n", "{% if add_generation_prompt %}<|assistant|>\n<think>\n"
)
OF_PARTS = CHATML.replace("m.content", "m.content[0].text")
TRIMMED = CHATML.replace("m.content", "m.content | trim")
WITHOUT_SYSTEM = CHATML.replace(
    "<|{{ m.role }}|>\n{{ m.content }}</s>\n",
    "{% if m.role != 'system' %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endif %}",
)


def chat_encoder(data, template, kind="models/stories260k"):
    tokenizer = AutoTokenizer.from_pretrained(data / kind)
    tokenizer.chat_template = template.replace("</s>", tokenizer.eos_token)
    return TASKS["chat"].prompt_tokenizer(tokenizer, "", False, 4_000, 8)


def learned(prompt_tokenizer, messages, tools=None):
    """The turns in the labels, decoded, the reference of the last one, and the truncation."""
    text, target = TASKS["chat"].pair({"messages_column": messages, "tools_column": tools})
    lost = Truncation()
    row = prompt_tokenizer.row(text, target, lost)
    prompt, _ = prompt_tokenizer.prompt(text, 4_000)
    assert row["input_ids"][: len(prompt)] == prompt  # scoring and training use the same prompt
    assert row["labels"][len(prompt) - 1] == IGNORE_INDEX != row["labels"][len(prompt)]
    turns, previous = [], IGNORE_INDEX
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (IGNORE_INDEX, token)
        if label != IGNORE_INDEX:
            turns = [*turns, [label]] if previous == IGNORE_INDEX else [*turns[:-1], [*turns[-1], label]]
        previous = label
    decoded = [
        prompt_tokenizer.tokenizer.decode(turn).replace(prompt_tokenizer.tokenizer.eos_token, "</s>") for turn in turns
    ]
    return [turn.strip() for turn in decoded], prompt_tokenizer.reference(text, target), lost


KINDS = ["models/stories260k", "tokenizers/gpt2"]
PLAIN = [TALK[0], {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "One, two."}]
LONGER = [*PLAIN, {"role": "user", "content": "More?"}, {"role": "assistant", "content": "Three."}]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [CHATML, SPACED, MARKED, TOOLS, OF_PARTS, TRIMMED, WITHOUT_SYSTEM, ASKS_MORE])
def test_labels_hold_each_turn_after_exactly_the_ids_of_its_prompt(template, kind, data):
    prompt_tokenizer = chat_encoder(data, template, kind)
    turns, reference, lost = learned(prompt_tokenizer, LONGER)
    assert turns == ["One, two.</s>", "Three.</s>"] and reference == "Three."
    assert (lost.masked_turns, lost.unwritten_turns) == (0, template == WITHOUT_SYSTEM)
    assert any("<think>" in remark for remark in prompt_tokenizer.remarks()) is (template == ASKS_MORE)


def test_the_first_word_after_a_prompt_that_ends_in_a_space_is_learned(data):
    prompt_tokenizer = chat_encoder(data, SPACED, "tokenizers/gpt2")
    whole = prompt_tokenizer.tokenizer("assistant: One").input_ids
    assert whole[-1] == prompt_tokenizer.tokenizer(" One").input_ids[0]  # the tokenizer joins the space and the word
    row = prompt_tokenizer.row([{"role": "user", "content": "Hi?"}], "One", Truncation())
    labels = [label for label in row["labels"] if label != IGNORE_INDEX]
    assert prompt_tokenizer.tokenizer.convert_ids_to_tokens(labels) == ["One", prompt_tokenizer.tokenizer.eos_token]


CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Z\u00fcrich", "days": 3}'}}
SCHEMA = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
QUESTION = {"role": "user", "content": "Weather?"}
CALLS = [QUESTION, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
WRITTEN = '<call>{"name": "weather", "arguments": {"city": "Z\u00fcrich", "days": 3}}</call>'


@pytest.mark.parametrize("as_text", [False, True])
def test_tool_calls_are_learned_and_scored_as_the_template_writes_them(as_text, data):
    messages = [*CALLS, {"role": "tool", "content": "sunny"}, {"role": "assistant", "content": "It is sunny."}]
    columns = (json.dumps(messages), json.dumps(SCHEMA)) if as_text else (messages, SCHEMA)
    prompt_tokenizer = chat_encoder(data, TOOLS, "tokenizers/gpt2")
    turns, reference, lost = learned(prompt_tokenizer, *columns)
    assert turns == [f"{WRITTEN}</s>", "It is sunny.</s>"] and reference == "It is sunny." and lost == Truncation()
    assert learned(prompt_tokenizer, CALLS)[:2] == ([f"{WRITTEN}</s>"], WRITTEN)
    text, _ = TASKS["chat"].pair({"messages_column": columns[0], "tools_column": columns[1]})
    assert prompt_tokenizer.tokenizer.decode(prompt_tokenizer.prompt(text)[0]).startswith(f"tools {json.dumps(SCHEMA)}")


def test_tools_come_from_an_optional_column(data, tmp_path):
    loaded = chat(
        data, tmp_path, [{"messages": CALLS, "tools": SCHEMA}, {"messages": CALLS}] * 2, TOOLS, max_target_length=100
    )
    decoded = [loaded.prompt_tokenizer.tokenizer.decode(ids) for ids in loaded.test_prompts]
    assert ["tools" in text for text in decoded] == [True, False] * 2
    assert loaded.references == [WRITTEN] * 4 and not any("left out" in remark for remark in loaded.remarks)
    dropped = chat(data, tmp_path, [{"messages": PLAIN, "tools": SCHEMA}] * 2, CHATML)
    assert "2 turns or tools in train are left out by the chat template" in dropped.remarks


THOUGHT = {"role": "assistant", "content": "Two.", "reasoning_content": "It follows."}


def test_reasoning_is_learned_if_the_template_writes_it(data):
    turns, reference, _ = learned(chat_encoder(data, THOUGHTS), [QUESTION, THOUGHT])
    assert turns == ["<think>It follows.</think>Two.</s>"] and reference == "<think>It follows.</think>Two."
    turns, _, lost = learned(chat_encoder(data, THOUGHTS), [QUESTION, THOUGHT, QUESTION, THOUGHT])
    assert turns == ["<think>It follows.</think>Two.</s>"] and lost.masked_turns == 1


def test_turns_that_are_not_learned_are_counted(data, tmp_path):
    loaded = chat(data, tmp_path, [{"messages": [QUESTION, THOUGHT, QUESTION, THOUGHT]}] * 3, THOUGHTS)
    assert any(remark.startswith("3 turns of the assistant in train are not learned: the") for remark in loaded.remarks)


def test_a_token_that_ends_the_whole_conversation_leaves_earlier_turns_their_labels(data):
    turns, _, lost = learned(chat_encoder(data, CLOSED, "tokenizers/gpt2"), LONGER)
    assert turns == ["One, two.</s>", "Three.</s>\n(closed)"] and lost == Truncation()


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (DROPS, [QUESTION, {"role": "assistant", "content": "<think>So.</think>Two."}], r"leaves out .* \('<think>So.</think>Two.'\)"),
        (CHATML, [QUESTION, THOUGHT], r"leaves out .* \('It follows.'\)"),
        (CHATML, CALLS, r"leaves out .* \('weather'\)"),
        (TOOLS.replace("c.function", "c.function.name"), CALLS, r"leaves out .* \('city'\)"),
        (CHATML, [QUESTION, {"role": "assistant", "content": " "}], "no turn of the role assistant .* with content"),
        (CHATML, [{"role": "assistant", "content": "Hi."}, QUESTION], "begins with the only turn of the role assistant"),
        (CHATML, [{"role": "user", "content": [{"type": "image"}]}, TALK[2]], "a part of the type 'image', and only text"),
        (CHATML, [{"role": "user", "content": None}, TALK[2]], "a message of the role .* has no content"),
        (CHATML.replace("m.content", "m.content + 1"), PLAIN, "refuses a conversation of system, user, assistant: "),
    ],
)  # fmt: skip
def test_a_template_that_leaves_out_a_part_of_an_answer_is_refused(template, messages, expected, data, tmp_path):
    with pytest.raises(UserError, match=expected) as caught:
        chat(data, tmp_path, [{"messages": messages}] * 2, template)
    assert str(caught.value).startswith("row 1 of t") and "\n" not in str(caught.value)


def test_text_parts_are_joined_and_turns_with_weight_0_are_not_learned(data):
    prompt_tokenizer = chat_encoder(data, CHATML)
    parts = [{"type": "text", "text": "Three"}, {"type": "text", "text": "."}]
    messages = [*PLAIN[:2], PLAIN[2] | {"weight": 0}, LONGER[3], {"role": "assistant", "content": parts}]
    turns, reference, lost = learned(prompt_tokenizer, messages)
    assert turns == ["Three.</s>"] and reference == "Three." and lost == Truncation()
    empty = [*PLAIN[:2], {"role": "assistant", "content": ""}, *LONGER[3:]]
    assert learned(prompt_tokenizer, empty)[0] == ["Three.</s>"]


def test_tool_calls_in_parquet_keep_their_own_arguments(data, tmp_path):
    from datasets import Dataset

    def calls(**arguments):
        return [QUESTION, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]

    rows = [{"messages": calls(city="Rome")}, {"messages": calls(days="two")}] * 2
    (tmp_path / "d").mkdir()
    for split in ("train", "validation", "test"):
        Dataset.from_list(rows).to_parquet(tmp_path / "d" / f"{split}.parquet")
    config = AutoConfig.from_pretrained(data / "models" / "stories260k")
    loaded = load_data(DataArguments("chat", str(tmp_path / "d")), config, tokenizer_of(data, TOOLS))
    assert loaded.references[:2] == [
        '<call>{"name": "f", "arguments": {"city": "Rome"}}</call>',
        '<call>{"name": "f", "arguments": {"days": "two"}}</call>',
    ]


# Plain text


def test_every_token_of_a_text_and_its_end_are_learned(data, tmp_path, llama):
    loaded = load_data(DataArguments("text", jsonl(tmp_path / "d", [{"text": "A cat sat."}] * 3)), *llama)
    row = loaded.train[0]
    assert row["labels"] == row["input_ids"] and row["input_ids"][-1] == llama[1].eos_token_id
    assert loaded.supervised_tokens == 3 * (len(row["labels"]) - 1)  # nothing comes before the first
    assert loaded.test_prompts[0] == row["input_ids"][:-1]
    assert loaded.references == [str(len(row["labels"]) - 2)] * 3


def test_the_loss_of_a_text_equals_the_models_own_in_any_batch(llama):
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=512
    )
    torch.manual_seed(0)
    model = auto_class(config).from_config(config).eval()
    prompts = [torch.randint(3, 500, (length,)).tolist() for length in (3, 17, 9, 30, 12)]
    with torch.inference_mode():
        expected = [model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item() for ids in prompts]
    assert losses(model, llama[1], prompts, 3) == pytest.approx(expected, rel=1e-5)


# From the command line


@pytest.mark.slow
def test_a_head_is_trained_predicted_saved_and_reloaded_from_any_folder(data, tmp_path, monkeypatch):
    monkeypatch.chdir(data)  # paths relative to it must also work from other folders
    arguments = ["--model_name_or_path", "models/stories260k", "--dataset_name", "financial_phrasebank"]
    size = ("--max_train_samples", "64", "--max_eval_samples", "24", "--max_steps", "4", "--learning_rate", "1e-2")
    done = recipe("lora", "--task", "sequence_classification", *arguments, *size, "--output_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "64 labels" in done.stdout and "majority class" in done.stdout
    assert any("allocated, peak" in line and "exact" in line for line in done.stdout.splitlines())
    assert "MISSING" not in done.stderr
    monkeypatch.chdir(tmp_path)
    run = FinishedRun(tmp_path / "run")
    assert run.record["task"] == "sequence_classification"
    assert run.record["label_names"] == ["negative", "neutral", "positive"]
    with (tmp_path / "run" / "completions.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["base"] for row in rows} | {row["tuned"] for row in rows} <= set(run.record["label_names"])
    assert [row["base"] for row in rows] != [row["tuned"] for row in rows]
    assert run.generate([row["text"] for row in rows]) == [row["tuned"] for row in rows]


@pytest.mark.slow
def test_a_checkpoints_own_head_is_scored_trained_and_reloaded_in_its_order(data, tmp_path):
    texts, classes = perfect_classifier(tmp_path / "model", data, dict(enumerate(MOODS)))
    rows = [(text, MOODS[number]) for text, number in zip(texts, classes, strict=True)]
    name = labelled(tmp_path / "d", train=rows, validation=rows, test=rows)
    arguments = [
        "--task",
        "sequence_classification",
        "--model_name_or_path",
        tmp_path / "model",
        "--dataset_name",
        name,
    ]
    for method in ("lora", "full"):
        size = ("--max_steps", "2", "--learning_rate", "1e-9", "--output_dir", tmp_path / method, "--use_cpu")
        done = recipe(method, *arguments, *size)
        assert done.returncode == 0, done.stderr
        run = FinishedRun(tmp_path / method)
        assert run.record["label_names"] == MOODS
        assert [run.record["scores"][who]["accuracy"] for who in ("base", "tuned")] == [1.0, 1.0]
        assert run.generate([text for text, _ in rows]) == [label for _, label in rows]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_head_on_a_model_of_260k_parameters_learns_to_classify_sentiments(data, tmp_path):
    """0.857 of the test split when this was written; the majority class is 0.616 of it."""
    arguments = (
        "--model_name_or_path",
        data / "models" / "stories260k",
        "--dataset_name",
        data / "financial_phrasebank",
    )
    size = ("--num_train_epochs", "4", "--learning_rate", "1e-3", "--save_strategy", "no")
    done = recipe("full", "--task", "sequence_classification", *arguments, *size, "--output_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "run" / "run.json").read_text())["scores"]
    assert scores["tuned"]["accuracy"] >= 0.80 > 0.62 > scores["base"]["accuracy"]


@pytest.mark.slow
def test_a_chat_model_is_trained_from_the_command_line(data, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(data / "models" / "stories260k", model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": CHATML}))
    rows = jsonl(tmp_path / "chat", [{"messages": TALK}] * 16)
    arguments = ["--task", "chat", "--model_name_or_path", model, "--dataset_name", rows, "--max_target_length", "16"]
    size = ("--max_eval_samples", "4", "--max_steps", "12", "--learning_rate", "1e-2")
    done = recipe("full", *arguments, *size, "--output_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "run" / "run.json").read_text())["scores"]
    assert scores["tuned"]["rougeL"] > scores["base"]["rougeL"]
