"""Tiny models of the five architectures in the tests: real classes of transformers with random weights."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedConfig

from toolkit.embedded import MODEL_DIR

CONFIGS = {
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 256},
    "bart": {
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 128,
        "decoder_ffn_dim": 128,
        "max_position_embeddings": 128,
        "vocab_size": 256,
    },
    "llama": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 256,
    },
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 256},
    "qwen2": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 256,
        "tie_word_embeddings": True,
    },
}

ENCODER_DECODERS = ("t5", "bart")
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 0}


def tiny_config(name: str):
    return AutoConfig.for_model(name, **CONFIGS[name], **SPECIAL)


def tiny_model(name: str, dtype: torch.dtype = torch.float32, **kwargs):
    torch.manual_seed(0)
    family = AutoModelForSeq2SeqLM if name in ENCODER_DECODERS else AutoModelForCausalLM
    return family.from_config(tiny_config(name), dtype=dtype, **kwargs)


def save_with_tokenizer(config: PreTrainedConfig, folder: Path) -> Path:
    """Saves a model of `config` with random weights in `folder`, with the embedded model's tokenizer and its vocabulary size."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    config.vocab_size, config.eos_token_id = len(tokenizer) + 5, tokenizer.eos_token_id
    config.pad_token_id = config.decoder_start_token_id = tokenizer.pad_token_id
    family = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    torch.manual_seed(0)
    family.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows(name: str, number: int, length: int = 32, target_length: int = 16) -> list[dict]:
    """`number` rows of real ids, all of the same length; encoder-decoder models have shorter labels."""
    generator = torch.Generator().manual_seed(0)

    def ids(n: int) -> torch.Tensor:
        return torch.randint(3, 256, (n,), generator=generator)

    return [
        {
            "input_ids": (row := ids(length)),
            "attention_mask": torch.ones(length, dtype=torch.long),
            "labels": ids(target_length) if name in ENCODER_DECODERS else row,
        }
        for _ in range(number)
    ]
