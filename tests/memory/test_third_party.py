"""The third-party benchmark: the meaning of a row, the training loops, and the committed results."""

import csv
import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("FOOTPRINT_TEST_DATA", ROOT / "../shared/data")) / "memory"
SAMPLES = {"rtx4080": "rtx4080_sample", "xmem": "rtx3060_a100_full_sample", "a100_trainer": "a100_trainer_sample"}
SAMPLES |= {"t4": "t4_lora_measured"}


def _module():
    spec = importlib.util.spec_from_file_location("third_party", ROOT / "benchmarks" / "third_party.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


benchmark = _module()
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 512,
}
RUN = benchmark.Run("RTX 3090", "small", 4, 64, "llama", SMALL)


def test_a_cell_is_read_as_its_description_says():
    row = {"dtype": "bf16", "clip": "1.0 (default)", "empty": "", "size": "64"}
    assert benchmark.value("constant", row) == "constant"
    assert benchmark.value({"column": "dtype", "read": {"bf16": "bfloat16"}}, row) == "bfloat16"
    assert benchmark.value({"column": "dtype", "read": {"fp16": "float16"}, "else": "float32"}, row) == "float32"
    assert benchmark.value({"column": "clip", "pattern": r"^(\S+)"}, row) == "1.0"
    assert benchmark.value({"column": "empty"}, row) is None
    assert benchmark.value({"hidden_size": {"column": "size"}, "fixed": 2}, row) == {"hidden_size": "64", "fixed": 2}
    with pytest.raises(KeyError):
        benchmark.value({"column": "absent"}, row)


def test_fields_have_their_types_and_empty_cells_give_the_defaults():
    described = {
        "run": {
            "card": "T4",
            "model": "m",
            "batch_size": {"column": "rows"},
            "seq_len": {"column": "tokens"},
            "lora_r": {"column": "rank"},
            "gradient_checkpointing": {"column": "checkpointing"},
            "config": {"hidden_size": {"column": "rows"}, "tie_word_embeddings": {"column": "tied"}},
        }
    }
    row = {"rows": "4", "tokens": "128", "rank": "", "checkpointing": "1", "tied": "False"}
    run = benchmark.run_of(described, row)
    assert (run.batch_size, run.lora_r, run.gradient_checkpointing) == (4, 16, True)
    assert run.config == {"hidden_size": 4, "tie_word_embeddings": False}


@pytest.mark.parametrize("name", SAMPLES)
def test_every_row_of_a_data_set_is_a_run_with_figures(name):
    path = DATA / f"{SAMPLES[name]}.csv"
    if not path.is_file():
        pytest.skip(f"the measured runs are not at {path}")
    described = benchmark.description(name)
    for row in csv.DictReader(path.open(encoding="utf-8")):
        run, figures = benchmark.run_of(described, row), benchmark.measured(described, row)
        assert benchmark.config_of(run).vocab_size > 0
        assert benchmark.optimizer_of(run, [torch.zeros(1, requires_grad=True)])
        assert described["decides"] in figures and min(figures.values()) > 2**20
        assert run.version("torch") >= (2, 4) and run.version("transformers") >= (4, 45)


