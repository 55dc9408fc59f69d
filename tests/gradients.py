"""Splits the same rows in different ways: gradients of one optimizer step, validation loss, order; run by test_gradients.py.

accelerate launch --config_file launch/ddp.yaml --num_processes 2 tests/gradients.py OUT --use_cpu
"""

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from datasets import Dataset
from training_data import config_of, task_data
from transformers import (
    AutoConfig,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
)

from toolkit.config.arguments import TrainArguments
from toolkit.distributed.ranks import exits_cleanly
from toolkit.methods.prompt_tuning import PromptTuning
from toolkit.models.heads import auto_class, set_head
from toolkit.training.trainer import FineTuner

KINDS = ("t5", "bart", "llama", "packed", "head")
STRATEGIES = ("random", "group_by_length", "batch_rebalance")
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
SIZES["head"] = SIZES["prompt"] = SIZES["packed"] = SIZES["llama"]


class Tokenizer:
    """A tokenizer that only pads."""

    pad_token_id, padding_side, model_input_names = 0, "right", ("input_ids",)
    bos_token_id, eos_token_id = 1, 2

    def save_pretrained(self, folder):
        """Saves nothing."""

    def pad(self, features, **kwargs):
        names = [name for name in features[0] if name != "labels"]
        classes = {"labels": torch.tensor([row["labels"] for row in features])} if "labels" in features[0] else {}
        longest = max(len(row["input_ids"]) for row in features)
        padded = {n: [row[n] + [0] * (longest - len(row[n])) for row in features] for n in names}
        return {name: torch.tensor(rows) for name, rows in padded.items()} | classes


def rows(kind: str) -> Dataset:
    """8 rows whose label counts range from 1 to 15, so that a mean of means is far from the mean over tokens.

    For a head the label is the index of one of 3 classes.
    """
    generator = torch.Generator().manual_seed(0)
    made = []
    for n in (1, 15, 2, 9, 3, 14, 1, 6):
        ids = torch.randint(3, 100, (20,), generator=generator).tolist()
        labels = (
            n % 3
            if kind == "head"
            else [-100] * (20 - n) + ids[-n:]
            if kind in ("llama", "prompt", "packed")
            else ids[-n:]
        )
        made.append({"input_ids": ids, "attention_mask": [1] * 20, "labels": labels})
    return Dataset.from_list(made)


class Keep(TrainerCallback):
    """Keeps the gradients from before the optimizer step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters()}


class Order(TrainerCallback):
    """Keeps the first token of each row that this rank trains on, by epoch; it identifies the row."""

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.epochs = [*getattr(self, "epochs", []), []]

    def collated(self, batch: dict[str, torch.Tensor]) -> None:
        if getattr(self, "epochs", None):
            self.epochs[-1] += batch["input_ids"][:, 0].tolist()


def fine_tuner(
    kind: str, folder: str | Path, train: Dataset, validation: Dataset, callbacks=(), **arguments
) -> FineTuner:
    """A `FineTuner` of a tiny model of `kind`, always with the same weights."""
    torch.manual_seed(0)
    special = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
    config = AutoConfig.for_model("llama" if kind in ("head", "prompt", "packed") else kind, **SIZES[kind], **special)
    if kind == "head":
        set_head(config, ["a", "b", "c"], pad_token_id=0)
    model = auto_class(config).from_config(config)
    if kind == "prompt":
        model = PromptTuning(num_virtual_tokens=3).attach(model)
    settings = {"save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}
    chunks = {"loss_chunk_tokens": 4, "packing": kind == "packed"}  # several chunks in each batch
    args = TrainArguments(output_dir=str(folder), report_to="none", **settings | chunks | arguments)
    task = SimpleNamespace(model_kind="head" if kind == "head" else "generating")
    return FineTuner(model, config_of(args), task_data(task, train, validation, Tokenizer()), callbacks)


def gradients(kind: str, batch_size: int, accumulation: int, ours: bool = True) -> dict[str, torch.Tensor]:
    """Parameter name to gradient, after one step over `batch_size x accumulation x processes` = 8 rows."""
    keep = Keep()
    with tempfile.TemporaryDirectory() as folder:
        split = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        trainer = fine_tuner(kind, folder, rows(kind), rows(kind), [keep], max_steps=1, max_grad_norm=0, **split)
        if not ours:
            tokenizer, model = Tokenizer(), trainer.model
            seq2seq = model if model.config.is_encoder_decoder else None
            collator = (
                DataCollatorWithPadding(tokenizer) if kind == "head" else DataCollatorForSeq2Seq(tokenizer, seq2seq)
            )
            trainer = Trainer(model, trainer.args, collator, rows(kind), callbacks=[keep])
        trainer.train()
    return keep.gradients


def validation_loss(kind: str, batch_size: int, number: int = 7, **arguments) -> float:
    """The validation loss of the first `number` of the 8 rows, in batches of `batch_size` on each process."""
    with tempfile.TemporaryDirectory() as folder:
        few = rows(kind).select(range(number))
        trainer = fine_tuner(kind, folder, few, few, per_device_eval_batch_size=batch_size, **arguments)
        return trainer.evaluate()["eval_loss"]


def lengths_differ() -> Dataset:
    """16 rows with different lengths and different first tokens."""
    made = [[20 + n, *range(3, 4 + (7 * n) % 16)] for n in range(16)]
    return Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} for ids in made])


def order(strategy: str, folder: str | Path, **arguments) -> list[list[int]]:
    """The first tokens of the rows that this rank trains on, in three epochs over `lengths_differ`."""
    seen = Order()
    train = lengths_differ()
    settings = {"per_device_train_batch_size": 2, "num_train_epochs": 3, "train_sampling_strategy": strategy}
    trainer = fine_tuner("llama", folder, train, train, [seen], **settings | arguments)
    collate = trainer.data_collator

    def watched(batch):
        collated = collate(batch)
        seen.collated(collated)
        return collated

    trainer.data_collator = watched
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    return seen.epochs


@exits_cleanly
def main() -> None:
    for kind in KINDS:
        found = gradients(kind, batch_size=4, accumulation=1)
        rank = torch.distributed.get_rank()
        assert torch.distributed.get_world_size() == 2
        torch.save(found, Path(sys.argv[1]) / f"{kind}.{rank}.pt")
        torch.save(validation_loss(kind, 2), Path(sys.argv[1]) / f"{kind}.{rank}.loss")
    for strategy in STRATEGIES:
        torch.save(order(strategy, tempfile.mkdtemp()), Path(sys.argv[1]) / f"{strategy}.{rank}.order")


if __name__ == "__main__":
    main()
