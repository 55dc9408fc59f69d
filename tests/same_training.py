"""Training under whatever engine launched it, from loading to the written text, to be held against one process with the same
global batch: run by test_same_training.py, on one process or two.

accelerate launch --config_file launch/zero3.yaml --num_processes 2 tests/same_training.py BASES OUT t5-full llama-qlora
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import training_data
from datasets import Dataset
from gradients import SIZES, Tokenizer
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, BatchEncoding, PreTrainedModel

from toolkit.config.arguments import TrainArguments
from toolkit.data.loading import TaskData
from toolkit.distributed.ranks import exits_cleanly
from toolkit.distributed.request import requested_engine
from toolkit.methods import METHODS
from toolkit.models.arguments import ModelArguments
from toolkit.models.generation import generate
from toolkit.models.heads import auto_class
from toolkit.models.loading import load_model, load_model_config
from toolkit.runs.preflight import check_engine
from toolkit.training.trainer import FineTuner, train

KINDS = ("t5", "llama")
CASES = [(kind, method) for kind in KINDS for method in ("full", "lora", "qlora")]
TARGETS = {"t5": ["q", "v", "wi"], "llama": ["q_proj", "v_proj", "down_proj"]}
ROWS, GLOBAL_BATCH, STEPS = 24, 8, 20  # 3 steps an epoch: nearly 7 epochs, each shuffled anew

# One step that tells the gradient: what it changes, over the rate, which is so large that rounding of the weights is no part of it.
RATE = 10.0
ONE_STEP = {"max_steps": 1, "optim": "sgd", "learning_rate": RATE, "lr_scheduler_type": "constant", "max_grad_norm": 0}
# A real run: everything of an optimizer that an engine does its own way (moments, weight decay, clipping, warmup) is in use.
CURVE = {
    "max_steps": STEPS,
    "optim": "adamw_torch",
    "learning_rate": 1e-2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 3,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
}


class Writer(Tokenizer):
    """A tokenizer that pads for generation, and shows ids as numbers."""

    def pad(self, features, padding_side="right", **kwargs):
        if isinstance(features, list):
            return super().pad(features, **kwargs)
        longest = max(map(len, features["input_ids"]))
        ids, mask = [], []
        for row in features["input_ids"]:
            gap = [0] * (longest - len(row))
            ids.append(row + gap if padding_side == "right" else gap + row)
            mask.append([int(i > 0) for i in ids[-1]])
        return BatchEncoding({"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)})

    def batch_decode(self, ids, **kwargs):
        return [" ".join(map(str, row.tolist())) for row in ids]

    def save_pretrained(self, folder):
        pass


@dataclass
class Found:
    """What a rank has seen of one case."""

    losses: list[float]  # of each step of the curve, as logged
    logits: torch.Tensor  # (2, length, 100), of the trained model as the engine computes them
    texts: list[str]  # what it writes
    packed: dict[str, int]  # 4-bit weights as loaded: how many by "type, whole" or "type, shared out"


def save_bases(folder: Path) -> None:
    """Writes the models that all cases begin with, `folder/KIND`, with random weights.

    Llama's are drawn wider than its own 0.02, from which a frozen head of this width could tell hardly any token.
    """
    special = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
    for kind in KINDS:
        torch.manual_seed(0)
        wide = {"initializer_range": 0.1} if kind == "llama" else {}
        config = AutoConfig.for_model(kind, **SIZES[kind], **special, **wide)
        auto_class(config).from_config(config).save_pretrained(folder / kind)


def rows(kind: str) -> Dataset:
    """24 rows of 20 ids whose label counts range from 1 to 15, so that a mean of means is far from the mean over tokens.

    They are a multiple of the global batch: else accelerate fills the last one of an epoch with rows from its beginning, so
    that every rank has some, where one process takes the smaller batch. The ids follow each other, so that there is something
    to learn.
    """
    generator = torch.Generator().manual_seed(0)
    made = []
    for n in (1, 15, 2, 9, 3, 14, 1, 6) * (ROWS // 8):
        first, stride = torch.randint(3, 20, (2,), generator=generator).tolist()
        ids = [3 + (first + stride * i) % 97 for i in range(20)]
        labels = [-100] * (20 - n) + ids[-n:] if kind == "llama" else ids[-n:]
        made.append({"input_ids": ids, "attention_mask": [1] * 20, "labels": labels})
    return Dataset.from_list(made)


def batch(kind: str) -> dict[str, torch.Tensor]:
    """Two rows of ids, (2, 20), int64; T5's decoder gets the first 5."""
    ids = torch.tensor(rows(kind)["input_ids"][:2])
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :5]} if kind == "t5" else {})


