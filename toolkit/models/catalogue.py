"""The shapes of popular models by hub id, so that a prediction needs neither network access nor a licence.

Each entry has the fields of the model's published config.json that decide shapes, depth and dropout, and the published number
of parameters (the hub's figure for the safetensors file). A test builds every entry without weights and counts its parameters.
Fields that an entry does not set have the default of transformers' config class.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedConfig


@dataclass(frozen=True)
class Entry:
    """One architecture. `names` are the hub ids that share it, such as a base model and its instruct variants."""

    names: tuple[str, ...]
    model_type: str
    parameters: int  # as published; tied weights count once
    fields: dict[str, Any]
    separate_head: bool = False  # the checkpoint has a separate output embedding, even if the config class ties it


def _decoder(
    names: str, model_type: str, parameters: int, shape: str, positions: int, tied: bool = False, **more: Any
) -> Entry:
    """`shape`: hidden size, feed-forward size, layers, heads, key-value heads, vocabulary."""
    keys = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    sizes = dict(zip(keys, map(int, shape.split()), strict=True))
    fields = {**sizes, "max_position_embeddings": positions, "tie_word_embeddings": tied, **more}
    return Entry(tuple(names.split()), model_type, parameters, fields)


def _t5(names: str, model_type: str, parameters: int, shape: str, **more: Any) -> Entry:
    """`shape`: model size, feed-forward size, layers (encoder and decoder each), heads of size 64, vocabulary."""
    keys = ("d_model", "d_ff", "num_layers", "num_heads", "vocab_size")
    sizes = dict(zip(keys, map(int, shape.split()), strict=True))
    fields = {**sizes, "d_kv": 64, "decoder_start_token_id": 0, **more}
    own_head = more.get("tie_word_embeddings") is False
    return Entry(tuple(names.split()), model_type, parameters, fields, separate_head=own_head)


_GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}

ENTRIES: tuple[Entry, ...] = (
    _t5("google-t5/t5-small t5-small", "t5", 60_506_624, "512 2048 6 8 32128"),
    _t5("google-t5/t5-base t5-base", "t5", 222_903_552, "768 3072 12 12 32128"),
    _t5("google-t5/t5-large t5-large", "t5", 737_668_096, "1024 4096 24 16 32128"),
    _t5("google/flan-t5-small google/t5-v1_1-small", "t5", 76_961_152, "512 1024 8 6 32128", **_GATED),
    _t5("google/flan-t5-base google/t5-v1_1-base", "t5", 247_577_856, "768 2048 12 12 32128", **_GATED),
    _t5("google/flan-t5-large google/t5-v1_1-large", "t5", 783_150_080, "1024 2816 24 16 32128", **_GATED),
    _t5("google/flan-t5-xl google/t5-v1_1-xl", "t5", 2_849_757_184, "2048 5120 24 32 32128", **_GATED),
    _t5("bigscience/mt0-small google/mt5-small", "mt5", 300_176_768, "512 1024 8 6 250112", **_GATED),
    _t5("bigscience/mt0-base google/mt5-base", "mt5", 582_401_280, "768 2048 12 12 250112", **_GATED),
    _t5("bigscience/mt0-large google/mt5-large", "mt5", 1_229_581_312, "1024 2816 24 16 250112", **_GATED),
    _t5("bigscience/mt0-xl google/mt5-xl", "mt5", 3_742_619_648, "2048 5120 24 32 250112", **_GATED),
    _decoder(
        "meta-llama/Llama-2-7b-hf meta-llama/Llama-2-7b-chat-hf",
        "llama",
        6_738_415_616,
        "4096 11008 32 32 32 32000",
        4096,
    ),
    _decoder(
        "meta-llama/Llama-2-13b-hf meta-llama/Llama-2-13b-chat-hf",
        "llama",
        13_015_864_320,
        "5120 13824 40 40 40 32000",
        4096,
    ),
    _decoder(
        "meta-llama/Meta-Llama-3-8B meta-llama/Meta-Llama-3-8B-Instruct",
        "llama",
        8_030_261_248,
        "4096 14336 32 32 8 128256",
        8192,
    ),
    _decoder(
        "meta-llama/Llama-3.1-8B meta-llama/Llama-3.1-8B-Instruct",
        "llama",
        8_030_261_248,
        "4096 14336 32 32 8 128256",
        131072,
    ),
    _decoder(
        "meta-llama/Llama-3.1-70B meta-llama/Llama-3.1-70B-Instruct meta-llama/Llama-3.3-70B-Instruct",
        "llama",
        70_553_706_496,
        "8192 28672 80 64 8 128256",
        131072,
    ),
    _decoder(
        "meta-llama/Llama-3.2-1B meta-llama/Llama-3.2-1B-Instruct",
        "llama",
        1_235_814_400,
        "2048 8192 16 32 8 128256",
        131072,
        tied=True,
        head_dim=64,
    ),
    _decoder(
        "meta-llama/Llama-3.2-3B meta-llama/Llama-3.2-3B-Instruct",
        "llama",
        3_212_749_824,
        "3072 8192 28 24 8 128256",
        131072,
        tied=True,
        head_dim=128,
    ),
    _decoder(
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0 TinyLlama/TinyLlama_v1.1",
        "llama",
        1_100_048_384,
        "2048 5632 22 32 4 32000",
        2048,
    ),
    _decoder(
        "HuggingFaceTB/SmolLM2-135M HuggingFaceTB/SmolLM2-135M-Instruct",
        "llama",
        134_515_008,
        "576 1536 30 9 3 49152",
        8192,
        tied=True,
    ),
    _decoder(
        "HuggingFaceTB/SmolLM2-360M HuggingFaceTB/SmolLM2-360M-Instruct",
        "llama",
        361_821_120,
        "960 2560 32 15 5 49152",
        8192,
        tied=True,
    ),
    _decoder(
        "HuggingFaceTB/SmolLM2-1.7B HuggingFaceTB/SmolLM2-1.7B-Instruct",
        "llama",
        1_711_376_384,
        "2048 8192 24 32 32 49152",
        8192,
        tied=True,
    ),
    _decoder(
        "Qwen/Qwen2.5-0.5B Qwen/Qwen2.5-0.5B-Instruct",
        "qwen2",
        494_032_768,
        "896 4864 24 14 2 151936",
        32768,
        tied=True,
    ),
    _decoder(
        "Qwen/Qwen2.5-1.5B Qwen/Qwen2.5-1.5B-Instruct Qwen/Qwen2.5-Coder-1.5B-Instruct",
        "qwen2",
        1_543_714_304,
        "1536 8960 28 12 2 151936",
        32768,
        tied=True,
    ),
    _decoder(
        "Qwen/Qwen2.5-3B Qwen/Qwen2.5-3B-Instruct",
        "qwen2",
        3_085_938_688,
        "2048 11008 36 16 2 151936",
        32768,
        tied=True,
    ),
    _decoder("Qwen/Qwen2.5-7B Qwen/Qwen2.5-7B-Instruct", "qwen2", 7_615_616_512, "3584 18944 28 28 4 152064", 32768),
    _decoder("Qwen/Qwen2.5-14B Qwen/Qwen2.5-14B-Instruct", "qwen2", 14_770_033_664, "5120 13824 48 40 8 152064", 32768),
    _decoder("Qwen/Qwen2.5-32B Qwen/Qwen2.5-32B-Instruct", "qwen2", 32_763_876_352, "5120 27648 64 40 8 152064", 32768),
    _decoder("Qwen/Qwen3-0.6B", "qwen3", 596_049_920, "1024 3072 28 16 8 151936", 40960, tied=True, head_dim=128),
    _decoder("Qwen/Qwen3-1.7B", "qwen3", 1_720_574_976, "2048 6144 28 16 8 151936", 40960, tied=True, head_dim=128),
    _decoder("Qwen/Qwen3-4B", "qwen3", 4_022_468_096, "2560 9728 36 32 8 151936", 40960, tied=True, head_dim=128),
    _decoder("Qwen/Qwen3-8B", "qwen3", 8_190_735_360, "4096 12288 36 32 8 151936", 40960, head_dim=128),
    _decoder(
        "mistralai/Mistral-7B-v0.1 mistralai/Mistral-7B-Instruct-v0.1",
        "mistral",
        7_241_732_096,
        "4096 14336 32 32 8 32000",
        32768,
        sliding_window=4096,
    ),
    _decoder(
        "mistralai/Mistral-7B-v0.3 mistralai/Mistral-7B-Instruct-v0.3",
        "mistral",
        7_248_023_552,
        "4096 14336 32 32 8 32768",
        32768,
        sliding_window=None,
    ),
    _decoder(
        "google/gemma-2-2b google/gemma-2-2b-it",
        "gemma2",
        2_614_341_888,
        "2304 9216 26 8 4 256000",
        8192,
        tied=True,
        head_dim=256,
    ),
    _decoder(
        "google/gemma-2-9b google/gemma-2-9b-it",
        "gemma2",
        9_241_705_984,
        "3584 14336 42 16 8 256000",
        8192,
        tied=True,
        head_dim=256,
    ),
    _decoder(
        "google/gemma-3-1b-pt google/gemma-3-1b-it",
        "gemma3_text",
        999_885_952,
        "1152 6912 26 4 1 262144",
        32768,
        tied=True,
        head_dim=256,
        sliding_window=512,
    ),
    _decoder(
        "microsoft/Phi-3-mini-4k-instruct",
        "phi3",
        3_821_079_552,
        "3072 8192 32 32 32 32064",
        4096,
        sliding_window=2047,
        pad_token_id=32000,
    ),
    _decoder("microsoft/phi-2", "phi", 2_779_683_840, "2560 10240 32 32 32 51200", 2048, partial_rotary_factor=0.4),
    Entry(("openai-community/gpt2", "gpt2"), "gpt2", 124_439_808, {"n_embd": 768, "n_layer": 12, "n_head": 12}),
    Entry(
        ("openai-community/gpt2-medium", "gpt2-medium"),
        "gpt2",
        354_823_168,
        {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    ),
    Entry(
        ("openai-community/gpt2-large", "gpt2-large"),
        "gpt2",
        774_030_080,
        {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    ),
)

_BY_NAME = {name.lower(): entry for entry in ENTRIES for name in entry.names}


def names() -> list[str]:
    """All hub ids in the catalogue."""
    return [name for entry in ENTRIES for name in entry.names]


def find(name: str) -> Entry | None:
    """The entry for a hub id (case does not matter), or None."""
    return _BY_NAME.get(name.lower())


def config_of(name: str) -> PreTrainedConfig | None:
    """A config of the hub id's architecture, or None if the catalogue does not have it."""
    entry = find(name)
    return None if entry is None else AutoConfig.for_model(entry.model_type, **entry.fields)


