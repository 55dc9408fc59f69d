"""The same rows give the same gradients and validation loss, however they are split over batches, steps and processes."""

import tempfile

import pytest
import torch
from gradients import KINDS, STRATEGIES, fine_tuner, gradients, lengths_differ, order, rows, validation_loss
from reliability import Run

from toolkit.training.guards import Guards

TOLERANCE = 1e-5  # relative, in fp32


def difference(found, expected) -> float:
    """The norm of the difference divided by the norm of the expected gradients, over all parameters."""
    assert found.keys() == expected.keys()
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    return float(torch.stack([(found[n] - g).norm() for n, g in expected.items()]).norm() / norm)


@pytest.fixture(scope="module")
def whole():
    return {kind: gradients(kind, batch_size=8, accumulation=1) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_four_accumulated_batches_give_the_gradients_of_one(kind, whole):
    assert difference(gradients(kind, batch_size=2, accumulation=4), whole[kind]) < TOLERANCE


def test_uneven_batches_give_a_head_the_mean_over_its_rows(whole):
    assert difference(gradients("head", batch_size=3, accumulation=3), whole["head"]) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_one_whole_batch_gives_the_gradients_of_trainer(kind, whole):
    assert difference(gradients(kind, batch_size=8, accumulation=1, ours=False), whole[kind]) < TOLERANCE


@pytest.mark.parametrize(("kind", "expected"), [("t5", 3.0), ("bart", 3.0), ("head", 3.0), ("llama", 0.0)])
def test_plain_trainer_loses_the_scale_for_t5_and_bart_and_a_head(kind, expected, whole):
    """Why `FineTuner.compute_loss` exists: without it, 4 accumulated batches give about 4 times the gradient."""
    off = difference(gradients(kind, batch_size=2, accumulation=4, ours=False), whole[kind])
    assert abs(off - expected) < (TOLERANCE if kind == "llama" else 1.0)


@torch.no_grad()
def mean_over_tokens(kind, tmp_path, number=7) -> float:
    """The model's own loss of each row alone, averaged with label tokens as weights."""
    model = fine_tuner(kind, tmp_path, rows(kind), rows(kind)).model.eval()
    total, tokens = 0.0, 0
    for row in rows(kind).select(range(number)):
        inputs = {name: torch.tensor([values]) for name, values in row.items()}
        labels = inputs["labels"] if kind in ("t5", "bart", "head", "prompt") else inputs["labels"][:, 1:]
        total += model(**inputs).loss.item() * int(labels.ne(-100).sum())
        tokens += int(labels.ne(-100).sum())
    return total / tokens


@pytest.mark.parametrize("kind", [*KINDS, "prompt"])
def test_the_validation_loss_is_the_mean_over_label_tokens_in_batches_of_any_size(kind, tmp_path):
    expected = mean_over_tokens(kind, tmp_path)
    for size in (1, 2, 5, 7):
        assert validation_loss(kind, size) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_smoothed_validation_loss_does_not_depend_on_batches_either(kind):
    smoothed = validation_loss(kind, 7, label_smoothing_factor=0.2)
    assert validation_loss(kind, 2, label_smoothing_factor=0.2) == pytest.approx(smoothed, rel=1e-5)
    assert smoothed != pytest.approx(validation_loss(kind, 7), rel=1e-4)


@pytest.mark.parametrize("kind", [*KINDS, "prompt"])
def test_training_and_validation_use_the_same_smoothed_loss(kind, tmp_path):
    smoothing = {"label_smoothing_factor": 0.2, "learning_rate": 0.0}
    trainer = fine_tuner(
        kind, tmp_path, rows(kind), rows(kind), per_device_train_batch_size=8, max_steps=1, **smoothing
    )
    trainer.remove_callback(Guards)  # they would require weights to change
    assert trainer.train().training_loss == pytest.approx(validation_loss(kind, 3, number=8, **smoothing), rel=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_resumed_run_sees_the_same_rows_as_an_uninterrupted_one(strategy, tmp_path):
    checkpoints = {
        "save_strategy": "steps",
        "save_steps": 11,
        "save_total_limit": None,
    }  # of 24 steps: in the middle of the second epoch
    whole = order(strategy, tmp_path, **checkpoints)
    assert all(sorted(epoch) == list(range(20, 36)) for epoch in whole)
    assert whole[0] != whole[1] != whole[2]
    torch.manual_seed(7)  # another random state, as in another process
    again = order(strategy, tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-11"), **checkpoints)
    assert again == [whole[1][6:], whole[2]]


def test_rows_of_similar_length_are_grouped():
    length = {row["input_ids"][0]: len(row["input_ids"]) for row in lengths_differ()}

    def padding(strategy, tmp):
        epochs = order(strategy, tmp)
        pairs = [pair for epoch in epochs for pair in zip(epoch[::2], epoch[1::2], strict=True)]
        return sum(abs(length[a] - length[b]) for a, b in pairs)

    with tempfile.TemporaryDirectory() as folder:
        assert padding("group_by_length", folder) < padding("random", folder) * 2 / 3


@pytest.mark.slow
def test_two_processes_give_the_gradients_and_losses_of_one_and_each_row_once(tmp_path, whole):
    ranks = Run("tests/gradients.py", tmp_path, "--use_cpu", log=tmp_path / "log", processes=2)
    assert ranks.wait() == [0, 0], ranks.text()
    for kind in KINDS:
        for rank in (0, 1):
            assert difference(torch.load(tmp_path / f"{kind}.{rank}.pt"), whole[kind]) < TOLERANCE
            loss = torch.load(tmp_path / f"{kind}.{rank}.loss")
            assert loss == pytest.approx(mean_over_tokens(kind, tmp_path), rel=1e-5)
    for strategy in STRATEGIES:
        of_ranks = [torch.load(tmp_path / f"{strategy}.{rank}.order") for rank in (0, 1)]
        for epoch in zip(*of_ranks, strict=True):
            assert sorted(epoch[0] + epoch[1]) == list(range(20, 36)), strategy
        assert of_ranks[0][0] != of_ranks[0][1], strategy
