"""Predicts runs whose base is larger than the card: weights wait in host memory, and a layer is on the card while it is computed.

    python benchmarks/streamed.py            # some minutes; models of 70B take most of them
    python benchmarks/streamed.py --show     # the committed results

One process under launch/zero3_offload.yaml, one row, bf16, with activation checkpointing.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import predicted_rows

RESULTS = Path(__file__).parent / "results" / "streamed.json"
CARD_GB = 4  # the smallest on which anybody trains
LLAMA_8B, LLAMA_70B = "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B"
RUNS = [  # method, model, tokens
    *((method, LLAMA_8B, tokens) for method in ("qlora", "lora") for tokens in (1024, 4096)),
    *((method, LLAMA_70B, 1024) for method in ("qlora", "lora")),
    ("full", LLAMA_8B, 1024),
]
FLAGS = {
    "bf16": True,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "activation_checkpointing": True,
}


def row(method: str, model: str, tokens: int) -> dict[str, Any]:
    """The row of the results for one run."""
    from toolkit.runs.api import predict

    launch = {"gpu_memory": f"{CARD_GB}GB", "launch": "zero3_offload", "num_processes": 1}
    ledger = predict(method, **launch, **FLAGS, model_name_or_path=model, max_length=tokens)
    return {
        "method": method,
        "model": model,
        "tokens": tokens,
        "needed_bytes": ledger.needed_bytes,
        "budget_bytes": ledger.budget_bytes,
        "host_bytes": ledger.host_bytes,
        "date": datetime.date.today().isoformat(),
    }


def load() -> dict[str, Any]:
    """The committed results."""
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def show(found: list[dict[str, Any]]) -> None:
    """Prints the results."""
    for one in found:
        print(
            f"{one['method']:6s} {one['model']:26s} {one['tokens']:6,d} tokens: {one['needed_bytes'] / 2**30:6.2f} GiB of "
            f"{one['budget_bytes'] / 2**30:.2f}, {one['host_bytes'] / 2**30:6.1f} GiB on the host"
        )


if __name__ == "__main__":
    predicted_rows.run(__doc__, RESULTS, RUNS, row, show)
