"""The same rows give the same gradients, however they are split over accumulation steps and processes."""

import pytest
import torch
from gradients import KINDS, gradients
from reliability import Run

TOLERANCE = 1e-5  # relative, in fp32


def difference(found, expected) -> float:
    """Norm of the difference over the norm of the expected gradients, all parameters together."""
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
def test_trainer_alone_loses_the_scale_for_t5_and_bart_and_a_head(kind, expected, whole):
    """Why `FineTuner.compute_loss` exists: without it, 4 accumulated batches give about 4 times the gradient."""
    off = difference(gradients(kind, batch_size=2, accumulation=4, ours=False), whole[kind])
    assert abs(off - expected) < (TOLERANCE if kind == "llama" else 1.0)


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(tmp_path, whole):
    ranks = Run("tests/gradients.py", tmp_path, "--use_cpu", log=tmp_path / "log", processes=2)
    assert ranks.wait() == [0, 0], ranks.text()
    for kind in KINDS:
        for rank in (0, 1):
            assert difference(torch.load(tmp_path / f"{kind}.{rank}.pt"), whole[kind]) < TOLERANCE
