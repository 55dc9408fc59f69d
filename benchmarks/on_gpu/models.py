"""Makes model folders without the hub (configs of the catalogue, random weights, the embedded tokenizer), and data rows."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from on_gpu.items import Item

BART = {"model_type": "bart", "vocab_size": 50265, "d_model": 768, "encoder_layers": 6, "decoder_layers": 6}
BART |= {"encoder_attention_heads": 12, "decoder_attention_heads": 12, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072}
SMALL_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
}
SMALL_LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2048, "head_dim": 64}
SMALL_T5: dict[str, Any] = {
    "model_type": "t5",
    "d_model": 256,
    "d_kv": 64,
    "d_ff": 512,
    "num_layers": 3,
    "num_heads": 4,
}
SMALL_T5 |= {"vocab_size": 2048, "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu"}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}  # for a rehearsal
TINY_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2}
TINY_BART = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
TINY_BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "vocab_size": 2048}


@dataclass(frozen=True)
class Model:
    """A model: its label, its source (a catalogue id or config fields), and the GiB and seconds for making its folder."""

    label: str
    source: str | dict[str, Any]
    gib: float
    seconds: float = 6.0

    @property
    def is_seq2seq(self) -> bool:
        """Whether it is an encoder-decoder."""
        return any(part in self.label for part in ("t5", "mt0", "bart"))

    @property
    def item(self) -> Item:
        """The item that makes its folder."""
        return Item(
            f"model {self.label}",
            "models",
            "on_gpu.models:make",
            {"label": self.label, "source": self.source},
            self.seconds,
            self.gib,
        )


REAL = (
    Model("small-llama", SMALL_LLAMA, 1, 3),
    Model("small-t5", SMALL_T5, 1, 3),
    Model("llama-1b", "meta-llama/Llama-3.2-1B", 4, 6),
    Model("flan-t5-base", "google/flan-t5-base", 2, 4),
    Model("qwen-1.5b", "Qwen/Qwen2.5-1.5B", 5, 7),
    Model("llama-3b", "meta-llama/Llama-3.2-3B", 9, 10),
    Model("mt0-large", "bigscience/mt0-large", 4, 6),
    Model("bart-base", BART, 2, 4),
    Model("llama-8b", "meta-llama/Llama-3.1-8B", 18, 25),
)
REHEARSED = (
    Model("small-llama", SMALL_LLAMA | TINY, 1, 2),
    Model("small-t5", SMALL_T5 | TINY_T5, 1, 2),
    Model("bart-base", BART | TINY_BART, 1, 2),
)


def by_label(rehearsed: bool) -> dict[str, Model]:
    """The models by label; in a rehearsal only small ones."""
    return {model.label: model for model in (REHEARSED if rehearsed else REAL)}


def config_of(source: str | dict[str, Any]) -> Any:
    """transformers' config of a model's `source`."""
    from transformers import AutoConfig

    from toolkit.models import catalogue

    return catalogue.config_of(source) if isinstance(source, str) else AutoConfig.for_model(**source)


def make(label: str, source: str | dict[str, Any], work: str, rehearsed: bool) -> dict[str, Any]:
    """Makes the folder `work`/models/`label`: config, random bf16 weights, generation config, tokenizer."""
    import torch

    from toolkit.models import catalogue
    from toolkit.models.arguments import ModelArguments
    from toolkit.models.heads import auto_class

    began = time.monotonic()
    config = config_of(source)
    torch.manual_seed(0)
    with torch.device("cpu" if rehearsed else "cuda"):
        model = auto_class(config).from_config(config, dtype=torch.bfloat16)
        if isinstance(source, str) and catalogue.find(source).separate_head:
            catalogue.separate_head(model, source)
            torch.nn.init.normal_(model.get_output_embeddings().weight.data, std=0.02)
    if model.generation_config is not None:
        model.generation_config.eos_token_id = 1
    folder = Path(work) / "models" / label
    temporary = folder.with_name(f".{label}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary, max_shard_size="4GB")
    embedded = Path(ModelArguments().source)
    shutil.copy(embedded / "tokenizer.json", temporary)
    settings = json.loads((embedded / "tokenizer_config.json").read_text(encoding="utf-8"))
    del settings["model_max_length"]  # 512 would truncate longer rows
    (temporary / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)
    return {"seconds": round(time.monotonic() - began, 1)}


def folder_of(work: str, label: str) -> Path:
    """The folder that `make` writes."""
    return Path(work) / "models" / label


TRAIN_ROWS = 256


def write_rows(work: Path) -> Path:
    """Writes a data set folder. Rows longer and much shorter than any --max_length alternate, so that every batch has padding."""
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "while",
        "nine",
        "men",
        "talk",
        "about",
        "tea",
    ]
    folder = work / "rows"
    folder.mkdir(exist_ok=True)
    for split, count in (("train", TRAIN_ROWS), ("validation", 4), ("test", 4)):
        lines = []
        for row in range(count):
            long = [words[(row * 7 + k * (k % 5 + 1)) % len(words)] for k in range(1100 if row % 2 == 0 else 20)]
            target = [words[(row + k) % len(words)] for k in range(300)]
            lines.append(json.dumps({"dialogue": " ".join(long), "summary": " ".join(target)}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
