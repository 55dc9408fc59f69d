"""A small version of `make gpu` on this machine's GPU: `pytest -m gpu`."""

import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from on_gpu import fact_jobs, fits, memory, models, runs
from on_gpu.items import WHOLE, Estimates, Item
from on_gpu.pool import Outcome, Pool

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and there is none here"),
]
SMALL = ("small-llama", "small-t5")
BF16 = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8
PRECISION = ("--bf16",) if BF16 else ("--bf16", "false")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "models").mkdir()
    models.write_rows(folder)
    return folder


@pytest.fixture(scope="module")
def run(work):
    """Runs one item in its own process and returns its outcome; it must not fail."""
    outcomes: list[Outcome] = []
    pool = Pool(work, 1, 1, WHOLE, float("inf"), 300.0, Estimates(), outcomes.append)
    for label in SMALL:
        maker = models.by_label(rehearsed=False)[label].item
        maker.arguments.update(work=str(work), rehearsed=False)
        pool.helpers[maker.name] = maker

    def run_item(item: Item) -> Outcome:
        if item.gib:
            pool.run([item])
        else:
            pool.behind.append(item)
        pool.drain()
        assert outcomes[-1].status == "ok", outcomes[-1].error
        return outcomes[-1]

    yield run_item
    pool.close()


@pytest.mark.parametrize(
    "scenario",
    [
        runs.Scenario("lora", "small-llama", PRECISION),
        runs.Scenario("lora", "small-llama", ("--fp16",)),
        runs.Scenario("qlora", "small-t5", PRECISION),
        runs.Scenario("prefix_tuning", "small-llama", PRECISION),
        runs.Scenario("full", "small-t5", PRECISION, killed=True),
        runs.Scenario("lora", "small-llama", PRECISION, "fsdp2"),
    ],
    ids=lambda scenario: scenario.name.replace(" ", "-"),
)
def test_a_recipe_trains_resumes_answers_and_merges_on_a_gpu(run, work, scenario):
    run(scenario.item(work, rehearsed=False))


@pytest.mark.parametrize("model", SMALL)
@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_measured_memory_on_a_gpu_matches_the_prediction_for_the_same_steps(run, work, method, model):
    flags = ("--per_device_train_batch_size", "4", "--max_length", "256", *PRECISION)
    one = memory.Configuration(f"{model} {method}", method, model, flags)
    row = {"name": one.name, **run(one.item(work, work, rehearsed=False)).found}
    facts = run(Item("card", "card", "on_gpu.fact_jobs:card", {"rehearsed": False}, gib=1.0)).found
    predicted = run(memory.prediction_item(row, facts, work, rehearsed=False)).found
    compared = memory.compared(row, predicted)
    assert compared["agrees"], compared["says"]  # the criterion of the accuracy table


@pytest.mark.parametrize("fact", ["workspaces", "attention"])
def test_facts_that_predictions_take_from_sources_hold_on_this_gpu(run, fact):
    found = run(Item(f"facts {fact}", "facts", f"on_gpu.fact_jobs:{fact}", {"rehearsed": False}, gib=WHOLE)).found
    assert found["agrees"], found["says"]


@pytest.mark.parametrize(("limit", "outcome"), [(2**30, "fits"), (64 * 2**20, "runs out")])
def test_an_allocator_limit_works(run, work, limit, outcome):
    ladder = fits.Ladder("full", "small-llama", 256, 20)
    arguments = {
        "ladder": vars(ladder),
        "rows": 8,
        "limit": limit,
        "expected": outcome,
        "work": str(work),
        "rehearsed": False,
    }
    item = Item(f"fits {limit}", "fits", "on_gpu.fits:tried", arguments, 20, WHOLE, ("model small-llama",))
    assert run(item).found["outcome"] == outcome


def test_every_fact_that_is_listed_can_be_measured():
    from on_gpu import facts

    for item in facts.items(ROOT, rehearsed=False):
        assert callable(getattr(fact_jobs, item.job.split(":")[1]))
