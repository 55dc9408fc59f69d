"""Every architecture in the catalogue has the number of parameters that its authors publish."""

import json
from datetime import date

import pytest
import torch
from tiny_models import CONFIGS, SPECIAL
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from toolkit.models.catalogue import config_of, entries, find, names, separate_head, similar


@pytest.mark.slow
@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.names[0])
def test_an_entry_has_the_published_number_of_parameters(entry):
    config = config_of(entry.names[0])
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    if (
        config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    ):  # the published number counts the images' part too
        auto = AutoModelForImageTextToText
    with torch.device("meta"):
        model = auto.from_config(config)
    separate_head(model, entry.names[0])
    assert sum(parameter.numel() for parameter in model.parameters()) == entry.parameters


def test_names_are_unique_and_cover_the_families():
    assert len({name.lower() for name in names()}) == len(names())
    assert {entry.model_type for entry in entries()} >= {
        *(
            "t5",
            "mt5",
            "t5gemma",
            "bart",
            "pegasus",
            "mbart",
            "gpt2",
            "gpt_oss",
            "olmo2",
            "olmo3",
            "granite",
            "smollm3",
            "mixtral",
        ),
        *("llama", "mllama", "llama4", "qwen2", "qwen3", "qwen3_moe", "mistral", "mistral3", "phi", "phi3"),
        *("gemma", "gemma2", "gemma3_text", "gemma3"),
    }


def test_every_entry_says_when_it_was_checked():
    assert all(date.fromisoformat(entry.checked) >= date(2026, 11, 1) for entry in entries())


@pytest.mark.parametrize(
    ("given", "base"),
    [
        ("META-LLAMA/llama-3.2-1b", "meta-llama/Llama-3.2-1B"),  # case does not matter
        ("unsloth/Llama-3.2-3B-Instruct", "meta-llama/Llama-3.2-3B"),
        ("unsloth/gemma-3-4b-it", "google/gemma-3-4b-pt"),
        ("unsloth/mistral-7b-instruct-v0.3", "mistralai/Mistral-7B-v0.3"),
        ("unsloth/Meta-Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B"),
        ("NousResearch/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "meta-llama/Llama-3.1-8B"),
        ("facebook/bart-large-xsum", "facebook/bart-large-cnn"),
        ("google/t5gemma-2b-2b-prefixlm-it", "google/t5gemma-2b-2b-ul2"),
    ],
)
def test_a_variant_or_a_mirror_has_the_shape_of_its_base(given, base):
    assert find(given) is find(base)


def test_a_variant_changes_only_the_fields_that_its_line_names():
    base, variant = config_of("Qwen/Qwen3-4B"), config_of("Qwen/Qwen3-4B-Instruct-2507")
    assert (base.max_position_embeddings, variant.max_position_embeddings) == (40960, 262144)
    assert base.hidden_size == variant.hidden_size == 2560
    assert find("Qwen/Qwen3-4B-Instruct-2507").parameters == 4_022_468_096


def test_a_mirror_that_rebuilt_a_model_has_its_own_line():
    assert find("unsloth/phi-4").model_type == "llama"  # microsoft's is phi3, with fused projections
    assert find("unsloth/Phi-3.5-mini-instruct") is None


def test_an_unknown_model_gives_nothing():
    assert find("nobody/nothing") is None
    assert config_of("nobody/nothing") is None
    assert similar("nobody/nothing") == []


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("Llama-3.2-3B", "meta-llama/Llama-3.2-3B"),
        ("meta-lama/Llama-3.2-1B-Instuct", "meta-llama/Llama-3.2-1B-Instruct"),
        ("qwen3-4b", "Qwen/Qwen3-4B"),
        ("gemma3-4b-it", "google/gemma-3-4b-it"),
        ("Phi4", "microsoft/phi-4"),
        ("flan-t5-basse", "google/flan-t5-base"),
        ("bart-large-cnn", "facebook/bart-large-cnn"),
        ("Mistral-Nemo-Instruct", "mistralai/Mistral-Nemo-Instruct-2407"),
    ],
)
def test_a_short_or_misspelt_name_gets_the_nearest_first(given, near):
    assert similar(given)[0] == near


def t5_folder(folder, heads, weights):
    """A folder with a T5 1.1. `heads`: a separate output head ("own"), one with the embedding's values ("the same"), or "none".

    config.json says that the head is tied, except for "own".
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "t5", **CONFIGS["t5"] | {"vocab_size": 1200}, feed_forward_proj="gated-gelu", **SPECIAL
    )
    model = AutoModelForSeq2SeqLM.from_config(config)
    if heads != "none":
        own = model.shared.weight.detach().clone()
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(own) if heads == "own" else own)
    model.save_pretrained(folder)
    config_json = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config_json | {"tie_word_embeddings": heads != "own"}))
    if not weights:
        (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("heads", ["own", "the same", "none"])
def test_a_folders_output_head_is_counted_as_after_loading(heads, weights, tmp_path):
    folder = t5_folder(tmp_path, heads, weights)
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(AutoConfig.from_pretrained(folder))
    separate_head(model, str(folder))
    counted = sum(parameter.numel() for parameter in model.parameters())
    if weights:
        loaded = AutoModelForSeq2SeqLM.from_pretrained(folder)
        assert counted == sum(parameter.numel() for parameter in loaded.parameters())
    assert (model.lm_head.weight is model.shared.weight) == (heads != "own")


@pytest.mark.slow
def test_full_fine_tuning_of_a_folder_with_a_separate_head_is_predicted_as_measured(tmp_path):
    from conftest import recipe, write_csv
    from ledgers import assert_same
    from transformers import AutoTokenizer

    from toolkit.embedded import MODEL_DIR
    from toolkit.memory.ledger import Ledger

    folder = t5_folder(tmp_path / "model", "own", weights=True)
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(folder)
    rows = [(f"Person {n} saw a cat.", f"Cat {n}.") for n in range(8)]
    given = ["--dataset_name", write_csv(tmp_path / "rows", train=rows, validation=rows[:2], test=rows[:2])]
    given += [
        "--model_name_or_path",
        folder,
        "--output_dir",
        tmp_path / "run",
        "--max_steps",
        "2",
        "--max_length",
        "64",
    ]
    done = recipe("full", *given, "--per_device_train_batch_size", "2", "--max_target_length", "16")
    assert done.returncode == 0, done.stderr
    predicted, measured = (Ledger.load(tmp_path / "run" / f"{name}memory.json") for name in ("predicted_", ""))
    assert_same(predicted, measured)
