"""How fast: tokens a second and the peak of each step of the ladder, beside a bare loop and plain Trainer with PEFT.

Each contender is a process of its own, in the same order for each model, on batches of the same shape; the first steps warm
up, the others give the median. What the card itself can do is measured in the same call: a step's fraction of its matrix
products counts 2 operations a weight and token forward, 2 backward for the gradients of activations, and 2 for those of
weights that train (scores of attention, 3 % at these lengths, and what checkpointing computes again are not counted); its
fraction of the copy rate counts each weight read twice a step.
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


LADDER = (  # add a step here, and it is measured
    Step("lora", "lora"),
    Step("lora, checkpointing", "lora", ("--gradient_checkpointing",)),
    Step("qlora, checkpointing", "qlora", ("--gradient_checkpointing",)),
    Step("full", "full"),
    Step("full, 8-bit AdamW", "full", ("--optim", "adamw_bnb_8bit")),
)
BESIDE = ("bare loop", "Trainer + PEFT")  # of the ladder's first step
SHAPES = {"llama-1b": (4, 1024), "flan-t5-base": (8, 512), "small-llama": (2, 64), "small-t5": (2, 64)}  # rows x length


def items(work: Path, rehearsed: bool) -> list[Item]:
    """The card's own rates, then the first step beside its rivals, then the rest of the ladder."""
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
    """Row's name -> its fractions of the card's matrix products and copy rate, once the card's own rates are there."""
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
