"""The catalogue: every architecture has the number of parameters that its authors publish."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from toolkit.memory.catalogue import ENTRIES, config_of, find, names, separate_head


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
