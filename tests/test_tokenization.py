"""Token ids and labels: which tokens count in the loss, and what is truncated."""

import pytest
from conftest import write_csv
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoTokenizer, ByT5Tokenizer, DataCollatorForSeq2Seq

from toolkit.data.loading import DataArguments, load_data
from toolkit.errors import UserError
from toolkit.models.arguments import ModelArguments
from toolkit.models.loading import load_tokenizer
from toolkit.models.losses import IGNORE_INDEX
from toolkit.tasks.chat import ChatPromptTokenizer
from toolkit.tasks.sequence_classification import HeadPromptTokenizer
from toolkit.tasks.summarization import Summarization
from toolkit.tasks.text import TextPromptTokenizer
from toolkit.tasks.tokenization import PromptTokenizer, Truncation

TEXT = "#Person1#: I saw nine cats. " * 30
PROMPT = Summarization.flags["prompt_template"]
TARGET = "Person1 saw cats."


def prompt_tokenizer(data, kind: str, max_length: int = 256, max_target_length: int = 32) -> PromptTokenizer:
    folder = {"t5": "tokenizers/t5-small", "gpt2": "tokenizers/gpt2", "llama": "models/stories260k"}[kind]
    tokenizer = AutoTokenizer.from_pretrained(data / folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return PromptTokenizer(tokenizer, PROMPT, kind == "t5", max_length, max_target_length)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_gpt_like_model_only_learns_the_target(data, kind):
    enc = prompt_tokenizer(data, kind)
    row = enc.row("Hello there.", TARGET, Truncation())
    first = next(i for i, label in enumerate(row["labels"]) if label != IGNORE_INDEX)
    assert row["labels"][first:] == row["input_ids"][first:]
    assert enc.tokenizer.decode(row["labels"][first:], skip_special_tokens=True).strip() == TARGET
    assert row["labels"][-1] == enc.tokenizer.eos_token_id
    assert row["input_ids"][:first] == enc.prompt("Hello there.")[0]
    whole = enc.tokenizer(PROMPT.replace("{text}", "Hello there.") + f" {TARGET}").input_ids
    assert row["input_ids"][: len(whole)] == whole  # the very ids that the text as a whole would have


def test_a_t5_like_model_learns_the_target_and_its_end(data):
    enc = prompt_tokenizer(data, "t5")
    row = enc.row("Hello there.", TARGET, Truncation())
    assert enc.tokenizer.decode(row["labels"]) == f"{TARGET}</s>"
    assert enc.tokenizer.decode(row["input_ids"]).startswith("Summarize the following conversation.")


@pytest.mark.parametrize("kind", ["t5", "gpt2", "llama"])
def test_truncation_shortens_the_text_and_never_the_instruction(data, kind):
    enc = prompt_tokenizer(data, kind, max_length=128, max_target_length=24)
    lost = Truncation()
    row = enc.row(TEXT, TARGET, lost)
    assert len(row["input_ids"]) <= 128
    text = enc.tokenizer.decode(row["input_ids"], skip_special_tokens=True)
    assert text.startswith("Summarize the following conversation.") and "Summary:" in text
    whole = prompt_tokenizer(data, kind, max_length=10_000, max_target_length=24).row(TEXT, TARGET, Truncation())
    assert lost == Truncation(1, len(whole["input_ids"]) - len(row["input_ids"]), 0)


@pytest.mark.parametrize("kind", ["t5", "gpt2", "llama"])
@pytest.mark.parametrize("text", ["Hi.", "#Person1#: I saw nine cats. " * 7, TEXT, "{text} {labels} {}", "a\n\n b "])
def test_scoring_and_training_use_the_same_prompt(text, kind, data):
    enc = prompt_tokenizer(data, kind, max_length=128, max_target_length=24)
    prompt, _ = enc.prompt(text)
    for target in ("Cats.", TARGET * 9):
        ids = enc.row(text, target, Truncation())["input_ids"]
        assert ids[: len(prompt)] == prompt and (kind != "t5" or ids == prompt)
    if len(text) < 30:
        assert enc.tokenizer(PROMPT.replace("{text}", text)).input_ids[: len(prompt)] == prompt


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_a_truncated_target_keeps_its_end_and_is_counted(data, kind):
    enc = prompt_tokenizer(data, kind, max_target_length=4)
    lost = Truncation()
    labels = [x for x in enc.row("Hi.", "one two three four five six", lost)["labels"] if x != IGNORE_INDEX]
    assert len(labels) == 4 and labels[-1] == enc.tokenizer.eos_token_id
    assert lost.rows == 1 and lost.target_tokens == len(enc.target_ids("one two three four five six")) - 4


def test_a_tokenizer_without_a_fast_form_truncates_no_more_than_necessary(data):
    tokenizer = ByT5Tokenizer()
    enc = PromptTokenizer(tokenizer, "Say: {text} End.", True, 64, 8)
    room = 64 - len(tokenizer("Say:  End.").input_ids)  # bytes
    text = "\u00e9" * 100  # two bytes each
    lost = Truncation()
    row = enc.row(text, "ok", lost)
    assert tokenizer.decode(row["input_ids"]) == f"Say: {'é' * (room // 2)} End.</s>"
    assert lost == Truncation(1, 2 * (100 - room // 2), 0)
    assert enc.row(text[: room // 2], "ok", Truncation()) == row
    with pytest.raises(UserError, match="leaves 8 tokens for a prompt whose own words take"):
        PromptTokenizer(tokenizer, "Say: {text} End.", True, 8, 8).row(text, "ok", Truncation())
    tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(UserError, match="its tokenizer has no fast form"):
        ChatPromptTokenizer(tokenizer, "", False, 64, 8)


def closing(folder, data):
    """The path of a tokenizer that ends each text with a special token, like RoBERTa's, and pads on the left."""
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizers/gpt2", pad_token="<|pad|>", padding_side="left")
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    tokenizer.save_pretrained(folder)
    return folder


def test_a_tokenizers_closing_token_is_kept_only_if_no_target_follows(data, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(closing(tmp_path, data))
    end = tokenizer.eos_token_id
    assert tokenizer("a cat").input_ids[-1] == end
    head = HeadPromptTokenizer(tokenizer, "{text}", False, 16, 0, ("down", "up"))
    assert head.row("a cat", "up", Truncation())["input_ids"] == tokenizer("a cat").input_ids
    cut = head.row("a cat " * 20, "up", Truncation())["input_ids"]
    assert len(cut) == 16 and cut[-1] == end and cut.count(end) == 1
    writes = PromptTokenizer(tokenizer, "{text}", False, 32, 8)
    assert writes.prompt("a cat")[0] == tokenizer("a cat").input_ids[:-1]
    assert writes.row("a cat", "up", Truncation())["input_ids"].count(end) == 1


def test_a_tokenizer_that_pads_on_the_left_pads_batches_on_the_right(data, tmp_path):
    tokenizer = load_tokenizer(ModelArguments(str(closing(tmp_path, data))))
    prompt_tokenizer = TextPromptTokenizer(tokenizer, "{text}", False, 32, 0)
    rows = [prompt_tokenizer.row(text, "", Truncation()) for text in ("a cat", "a cat sat on the mat")]
    batch = DataCollatorForSeq2Seq(tokenizer)([dict(row) for row in rows])
    predicted = (batch["labels"][:, 1:] != IGNORE_INDEX).sum().item()  # a GPT-like model predicts none from nothing
    assert predicted == sum(len(row["labels"]) - 1 for row in rows)
    assert batch["attention_mask"][:, 0].tolist() == [1, 1]


def test_a_tokenizer_without_padding_or_end_tokens_is_refused(data, tmp_path, small_csv):
    config = AutoConfig.from_pretrained(data / "models/stories260k")
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizers/gpt2")
    tokenizer.eos_token = tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="neither a padding token nor an end-of-text token") as caught:
        load_tokenizer(ModelArguments(str(tmp_path)))
    assert "\n" not in str(caught.value)
    tokenizer.pad_token = "!"
    with pytest.raises(UserError, match="its tokenizer has no end-of-text token"):
        load_data(DataArguments(dataset_name=str(small_csv)), config, tokenizer)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_tokens_without_an_embedding_are_refused_if_they_are_used(data, small_csv, kind):
    source = data / ("tokenizers/t5-small" if kind == "t5" else "models/stories260k")
    tokenizer = AutoTokenizer.from_pretrained(source)
    config = AutoConfig.for_model("t5") if kind == "t5" else AutoConfig.from_pretrained(source)
    tokenizer.add_tokens([f"<image{n}>" for n in range(40)])
    assert len(tokenizer) > config.vocab_size
    arguments = DataArguments(dataset_name=str(small_csv), max_length=256, max_target_length=32)
    load_data(arguments, config, tokenizer)  # no text has them
    tokenizer.add_tokens(["Really"])
    last = len(tokenizer) - 1
    with pytest.raises(
        UserError, match=rf"gives token {last:,} \(.?Really\), but the model has embeddings for"
    ) as caught:
        load_data(arguments, config, tokenizer)
    assert "\n" not in str(caught.value)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    config.vocab_size = tokenizer.pad_token_id
    with pytest.raises(UserError, match="the model has embeddings for"):
        load_data(arguments, config, tokenizer)


def test_a_length_without_room_for_the_prompt_is_refused(data):
    with pytest.raises(UserError, match="leaves 8 tokens for a prompt whose own words take"):
        prompt_tokenizer(data, "t5", max_length=8).row(TEXT, TARGET, Truncation())


def load(data, kind: str, folder, **kwargs):
    source = data / ("tokenizers/t5-small" if kind == "t5" else "models/stories260k")
    tokenizer = AutoTokenizer.from_pretrained(source)
    config = AutoConfig.for_model("t5") if kind == "t5" else AutoConfig.from_pretrained(source)
    return load_data(DataArguments(dataset_name=str(folder), **kwargs), config, tokenizer)


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_a_label_longer_than_the_model_can_take_is_refused_unless_truncated_on_purpose(data, kind, tmp_path):
    folder = write_csv(
        tmp_path / "d", train=[("a", "b"), ("c", "word " * 600)], validation=[("a", "b")], test=[("a", "b")]
    )
    with pytest.raises(UserError, match=r"row 2 of train: its summary has \d+ tokens, more than the 512"):
        load(data, kind, folder)
    assert load(data, kind, folder, max_target_length=64).truncation["train"].target_tokens > 500


def test_lengths_beyond_the_model_are_refused(data, small_csv):
    with pytest.raises(UserError, match="--max_length 1024 is longer than the model can take; give at most 512"):
        load(data, "llama", small_csv, max_length=1024)
    with pytest.raises(UserError, match="leaves no room for a prompt"):
        load(data, "llama", small_csv, max_length=100, max_target_length=100)


def test_a_data_set_with_only_masked_labels_is_refused(data, small_csv, monkeypatch):
    loaded = load(data, "llama", small_csv)
    counted = sum(label != IGNORE_INDEX for labels in loaded.train["labels"] for label in labels)
    assert loaded.supervised_tokens == counted > 0
    monkeypatch.setattr(PromptTokenizer, "row", lambda self, *args: {"input_ids": [1, 2], "labels": [IGNORE_INDEX] * 2})
    with pytest.raises(UserError, match="every label of the train split is masked"):
        load(data, "llama", small_csv)


def test_the_fingerprint_changes_with_the_data(data, small_csv, tmp_path):
    whole, part = load(data, "t5", small_csv), load(data, "t5", small_csv, max_train_samples=3)
    assert whole.fingerprint["train"] != part.fingerprint["train"]
    assert whole.fingerprint["test"] == part.fingerprint["test"] == load(data, "t5", small_csv).fingerprint["test"]
    assert len(part.train) == 3
