"""`footprint predict` and `footprint report`: one JSON object, an exit code, and one-line errors."""

import json
import os
import re
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_with_tokenizer, tiny_config
from transformers import LlamaConfig, MixtralConfig

from toolkit.cli import main
from toolkit.config import Flags, parse_config
from toolkit.distributed.launch_files import ONE_PROCESS
from toolkit.errors import UserError
from toolkit.memory import meta_ops
from toolkit.memory.cuda.cards import find_card
from toolkit.memory.cuda.device import Cuda
from toolkit.memory.ledger import Ledger, PhaseUse
from toolkit.methods.lora import Lora
from toolkit.methods.qlora import QLora
from toolkit.models import catalogue
from toolkit.models.arguments import ModelArguments
from toolkit.models.loading import build_on_meta, load_model_config
from toolkit.runs import prediction
from toolkit.units import format_bytes


@pytest.fixture(scope="module")
def config_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config of a tiny Llama: no weights, no tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        vocab_size=512,
        max_position_embeddings=256,
    ).save_pretrained(folder)
    return folder


def flags(folder: Path, *more: str) -> list[str]:
    return ["--model_name_or_path", str(folder), "--max_length", "64", "--per_device_train_batch_size", "2", *more]


def run(capfd: pytest.CaptureFixture[str], *command: str) -> tuple[int | str | None, str, str]:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["footprint", *command])
        main()
    return end.value.code, *capfd.readouterr()


def test_json_is_one_object_and_nothing_else(config_only, capfd):
    code, out, _ = run(capfd, "predict", "lora", *flags(config_only, "--json"))
    ledger = json.loads(out)
    assert code in (None, 0)
    assert (ledger["source"], ledger["device"], ledger["fits"]) == ("predicted", "cpu", True)
    assert ledger["peak"]["allocated_bytes"] == sum(ledger["categories_at_peak"].values())
    # LoRA of rank 16 on q (64 -> 64) and v (64 -> 32) of 2 layers
    assert ledger["parameters"]["trainable"] == 2 * 16 * (64 + 64 + 64 + 32)


def test_a_card_that_is_not_here_is_predicted_with_its_allocator_and_context(config_only, capfd):
    arguments = flags(config_only, "--fp16", "--gpu", "T4", "--json")
    code, out, _ = run(capfd, "predict", "lora", *arguments)
    peak = json.loads(out)["peak"]
    assert code == 0
    assert peak["allocated_bytes"] % 512 == 0
    assert peak["reserved_bytes"] % 2**21 == 0
    assert peak["process_bytes"] == peak["reserved_bytes"] + peak["context_bytes"]


def test_without_a_name_the_card_is_this_machines(config_only, capfd, monkeypatch):
    monkeypatch.setattr(prediction, "this_card", lambda: find_card("RTX 4070"))
    _, out, _ = run(capfd, "predict", "lora", *flags(config_only, "--json"))
    assert json.loads(out)["device"] == "RTX 4070"
    _, out, _ = run(capfd, "predict", "lora", *flags(config_only, "--json", "--use_cpu"))
    assert json.loads(out)["device"] == "cpu"


def test_an_error_inside_a_prediction_is_one_line(config_only, capfd, monkeypatch):
    def predict(*args):
        raise RuntimeError("a kernel\nrefuses")

    monkeypatch.setattr(prediction, "predict", predict)
    code, _, err = run(capfd, "predict", "full", *flags(config_only))
    assert code == 2 and "error: memory of full cannot be predicted: RuntimeError: a kernel refuses (traceback: " in err


