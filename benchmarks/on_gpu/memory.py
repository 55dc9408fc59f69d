"""Checks predictions: each configuration trains two traced steps on the card; the same two steps are predicted without it.

The results keep the shapes of the measured batches, so that any machine can predict the same steps. One more step runs
without the trace, because a traced step can hold more memory (see `toolkit.memory.measure`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from on_gpu import models, training
from on_gpu.items import Item
from on_gpu.results import error_percent, slug

SHAPES = ((4, 512), (1, 1024))  # rows x --max_length
REHEARSED_SHAPE = (2, 64)
METHODS = {"lora": "lora", "qlora": "qlora", "full": "full", "ia3": "ia3"}  # shown name -> recipe
MODELS = ("llama-1b", "flan-t5-base", "llama-3b", "qwen-1.5b", "mt0-large", "llama-8b")
# Guesses: GiB with full fine-tuning, with LoRA in bf16, and with a quantized base; seconds
NEEDS = {
    "small-llama": (2, 2, 2, 6),
    "small-t5": (2, 2, 2, 6),
    "llama-1b": (28, 10, 8, 9),
    "flan-t5-base": (9, 5, 5, 9),
    "bart-base": (6, 4, 4, 8),
    "qwen-1.5b": (38, 12, 10, 11),
    "llama-3b": (62, 16, 10, 14),
    "mt0-large": (32, 12, 12, 12),
    "llama-8b": (160, 28, 16, 25),
}
TOLERANCE_PERCENT = {
    "allocated_bytes": 1.0,
    "reserved_bytes": 3.0,
    "untraced_allocated_bytes": 1.0,
}  # a row with a larger error counts as different


@dataclass(frozen=True)
class Configuration:
    """One point of the grid: a recipe and its flags on a model; `allocator` has the settings of PYTORCH_ALLOC_CONF."""

    name: str
    method: str
    model: str
    flags: tuple[str, ...]
    allocator: str | None = None
    snapshot: bool = False

    def item(self, work: Path, artifacts: Path, rehearsed: bool) -> Item:
        """The item that measures it."""
        full, frozen, quantized, seconds = NEEDS[self.model]
        bits = self.method == "qlora" or "--load_in_8bit" in self.flags
        gib = full if self.method == "full" else quantized if bits else frozen
        arguments = {
            "configuration": vars(self),
            "work": str(work),
            "artifacts": str(artifacts),
            "rehearsed": rehearsed,
        }
        return Item(self.name, "memory", "on_gpu.memory:measure", arguments, seconds, gib, (f"model {self.model}",))


def grid(rehearsed: bool = False) -> list[Configuration]:
    """All configurations, the most informative first: every model with every method, each option once, then the other shape."""
    first, second = SHAPES
    result = [_plain(model, method, first) for method, model in product(METHODS, MODELS)]
    result += _turned("llama-1b", ("lora", "full"))
    result += _turned("flan-t5-base", ("lora", "full"))
    result += _single()
    result += [_plain(model, method, second) for method, model in product(METHODS, MODELS)]
    # needs at least 16 bytes per weight, more than any card has
    result = [c for c in result if (c.model, c.method) != ("llama-8b", "full")]
    return _small(result) if rehearsed else result


def _sizes(shape: tuple[int, int], *precision: str) -> tuple[str, ...]:
    # qlora's default is true; whole logits show more of the allocator, and rows of earlier calls had them
    own = ("--gradient_checkpointing", "false", "--loss_chunk_tokens", "0")
    return ("--per_device_train_batch_size", str(shape[0]), "--max_length", str(shape[1]), *own, *precision)


def _plain(model: str, method: str, shape: tuple[int, int]) -> Configuration:
    return Configuration(f"{model} {method} {shape[0]}x{shape[1]}", METHODS[method], model, _sizes(shape, "--bf16"))


OPTIONS: dict[str, tuple[str, ...]] = {
    "checkpointed": ("--bf16", "--gradient_checkpointing"),
    "eager": ("--bf16", "--attn_implementation", "eager"),
    "adamw-8bit": ("--bf16", "--optim", "adamw_bnb_8bit"),
    "paged": ("--bf16", "--optim", "paged_adamw_8bit"),
    "fp32": ("--bf16", "false"),
    "accumulated": ("--bf16", "--gradient_accumulation_steps", "2"),
    "expandable": ("--bf16",),
    "chunks": ("--bf16", "--loss_chunk_tokens", "512"),
    "tiles": ("--bf16", "--loss_chunk_tokens", "512", "--mlp_tile_tokens", "256"),
    "in-backward": ("--bf16", "--optimizer_in_backward"),
}


def _turned(model: str, methods: tuple[str, ...]) -> list[Configuration]:
    allocator = {"expandable": "expandable_segments:True"}
    return [
        Configuration(
            f"{model} {method} 2x512 {option}", method, model, _sizes((2, 512), *flags), allocator.get(option)
        )
        for option, flags in OPTIONS.items()
        for method in methods
    ]


def _single() -> list[Configuration]:
    """Configurations that only run on one model."""
    half, eight = _sizes((2, 512), "--fp16"), _sizes((2, 512), "--bf16", "--load_in_8bit")
    plain = _sizes((2, 512), "--bf16")
    return [
        Configuration("llama-1b lora 2x512 fp16", "lora", "llama-1b", half),
        Configuration("llama-1b full 2x512 fp16", "full", "llama-1b", half),
        Configuration("llama-1b qlora 2x512 8-bit", "qlora", "llama-1b", eight),
        Configuration("flan-t5-base qlora 2x512 8-bit", "qlora", "flan-t5-base", eight),
        Configuration("llama-8b qlora 2x512 8-bit", "qlora", "llama-8b", eight),
        Configuration("llama-8b qlora 2x512 checkpointed", "qlora", "llama-8b", (*plain, "--gradient_checkpointing")),
        Configuration("bart-base lora 2x512", "lora", "bart-base", plain),
        Configuration("bart-base full 2x512", "full", "bart-base", plain),
        Configuration("llama-1b prefix_tuning 2x512", "prefix_tuning", "llama-1b", plain),
        Configuration("flan-t5-base adapter 2x512", "adapter", "flan-t5-base", plain),
        *(
            Configuration(f"small-llama {method} 2x512 snapshot", method, "small-llama", plain, snapshot=True)
            for method in METHODS.values()
        ),
    ]


KEPT = ("", "expandable", "8-bit", "snapshot", "chunks", "tiles", "in-backward")  # options that a rehearsal tries


def _small(whole: list[Configuration]) -> list[Configuration]:
    """Each method once on a small Llama, LoRA also on a T5 and a BART, and the options in `KEPT`."""
    result: dict[str, Configuration] = {}
    for one in whole:
        seq2seq = {"flan-t5-base": "small-t5", "bart-base": "bart-base"}
        kind = seq2seq.get(one.model, "small-llama")
        option = " ".join(one.name.split()[3:])
        key = option or f"{kind} {one.method}"
        if key in result or option not in KEPT or (kind != "small-llama" and one.method != "lora"):
            continue
        flags = list(one.flags)
        flags[1], flags[3] = map(str, REHEARSED_SHAPE)
        name = f"{kind} {one.method} {option}".strip()
        result[key] = Configuration(name, one.method, kind, tuple(flags), one.allocator, one.snapshot)
    return list(result.values())


# ---- jobs


def measure(configuration: Mapping[str, Any], work: str, artifacts: str, rehearsed: bool) -> dict[str, Any]:
    """Trains the configuration's two steps on the card, and saves the whole ledger to `artifacts`."""
    one = Configuration(**{**configuration, "flags": tuple(configuration["flags"])})
    output = Path(work) / "measured" / slug(one.name)
    argv = training.flags(work, one.model, one.flags, str(output), rehearsed, training.UNTRACED_STEPS)
    snapshot = str(Path(artifacts) / f"{slug(one.name)}.snapshot.pickle") if one.snapshot else None
    memory, found = training.measured(one.method, argv, snapshot, one.allocator)
    memory.ledger.save(Path(artifacts) / f"{slug(one.name)}.measured.json")
    return found | {
        "method": one.method,
        "model": one.model,
        "flags": list(one.flags),
        "allocator_settings": one.allocator,
    }


