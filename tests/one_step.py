"""One optimizer step of real training under whatever engine launched it, saved: run by test_launch.py, on one process or two.

accelerate launch --config_file launch/zero3.yaml --num_processes 2 tests/one_step.py OUT --use_cpu
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from gradients import SIZES, Tokenizer, rows
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, BatchEncoding, PreTrainedModel

from toolkit.config import TrainArguments
from toolkit.engine import without_partitioning
from toolkit.evaluation import generate
from toolkit.preparation import check_engine
from toolkit.ranks import exits_cleanly
from toolkit.training import FineTuner, train

CASES = [(kind, method) for kind in ("t5", "llama") for method in ("full", "lora")]
RATE = 10.0  # large enough that the weights' rounding is no part of the step: they tell the gradient


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


def build(kind: str, method: str) -> PreTrainedModel:
    """The same tiny model in every process; LoRA's matrices are random, so that both have gradients.

    It is whole at first: made under ZeRO-3, a model draws other random weights than on one process.
    """
    torch.manual_seed(0)
    special = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
    config = AutoConfig.for_model(kind, **SIZES[kind], **special)
    with without_partitioning():
        model = (AutoModelForCausalLM if kind == "llama" else AutoModelForSeq2SeqLM).from_config(config)
    if method == "lora":
        targets = ["q_proj", "v_proj"] if kind == "llama" else ["q", "v"]
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    return model


def batch(kind: str) -> dict[str, torch.Tensor]:
    """Two rows of ids, (2, 20), int64; T5's decoder gets the first 5."""
    ids = torch.tensor(rows(kind)["input_ids"][:2])
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :5]} if kind == "t5" else {})


def one_step(kind: str, method: str, folder: Path, batch_size: int, use_cpu: bool = True) -> dict:
    """The loss of the step, the logits after it (as the engine computes them) and what the model then writes."""
    model = build(kind, method)
    args = TrainArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        max_steps=1,
        max_grad_norm=0,
        save_strategy="no",
        logging_steps=1,
        use_cpu=use_cpu,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    check_engine(args)
    encoder = SimpleNamespace(tokenizer=Writer())
    task = SimpleNamespace(model_kind="generating")
    data = SimpleNamespace(task=task, train=rows(kind), validation=rows(kind), encoder=encoder)
    trainer = FineTuner(model, args, data)
    train(trainer)
    model.eval()
    with torch.no_grad():
        logits = model(**batch(kind)).logits.float()
    prompts = [ids[: 4 + n] for n, ids in enumerate(rows(kind)["input_ids"][:3])]  # one more for rank 0 than for rank 1
    texts = generate(model, Writer(), prompts, batch_size=1, max_new_tokens=6)
    return {"loss": trainer.state.log_history[0]["loss"], "logits": logits, "texts": texts}


@exits_cleanly
def main() -> None:
    out = Path(sys.argv[1])
    for kind, method in CASES:
        found = one_step(kind, method, out / f"{kind}-{method}", batch_size=4)
        assert torch.distributed.get_world_size() == 2
        torch.save(found, out / f"{kind}-{method}.{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main()
