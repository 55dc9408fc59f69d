"""Predicts which runs fit on 1, 2, 4 and 8 cards with 24 GB, under the files of launch/.

    python benchmarks/distributed_fits.py              # continues where it stopped; takes more than an hour
    python benchmarks/distributed_fits.py --show       # the committed results

Each card (RTX 3090, 24 GB) gets one row of 1,024 tokens, in bf16 with activation checkpointing; LoRA has the recipe's rank. For each
model, method and launch file this searches upwards for the smallest number of cards that fits: with more cards, each needs no more
memory. If the model states alone exceed the card (`least_states`), no prediction is needed. Optimizers are the recipes' own, on
cards or offloaded. A prediction takes a minute or more on a slow core, and longer for more layers.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "distributed_fits.json"
CARD = "RTX 3090"
CARD_BYTES = 24 * 2**30
CARDS = (1, 2, 4, 8)
MODELS = {  # of the catalogue; billions of parameters
    "meta-llama/Llama-3.2-1B": 1.24,
    "meta-llama/Llama-3.2-3B": 3.21,
    "meta-llama/Llama-3.1-8B": 8.03,
    "Qwen/Qwen2.5-14B": 14.77,
    "Qwen/Qwen2.5-32B": 32.76,
    "meta-llama/Llama-3.1-70B": 70.55,
}
METHODS = ("lora", "full")
LAUNCHES = ("single", "ddp", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload", "fsdp2")
FIRST = ("single", "ddp", "zero2", "zero1", "fsdp2", "zero2_offload", "zero3", "zero3_offload")  # quick ones first
SMALL = 9  # billions of parameters: larger models come last
FLAGS = ["--max_length", "1024", "--per_device_train_batch_size", "1", "--bf16", "--activation_checkpointing"]
FLAGS += ["--loss_chunk_tokens", "0"]  # as in the committed results, which are older than the loss in chunks


def least_states(billions: float, method: str, launch: str, cards: int) -> float:
    """A lower bound of the model states per card, in bytes: weights for LoRA; weights, gradients and AdamW for full fine-tuning.

    Without ZeRO, weights, gradients and both moments are in fp32. With ZeRO, weights and gradients are in bf16; master weights
    and moments in fp32 are sharded, under stage 2 also gradients, under stage 3 everything (arXiv:1910.02054, section 5).
    """
    if launch == "fsdp2":  # each card holds the whole model while loading (launch/fsdp2.yaml)
        return billions * 1e9 * (max(4, 16 / cards) if method == "full" else 2)
    whole, shared = {
        ("lora", "zero3"): (0, 2),
        ("full", "zero3"): (0, 16),
        ("lora", "zero3_offload"): (0, 0),
        ("full", "zero3_offload"): (0, 0),
        ("full", "zero2_offload"): (2, 0),
        ("full", "zero2"): (2, 14),
        ("full", "zero1"): (4, 12),
        ("full", "single"): (16, 0),
        ("full", "ddp"): (16, 0),
    }.get((method, launch), (2, 0))
    return billions * 1e9 * (whole + shared / cards)


def predict(model: str, method: str, launch: str, cards: int, path: Path) -> None:
    """Writes the ledger of one card to `path`."""
    from toolkit.distributed.launch_files import read_launch_file
    from toolkit.memory.cuda.cards import find_card
    from toolkit.runs.prediction import PredictionJob

    flags = ["--model_name_or_path", model, *FLAGS]
    PredictionJob.of(method, flags, read_launch_file(launch, cards), find_card(CARD)).predict().save(path)


def predicted(model: str, method: str, launch: str, cards: int) -> dict[str, Any]:
    """A row of the results. A forked process predicts it, so that all start in the same state and imports happen once."""
    from distributed_accuracy import in_children

    from toolkit.memory.ledger import Ledger

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.json"
        (code,) = in_children([lambda: predict(model, method, launch, cards, path)])
        if code:
            raise RuntimeError(f"{model} {method} {launch} on {cards}: not predicted")
        ledger = Ledger.load(path)
    row = {"model": model, "method": method, "launch": launch, "cards": cards, "fits": ledger.fits}
    row |= {"process_bytes": ledger.process_bytes, "allocated_bytes": ledger.allocated_bytes}
    row["host_bytes"] = ledger.host_bytes
    return row | {"date": datetime.date.today().isoformat(), "stack": dict(ledger.stack)}


def load() -> dict[str, Any]:
    """The results so far."""
    if not RESULTS.is_file():
        return {"card": CARD, "flags": FLAGS, "rows": []}
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def table(rows: list[dict[str, Any]]) -> dict[tuple[str, str, str], str]:
    """(model, method, launch) -> the smallest number of cards with the GiB per card (+ GiB of the host), "no", or "≥ N" if open."""
    found = {}
    for model, billions in MODELS.items():
        for method in METHODS:
            for launch in LAUNCHES:
                own = [row for row in rows if (row["model"], row["method"], row["launch"]) == (model, method, launch)]
                fitting = min((row for row in own if row["fits"]), key=lambda row: row["cards"], default=None)
                tried = {row["cards"] for row in own}
                open_ = [n for n in _candidates(billions, method, launch) if n not in tried]
                if fitting is not None:
                    host = fitting.get("host_bytes", 0) / 2**30
                    more = f" + {host:.0f}" if host >= 1 else " + <1" if host else ""
                    text = f"{fitting['cards']} ({fitting['process_bytes'] / 2**30:.1f}{more})"
                else:
                    text = f"≥ {open_[0]}" if open_ else "no"
                found[model, method, launch] = text
    return found


def _candidates(billions: float, method: str, launch: str) -> list[int]:
    """The numbers of cards on which the model states leave room, smallest first."""
    if launch == "single":
        numbers: tuple[int, ...] = (1,)
    elif launch == "ddp":
        numbers = (2,)  # under DDP each card needs the same on 2 as on 8
    else:
        numbers = CARDS if launch.endswith("_offload") else CARDS[1:]  # sharding needs two cards, offloading does not
    return [n for n in numbers if least_states(billions, method, launch, n) < CARD_BYTES]


def order() -> list[tuple[str, str, str]]:
    """(model, launch, method) in the order of prediction, small models first."""
    small = [model for model, billions in MODELS.items() if billions < SMALL]
    rest = [model for model in MODELS if model not in small]
    cells = [(model, launch, method) for launch in FIRST for model in small for method in METHODS]
    return cells + [(model, launch, method) for model in rest for launch in FIRST for method in METHODS]


def main() -> int:
    """Makes the missing predictions; `--show` only prints the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--show", action="store_true")
    args = parser.parse_args()
    result = load()
    if not args.show:
        from toolkit.files import atomic_write

        os.environ.setdefault("OMP_NUM_THREADS", "1")
        for model, launch, method in order():
            for cards in _candidates(MODELS[model], method, launch):
                key = (model, method, launch, cards)
                known = [r for r in result["rows"] if (r["model"], r["method"], r["launch"], r["cards"]) == key]
                if not known:
                    try:
                        known = [predicted(*key)]
                    except RuntimeError as error:  # the child has printed its traceback
                        print(error, flush=True)
                        break
                    result["rows"] += known
                    atomic_write(RESULTS, json.dumps(result, indent=1) + "\n")
                    print(*key, known[0]["fits"], f"{known[0]['process_bytes'] / 2**30:.2f} GiB", flush=True)
                if known[0]["fits"]:
                    break
    for key, text in table(result["rows"]).items():
        print(*key, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
