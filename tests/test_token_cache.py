"""Tokenized rows are kept, and taken only for the same texts, tokenizer and flags."""

import os
import time
from dataclasses import replace

import datasets
import pytest
from conftest import write_csv
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer

from toolkit.data import token_cache
from toolkit.data.loading import DataArguments, load_data
from toolkit.data.token_cache import Tokenized, cached
from toolkit.embedded import MODEL_DIR
from toolkit.tasks.tokenization import PromptTokenizer, Truncation

ROWS = [(f"I saw {n} cats, and they saw me too.", f"{n} cats.") for n in range(6)]
PARTS = ("summarization", None, "hash of the texts")


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(token_cache, "FEWEST", 2)
    return tmp_path / "cache" / "footprint"


def loaded(rows_folder, **flags):
    args = DataArguments(dataset_name=str(rows_folder), **flags)
    return load_data(args, AutoConfig.from_pretrained(MODEL_DIR), AutoTokenizer.from_pretrained(MODEL_DIR))


def csv(folder, rows=ROWS):
    return write_csv(folder, train=rows, validation=rows[:3], test=rows[:2])


def prompt_tokenizer(**flags) -> PromptTokenizer:
    fields = {"template": "{text}", "is_encoder_decoder": True, "max_length": 8, "max_target_length": 4}
    return PromptTokenizer(AutoTokenizer.from_pretrained(MODEL_DIR), **fields | flags)


def made() -> Tokenized:
    rows = [{"input_ids": [7, 8], "attention_mask": [1, 1], "labels": [-100, 1]}]
    lost = Truncation(rows=1, text_tokens=2, target_tokens=3, masked_turns=4, unwritten_turns=5)
    lost.unusual_roles["robot"] += 6
    return Tokenized(Dataset.from_list(rows), 7, 8, lost)


def never() -> Tokenized:
    raise AssertionError("tokenized again")


def test_the_second_run_has_the_same_data_without_tokenizing(tmp_path, monkeypatch):
    first = loaded(csv(tmp_path / "rows"), max_length=24, max_target_length=3)
    assert first.truncation["train"].rows
    monkeypatch.setattr(PromptTokenizer, "row", lambda *_: never())
    again = loaded(tmp_path / "rows", max_length=24, max_target_length=3)
    assert again.train[:] == first.train[:] and again.validation[:] == first.validation[:]
    assert again.train.features == first.train.features
    same = ("truncation", "remarks", "fingerprint", "supervised_tokens", "train_fingerprint")
    assert [getattr(again, name) for name in same] == [getattr(first, name) for name in same]


def test_other_texts_and_flags_are_tokenized_anew(tmp_path):
    one = loaded(csv(tmp_path / "rows"))
    other = loaded(csv(tmp_path / "other", [(text.upper(), summary) for text, summary in ROWS]))
    cut = loaded(tmp_path / "rows", max_length=24)
    prompted = loaded(tmp_path / "rows", prompt_template="Summarize: {text}")
    assert len({str(data.train["input_ids"][:]) for data in (one, other, cut, prompted)}) == 4


def test_everything_that_is_known_of_a_split_is_kept():
    cached(2, prompt_tokenizer(), PARTS, made)
    again = cached(2, prompt_tokenizer(), PARTS, never)
    assert replace(again, rows=None) == replace(made(), rows=None)
    assert again.rows[:] == made().rows[:]


@pytest.mark.parametrize("change", ["max_length", "label_names", "token", "template", "class", "part"])
def test_whatever_the_ids_depend_on_is_in_the_key(change):
    cached(2, prompt_tokenizer(), PARTS, made)
    flags = {"max_length": {"max_length": 9}, "label_names": {"label_names": ("a",)}}.get(change, {})
    other, parts = prompt_tokenizer(**flags), PARTS
    if change == "token":
        other.tokenizer.add_tokens(["cats"])
    elif change == "template":
        other.tokenizer.chat_template = "{{ messages }}"
    elif change == "class":
        other = type("Other", (PromptTokenizer,), {})(**vars(other))
    elif change == "part":
        parts = (*PARTS[:-1], "of others")
    with pytest.raises(AssertionError, match="tokenized again"):
        cached(2, other, parts, never)


@pytest.mark.parametrize("damage", [b"", b"PAR1 and no more", None], ids=["empty", "no table", "deleted"])
def test_a_file_that_is_gone_or_damaged_is_made_again(damage, folder):
    cached(2, prompt_tokenizer(), PARTS, made)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage)
    assert cached(2, prompt_tokenizer(), PARTS, made).rows[:] == made().rows[:]
    assert [path.read_bytes() for path in folder.iterdir()] == [whole]  # and no temporary file


def test_without_room_for_files_rows_are_tokenized_each_time(folder):
    folder.parent.mkdir()
    folder.write_text("a file where the folder would be")
    for _ in range(2):
        assert cached(2, prompt_tokenizer(), PARTS, made).supervised_tokens == 8


def test_few_rows_are_not_kept(folder, monkeypatch):
    monkeypatch.setattr(token_cache, "FEWEST", 3)
    cached(2, prompt_tokenizer(), PARTS, made)
    assert not folder.exists()


def test_a_tokenizer_that_cannot_be_saved_tokenizes_each_time(folder, monkeypatch):
    other = prompt_tokenizer()

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(type(other.tokenizer), "save_pretrained", full)
    assert cached(2, other, PARTS, made).supervised_tokens == 8
    assert not folder.exists()


def test_a_template_that_writes_the_date_is_tokenized_anew_each_day(monkeypatch):
    other = prompt_tokenizer()
    other.tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}{{ messages }}"

    class Tomorrow(token_cache.datetime.date):
        @classmethod
        def today(cls):
            return cls(2100, 1, 1)

    cached(2, other, PARTS, made)
    cached(2, other, PARTS, never)
    monkeypatch.setattr(token_cache.datetime, "date", Tomorrow)
    with pytest.raises(AssertionError, match="tokenized again"):
        cached(2, other, PARTS, never)


def test_files_that_no_run_used_for_a_month_are_deleted(folder):
    for n in range(2):
        cached(2, prompt_tokenizer(max_length=8 + n), PARTS, made)
    long_ago = time.time() - 31 * 24 * 3600
    for file in folder.iterdir():
        os.utime(file, (long_ago, long_ago))
    cached(2, prompt_tokenizer(max_length=8), PARTS, never)  # used today
    cached(2, prompt_tokenizer(max_length=10), PARTS, made)
    assert len([*folder.iterdir()]) == 2
    with pytest.raises(AssertionError, match="tokenized again"):
        cached(2, prompt_tokenizer(max_length=9), PARTS, never)
