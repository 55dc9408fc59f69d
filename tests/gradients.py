"""The gradients of one optimizer step over the same 8 rows, however they are split; run by test_gradients.py.

accelerate launch --config_file launch/ddp.yaml --num_processes 2 tests/gradients.py OUT --use_cpu
"""

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
)

from toolkit.config import TrainArguments
from toolkit.models import auto_class, set_head
from toolkit.ranks import exits_cleanly
from toolkit.training import FineTuner

KINDS = ("t5", "bart", "llama", "head")
SIZES = {
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0},
    "bart": {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "max_position_embeddings": 64,
        "dropout": 0.0,
    },
    "llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
}
SIZES["head"] = SIZES["llama"]


class Tokenizer:
    """Pads; nothing else is asked of a tokenizer here."""

    pad_token_id, padding_side = 0, "right"
    bos_token_id, eos_token_id = 1, 2

    def pad(self, features, **kwargs):
        names = [name for name in features[0] if name != "labels"]
        classes = {"labels": torch.tensor([row["labels"] for row in features])} if "labels" in features[0] else {}
        longest = max(len(row["input_ids"]) for row in features)
        padded = {n: [row[n] + [0] * (longest - len(row[n])) for row in features] for n in names}
        return {name: torch.tensor(rows) for name, rows in padded.items()} | classes


def rows(kind: str) -> Dataset:
    """8 rows whose label counts range from 1 to 15, so that a mean of means is far from the mean over tokens.

    For a head the label is the number of one of 3 classes.
    """
    generator = torch.Generator().manual_seed(0)
    made = []
    for n in (1, 15, 2, 9, 3, 14, 1, 6):
        ids = torch.randint(3, 100, (20,), generator=generator).tolist()
        labels = n % 3 if kind == "head" else [-100] * (20 - n) + ids[-n:] if kind == "llama" else ids[-n:]
        made.append({"input_ids": ids, "attention_mask": [1] * 20, "labels": labels})
    return Dataset.from_list(made)


class Keep(TrainerCallback):
    """Keeps the gradients as they are before the optimizer takes them."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters()}


def gradients(kind: str, batch_size: int, accumulation: int, ours: bool = True) -> dict[str, torch.Tensor]:
    """Parameter name to gradient, after one step over `batch_size x accumulation x processes` = 8 rows."""
    torch.manual_seed(0)
    special = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
    config = AutoConfig.for_model("llama" if kind == "head" else kind, **SIZES[kind], **special)
    if kind == "head":
        set_head(config, ["a", "b", "c"], pad_token_id=0)
    model = auto_class(config).from_config(config)
    keep = Keep()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainArguments(
            output_dir=folder,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            max_grad_norm=0,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        if ours:
            encoder = SimpleNamespace(tokenizer=Tokenizer())
            task = SimpleNamespace(model_kind="head" if kind == "head" else "generating")
            data = SimpleNamespace(task=task, train=rows(kind), validation=rows(kind), encoder=encoder)
            trainer = FineTuner(model, args, data, callbacks=[keep])
        else:
            if kind == "head":
                collator = DataCollatorWithPadding(Tokenizer())
            else:
                collator = DataCollatorForSeq2Seq(Tokenizer(), model=model if kind != "llama" else None)
            trainer = Trainer(model, args, collator, rows(kind), callbacks=[keep])
        trainer.train()
    return keep.gradients


@exits_cleanly
def main() -> None:
    for kind in KINDS:
        found = gradients(kind, batch_size=4, accumulation=1)
        rank = torch.distributed.get_rank()
        assert torch.distributed.get_world_size() == 2
        torch.save(found, Path(sys.argv[1]) / f"{kind}.{rank}.pt")


if __name__ == "__main__":
    main()
