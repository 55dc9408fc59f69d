"""One simulated rank of several: its states are checked against the papers' arithmetic and against real ranks."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from reliability import Run
from tiny_models import rows, save_with_tokenizer, tiny_config
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from toolkit.distributed.deepspeed import without_partitioning
from toolkit.distributed.launch_files import read_launch_file
from toolkit.distributed.request import requested_engine
from toolkit.errors import UserError
from toolkit.memory.cuda import attention
from toolkit.memory.cuda.cards import find_card
from toolkit.memory.cuda.device import Cuda
from toolkit.memory.ledger import Ledger
from toolkit.memory.shadow.simulated_rank import in_world, processes, world
from toolkit.memory.shadow.step import CPU, predict
from toolkit.runs.prediction import PredictionJob

sys.path.append(str(ROOT / "benchmarks"))

import distributed_accuracy
import distributed_fits


def build():
    with torch.device("meta"), without_partitioning():
        return AutoModelForCausalLM.from_config(tiny_config("llama"))


def ledger(launch: str, number: int, folder: Path, rank: int = 0, device=CPU, **more) -> Ledger:
    """A tiny Llama in fp32, 2 rows of 32 tokens a rank, plain AdamW."""
    with world(read_launch_file(launch, number).of_rank(rank)):
        settings = {"per_device_train_batch_size": 2, "use_cpu": True, "report_to": [], "max_steps": 2} | more
        args = TrainingArguments(output_dir=str(folder), dataloader_pin_memory=False, **settings)

        def trainer(model, arguments, callback):
            return Trainer(model, arguments, train_dataset=rows("llama", 16 * number), callbacks=[callback])

        return predict(build, trainer, args, device)


def states(found: Ledger) -> dict[str, int]:
    return distributed_accuracy.states(found)


def weights() -> int:
    return sum(p.numel() for p in build().parameters())


@pytest.mark.slow
def test_ddp_holds_all_states_and_buckets_as_large_as_the_gradients(tmp_path):
    found, whole = ledger("ddp", 2, tmp_path), 4 * weights()
    assert states(found)["parameters_trainable"] == states(found)["gradients"] == whole
    moments = states(found)["optimizer_state"] - 2 * whole
    assert 0 < moments < 4 * 64  # the step counts, one per parameter
    assert found.phases["forward"].categories["communication"] == whole


@pytest.mark.slow
def test_zero2_shards_master_weights_and_moments_with_padding(tmp_path):
    found = ledger("zero2", 3, tmp_path, rank=2)
    share = -(-weights() // 6) * 6 // 3  # flat buffers are padded to a multiple of 2 elements per rank
    assert states(found)["parameters_trainable"] >= 4 * weights()
    assert states(found)["optimizer_state"] == pytest.approx(3 * 4 * share, abs=64)


@pytest.mark.slow
def test_sequence_parallelism_on_2_processes_halves_activations_and_restores_attention_afterwards(tmp_path):
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    shared, whole = (
        distributed_accuracy.predicted(distributed_accuracy.Configuration(launch), tmp_path, 0)
        for launch in ("sequence_parallel", "zero3")
    )
    saved = [found.phases["backward"].categories["activations_saved"] for found in (shared, whole)]
    # half of them, and the gathered keys and values of all tokens for half of the heads
    assert saved[1] / 2 <= saved[0] < 0.6 * saved[1]
    assert states(shared) == states(whole)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["zero2", "zero3", "fsdp2", "ddp"])
def test_fp16_is_computed_in_fp16_and_needs_as_much_memory_as_bf16(launch, tmp_path, monkeypatch):
    choose, dtypes = attention.choose_kernel, []

    def spy(card, query, *args):
        dtypes.append(query.dtype)
        return choose(card, query, *args)

    monkeypatch.setattr(attention, "choose_kernel", spy)
    device = Cuda(find_card("RTX 3090"))  # a card with the same kernels for both types
    half, brain = (ledger(launch, 2, tmp_path, device=device, **{name: True}) for name in ("fp16", "bf16"))
    middle = len(dtypes) // 2
    assert set(dtypes[:middle]) == {torch.float16} and set(dtypes[middle:]) == {torch.bfloat16}
    assert half.allocated_bytes == pytest.approx(brain.allocated_bytes, rel=0.001)
    assert states(half) == states(brain)


@pytest.mark.slow
def test_zero3_and_fsdp2_shard_all_states(tmp_path):
    whole = 4 * weights()
    norms = 4 * 5 * 64  # below ZeRO's persistence threshold of 10 x hidden_size, so they stay gathered
    for launch, copies, stays in (("zero3", 3, norms), ("fsdp2", 2, 0)):  # ZeRO also keeps master weights
        found = ledger(launch, 4, tmp_path)
        assert states(found)["parameters_trainable"] == whole // 4 + stays, launch
        assert states(found)["optimizer_state"] == pytest.approx(copies * whole / 4, rel=0.01), launch
        assert found.phases["forward"].categories["communication"] > 0, launch
        assert found.parameters == {"trainable": weights(), "all": weights()}


@pytest.mark.slow
@pytest.mark.long
def test_states_that_zero2_offloads_are_in_host_memory_and_not_on_the_card(tmp_path):
    found = ledger("zero2_offload", 2, tmp_path)
    assert states(found)["optimizer_state"] == 0
    assert found.allocated_bytes < ledger("zero2", 2, tmp_path).allocated_bytes
    # of all ranks: master weights, their gradients and two moments in fp32, a buffer to copy weights back, a table's gradient
    assert 20 * weights() <= found.host_bytes <= 1.1 * 20 * weights() + 2 * 4 * 256 * 64


@pytest.mark.slow
def test_zero_infinity_writes_files_for_all_tensors_of_at_least_1_mib(tmp_path):
    (configuration,) = [c for c in distributed_accuracy.GRID if c.launch == "zero3_nvme"]
    found = distributed_accuracy.predicted(configuration, tmp_path, 0)
    with torch.device("meta"):
        shares = [-(-p.numel() // 2) for p in distributed_accuracy.build(configuration).parameters()]
    expected = 3 * 4 * sum(shares)  # master weights and two moments, for all weights
    expected += sum(size * share for size in (2, 4) for share in shares if size * share >= 2**20)  # weights, gradients
    assert found.nvme_bytes == pytest.approx(2 * expected, rel=0.001)
    assert states(found)["optimizer_state"] == states(found)["gradients"] == 0
    assert found.host_bytes > 2 * 4 * 4 * sum(shares)  # four buffers of the optimizer on each of 2 ranks
    assert not (tmp_path / "swap").exists()  # DeepSpeed would empty the folder that runs swap to


def test_a_world_restores_the_state_of_the_process(tmp_path):
    environment, address = dict(os.environ), FakeTensor.data_ptr
    with pytest.raises(ZeroDivisionError), world(read_launch_file("zero3", 2).of_rank(1)):
        assert (in_world(), processes(), torch.distributed.get_rank()) == (True, 2, 1)
        assert str(requested_engine()) == "ZeRO-3 on 2 processes"
        _ = 1 / 0
    assert (in_world(), processes(), torch.distributed.is_initialized()) == (False, 1, False)
    assert dict(os.environ) == environment
    assert FakeTensor.data_ptr is address


@pytest.mark.parametrize(
    ("name", "number", "message"),
    [
        ("zero4", 2, "did you mean zero"),
        ("none.yaml", 2, "no such launch file"),
        ("single", 2, "starts one process, not 2"),
        ("ddp", 1, "at least 2 processes"),
        ("two_machines", 3, "cannot be started on 2 machines"),
        ("./README.md", 2, "README.md: not valid YAML"),
    ],
)
def test_a_launch_file_that_cannot_start_the_requested_processes_is_refused(name, number, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=message):
        read_launch_file(name, number)


def test_a_custom_launch_file_is_read_with_its_own_number_of_processes(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("distributed_type: FSDP\nnum_processes: 6\nfsdp_config:\n  fsdp_version: 2\n")
    launch = read_launch_file(str(path))
    assert (launch.processes, launch.engine.kind, launch.of_rank(5)["LOCAL_RANK"]) == (6, "FSDP2", "5")


@pytest.mark.slow
def test_real_ranks_have_the_predicted_states_and_a_peak_within_3_percent(tmp_path):
    check_real_ranks("zero3 x2 full float32 bf16=True", tmp_path)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", [c.name for c in distributed_accuracy.GRID])
def test_every_engine_is_predicted(name, tmp_path):
    check_real_ranks(name, tmp_path)


def check_real_ranks(name, place):
    done = Run("benchmarks/distributed_accuracy.py", "--only", name, log=place, settings={"OMP_NUM_THREADS": "1"})
    assert done.wait() == [0], done.text()[-4000:]
    (row,) = next(json.loads(line) for line in done.text().splitlines() if line.startswith("[{"))
    for rank in row["ranks"]:
        assert rank["states_bytes"]["predicted"] == rank["states_bytes"]["measured"], name
        assert abs(rank["error_percent"]["peak"]) < 3, name
        assert rank["nvme_bytes"]["predicted"] == rank["nvme_bytes"]["measured"], name
        for phase, (before, after) in rank["communication_bytes"].items():
            assert before == pytest.approx(after, rel=0.03), (name, phase)


def test_the_committed_results_have_the_documented_accuracy():
    result = json.loads(distributed_accuracy.RESULTS.read_text(encoding="utf-8"))
    assert {row["processes"] for row in result["rows"]} >= {2, 4}
    for errors in result["summary_percent"].values():
        assert errors["states"] == 0
        assert errors["peak"] < 3


def test_states_never_need_more_memory_on_more_cards_and_lora_needs_less():
    for launch in distributed_fits.LAUNCHES:
        needs = [distributed_fits.least_states(8, "full", launch, n) for n in (1, 2, 4, 8)]
        assert needs == sorted(needs, reverse=True)
        assert distributed_fits.least_states(8, "lora", launch, 2) <= needs[1]
    assert distributed_fits.least_states(8, "full", "zero3", 8) == 16e9
    assert set(distributed_fits.FIRST) == set(distributed_fits.LAUNCHES)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "targets"), [("full", ()), ("lora", ("q_proj", "lm_head"))])
def test_zero3_gathers_a_head_and_a_feed_forward_once_however_many_chunks_and_tiles(
    method, targets, tmp_path, monkeypatch
):
    model = save_with_tokenizer(tiny_config("llama"), tmp_path)
    gathered, gather = [], torch.distributed.all_gather_into_tensor

    def counted(*args, **kwargs):
        gathered[-1] += 1
        return gather(*args, **kwargs)

    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", counted)
    launch = read_launch_file("zero3", 2)
    for chunk, tile in ((1000, 1000), (8, 1000), (8, 16)):
        flags = ["--model_name_or_path", str(model), "--use_cpu", "--max_length", "64", "--max_target_length", "60"]
        flags += ["--loss_chunk_tokens", str(chunk), "--mlp_tile_tokens", str(tile)]
        flags += ["--lora_target_modules", *targets] if targets else []
        gathered.append(0)
        PredictionJob.of(method, flags, launch, None).predict()
    assert gathered[0] > 20 and len(set(gathered)) == 1, gathered
