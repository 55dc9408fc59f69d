"""Speed: tokens per second and peak memory of each step of a ladder, compared with a bare loop and with plain Trainer and PEFT.

Each contender runs in its own process, in the same order for each model, on batches of the same shape. The first steps are warm-up;
the others give the median. The card's own rates are measured in the same call. The fraction of the matrix product rate counts, per
weight and token, 2 operations in the forward pass, 2 in the backward pass for gradients of activations, and 2 for gradients of
trained weights. It does not count attention scores (3 % at these lengths) and recomputation by checkpointing. The fraction of the
copy rate counts two reads of each weight per step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from on_gpu.items import WHOLE, Item


@dataclass(frozen=True)
class Step:
    """One step of the ladder: a recipe and its flags."""

    name: str
    method: str
    flags: tuple[str, ...] = ()


WHOLE_LOSS = ("--loss_chunk_tokens", "0")  # as in the bare loop, in Trainer, and in earlier calls
CHECKPOINTING = "--activation_checkpointing"
LADDER = (  # every step added here is measured
    Step("lora", "lora", WHOLE_LOSS),
    Step("lora, checkpointing", "lora", (*WHOLE_LOSS, CHECKPOINTING)),
    Step("qlora, checkpointing", "qlora", (*WHOLE_LOSS, CHECKPOINTING)),
    Step("full", "full", WHOLE_LOSS),
    Step("full, 8-bit AdamW", "full", (*WHOLE_LOSS, "--optim", "adamw_bnb_8bit")),
    Step("lora, loss in chunks", "lora"),
    Step("lora, and MLP in tiles", "lora", ("--mlp_tile_tokens", "256")),
    Step("lora, and checkpointing", "lora", ("--mlp_tile_tokens", "256", CHECKPOINTING)),
    Step(
        "lora, and layer inputs on the host",
        "lora",
        ("--mlp_tile_tokens", "256", CHECKPOINTING, "--activation_checkpointing_kwargs", '{"offload": true}'),
    ),
    Step("full, loss in chunks, 8-bit AdamW", "full", ("--optim", "adamw_bnb_8bit")),
    Step("full, and optimizer in backward", "full", ("--optim", "adamw_bnb_8bit", "--optimizer_in_backward")),
)
BESIDE = ("bare loop", "Trainer + PEFT")  # compared with the ladder's first step
SHAPES = {"llama-1b": (4, 1024), "flan-t5-base": (8, 512), "small-llama": (2, 64), "small-t5": (2, 64)}  # rows x length


def items(work: Path, rehearsed: bool) -> list[Item]:
    """Items for the card's own rates, the first step and its contenders, and the rest of the ladder."""
    labels = ("small-llama",) if rehearsed else ("llama-1b", "flan-t5-base")
    result = [Item("speed card", "speed", "on_gpu.speed_jobs:rates", {"rehearsed": rehearsed}, 6, WHOLE)]
    common = {"work": str(work), "rehearsed": rehearsed}
    for number, step in enumerate(LADDER[:1] if rehearsed else LADDER):
        for label in labels:
            for contender in (*BESIDE, "footprint") if number == 0 else ("footprint",):
                arguments = common | {"label": label, "step": vars(step), "contender": contender}
                name = f"speed {label} {step.name}, {contender}"
                result.append(
                    Item(name, "speed", "on_gpu.speed_jobs:measure", arguments, 14, WHOLE, (f"model {label}",))
                )
    return result


def fractions(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Row's name -> its fractions of the card's matrix product rate and copy rate; empty before those are measured."""
    card = next((row for row in rows if row["name"] == "speed card" and row["status"] == "ok"), None)
    if card is None:
        return {}
    return {
        row["name"]: {
            "of_matrix_products": round(
                row["operations"] / median(row["seconds"]) / card["product_operations_per_second"], 4
            ),
            "of_copy_rate": round(row["read_bytes"] / median(row["seconds"]) / card["copy_bytes_per_second"], 4),
        }
        for row in rows
        if row["status"] == "ok" and "operations" in row
    }