@pytest.mark.slow
@pytest.mark.parametrize("sees_a_gpu", [False, True])
def test_one_of_several_gpus_is_predicted_under_a_launch_file(sees_a_gpu, config_only, capfd, monkeypatch):
    """On a machine with a GPU, a separate process that does not see it predicts."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: sees_a_gpu)
    arguments = flags(config_only, "--launch", "zero2", "--num_processes", "3", "--bf16", "--gpu", "RTX 4090", "--json")
    code, out, _ = run(capfd, "predict", "full", *arguments)
    ledger = json.loads(out)
    assert code == 0
    assert (ledger["processes"], ledger["engine"], ledger["host_bytes"], ledger["nvme_bytes"]) == (3, "ZeRO-2", 0, 0)
    count = ledger["parameters"]["all"]
    step = ledger["phases"]["optimizer_step"]["cells"]
    assert sum(step["parameters_trainable"].values()) >= 2 * count  # bf16 on every GPU
    share = -(-count // 6) * 6 // 3
    assert sum(step["optimizer_state"].values()) == pytest.approx(3 * 4 * share, abs=64)


@pytest.mark.slow
def test_a_run_that_does_not_fit_exits_with_1(config_only, capfd):
    code, out, _ = run(capfd, "predict", "full", *flags(config_only, "--gpu_memory", "16MiB", "--json"))
    assert (code, json.loads(out)["fits"]) == (1, False)


@pytest.mark.slow
def test_the_first_line_is_the_verdict_and_the_last_the_command(config_only, capfd):
    source = ("--model_name_or_path", str(config_only))
    _, out, _ = run(capfd, "predict", "lora", *source, "--gpu", "3060")
    assert re.match(
        r"fits: \S+ MiB of 11.76 GiB; at most 1 in \d+ that it runs out, from \d+ measured runs", " ".join(out.split())
    )
    assert out.endswith(f"\nnext: footprint train lora {' '.join(source)} --dataset_name DATA\n")
    _, out, _ = run(capfd, "predict", "lora", *source, "--gpu_memory", "3600KiB")
    assert out.startswith("does not fit: ") and "next:" not in out
    _, out, _ = run(capfd, "predict", "lora", *source, "--gpu_memory", "12288MiB")
    assert "no CUDA context is counted" in " ".join(out.split())
    _, out, _ = run(capfd, "predict", "lora", *source, "--json")
    assert ("for this machine's CPU" in json.loads(out)["warnings"][0]) == (not torch.cuda.is_available())


def test_what_was_assumed_is_in_the_table_and_in_the_json(config_only, capfd):
    _, out, _ = run(capfd, "predict", "lora", "--model_name_or_path", str(config_only), "--json", "--gpu", "3060")
    assert json.loads(out)["assumed"] == {
        "rows": 4,
        "tokens": 256,  # the model's own limit
        "target_tokens": 0,
        "gradient_accumulation_steps": 2,
        "precision": "bf16",
        "weights": "bfloat16",
        "gradient_checkpointing": False,
        "data": "rows as long as the flags allow (no --dataset_name was given)",
    }
    _, out, _ = run(capfd, "predict", "qlora", *flags(config_only, "--gpu", "T4", "--gradient_checkpointing", "true"))
    said = " ".join(out.split())
    # of the two layers 49,152 weights are packed, the two embeddings of 512 x 64 and five norms of 64 are not
    assert (
        "weights 4-bit nf4 for 53% of the parameters, float32 for the rest; activation checkpointing; rows as" in said
    )


def test_the_rows_of_a_named_data_set_are_as_long_as_its_longest(tmp_path, capfd):
    from conftest import write_csv

    from toolkit.data.loading import load_data
    from toolkit.models.loading import load_tokenizer

    rows = [(f"Person {n} saw a cat in the garden of the house.", f"Cat {n}.") for n in range(12)]
    data = write_csv(tmp_path, train=rows, validation=rows[:2], test=rows[:2])
    _, out, _ = run(capfd, "predict", "lora", "--dataset_name", str(data), "--json")
    assumed = json.loads(out)["assumed"]
    config = parse_config(Lora, ["--dataset_name", str(data)])
    train = load_data(config.data, config.model_config, load_tokenizer(config.model)).train
    assert assumed["tokens"] == max(map(len, train["input_ids"])) < 256
    assert assumed["target_tokens"] == max(map(len, train["labels"])) < 48
    assert assumed["data"] == f"rows as long as the longest of the 12 rows of {data}"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--dataset_name", "/nope.jsonl"], "--dataset_name /nope.jsonl: no such folder or file"),
        (
            ["--model_name_or_path", "meta-llama/Llama-3.2-1B", "--dataset_name", "rows.csv"],
            "without --dataset_name rows of --max_length tokens are predicted",
        ),
    ],
)
def test_data_that_cannot_be_counted_in_tokens_is_refused(more, says, capfd, monkeypatch, tmp_path):
    monkeypatch.setattr("toolkit.models.hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("toolkit.models.hub.try_to_load_from_cache", lambda *args, **kwargs: None)
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text("text,summary\n" + "a b c,a\n" * 20)
    code, _, err = run(capfd, "predict", "lora", *more)
    assert code == 2
    assert says in err.splitlines()[-1]


def ledger_of(needed: int, states: int, assumed: dict[str, Any]) -> Ledger:
    """A ledger for 1,000 bytes of budget that needs `needed`, of which `states` bytes are weights."""
    use = PhaseUse(needed, states, {"parameters_frozen": {"": states}, "temporaries": {"": needed - states}})
    return Ledger(
        source="predicted",
        device="a card",
        phases={"optimizer_step": use},
        first_step={},
        reserved_bytes=needed,
        parameters={"trainable": 1, "all": 1},
        budget_bytes=1000,
        context_bytes=0,
        assumed=assumed,
    )


ASSUMED = {
    "rows": 4,
    "tokens": 512,
    "gradient_accumulation_steps": 2,
    "weights": "bfloat16",
    "gradient_checkpointing": False,
}


@pytest.mark.parametrize(
    ("method", "states", "needs", "says", "trials"),
    [
        ("lora", 300, {"activation_checkpointing": 900}, "it fits with --activation_checkpointing: 900 B", 1),
        (
            "lora",
            300,
            {"per_device_train_batch_size": 900},
            "it fits with --activation_checkpointing --per_device_train_batch_size 2 --gradient_accumulation_steps 4: 900 B",
            2,
        ),
        (
            "lora",
            1200,
            {"load_in_4bit": 900},
            "it fits with --load_in_4bit --kbit_upcast none: 900 B",
            1,
        ),  # the weights alone are too large
        (
            "full",
            1200,
            {"qlora": 800},
            "no batch size, length or checkpointing is enough for full; another method is: qlora --per",
            3,
        ),
        ("full", 1200, {"lora": 900}, r"is enough for full; another method is: lora \(900 B\)", 1),
        (
            "lora",
            300,
            {"max_length": 1900},
            "is enough for lora; with .*--max_length 256 it needs 1.9 KiB, and the smallest card .* is GT 1030",
            6,
        ),
    ],
)
def test_the_nearest_setting_that_fits_is_named(method, states, needs, says, trials, capfd):
    tried = []

    def predict(job):
        tried.append(job)
        given = {**job.flags.given, job.method: True}
        needed = min((nbytes for name, nbytes in needs.items() if name in given), default=2000)
        return ledger_of(needed, min(needed, 300 if given.get("load_in_4bit") else states), ASSUMED)

    job = prediction.PredictionJob(method, Flags({}), ONE_PROCESS)
    assert re.search(says, prediction.nearest_fit(job, ledger_of(2000, states, ASSUMED), predict))
    assert len(tried) == trials
    assert capfd.readouterr().err.count("does not fit; trying") == trials


def test_of_weights_that_are_too_large_alone_the_least_is_predicted(capfd):
    def predict(job):
        smallest = job.flags.given.get("per_device_train_batch_size") == 1
        return ledger_of(1900 if smallest else 2000, 1200, ASSUMED)

    job = prediction.PredictionJob("lora", Flags({}), ONE_PROCESS)
    least = "--load_in_4bit --kbit_upcast none --activation_checkpointing --per_device_train_batch_size 1 --gradient_accumulation_steps 8"
    said = prediction.nearest_fit(job, ledger_of(2000, 1200, ASSUMED), predict)
    assert f"is enough for lora; with {least} it needs 1.9 KiB, and" in said
    assert capfd.readouterr().err.count("does not fit; trying") == 2


def test_of_a_base_in_4_bits_beside_fp32_the_rest_is_kept_short(capfd):
    packed = ASSUMED | {"weights": "4-bit nf4 for 87% of the parameters, float32 for the rest"}
    given = []

    def predict(job):
        given.append(job.flags.given)
        return ledger_of(900 if "kbit_upcast" in job.flags.given else 2000, 300, packed)

    job = prediction.PredictionJob("lora", Flags({"load_in_4bit": True}), ONE_PROCESS)
    said = prediction.nearest_fit(job, ledger_of(2000, 1200, packed), predict)
    assert said == "it fits with --kbit_upcast none: 900 B" and len(given) == 1
    assert prediction._four_bits(QLora, packed["weights"].replace("float32", "bfloat16")) == {}


def test_measured_steps_of_many_passes_are_not_traced_again(config_only):
    config = parse_config(Lora, [*flags(config_only, "--gradient_accumulation_steps", "33", "--predict")])
    with pytest.raises(UserError, match="more than 32 accumulated passes take too long"):
        prediction.predict_run(config, batches=[{"input_ids": torch.ones(1, 2, dtype=torch.long)}] * 66)


def test_the_command_to_type_names_the_processes(config_only, capfd):
    words = flags(config_only, "--gpu", "4x RTX 4090", "--launch", "ddp")
    assert "--launch ddp --num_processes 4 " in run(capfd, "predict", "lora", *words)[1].splitlines()[-1]


def test_the_command_names_what_fits_first(config_only, capfd):
    code, out, err = run(capfd, "predict", "lora", *flags(config_only, "--gpu_memory", "3600KiB", "--json"))
    ledger = json.loads(out)
    assert (code, ledger["fits"]) == (1, False)
    assert "trying" in err
    assert ledger["warnings"][0].startswith(("it fits with --", "no batch size"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "model"), [("lora", "meta-llama/Llama-3.2-1B"), ("qlora", "meta-llama/Llama-3.1-8B")]
)
def test_the_defaults_fit_a_card_with_12_gb(method, model, capfd):
    code, out, _ = run(capfd, "predict", method, "--model_name_or_path", model, "--gpu", "RTX 3060", "--json")
    assumed = json.loads(out)["assumed"]
    assert code == 0
    assert assumed["rows"] * assumed["gradient_accumulation_steps"] == 8  # as Trainer's own default
    assert assumed["gradient_checkpointing"] == (method == "qlora")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], (16, 1, False)),  # the embedded model
        (["--model_name_or_path", "FOLDER"], (4, 2, True)),
        (["--model_name_or_path", "FOLDER", "--per_device_train_batch_size", "8"], (8, 1, True)),
        (["--model_name_or_path", "FOLDER", "--gradient_accumulation_steps", "4"], (4, 4, True)),
        (["--model_name_or_path", "FOLDER", "--gradient_checkpointing", "false"], (4, 2, False)),
    ],
)
def test_the_default_batch_gives_way_to_what_is_asked_for(argv, expected, config_only):
    training = parse_config(QLora, [word.replace("FOLDER", str(config_only)) for word in argv]).training
    got = (training.per_device_train_batch_size, training.gradient_accumulation_steps, training.gradient_checkpointing)
    assert got == expected


@pytest.mark.parametrize(
    ("method", "more", "says"),
    [
        ("lorra", [], "lora"),
        ("lora", ["--gpu", "RTX 4909"], "RTX 4090"),
        ("lora", ["--gpu_memory", "many"], "24GiB"),
        ("lora", ["--gpu", "T4", "--gpu_memory", "24GiB"], "exclude each other"),
        ("lora", ["--max_length", "512"], "at most 256"),
        ("lora", ["--bf16", "--fp16"], "exclude each other"),
        ("full", ["--load_in_4bit"], "quantized"),
        ("lora", ["--torch_compile_mode", "max-autotune"], "it records CUDA graphs"),
        ("lora", ["--torch_compile", "--launch", "ddp"], "--torch_compile under DDP"),
        (
            "full",
            ["--launch", "zero2", "--optim", "galore_adamw", "--optim_target_modules", "all-linear"],
            "--optim galore_adamw under ZeRO-2: DeepSpeed gives the optimizer flat shards",
        ),
        (
            "full",
            ["--launch", "ddp", "--optim", "apollo_adamw_layerwise", "--optim_target_modules", "all-linear"],
            "use apollo_adamw",
        ),
        ("lora", ["--num_processes", "2"], "no effect without --launch"),
        ("lora", ["--launch", "zero33"], "did you mean zero3"),
        ("lora", ["--launch", "zero3_nvme", "--optim", "sgd"], "--optim sgd"),
        ("lora", ["--launch", "sequence_parallel", "--num_processes", "4"], "parallelism_config_dp_shard_size: 2 "),
        ("lora", ["--launch", "sequence_parallel", "--num_processes", "3"], "set parallelism_config_sp_size: 3"),
        ("lora", ["--launch", "zero2_offload", "--optim", "sgd"], "--optim sgd"),
        ("qlora", ["--launch", "fsdp2_qlora", "--optim", "paged_adamw_8bit"], "--optim paged_adamw_8bit under FSDP2"),
        ("lora", ["--launch", "fsdp2", "--load_in_8bit"], "cannot be sharded"),
        ("lora", ["--gpu", ""], "--gpu is empty; give it a value, or leave it out"),
        ("lora", ["--gpu_memory", ""], "--gpu_memory is empty"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(method, more, says, config_only, capfd):
    code, out, err = run(capfd, "predict", method, *flags(config_only, *more))
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert says in lines[0]


@pytest.mark.parametrize("more", [[], ["--gpu", "RTX 4090"]])
def test_a_compiled_run_is_predicted_as_an_upper_bound(more, config_only, capfd):
    _, out, _ = run(capfd, "predict", "lora", *flags(config_only, *more, "--json"))
    _, compiled, _ = run(capfd, "predict", "lora", *flags(config_only, *more, "--torch_compile", "--json"))
    plain, bound = json.loads(out), json.loads(compiled)
    assert bound["phases"] == plain["phases"] and bound["first_step"] == plain["first_step"]
    assert any("without --torch_compile, an upper bound" in note for note in bound["notes"])
    assert bound["notes"][: len(plain["notes"])] == plain["notes"]
    assert (
        "ACCELERATE_DYNAMO_BACKEND" not in os.environ
    )  # with which accelerate would compile later runs of this process


def test_report_puts_ledgers_side_by_side(config_only, tmp_path, capfd):
    for method in ("full", "lora"):
        code, out, _ = run(capfd, "predict", method, *flags(config_only, "--json"))
        assert code == 0
        (tmp_path / f"{method}.json").write_text(out)
    full, lora = (Ledger.load(tmp_path / f"{method}.json") for method in ("full", "lora"))
    assert lora.allocated_bytes < full.allocated_bytes
    code, out, _ = run(capfd, "report", str(tmp_path / "full.json"), str(tmp_path / "lora.json"))
    assert code in (None, 0)
    assert "lora against full" in out
    assert "optimizer state -" in out


def test_against_shows_the_difference_of_two_predictions_and_returns_the_code_of_the_first(config_only, capfd):
    common = flags(config_only, "--json", "--max_length", "256")
    sizes = {}
    for method in ("full", "lora"):
        _, out, _ = run(capfd, "predict", method, *common, "--gpu_memory", "1GiB")
        sizes[method] = json.loads(out)["peak"]["reserved_bytes"]
    common += ["--gpu_memory", f"{sizes['lora'] // 1024}KiB"]  # enough for LoRA alone
    for first, second, expected in (("full", "lora", 1), ("lora", "full", 0)):
        code, out, _ = run(capfd, "predict", first, *common, "--against", second)
        both = json.loads(out)
        assert code == expected and both.keys() == {"a", "b", "difference"}
        assert (both["a"]["fits"], both["b"]["fits"]) == (first == "lora", second == "lora")
        change = sizes[second] - sizes[first]
        assert both["difference"]["change_bytes"] == change != 0
        assert sum(part["change_bytes"] for part in both["difference"]["parts"]) == change


def test_against_names_what_differs_and_refuses_two_equal_configurations(config_only, capfd):
    common = flags(config_only, "--gpu", "T4")
    code, out, _ = run(capfd, "predict", "lora", *common, "--against", "qlora", "--bf16", "false", "--lora_alpha", "32")
    said = " ".join(out.split())
    assert code == 0 and re.match(r"B needs .* on T4\. Both fit into ", said)
    assert "B differs from A in: method qlora instead of lora; " in said
    assert "--load_in_4bit true instead of false; " in said and "--lora_alpha" not in said  # 32 is the default
    _, out, _ = run(capfd, "predict", "lora", *common, "--against", "--lora_r", "32")
    assert "\nAll of it comes from --lora_r 32 instead of 16.\n" in out
    code, out, err = run(capfd, "predict", "lora", *common, "--against", "--lora_r", "16")
    assert (code, out) == (2, "") and "both configurations are the same" in err


def test_a_missing_ledger_is_a_user_error(tmp_path, capfd):
    code, _, err = run(capfd, "report", str(tmp_path / "none.json"))
    assert code == 2
    assert "none.json" in err


def test_a_mask_of_long_rows_needs_no_memory_on_this_machine(config_only):
    """8 rows of 32,768 tokens: with real numbers, the mask alone would take 8 GiB, and everything computed from it more."""
    arguments = ["--model_name_or_path", str(config_only), "--bf16", "--use_cpu", "--per_device_train_batch_size", "8"]
    settings = json.loads((config_only / "config.json").read_text()) | {"max_position_embeddings": 32768}
    (config_only.parent / "long").mkdir()
    (config_only.parent / "long" / "config.json").write_text(json.dumps(settings))
    arguments[1] = str(config_only.parent / "long")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    ledger = prediction.predict_run(parse_config(Lora, [*arguments, "--max_length", "32768"]), Cuda(find_card("H200")))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # 1 GiB
    bias = 8 * 4 * 32768 * 32768 * 2  # attention's mask as a bias in bf16, for each head
    assert ledger.allocated_bytes > bias // 4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_fake_masks_are_counted_like_real_ones(name, attention, tmp_path, monkeypatch):
    save_with_tokenizer(tiny_config(name), tmp_path)
    arguments = ["--model_name_or_path", str(tmp_path), "--attn_implementation", attention, "--use_cpu"]
    config = parse_config(Lora, [*arguments, "--max_length", "100", "--per_device_train_batch_size", "3"])
    device = Cuda(find_card("RTX4090"))
    real = prediction.predict_run(config, device)
    monkeypatch.setattr(meta_ops, "_LARGE", 1000)
    fake = prediction.predict_run(config, device)
    assert (fake.allocated_bytes, fake.reserved_bytes) == (real.allocated_bytes, real.reserved_bytes)
    assert fake.phases == real.phases


def test_experts_that_stay_unquantized_are_reported_with_their_size(tmp_path, capfd):
    settings = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    MixtralConfig(num_key_value_heads=2, num_local_experts=4, vocab_size=256, **settings).save_pretrained(tmp_path)
    targets = ("--lora_target_modules", "q_proj", "v_proj")
    _, out, _ = run(capfd, "predict", "qlora", *flags(tmp_path, *targets, "--gpu", "RTX4090", "--json"))
    ledger = json.loads(out)
    note = ledger["warnings"][0]
    elements = 2 * 4 * 3 * 64 * 128  # layers x experts x projections
    assert f"({elements * 2 / 1024:.1f} KiB)" in note and "held in bfloat16" in note
    # attention packs 2 layers x (2 x 64 x 64 + 2 x 64 x 32) of these weights, the experts, routers, embeddings and norms
    everything = elements + 24576 + 2 * 4 * 64 + 2 * 256 * 64 + 5 * 64
    assert (
        ledger["assumed"]["weights"]
        == f"4-bit nf4 for {24576 / everything:.0%} of the parameters, bfloat16 for the rest"
    )
    code, out, _ = run(capfd, "predict", "qlora", *flags(tmp_path, *targets, "--gpu_memory", "600KiB", "--json"))
    unquantized, untrained, advice = json.loads(out)["warnings"]
    assert code == 1 and "not quantized" in unquantized and "lora" in advice
    assert untrained == "the experts, 75% of the weights, stay as they are: nothing of them is trained"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--per_device_train_batch_size", "1000000"], "1,000,000 rows of 64 tokens is too large for a prediction"),
        (
            ["--gradient_accumulation_steps", "10000", "--launch", "zero2"],
            "--gradient_accumulation_steps 10000: predicting more than 32 passes under ZeRO-2",
        ),
    ],
)
def test_a_batch_that_this_machine_could_not_hold_is_refused(more, says, config_only, capfd):
    code, out, err = run(capfd, "predict", "lora", *flags(config_only, *more))
    assert (code, out) == (2, "") and says in err


def test_more_passes_than_are_traced_need_their_batches_of_token_ids_alone(config_only, capfd, monkeypatch):
    def predicted(passes):
        words = flags(config_only, "--gradient_accumulation_steps", str(passes), "--use_cpu", "--json")
        return json.loads(run(capfd, "predict", "lora", *words)[1])

    whole = predicted(8)
    monkeypatch.setattr(prediction, "MOST_PASSES", 2)
    part = predicted(8)
    missing = whole["peak"]["allocated_bytes"] - part["peak"]["allocated_bytes"]
    assert part["assumed"] == whole["assumed"] and missing > 0
    assert (
        f"2 of 8 passes were traced; each other one needs only its batch, {format_bytes(missing)} for"
        in part["notes"][-1]
    )


@pytest.mark.parametrize("name", ["unsloth/SmolLM2-135M-Instruct-bnb-4bit", "unsloth/gemma-3-4b-it-bnb-4bit"])
def test_a_copy_in_4_bits_of_a_model_of_the_catalogue_is_built_without_a_network(name):
    whole = name.removesuffix("-bnb-4bit")

    def built(source: str) -> dict[str, Any]:
        args = ModelArguments(source, load_in_4bit=True)
        config = load_model_config(args, needs_weights=False)
        model = build_on_meta(args, config, torch.bfloat16)
        return {name: (type(p), p.shape, p.dtype) for name, p in model.named_parameters()}

    assert built(name) == built(whole)
    with pytest.raises(UserError, match=f"4 bits: recipes/qlora.py trains it.*give the original, .*{whole[8:]}$"):
        load_model_config(ModelArguments(name), needs_weights=False)


@pytest.mark.parametrize(
    "name", ["unsloth/Qwen3-30B-A3B-bnb-4bit", "unsloth/gpt-oss-20b-bnb-4bit", "unsloth/Nothing-bnb-4bit"]
)
def test_a_copy_whose_layers_are_stored_in_another_way_is_not_in_the_catalogue(name):
    assert catalogue.find(name) is None


def test_the_cost_of_peft_casts_is_said_by_another_prediction(config_only, capfd):
    large = [
        "--max_length",
        "256",
        "--per_device_train_batch_size",
        "64",
    ]  # the allocator's blocks of 20 MiB would hide it
    command = ["lora", "--model_name_or_path", str(config_only), *large, "--load_in_4bit", "--gpu", "RTX 4090"]
    ledgers = {}
    for upcast in ("all", "none"):
        code, out, _ = run(capfd, "predict", *command, "--kbit_upcast", upcast, "--json")
        assert code == 0
        ledgers[upcast] = json.loads(out)
    more = ledgers["all"]["peak"]["process_bytes"] - ledgers["none"]["peak"]["process_bytes"]
    assert more > 0
    assert (
        f"--kbit_upcast all costs {format_bytes(more)} of it; --kbit_upcast none needs no other change"
        in ledgers["all"]["notes"]
    )
    assert not any("kbit_upcast" in note for note in ledgers["none"]["notes"])


def test_without_peft_casts_there_is_one_prediction(config_only, capfd):
    """Also in fp32, where the rest of the base is in that type anyway."""
    _, _, err = run(capfd, "predict", "qlora", *flags(config_only, "--gpu", "RTX 2080 Ti", "--json"))
    assert "kbit_upcast" not in err