def card_of(facts: Mapping[str, Any]) -> Any:
    """The measured card for a prediction; None for a CPU. Uses the measured context if there is one."""
    from toolkit.memory.cuda.cards import Card, card_of_device

    if facts.get("capability") is None:
        return None
    capability = (facts["capability"][0], facts["capability"][1])
    card = card_of_device(facts["name"], capability, facts["multiprocessors"], facts["total_bytes"])
    if facts.get("context_bytes"):
        card = Card(**{**vars(card), "context_bytes": facts["context_bytes"], "context_is_estimate": False})
    return card


def predict(row: Mapping[str, Any], source: str | dict[str, Any], facts: dict[str, Any], work: str) -> dict[str, Any]:
    """Predicts the steps of a measured row for the card of `facts`, in a process without visible GPUs."""
    from toolkit.distributed.launch_files import ONE_PROCESS
    from toolkit.runs.prediction import PredictionJob

    if isinstance(source, str):
        name = source
    else:  # not in the catalogue: a folder with only a config is enough
        folder = Path(work) / "configs" / row["model"]
        models.config_of(source).save_pretrained(folder)
        name = str(folder)
    card = card_of(facts)
    flags = ["--model_name_or_path", name, "--max_steps", "2", "--report_to", "none", *row["flags"]]
    batches = [training.rebuilt(batch) for batch in row["batches"]]
    if card is None:
        flags.append("--use_cpu")
    ledger = PredictionJob.of(row["method"], flags, ONE_PROCESS, card, batches=batches).predict()
    return training.ledger_row(ledger)