def separate_head(model: nn.Module, name: str) -> None:
    """Unties the output embedding of `model`, built from a config, if it is separate in the checkpoint `name` (hub id, folder).

    transformers 5 ties the output embedding of T5-like models in the config. It unties it if a checkpoint holds both embeddings
    with different values (FLAN-T5, T5 1.1, mT5, mT0). A model built without its checkpoint must do the same. Whether the head
    is separate is read from the catalogue, otherwise from the folder's weights, otherwise from `tie_word_embeddings` in
    config.json.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    entry = find(name)
    if entry.separate_head if entry is not None else _is_separate_in(name, model):
        head.weight = nn.Parameter(torch.empty_like(head.weight), requires_grad=head.weight.requires_grad)


def _is_separate_in(name: str, model: nn.Module) -> bool:
    folder, head = Path(name).expanduser(), model.get_output_embeddings()
    keys = [
        f"{path}.weight" for path, module in model.named_modules() if module in (head, model.get_input_embeddings())
    ]
    files = sorted(folder.glob("*.safetensors"))
    if files:
        found = [_first_rows(files, key) for key in keys]
        present = [rows for rows in found if rows is not None]
        return len(present) == 2 and not torch.equal(*present)
    try:
        return PreTrainedConfig.get_config_dict(name)[0].get("tie_word_embeddings") is False
    except (OSError, ValueError):
        return False


def _first_rows(files: list[Path], key: str) -> torch.Tensor | None:
    """The first rows of the tensor `key`, enough to compare two embeddings; None if no file holds it."""
    for file in files:
        with safe_open(file, "pt") as tensors:
            if key in tensors.keys():  # noqa: SIM118 - not a dictionary
                return tensors.get_slice(key)[:64]
    return None
