"""The embedded defaults: reproducible dialogues that are hard to guess, and a small model that loads and cannot summarize."""

import json
import random
import subprocess
import sys
from statistics import mean

import pytest
from conftest import ROOT
from rouge_score.rouge_scorer import RougeScorer

from toolkit.embedded import MODEL_DIR, make_dialogues
from toolkit.embedded.dialogues import DEFAULT_SIZES, make_samples
from toolkit.embedded.frames import FRAMES, KINDS, NAMES
from toolkit.embedded.tasks import example

SPLITS = ("train", "validation", "test")


def test_dialogues_are_the_same_in_every_process():
    code = "from toolkit.embedded.dialogues import make_dialogues as m; print(m('test', 50))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert outputs == {f"{make_dialogues('test', 50)}\n"}


def test_a_smaller_size_is_the_beginning_of_a_larger_one_and_another_seed_gives_other_dialogues():
    assert make_dialogues("train", 10) == make_dialogues("train", 30)[:10]
    assert make_dialogues("train", 10, seed=1) != make_dialogues("train", 10)


def test_rows_have_the_layout_of_dialogsum():
    for split in SPLITS:
        rows = make_dialogues(split)
        assert len(rows) == len({row["dialogue"] for row in rows}) == DEFAULT_SIZES[split]
        for row in rows:
            assert list(row) == ["id", "dialogue", "summary", "topic"]
            lines = row["dialogue"].split("\n")
            assert 3 <= len(lines) <= 8
            assert [line[:10] for line in lines] == (["#Person1#:", "#Person2#:"] * 4)[: len(lines)]
            assert "{" not in row["dialogue"] + row["summary"]


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="choose one of train, validation, test"):
        make_dialogues("dev")  # type: ignore[arg-type]


def test_no_split_shares_a_sentence_frame_or_a_name_with_another():
    """Pretraining also has its own sentence frames; it shares words with all splits."""
    turns = {
        split: {turn for kind in KINDS for part in frames.exchanges(kind) for turn in part}
        for split, frames in FRAMES.items()
    }
    for one in FRAMES:
        for other in FRAMES:
            if one < other:
                assert not turns[one] & turns[other], (one, other)
                if "pretraining" not in (one, other):
                    assert not set(NAMES[one]) & set(NAMES[other])


def test_every_turn_comes_from_a_frame_of_its_split():
    for split in SPLITS:
        known = {turn for kind in KINDS for part in FRAMES[split].exchanges(kind) for turn in part}
        assert {turn for sample in make_samples(split, 100) for turn in sample.frames} <= known


def copied(row: dict, lines: int) -> float:
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return scorer.score(row["summary"], "\n".join(row["dialogue"].split("\n")[:lines]))["rougeL"].fmeasure


@pytest.mark.parametrize(("lines", "most"), [(1, 0.25), (2, 0.3)])
def test_copying_the_first_lines_scores_low(lines, most):
    for split in SPLITS:
        score = mean(copied(row, lines) for row in make_dialogues(split, 100))
        assert 0.02 < score < most, (split, score)


def test_pretraining_never_shows_a_summary():
    rng = random.Random(0)
    for sample in make_samples("pretraining", 300):
        source, target = example(sample, rng)
        assert "ummar" not in source
        assert " wants to " not in target


def test_the_model_is_small_and_loads_in_float32_with_its_tokenizer():
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    assert sum(file.stat().st_size for file in MODEL_DIR.iterdir()) <= 4 * 2**20
    model = AutoModelForSeq2SeqLM.from_pretrained(MODEL_DIR)
    assert model.dtype == torch.float32 and model.num_parameters() < 2_000_000
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    line = "#Person1#: Can we meet on Friday at seven?"
    assert tokenizer.decode(tokenizer(line).input_ids, skip_special_tokens=True) == line


def test_in_each_committed_seed_lora_and_full_fine_tuning_are_far_above_the_base():
    result = json.loads((ROOT / "benchmarks" / "results" / "embedded.json").read_text(encoding="utf-8"))
    assert sorted((run["method"], run["seed"]) for run in result["runs"]) == [
        (m, s) for m in ("full", "lora") for s in range(3)
    ]
    for run in result["runs"]:
        assert run["scores"]["base"]["rougeL"] < 0.25
        assert run["scores"]["tuned"]["rougeL"] > run["scores"]["base"]["rougeL"] + 0.2
