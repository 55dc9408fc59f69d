"""`make gpu` on a machine without a GPU: its items, pool and results, and a whole rehearsal with tiny models."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
import zipfile

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForSeq2SeqLM

sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu
from on_gpu import facts, fits, memory, models, runs, speed, training
from on_gpu.items import WHOLE, Estimates, Item
from on_gpu.pool import Pool
from on_gpu.results import Results, error_percent, summary, table

from toolkit.config import parse_config
from toolkit.memory.cuda.cards import find_card
from toolkit.methods import METHODS

H100 = {"name": "NVIDIA H100 80GB HBM3", "capability": [9, 0], "multiprocessors": 132, "total_bytes": 79 * 2**30}
VERSIONS = {"torch": "2.11.0+cu130", "transformers": "5.17.0"}


# ---- items


def test_the_grid_has_at_least_40_configurations_with_unique_names():
    grid = memory.grid()
    assert len({c.name for c in grid}) == len(grid) >= 40
    assert {c.method for c in grid} >= {"full", "lora", "qlora", "ia3", "prefix_tuning", "adapter"}
    assert {c.model for c in grid} <= models.by_label(rehearsed=False).keys() <= memory.NEEDS.keys()


def test_every_item_has_a_unique_name_and_a_model_that_can_be_made(tmp_path):
    plans = {ladder.name: {str(8 * 2**30): {"rows": 3}} for ladder in fits.LADDERS}
    items = [scenario.item(tmp_path, False) for scenario in runs.scenarios()]
    items += [c.item(tmp_path, tmp_path, False) for c in memory.grid()]
    items += facts.items(tmp_path, False) + speed.items(tmp_path, False) + fits.items(plans, tmp_path, False)
    items += fits.reach_items(tmp_path, False)
    assert len({item.name for item in items}) == len(items)
    makers = {model.item.name for model in models.by_label(rehearsed=False).values()}
    for item in items:
        assert set(item.needs) <= makers
        json.dumps(item.arguments)  # arguments must be JSON-serializable


@pytest.mark.parametrize("one", memory.grid(), ids=lambda one: one.name)
def test_recipes_take_the_flags_of_every_configuration_on_an_h100(one):
    config = parse_config(
        METHODS[one.method], ["--model_name_or_path", "meta-llama/Llama-3.2-1B", *one.flags], find_card("H100")
    )
    assert config.training.bf16 or config.training.fp16 or "fp32" in one.name


@pytest.mark.parametrize("one", runs.scenarios(), ids=lambda one: one.name)
def test_recipes_take_the_flags_of_every_scenario_on_an_h100(one, tmp_path, monkeypatch):
    for name, value in runs._environment(one).items():
        monkeypatch.setenv(name, value)
    flags = runs._flags(one, str(tmp_path), tmp_path / "run", rehearsed=False)
    assert parse_config(METHODS[one.method], flags, find_card("H100")).method.name == one.method


def test_models_come_from_the_catalogue_and_their_folders_have_a_tokenizer(tmp_path):
    label = "small-t5"
    source = models.by_label(rehearsed=True)[label].source
    (tmp_path / "models").mkdir()
    models.make(label, source, str(tmp_path), rehearsed=True)
    there = {path.name for path in models.folder_of(str(tmp_path), label).iterdir()}
    assert there >= {
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for model in models.REAL:
        assert models.config_of(model.source) is not None


def test_a_model_with_a_separate_output_embedding_is_saved_with_it(tmp_path, monkeypatch):
    small = models.config_of(models.by_label(rehearsed=True)["small-t5"].source)
    monkeypatch.setattr(models, "config_of", lambda source: small)
    (tmp_path / "models").mkdir()
    models.make("flan-t5-base", "google/flan-t5-base", str(tmp_path), rehearsed=True)
    model = AutoModelForSeq2SeqLM.from_pretrained(models.folder_of(str(tmp_path), "flan-t5-base"))
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert not torch.equal(head, embedding) and 0.015 < head.std().item() < 0.025  # as it was drawn


def test_every_batch_of_the_rows_has_padding_and_none_is_too_long(tmp_path):
    folder = models.write_rows(tmp_path)
    words = [len(json.loads(line)["dialogue"].split()) for line in (folder / "train.jsonl").open()]
    assert words[0] > 1024 and all(abs(a - b) > 1000 for a, b in itertools.pairwise(words))


def test_a_batch_is_rebuilt_from_its_shapes_and_row_lengths():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    batch = {"input_ids": torch.tensor([[7, 8, 9], [7, 0, 0]]), "attention_mask": mask, "labels": mask.clone()}
    described = json.loads(json.dumps(training.describe(batch)))
    again = training.rebuilt(described)
    assert again.keys() == batch.keys() and torch.equal(again["attention_mask"], mask)
    assert all(again[name].shape == batch[name].shape and again[name].dtype == torch.int64 for name in batch)


def test_kernels_are_recognized_by_their_names():
    from on_gpu.fact_jobs import kind_of

    names = {
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128>>": "flash",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention)": "efficient",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16": "cudnn",
        "void (anonymous namespace)::softmax_warp_forward<float>": "math",
        "ampere_bf16_s16816gemm_bf16_128x64": None,
    }
    assert {name: kind_of(name) for name in names} == names


# ---- time


def test_measured_times_correct_the_guesses_of_a_part():
    known, other = Item("a", "memory", "", seconds=10), Item("b", "memory", "", seconds=20)
    estimates = Estimates([(known, 30.0)])
    assert (estimates.of(known), estimates.of(other)) == (30.0, 60.0)
    assert estimates.of(Item("c", "runs", "", seconds=5)) == 5.0


@pytest.fixture
def outcomes():
    return {}


@pytest.fixture
def make_pool(tmp_path, outcomes, monkeypatch):
    """A pool of forks of this process; `outcomes` gets the finished items by name."""
    for name in (
        "HF_HUB_OFFLINE",
        "OMP_NUM_THREADS",
        "PYTHONPATH",
        "PYTORCH_NVML_BASED_CUDA_CHECK",
        "TOKENIZERS_PARALLELISM",
    ):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # so that changes by the pool are undone

    def make(seconds, workers=3, gib=10.0, least=1.0):
        end = time.monotonic() + seconds
        finished = lambda outcome: outcomes.__setitem__(outcome.item.name, outcome)  # noqa: E731
        return Pool(tmp_path, workers, 1, gib, end, least, Estimates(), finished, method="fork")

    return make


def item(name, job, seconds=0.5, gib=1.0, needs=(), **arguments):
    return Item(name, "test", f"gpu_jobs:{job}", arguments, seconds, gib, needs)


@pytest.mark.slow
def test_an_item_that_fails_dies_or_hangs_stops_nothing_and_says_why(make_pool, outcomes):
    pool = make_pool(60)
    left = pool.run(
        [item("breaks", "breaks"), item("dies", "dies"), item("hangs", "hangs"), item("fine", "fine", value=3)]
    )
    assert left == [] and pool.drain() == []
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        "breaks": "failed",
        "dies": "failed",
        "hangs": "failed",
        "fine": "ok",
    }
    assert 'raise ValueError("a reason that must not be lost")' in outcomes["breaks"].error
    assert "exit code -9" in outcomes["dies"].error
    for said in ("killed after", "so far so good", "gpu_jobs.py", "in hangs"):  # and where it was
        assert said in outcomes["hangs"].error
    assert outcomes["fine"].found == {"value": 3}


@pytest.mark.slow
def test_only_items_that_can_end_in_time_start_and_running_ones_are_killed_at_the_end(make_pool, outcomes):
    pool = make_pool(3, least=100)
    began = time.monotonic()
    left = pool.run([item("long", "fine", seconds=60, value=1), item("hangs", "hangs"), item("short", "fine", value=2)])
    left += pool.drain()
    assert [one.name for one in left] == ["long"]
    assert [one.name for one in pool.cut_off] == ["hangs"]
    assert list(outcomes) == ["short"] and 2.5 < time.monotonic() - began < 20


def test_an_item_that_ran_out_of_memory_next_to_others_is_retried_alone(make_pool, outcomes, tmp_path):
    pool = make_pool(60)
    pool.run(
        [
            item("room", "needs_room", others=str(tmp_path)),
            item("stays", "stays", seconds=2),
            item("never", "never_fits", gib=WHOLE),
        ]
    )
    pool.drain()
    assert outcomes["room"].status == "ok" and outcomes["room"].item.alone
    assert outcomes["never"].status == "out of memory" and "2000.00 GiB" in outcomes["never"].error


def test_an_item_that_needs_the_whole_card_gets_it(make_pool, outcomes, tmp_path):
    log = tmp_path / "order"
    pool = make_pool(60)
    pool.run(
        [
            item("one", "stays", seconds=1.0),
            item("alone", "fine", gib=WHOLE, value=1, log=str(log)),
            item("after", "fine", value=2, log=str(log)),
        ]
    )
    pool.drain()
    assert log.read_text().split() == ["1", "2"] and list(outcomes) == ["one", "alone", "after"]


def test_a_helper_is_run_once_before_the_first_that_needs_it(make_pool, outcomes, tmp_path):
    log = tmp_path / "order"
    pool = make_pool(60)
    pool.helpers["model"] = item("model", "fine", value=0, log=str(log))
    pool.helpers["broken"] = item("broken", "breaks")
    pool.run([item(f"item {n}", "fine", needs=("model",), value=n, log=str(log)) for n in (1, 2)])
    pool.run([item("without", "fine", needs=("broken",), value=3)])
    pool.drain()
    assert sorted(log.read_text().split()) == ["0", "1", "2"] and log.read_text()[0] == "0"
    assert outcomes["without"].status == "failed" and "must not be lost" in outcomes["without"].error


# ---- results


def test_results_continue_earlier_ones_of_the_same_card_and_stack(tmp_path):
    results = Results.of(tmp_path, H100, VERSIONS)
    results.begin(9, "abc")
    results.put("a", "memory", status="ok")
    results.put("b", "memory", status="failed", error="why")
    again = Results.of(tmp_path, H100, VERSIONS)
    assert (again.is_done("a"), again.is_done("b"), again.is_done("c")) == (True, False, False)
    other = Results.of(tmp_path, H100, VERSIONS | {"torch": "2.12.0"})
    assert not other.is_done("a") and other.rows() == []
    assert (
        tmp_path.joinpath("nvidia-h100-80gb-hbm3.json") == results.path
        and Results.load(results.path).row("a") is not None
    )


def test_errors_are_percent_of_the_measured_value_and_means_exclude_failures():
    assert (error_percent(101, 100), error_percent(190, 200)) == (1.0, -5.0)
    good = {"error_percent": {"allocated_bytes": -0.5, "reserved_bytes": 2.0}}
    assert summary([good, {"status": "failed"}]) == {
        "allocated_bytes": {"rows": 1, "mean": 0.5, "worst": 0.5},
        "reserved_bytes": {"rows": 1, "mean": 2.0, "worst": 2.0},
    }


def test_the_table_lists_agreements_differences_and_items_left():
    rows = [
        {"name": "a", "part": "memory", "status": "ok", "agrees": True, "says": "fine"},
        {"name": "b", "part": "memory", "status": "ok", "agrees": False, "says": "allocated +9 %"},
        {"name": "c", "part": "runs", "status": "failed", "error": "x"},
    ]
    text = table(rows, ["d", "e"])
    assert "1 agrees, 1 differs" in text and "differs  b: allocated +9 %" in text and "failed   c" in text
    assert "left: 2 (d, e)" in text and "fine" not in text


def test_a_prediction_is_compared_with_its_row():
    row = {"peak": {"allocated_bytes": 1000, "reserved_bytes": 2000}}
    near = memory.compared(row, {"peak": {"allocated_bytes": 1005, "reserved_bytes": 2050}})
    far = memory.compared(row, {"peak": {"allocated_bytes": 1005, "reserved_bytes": 2200}})
    assert near["agrees"] and not far["agrees"] and far["says"] == "allocated +0.50 %, reserved +10.00 %"


STEADY = {"load": [5000, 900], "forward": [900, 800], "backward": [1000, 600]}  # peak, end


def test_a_prediction_is_also_compared_with_the_steady_step_without_the_trace():
    predicted = {"peak": {"allocated_bytes": 5000, "reserved_bytes": 6000}, "phases": STEADY}
    row = {"peak": predicted["peak"], "phases": STEADY, "untraced_allocated_bytes": 1000}
    row |= {"batches": 2 * [{"input_ids": [1, 64], "tokens": [64]}]}
    same = memory.compared(row, predicted)
    assert same["agrees"] and same["error_percent"]["untraced_allocated_bytes"] == 0
    far = memory.compared(row | {"untraced_allocated_bytes": 1100}, predicted)
    assert not far["agrees"] and "untraced allocated -9.09 %" in far["says"]


def test_later_steps_are_compared_only_if_all_batches_have_the_same_shapes():
    predicted = {"peak": {"allocated_bytes": 5000, "reserved_bytes": 6000}, "phases": STEADY}
    row = {"peak": predicted["peak"], "phases": STEADY, "untraced_allocated_bytes": 500}
    one, other = ({"input_ids": [1, length], "tokens": [length]} for length in (64, 20))
    assert not memory.compared(row | {"batches": [one, one | {"tokens": [7]}]}, predicted)["agrees"]
    assert memory.compared(row | {"batches": [one, other]}, predicted)["agrees"]


def test_results_do_not_name_the_folders_of_the_machine(tmp_path):
    results = Results.of(tmp_path, H100, VERSIONS)
    results.put("a", "runs", status="failed", error=f"{ROOT}/recipes/full.py and /dev/shm/footprint-gpu-0/card/rows")
    assert results.row("a")["error"] == "recipes/full.py and WORK/card/rows"


def test_a_call_leaves_few_files_whatever_it_measured(tmp_path):
    for name in ("kept/a.json", "kept/b.json", "kept/a.pickle", "logs/a.log", "logs/b.log"):
        (tmp_path / "work" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "work" / name).write_text(name)
    results = Results.of(tmp_path / "out", H100, VERSIONS)
    results.pack(tmp_path / "work")
    results.pack(tmp_path / "work")
    assert {path.name for path in results.artifacts.iterdir()} == {"ledgers.zip", "snapshots.zip", "logs.zip"}
    with zipfile.ZipFile(results.artifacts / "ledgers.zip") as archive:
        assert archive.namelist() == ["a.json", "b.json"]


def test_two_steps_of_every_planned_batch_size_have_enough_rows(tmp_path):
    for rows, tried in ((fits.MOST, 2), (fits.MOST + 1, 0)):
        plan = {"lora llama-1b": {str(8 * 2**30): {"rows": rows}}}
        found = fits.items(plan, tmp_path, rehearsed=False)
        assert len(found) == tried and all(2 * one.arguments["rows"] <= models.TRAIN_ROWS for one in found)


def test_speeds_are_fractions_of_the_cards_own_rates():
    card = {"name": "speed card", "status": "ok", "product_operations_per_second": 1e12, "copy_bytes_per_second": 1e9}
    row = {"name": "x", "status": "ok", "operations": 4e11, "read_bytes": 1e8, "seconds": [2.0, 1.0, 1.0]}
    assert speed.fractions([card, row]) == {"x": {"of_matrix_products": 0.4, "of_copy_rate": 0.1}}
    assert speed.fractions([row]) == {}


def test_a_plan_names_both_sides_of_each_limit(tmp_path):
    found = {"lora llama-1b": {str(8 * 2**30): {"rows": 5, "reserved": 1, "one_more": 2}}}
    items = fits.items(found, tmp_path, rehearsed=False)
    sides = [(one.arguments["rows"], one.arguments["expected"]) for one in items]
    assert sides == [(5, "fits"), (6, "runs out")]


def test_the_committed_results_are_readable():
    for path in (ROOT / "benchmarks" / "results" / "gpu").glob("*.json"):
        if path.name == fits.PLAN.name:
            assert all(
                limit["rows"] > 0
                for plan in json.loads(path.read_text()).values()
                for one in plan.values()
                for limit in one.values()
            )
        else:
            assert Results.load(path).rows()


# ---- a whole rehearsal


@pytest.mark.slow
def test_importing_what_recipes_need_does_not_initialize_cuda():
    """On a machine with a GPU, an import that initializes CUDA would make forks unusable."""
    code = """