def prediction_item(row: dict[str, Any], facts: dict[str, Any], work: Path, rehearsed: bool) -> Item:
    """The item that predicts a measured row."""
    env = {"CUDA_VISIBLE_DEVICES": "", "PYTORCH_ALLOC_CONF": row.get("allocator_settings") or ""}
    needed = {name: row[name] for name in ("method", "model", "flags", "batches")}
    source = models.by_label(rehearsed)[row["model"]].source
    arguments = {"row": needed, "source": source, "facts": facts, "work": str(work)}
    return Item(f"predict {row['name']}", "predictions", "on_gpu.memory:predict", arguments, 20.0, env=env)


def compared(row: Mapping[str, Any], predicted: dict[str, Any]) -> dict[str, Any]:
    """The fields that a prediction adds to a measured row: errors, and what the trace itself added to the step.

    The step without the trace is compared with the predicted steady step, because it does not include loading and the
    first step; only if all traced batches have the same shapes, because then the later batches have them too.
    """
    error = {
        kind: error_percent(predicted["peak"][kind], row["peak"][kind])
        for kind in ("allocated_bytes", "reserved_bytes")
    }
    found: dict[str, Any] = {"predicted": predicted}
    if "untraced_allocated_bytes" in row and _same_shapes(row):
        untraced = row["untraced_allocated_bytes"]
        error["untraced_allocated_bytes"] = error_percent(steady_peak(predicted), untraced)
        found["trace_percent"] = error_percent(steady_peak(row), untraced)
    wrong = [kind for kind, value in error.items() if abs(value) > TOLERANCE_PERCENT[kind]]
    says = ", ".join(f"{kind.removesuffix('_bytes').replace('_', ' ')} {value:+.2f} %" for kind, value in error.items())
    return found | {"error_percent": error, "agrees": not wrong, "says": says}


def _same_shapes(row: Mapping[str, Any]) -> bool:
    """Whether the traced batches have the same shapes."""
    shapes = [{name: shape for name, shape in batch.items() if name != "tokens"} for batch in row["batches"]]
    return all(shape == shapes[0] for shape in shapes)


def steady_peak(row: Mapping[str, Any]) -> int:
    """The peak allocated bytes over the phases of the steady step."""
    return max(peak for name, (peak, _) in row["phases"].items() if name != "load")
