"""Predicts the longest rows, and the largest batches, that each card can train on, with more and more levers.

    python benchmarks/reach.py              # continues where it stopped; takes about an hour on two slow cores
    python benchmarks/reach.py --show       # the committed results

The runs are those of a table that others publish (Unsloth's README, "Context length benchmarks", Llama 3.1 8B): QLoRA of rank 32
without dropout on all linear layers, one row, activations recomputed. Its column for transformers with FlashAttention-2 has no
levers and PEFT's casts to fp32; SDPA's flash kernel keeps the same tensors. That column shows whether predictions flatter. The
model's limit of 131,072 positions is lifted, as theirs is. Each found length fits, and one of `STEP` more does not; both are predicted.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "reach.json"
MODEL = "meta-llama/Llama-3.1-8B"
CARDS = {  # GB -> a card of that size
    8: "RTX 4060",
    12: "RTX 3060",
    16: "RTX 4080",
    24: "RTX 4090",
    32: "RTX 5090",
    40: "A100 40GB",
    48: "L40S",
    80: "A100 80GB",
}
PUBLISHED = {  # GB -> tokens: transformers with FlashAttention-2 (0: does not fit), and Unsloth
    8: (0, 2_972),
    12: (932, 21_848),
    16: (2_551, 40_724),
    24: (5_789, 78_475),
    40: (12_264, 153_977),
    48: (15_502, 191_728),
    80: (28_454, 342_733),
}
RECIPE = ["--bf16", "--lora_r", "32", "--lora_dropout", "0", "--lora_target_modules", "all-linear"]
RECIPE += ["--activation_checkpointing", "--optim", "adamw_bnb_8bit"]
LEVERS = {  # cumulative
    "none, PEFT's fp32 casts": ["--loss_chunk_tokens", "0", "--kbit_upcast", "all"],  # as others measured
    "none": ["--loss_chunk_tokens", "0"],
    "loss in chunks": [],
    "and MLP in tiles": ["--mlp_tile_tokens", "4096"],
    "and layer inputs on the host": [
        *("--mlp_tile_tokens", "4096"),
        *("--activation_checkpointing_kwargs", '{"offload": true}'),
    ],
}
BATCH_LENGTH = 2048  # tokens of a row, for the largest batch
STEP = 0.03  # by how much more does not fit


def needed(levers: str, card: str, rows: int, tokens: int) -> dict[str, int]:
    """Bytes that a run needs on `card`, and what the card has."""
    from toolkit.distributed.launch_files import ONE_PROCESS
    from toolkit.memory.cuda.cards import find_card
    from toolkit.models.arguments import ModelArguments
    from toolkit.models.loading import load_model_config
    from toolkit.runs.prediction import PredictionJob

    with tempfile.TemporaryDirectory() as folder:
        config = load_model_config(ModelArguments(model_name_or_path=MODEL), needs_weights=False)
        config.max_position_embeddings = 2**20
        config.save_pretrained(folder)
        flags = ["--model_name_or_path", folder, "--per_device_train_batch_size", str(rows)]
        flags += ["--max_length", str(tokens), "--max_target_length", str(tokens - 1)]  # every token has a label
        flags += [*RECIPE, *LEVERS[levers]]
        ledger = PredictionJob.of("qlora", flags, ONE_PROCESS, find_card(card)).predict()
    return {
        "needed_bytes": ledger.needed_bytes,
        "budget_bytes": ledger.budget_bytes or 0,
        "host_bytes": ledger.host_bytes,
        "copied_bytes": ledger.copied_bytes,
    }


def most(kind: str, levers: str, gb: int, known: dict[int, int]) -> dict[str, Any]:
    """The row of the results: the most tokens (`kind` "length") or rows of `BATCH_LENGTH` tokens ("batch") that fit.

    `known` has the bytes that other amounts need, perhaps on other cards, for a first guess; what is predicted here is added.
    """
    from toolkit.memory.cuda.cards import find_card

    least = 16 if kind == "length" else 1
    low, high, fitting = 0, 0, {}  # the most that is known to fit, the least that is known not to
    amount, predictions = (512 if kind == "length" else 1) * max(1, gb // 8), 0
    if len(known) > 1:
        amount = max(least, min(_next(known, find_card(CARDS[gb]).budget_bytes, max(known), 0), 4 * max(known)))
    while not high or high - low > max(1, round(low * STEP)):
        found = needed(levers, CARDS[gb], *((1, amount) if kind == "length" else (amount, BATCH_LENGTH)))
        known[amount], predictions = found["needed_bytes"], predictions + 1
        if found["needed_bytes"] <= found["budget_bytes"]:
            low, fitting = amount, found
        else:
            high = amount
        if high and high <= least:
            break
        amount = max(least, _next(known, found["budget_bytes"], low, high))
    row = {"kind": kind, "levers": levers, "gb": gb, "card": CARDS[gb], "most": low, "not": high}
    return row | fitting | {"date": datetime.date.today().isoformat(), "predictions": predictions}


def _next(known: dict[int, int], budget: int, low: int, high: int) -> int:
    """What to try next: where a line through two high amounts meets the budget, or halfway between `low` and `high`."""
    if (low and high) or len(known) < 2:
        return (low + high) // 2 if high else 2 * low
    two = max(known)
    one = max((amount for amount in known if amount < 0.9 * two), default=min(known))  # memory grows in steps
    guess = two + int((budget - known[two]) * (two - one) / max(1, known[two] - known[one]))
    if high:
        return min(guess, int(high * (1 - STEP))) if guess > 0 else high // 2
    return min(max(guess, low + max(1, round(low * STEP))), 4 * low)


def next_row(case: tuple[str, str], gb: int, known: dict[int, int]) -> tuple[dict[str, Any], dict[int, int]]:
    """`most`, and all that is known then; runs in a process of its own."""
    return most(*case, gb, known), known


def cases() -> Iterator[tuple[str, str]]:
    """(kind, levers) of the rows."""
    yield from (("length", levers) for levers in LEVERS)
    yield from (("batch", levers) for levers in ("none", "and MLP in tiles"))


def load() -> dict[str, Any]:
    """The committed results, or none."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"rows": []}


def save(rows: list[dict[str, Any]]) -> None:
    """Writes the results, each row as one line."""
    from on_gpu.results import rows_as_lines

    from toolkit.files import atomic_write
    from toolkit.memory.environment import stack_versions

    order = {case: number for number, case in enumerate(cases())}
    rows = sorted(rows, key=lambda row: (order[row["kind"], row["levers"]], row["gb"]))
    atomic_write(RESULTS, rows_as_lines({"model": MODEL, "stack": stack_versions(), "rows": rows}))


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the results."""
    for row in rows:
        what = "tokens in one row" if row["kind"] == "length" else f"rows of {BATCH_LENGTH:,} tokens"
        print(f"{row['gb']:3d} GB  {row['levers']:30s} {row['most']:8,d} {what}, {row['not']:,} do not fit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="print the committed results")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="predictions at the same time")
    arguments = parser.parse_args()
    rows = load()["rows"]
    if not arguments.show:
        done = {(row["kind"], row["levers"], row["gb"]) for row in rows}
        left = {case: [gb for gb in CARDS if (*case, gb) not in done] for case in cases()}
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(arguments.workers, spawn) as pool:
            running = {pool.submit(next_row, case, gbs.pop(0), {}): case for case, gbs in left.items() if gbs}
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    case, (row, known) = running.pop(future), future.result()
                    rows.append(row)
                    save(rows)
                    if left[case]:
                        running[pool.submit(next_row, case, left[case].pop(0), known)] = case
    show(load()["rows"])


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
