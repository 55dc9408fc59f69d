"""Every architecture in the catalogue has the number of parameters that its authors publish."""

import json

import pytest
import torch
from tiny_models import CONFIGS, SPECIAL
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from toolkit.models.catalogue import ENTRIES, config_of, find, names, separate_head


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.names[0])
def test_an_entry_has_the_published_number_of_parameters(entry):
    config = config_of(entry.names[0])
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    separate_head(model, entry.names[0])
    assert sum(parameter.numel() for parameter in model.parameters()) == entry.parameters


def test_names_are_unique_and_cover_the_families():
    assert len({name.lower() for name in names()}) == len(names())
    assert {entry.model_type for entry in ENTRIES} == {
        *("t5", "mt5", "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi", "phi3", "gpt2")
    }


def test_case_does_not_matter_and_an_unknown_model_gives_nothing():
    assert find("META-LLAMA/llama-3.2-1b") is find("meta-llama/Llama-3.2-1B")
    assert find("nobody/nothing") is None
    assert config_of("nobody/nothing") is None


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
