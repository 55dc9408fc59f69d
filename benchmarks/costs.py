"""Predicts what single flags cost or save: each row is a run and the same run with a flag more, on one card.

    python benchmarks/costs.py               # some minutes
    python benchmarks/costs.py --show        # the committed results

`OTHERS_GIB` is what others measured for the same change of the same model and rows. How else their run differed is not known.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import predicted_rows

RESULTS = Path(__file__).parent / "results" / "costs.json"
CARD = "A100 80GB"
LLAMA, MISTRAL = "meta-llama/Llama-3.1-8B", "mistralai/Mistral-7B-v0.1"
ALL_LINEAR = "--lora_target_modules all-linear"
UPCAST = "--kbit_upcast all"
LORA = f"lora --model_name_or_path {LLAMA} --bf16 --max_length 2048 --per_device_train_batch_size 2 {ALL_LINEAR} --lora_dropout 0"
QLORA = f"qlora --model_name_or_path {LLAMA} --bf16 --max_length 8192 --per_device_train_batch_size 1 {ALL_LINEAR} --lora_dropout 0"
CASTS = f"qlora --model_name_or_path {MISTRAL} --bf16 --max_length 4096 --lora_dropout 0 --per_device_train_batch_size"
FULL = f"full --model_name_or_path {LLAMA} --bf16 --dtype bfloat16 --max_length 2048 --per_device_train_batch_size 1 --activation_checkpointing"
SMALL = "--model_name_or_path meta-llama/Llama-3.2-1B --bf16"
LORA_1B = f"lora {SMALL} --max_length 4096 --per_device_train_batch_size 4"
FULL_1B = f"full {SMALL} --dtype bfloat16 --max_length 1024 --per_device_train_batch_size 1"
LOW_RANK = "--optim_args rank=128 --optim_target_modules all-linear"
ROWS = [  # what changes, the run without it, and with it
    ("FlashAttention 2", LORA_1B, "--attn_implementation flash_attention_2"),
    ("Liger's kernels", LORA_1B, "--use_liger_kernel"),
    ("torchao's AdamW, 8 bits", FULL_1B, "--optim adamw_torch_8bit"),
    ("torchao's AdamW, 4 bits", FULL_1B, "--optim adamw_torch_4bit"),
    ("GaLore", FULL_1B, f"--optim galore_adamw {LOW_RANK}"),
    ("APOLLO", FULL_1B, f"--optim apollo_adamw {LOW_RANK}"),
    ("dropout before A, LoRA", LORA, "--lora_dropout 0.05"),
    ("dropout before A, QLoRA", QLORA, "--lora_dropout 0.05"),
    ("PEFT's casts to fp32, 4 rows", f"{CASTS} 4", UPCAST),
    ("PEFT's casts to fp32, 8 rows", f"{CASTS} 8", UPCAST),
    ("AdamW in 8 bits", FULL, "--optim adamw_bnb_8bit"),
    ("and in the backward pass", f"{FULL} --optim adamw_bnb_8bit", "--optimizer_in_backward"),
    (
        "and its state in managed memory",
        f"{FULL} --optim adamw_bnb_8bit --optimizer_in_backward",
        "--optim paged_adamw_8bit",
    ),
]
OTHERS_GIB = {"PEFT's casts to fp32, 4 rows": 4.0, "PEFT's casts to fp32, 8 rows": 8.0}


def row(what: str, run: str, more: str) -> dict[str, Any]:
    """The row of the results for one change: reserved bytes without and with it."""
    from toolkit.runs.api import predict

    method, *flags = f"{run} --gradient_accumulation_steps 1".split()
    without = predict(method, *flags, gpu=CARD)
    with_it = predict(method, *flags, *more.split(), gpu=CARD)
    return {
        "what": what,
        "run": run,
        "flag": more,
        "reserved_bytes": [without.reserved_bytes, with_it.reserved_bytes],
        "host_bytes": [without.host_bytes, with_it.host_bytes],
        "date": datetime.date.today().isoformat(),
    }


def load() -> dict[str, Any]:
    """The committed results."""
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def show(found: list[dict[str, Any]]) -> None:
    """Prints the results."""
    for one in found:
        without, with_it = (nbytes / 2**30 for nbytes in one["reserved_bytes"])
        print(f"{one['what']:32s} {without:7.2f} -> {with_it:7.2f} GiB  ({with_it - without:+.2f})  {one['flag']}")


if __name__ == "__main__":
    predicted_rows.run(__doc__, RESULTS, ROWS, row, show, card=CARD)
