"""The embedded default: the dialogues are reproducible and hard to guess, and the model is small, loads, and cannot summarize yet."""

import random
import re
import subprocess
import sys
from functools import cache

import pytest
from rouge_score.rouge_scorer import RougeScorer

from toolkit.embedded import make_dialogues
from toolkit.embedded.dialogues import DEFAULT_SIZES, make_samples
from toolkit.embedded.tasks import example
from toolkit.embedded.templates import load

SPLITS = ("train", "validation", "test")


@cache
def samples(split):
    return make_samples(split, DEFAULT_SIZES[split])


def rouge(reference, text, metric="rougeL"):
    return RougeScorer([metric], use_stemmer=True).score(reference, text)[metric].fmeasure


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def test_dialogues_are_the_same_in_every_process():
    code = "import hashlib; from toolkit.embedded import make_dialogues as m; print(hashlib.sha256(repr(m('test', 50)).encode()).hexdigest())"
    digests = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_a_smaller_size_is_the_beginning_of_a_larger_one_and_another_seed_gives_other_dialogues():
    assert make_dialogues("train", 10) == make_dialogues("train", 30)[:10]
    assert make_dialogues("train", 10, seed=1) != make_dialogues("train", 10)


def test_rows_have_the_layout_of_dialogsum():
    for split in SPLITS:
        rows = make_dialogues(split)
        assert len(rows) == DEFAULT_SIZES[split]
        assert len({row["dialogue"] for row in rows}) == len(rows)
        for row in rows:
            assert list(row) == ["id", "dialogue", "summary", "topic"]
            lines = row["dialogue"].split("\n")
            assert 4 <= len(lines) <= 8
            assert [line[:10] for line in lines] == (["#Person1#:", "#Person2#:"] * 4)[: len(lines)]
            assert not re.search(r"[{}~|]", row["dialogue"] + row["summary"])


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="choose one of train, validation, test"):
        make_dialogues("dev")  # type: ignore[arg-type]


def test_splits_share_no_template_no_wording_and_no_name():
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        a, b = load(one), load(other)
        assert not {*a.names, *a.cities} & {*b.names, *b.cities}
        for part in ("openings", "small_talk", "corrections", "closings"):
            assert not set(getattr(a, part)) & set(getattr(b, part)), part
        for attribute in ("template", "dialogue", "summary_skeleton"):
            seen = {getattr(sample, attribute) for sample in samples(one)}
            assert not seen & {getattr(sample, attribute) for sample in samples(other)}, attribute
        turns = {text for sample in samples(one) for text in sample.skeletons}
        assert not turns & {text for sample in samples(other) for text in sample.skeletons}
        sentences = {part for sample in samples(one) for part in re.split(r"(?<=\.) ", sample.summary_skeleton)}
        assert not sentences & {p for sample in samples(other) for p in re.split(r"(?<=\.) ", sample.summary_skeleton)}


@pytest.mark.parametrize(("lines", "expected"), [(1, 0.135), (2, 0.170)])
def test_copying_the_first_lines_of_a_test_dialogue_scores_badly(lines, expected):
    # Measured when the split was written; the copy includes the speakers' tags, which helps it.
    score = mean(
        rouge(row["summary"], "\n".join(row["dialogue"].split("\n")[:lines])) for row in make_dialogues("test")
    )
    assert score == pytest.approx(expected, abs=0.02)


def test_many_dialogues_correct_a_fact_on_the_way():
    corrections = {text for split in SPLITS for exchange in load(split).corrections for text in exchange}
    for split in SPLITS:
        share = mean(any(text in corrections for text in sample.skeletons) for sample in samples(split))
        assert 0.2 < share < 0.6, split


def test_pretraining_never_shows_a_summary():
    rng = random.Random(0)
    for sample in make_samples("train", 300):
        source, target = example(sample, rng)
        assert "Summar" not in source
        assert target != sample.summary