import sys, torch
def touched(*a, **k): raise SystemExit("CUDA was touched")
torch.cuda._is_compiled = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda._lazy_init = touched
torch._C._cuda_getDeviceCount = touched
torch._C._cuda_getCurrentRawStream = touched  # which bitsandbytes keeps for later
from on_gpu import machine
machine.nvidia_smi = lambda field: "9.0"
import on_gpu.preload
print("bitsandbytes" in sys.modules, "peft" in sys.modules, any(n.startswith("toolkit") for n in sys.modules))
"""
    from on_gpu.machine import environment

    done = subprocess.run([sys.executable, "-c", code], env=os.environ | environment(), capture_output=True, text=True)
    assert done.returncode == 0 and "touched" not in done.stderr, done.stderr[-3000:]
    assert done.stdout.split()[-3:] == ["True", "True", "False"]


@pytest.mark.long
def test_a_scenario_under_fsdp2_runs_on_a_cpu(make_pool, outcomes, tmp_path):
    (tmp_path / "models").mkdir()
    models.write_rows(tmp_path)
    pool = make_pool(400, least=400)
    maker = models.by_label(rehearsed=True)["small-llama"].item
    maker.arguments.update(work=str(tmp_path), rehearsed=True)
    pool.helpers[maker.name] = maker
    scenario = runs.Scenario("lora", "small-llama", launch="fsdp2", whole=False)
    pool.run([scenario.item(tmp_path, rehearsed=True)])
    pool.drain()
    assert outcomes[scenario.name].status == "ok", outcomes[scenario.name].error


@pytest.mark.slow
def test_a_killed_rehearsal_continues_where_it_stopped_and_agrees_in_everything(tmp_path):
    """The killed call runs only the shortest part: unfinished items are repeated, and `make test` must stay short."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--rehearse", "--out", str(tmp_path / "out")]
    command += ["--work", str(tmp_path / "work")]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    path, log = tmp_path / "out" / "cpu.json", tmp_path / "log"
    with log.open("w") as stream:
        first = subprocess.Popen([*command, "--only", "facts"], stdout=stream, stderr=subprocess.STDOUT, env=env)
    end = time.monotonic() + 300
    while not (path.is_file() and len(json.loads(path.read_text())["rows"]) >= 2):
        assert first.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    kept = json.loads(path.read_text())["rows"]
    assert 2 <= len(kept) < len(facts.items(tmp_path, rehearsed=True))
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, env=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(path.read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert len(found["calls"]) == 2 and {row["part"] for row in found["rows"]} == set(gpu.ORDER)
    assert all(rows[row["name"]] == row for row in kept)
    assert not any(f"  {row['name']}: " in done.stdout for row in kept)  # not repeated
    assert {row["status"] for row in found["rows"]} == {"ok"}
    measured = [row for row in found["rows"] if row["part"] == "memory"]
    assert len(measured) == len(memory.grid(rehearsed=True))
    for row in measured:  # predicted and measured on the same CPU: the tolerance of the shadow step
        assert abs(row["error_percent"]["allocated_bytes"]) <= 1.0, row["name"]
        assert row["untraced_step"] == 4, row["name"]  # the second after the two that were traced
        assert "untraced_allocated_bytes" not in row  # a CPU counts nothing
    verdicts = {row["expected"]: row["outcome"] for row in found["rows"] if row["part"] == "fits"}
    assert verdicts == {"fits": "fits", "runs out": "runs out"}
    assert "left: 0" in done.stdout
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert len(files) <= 6 and {"ledgers.zip", "logs.zip"} <= {file.name for file in files}
