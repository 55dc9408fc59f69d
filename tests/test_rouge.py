"""ROUGE with the same values as `evaluate`, without its script from the hub."""

import evaluate
import pytest

from toolkit.tasks.metrics.rouge import Rouge, rouge


def test_identical_texts_score_one_and_unrelated_ones_zero():
    assert rouge(["the cat sat"], ["the cat sat"]) == dict.fromkeys(["rouge1", "rouge2", "rougeL", "rougeLsum"], 1.0)
    assert set(rouge(["alpha beta"], ["gamma delta"]).values()) == {0.0}


def test_scores_derived_by_hand():
    # reference: 6 words, prediction: 5; common unigrams: the, cat, on, the = 4 -> P 4/5, R 4/6, F 8/11
    # bigrams: (the cat), (on the) = 2 of 4 and 5 -> F 2*2/(4+5); longest common subsequence: the cat on the = 4
    scores = rouge(["the cat on the sofa"], ["the cat sat on the mat"])
    assert scores["rouge1"] == pytest.approx(8 / 11)
    assert scores["rouge2"] == pytest.approx(4 / 9)
    assert scores["rougeL"] == pytest.approx(8 / 11)


def test_words_are_stemmed():
    assert rouge(["cats running"], ["cat runs"])["rouge1"] == 1.0


def test_sentences_of_lsum_end_at_line_breaks():
    scores = rouge(["b c\na b"], ["a b\nb c"])
    assert scores["rougeLsum"] == 1.0 and scores["rougeL"] < 1.0


def test_the_mean_is_over_pairs_and_scores_of_each_pair_are_available():
    metric = Rouge(keep_in_memory=True)
    assert isinstance(metric, evaluate.Metric)
    pairs = {"predictions": ["a b", "x"], "references": ["a b", "y"]}
    assert metric.compute(**pairs)["rouge1"] == 0.5
    assert metric.compute(**pairs, use_aggregator=False)["rouge1"] == [1.0, 0.0]