def written(model: PreTrainedModel, kind: str) -> list[str]:
    """What `model` writes for three prompts: with two ranks, one has a prompt more than the other."""
    prompts = [ids[: 4 + n] for n, ids in enumerate(rows(kind)["input_ids"][:3])]
    return generate(model, Writer(), prompts, batch_size=1, max_new_tokens=6)


def load(source: Path, method: str, args: TrainArguments) -> PreTrainedModel:
    """The model in the folder `source` as a recipe loads it, for the engine that runs."""
    flags = ModelArguments(model_name_or_path=str(source), load_in_4bit=method == "qlora")
    engine = requested_engine(args.deepspeed, args.fsdp)
    return load_model(flags, load_model_config(flags), torch.float32, args, engine)


def attach(model: PreTrainedModel, kind: str, method: str) -> PreTrainedModel:
    """The method as a recipe attaches it; LoRA's B is random instead of zero, so that A has gradients from the first step."""
    if method == "full":
        return METHODS["full"]().attach(model)
    options = {"lora_r": 4, "lora_dropout": 0.0, "lora_target_modules": TARGETS[kind]}
    model = METHODS[method](**options).attach(model)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def arguments(folder: Path, batch_size: int, **settings: Any) -> TrainArguments:
    return TrainArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{"save_strategy": "no"} | settings,
    )


def task_data(kind: str) -> TaskData:
    """The same rows to train, to validate and to answer."""
    task = SimpleNamespace(model_kind="generating")
    return training_data.task_data(task, rows(kind), rows(kind), Writer(), rows(kind)["input_ids"])


def trained(kind: str, method: str, bases: Path, args: TrainArguments) -> tuple[FineTuner, dict[str, int]]:
    """The trainer after training, its model saved in the run's folder; and the `packed` weights of its base as loaded."""
    config = training_data.config_of(args)
    check_engine(config.engine, args)
    base = load(bases / kind, method, args)
    packed: dict[str, int] = {}
    for parameter in base.parameters():
        if type(parameter).__name__ == "Params4bit" or hasattr(parameter, "quant_state"):
            how = "shared out" if hasattr(parameter, "ds_tensor") else "whole"
            stored = f"{str(parameter.dtype).removeprefix('torch.')}, {how}"
            packed[stored] = packed.get(stored, 0) + 1
    trainer = FineTuner(attach(base, kind, method), config, task_data(kind))
    train(trainer)
    return trainer, packed


def run_case(kind: str, method: str, bases: Path, out: Path, batch_size: int) -> Found:
    """Saves a model of one step (`out/gradient`) and one of the curve (`out/curve`)."""
    trained(kind, method, bases, arguments(out / "gradient", batch_size, **ONE_STEP))
    trainer, packed = trained(kind, method, bases, arguments(out / "curve", batch_size, **CURVE))
    model = trainer.model.eval()
    with torch.no_grad():
        logits = model(**batch(kind)).logits.float()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Found(losses, logits, written(model, kind), packed)


def reload(kind: str, method: str, bases: Path, folder: Path) -> PreTrainedModel:
    """The model on this process alone, from what was saved in `folder`."""
    args = arguments(folder, 1)
    if method == "full":
        return load(folder, method, args)
    return PeftModel.from_pretrained(load(bases / kind, method, args), folder)


@exits_cleanly
def main() -> None:
    bases, out = map(Path, sys.argv[1:3])
    for case in [tuple(name.split("-")) for name in sys.argv[3:]] or CASES:
        found = run_case(*case, bases, out / "-".join(case), GLOBAL_BATCH // 2)
        assert torch.distributed.get_world_size() == 2
        torch.save(vars(found), out / f"{'-'.join(case)}.{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main()