@pytest.mark.slow
@pytest.mark.parametrize(
    "entry", yaml.safe_load((ROOT / "benchmarks/loops/models.yaml").read_text()), ids=lambda e: e["names"]
)
def test_a_model_outside_the_catalogue_has_its_published_size(entry):
    from transformers import AutoModelForCausalLM

    for name in entry["names"].split():
        config = benchmark.config_of(replace(RUN, model=name.upper(), architecture="", config={}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == entry["parameters"]


def test_an_unknown_model_or_optimizer_is_reported():
    with pytest.raises(
        LookupError, match=r"nobody/nothing: its config is neither in the catalogue nor in .*models.yaml"
    ):
        benchmark.config_of(replace(RUN, model="nobody/nothing", architecture=""))
    with pytest.raises(LookupError, match="'muon' is not known"):
        benchmark.optimizer_of(replace(RUN, optimizer="muon"), [])


@pytest.mark.parametrize(
    ("optimizer", "states"),
    [("SGD", 0), ("adagrad", 1), ("RMSprop", 1), ("Adam", 2), ("AdamW", 2), ("adamw_torch_fused", 2), ("Adafactor", 0)],
)
def test_optimizers_keep_their_states(optimizer, states):
    """`states` counts copies of the weights; the tolerance covers the rounding of blocks and a factored state."""
    figures = benchmark.predict(
        replace(RUN, optimizer=optimizer, steps=1, zero_grad="after the step", output_lives="step")
    )
    weights = figures["after_load"]
    kept = figures["first_optimizer_step"] - figures["first_backward"] + weights  # the gradients are dropped in between
    assert kept == pytest.approx(states * weights, abs=0.12 * weights)


def test_gradients_are_freed_where_the_loop_frees_them():
    early, late, after = (
        benchmark.predict(replace(RUN, zero_grad=place))
        for place in ("before the batch", "before backward", "after the step")
    )
    gradients = early["after_load"]
    assert late["forward"] - early["forward"] == pytest.approx(gradients, rel=0.05)
    assert early["first_optimizer_step"] - after["first_optimizer_step"] == pytest.approx(gradients, rel=0.05)


def test_the_output_lives_as_long_as_the_loop_keeps_it():
    logits = 4 * 64 * 512 * 4
    dropped, kept, longer = (
        benchmark.predict(replace(RUN, output_lives=life, use_cache=False))
        for life in ("forward", "step", "next forward")
    )
    assert kept["first_backward"] - dropped["first_backward"] == pytest.approx(logits, abs=4096)
    assert longer["forward"] - kept["forward"] == pytest.approx(logits, abs=4096)


@pytest.mark.parametrize(("transformers", "copies"), [("4.45.2", 1), ("4.48.1", 1), ("4.51.3", 0), ("5.8.1", 0)])
def test_losses_of_older_transformers_copy_the_logits(transformers, copies):
    """Batch and vocabulary are large enough for the logits to decide the peak; in float32 there is no other copy."""
    run = replace(RUN, config=SMALL | {"vocab_size": 8192}, output_lives="forward", use_cache=False)
    now = benchmark.predict(replace(run, stack="transformers 5.20.0"))
    then = benchmark.predict(replace(run, stack=f"transformers {transformers}"))
    copy = 4 * 63 * 8192 * 4
    assert then["forward"] - now["forward"] == pytest.approx(copies * copy, abs=0.05 * copy)


SEQ2SEQ = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 256,
    "decoder_start_token_id": 0,
}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 512}
NEO = {
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 1]],
    "vocab_size": 512,
}
RUNS = {
    "llama nf4": {"method": "lora", "quantization": "nf4_double_quant", "kbit_prepare": True, "dtype": "bfloat16"},
    "llama int8": {"method": "lora", "quantization": "int8", "dtype": "float16", "kbit_prepare": True},
    "llama flash": {"dtype": "bfloat16", "attention": "flash_attention_2", "mask": "none", "max_grad_norm": 1.0},
    "llama autocast": {"autocast": "bfloat16", "gradient_checkpointing": True, "use_reentrant": True},
    "llama lora": {
        "method": "lora",
        "lora_targets": "q_proj v_proj",
        "lora_dropout": 0.1,
        "optimizer": "paged_adamw_8bit",
    },
    "t5": {"architecture": "t5", "config": SEQ2SEQ, "attention": "default", "mask": "padded"},
    "gpt2": {"architecture": "gpt2", "config": GPT, "mask": "padded"},
    "gpt_neo": {"architecture": "gpt_neo", "config": NEO, "attention": "default", "mask": "padded"},
    "gpt_bigcode": {"architecture": "gpt_bigcode", "config": GPT, "dtype": "bfloat16", "gradient_checkpointing": True},
    "granite": {"architecture": "granite", "mask": "none", "attention": "eager"},
    "qwen3": {"architecture": "qwen3", "config": SMALL | {"head_dim": 32, "num_key_value_heads": 2}, "mask": "padded"},
}


@pytest.mark.slow
@pytest.mark.matrix(sample=6)
@pytest.mark.parametrize("transformers", ["4.45.2", "4.51.3", "5.8.1"])
@pytest.mark.parametrize("name", RUNS)
def test_every_kind_of_run_is_predicted(name, transformers):
    stack = f"torch 2.6.0, transformers {transformers}, bitsandbytes 0.49.2"
    figures = benchmark.predict(replace(RUN, **RUNS[name], steps=2, stack=stack))
    assert figures["after_load"] < figures["peak_allocated"] <= figures["peak_reserved"] < figures["process"]


def test_the_committed_summary_matches_the_committed_rows():
    content = benchmark.load()
    assert benchmark.summary(content["rows"]) == content["summary_percent"]
    assert set(content["sets"]) == {row["set"] for row in content["rows"]}
    for row in content["rows"]:
        for figure, percent in row["error_percent"].items():
            error = benchmark.error(row["predicted_bytes"][figure], row["measured_bytes"][figure])
            assert percent == pytest.approx(error, abs=0.001)


def test_committed_allocated_peaks_have_the_documented_accuracy():
    for name, figures in benchmark.load()["summary_percent"].items():
        if "peak_allocated" in figures:
            assert figures["peak_allocated"]["mean"] <= 0.1 and figures["peak_allocated"]["worst"] <= 0.5, name


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize(("name", "index"), [("rtx4080", 0), ("xmem", 0), ("a100_trainer", 1)])
def test_the_committed_prediction_of_a_row_is_reproduced(name, index):
    path = DATA / f"{SAMPLES[name]}.csv"
    if not path.is_file():
        pytest.skip(f"the measured runs are not at {path}")
    row = list(csv.DictReader(path.open(encoding="utf-8")))[index]
    described = benchmark.description(name)
    committed = [
        e
        for e in benchmark.load()["rows"]
        if (e["set"], e["source"]) == (name, benchmark.value(described["source"], row))
    ]
    predicted = benchmark.predict(benchmark.run_of(described, row))
    for figure, nbytes in committed[0]["predicted_bytes"].items():
        assert predicted[figure] == pytest.approx(nbytes, rel=0.005), figure
