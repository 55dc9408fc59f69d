"""The list of facts that were inferred from sources and are measured here. `fact_jobs` has the functions that measure them."""

from __future__ import annotations

from pathlib import Path

from on_gpu.items import WHOLE, Item


def items(work: Path, rehearsed: bool) -> list[Item]:
    """The items of all facts; those that predictions need come first."""
    common = {"work": str(work), "rehearsed": rehearsed}
    plain = [
        Item(f"facts {name}", "facts", f"on_gpu.fact_jobs:{name}", {"rehearsed": rehearsed}, seconds, WHOLE)
        for name, seconds in (
            ("context", 4),
            ("workspaces", 4),
            ("attention", 8),
            ("outliers", 5),
            ("paged", 5),
            ("scaler", 4),
        )
    ]
    labels = {
        "kernels": ("small-llama",) if rehearsed else ("llama-1b", "flan-t5-base", "bart-base"),
        "evaluation": ("small-t5",) if rehearsed else ("llama-1b", "flan-t5-base"),
    }
    of_models = [
        Item(
            f"facts {job} {label}",
            "facts",
            f"on_gpu.fact_jobs:{job}",
            common | {"label": label},
            12,
            12.0,
            (f"model {label}",),
        )
        for job in labels
        for label in labels[job]
    ]
    return plain + of_models
