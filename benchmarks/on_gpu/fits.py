"""Does "fits" mean fits? Under a limit of the allocator, the largest batch predicted to fit runs, and the next one runs out.

The plan (which batch fits within which limit) is predicted without the card: by processors that have nothing else to do while
the other parts run, or beforehand (`--plan`), in `results/gpu/fits.json`. No minute of a GPU is spent on it. The limit is on what PyTorch reserves: that is what
`torch.cuda.set_per_process_memory_fraction` limits, and a context comes on top.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from on_gpu import models, training
from on_gpu.card import device
from on_gpu.items import Item
from on_gpu.machine import ROOT
from on_gpu.results import RESULTS, slug, stack_key
from toolkit.files import atomic_write

GIB, MIB = 2**30, 2**20
PLAN = RESULTS / "fits.json"
MOST = models.TRAIN_ROWS // 2 - 1  # rows that fit, so that two steps of one row more are whole batches too


@dataclass(frozen=True)
class Ladder:
    """Configurations that differ in their rows alone."""

    method: str
    model: str
    length: int
    seconds: float

    @property
    def name(self) -> str:
        """Such as "lora llama-1b"."""
        return f"{self.method} {self.model}"


LADDERS = (
    Ladder("lora", "llama-1b", 512, 12),
    Ladder("qlora", "llama-3b", 512, 16),
    Ladder("full", "flan-t5-base", 256, 14),
)
REHEARSED = (Ladder("lora", "small-llama", 64, 6),)
LIMITS = (8, 12, 16, 24)  # GiB; MiB in a rehearsal


def ladders(rehearsed: bool) -> tuple[Ladder, ...]:
    """Those that are tried."""
    return REHEARSED if rehearsed else LADDERS


def limits(rehearsed: bool) -> list[int]:
    """Bytes."""
    return [limit * (MIB if rehearsed else GIB) for limit in (LIMITS[:1] if rehearsed else LIMITS)]


def plan_key(facts: dict[str, Any]) -> str:
    """A plan holds for an architecture, the versions that memory depends on, and the toolkit's own code."""
    names = ("torch", "transformers", "peft", "bitsandbytes")
    versions = {name: facts["versions"][name].split("+")[0] for name in names if name in facts["versions"]}
    capability = facts.get("capability")
    where = "cpu" if capability is None else f"sm_{capability[0]}{capability[1]}"
    code = hashlib.sha256()
    for path in sorted((ROOT / "toolkit").rglob("*.py")):
        code.update(path.read_bytes())
    return f"{where}, {stack_key(versions)}, toolkit {code.hexdigest()[:12]}"


def known_plan(facts: dict[str, Any], extra: Path | None = None) -> dict[str, dict[str, dict[str, int]]]:
    """Ladder -> limit -> {"rows": the most that fit, their "reserved" bytes, and those of one row more}, as far as planned."""
    found: dict[str, Any] = {}
    for path in (PLAN, extra):
        if path is not None and path.is_file():
            found |= json.loads(path.read_text(encoding="utf-8")).get(plan_key(facts), {})
    return found


def keep_plan(facts: dict[str, Any], ladder: str, plan: dict[str, Any], path: Path) -> None:
    """Adds one ladder's plan to a file of plans."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    content.setdefault(plan_key(facts), {})[ladder] = plan
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def plan_item(ladder: Ladder, facts: dict[str, Any], work: Path, rehearsed: bool) -> Item:
    """What plans one ladder."""
    arguments = {"ladder": vars(ladder), "facts": facts, "work": str(work), "rehearsed": rehearsed}
    return Item(
        f"plan {ladder.name}",
        "plans",
        "on_gpu.fits:plan",
        arguments,
        180,
        env={"CUDA_VISIBLE_DEVICES": "", "PYTORCH_ALLOC_CONF": ""},
    )


def items(plans: dict[str, dict[str, dict[str, int]]], work: Path, rehearsed: bool) -> list[Item]:
    """For each limit, the most rows predicted to fit and one row more, of each ladder that has a plan."""
    result = []
    for ladder in ladders(rehearsed):
        for limit, found in plans.get(ladder.name, {}).items():
            for rows, expected in ((found["rows"], "fits"), (found["rows"] + 1, "runs out")):
                if rows == 0 or found["rows"] > MOST:  # where more rows might fit, there is no next one to try
                    continue
                unit, size = ("MiB", MIB) if rehearsed else ("GiB", GIB)
                name = f"fits {int(limit) // size} {unit} {ladder.name} {rows}x{ladder.length}"
                arguments = {"ladder": vars(ladder), "rows": rows, "limit": int(limit), "expected": expected}
                arguments |= {"work": str(work), "rehearsed": rehearsed}
                gib = int(limit) / GIB + 1.5
                result.append(
                    Item(name, "fits", "on_gpu.fits:tried", arguments, ladder.seconds, gib, (f"model {ladder.model}",))
                )
    return sorted(result, key=lambda item: item.arguments["limit"])


# ---- jobs


def _flags(ladder: Ladder, rows: int) -> tuple[str, ...]:
    return ("--bf16", "--per_device_train_batch_size", str(rows), "--max_length", str(ladder.length))


def plan(ladder: dict[str, Any], facts: dict[str, Any], work: str, rehearsed: bool) -> dict[str, dict[str, int]]:
    """For each limit, how many rows are predicted to fit, by bisection; 0: not one."""
    from on_gpu.memory import card_of
    from toolkit.config import parse_config
    from toolkit.memory.cuda.device import Cuda
    from toolkit.memory.shadow.step import CPU
    from toolkit.methods import METHODS
    from toolkit.runs.prediction import predict_run

    one = Ladder(**ladder)
    source = models.by_label(rehearsed)[one.model].source
    name = source if isinstance(source, str) else str(Path(work) / "configs" / one.model)
    if not isinstance(source, str):
        models.config_of(source).save_pretrained(name)
    card = card_of(facts)
    target = (
        "--max_target_length",
        str(8 if rehearsed else 128 if models.by_label(rehearsed)[one.model].is_seq2seq else 16),
    )
    seen: dict[tuple[int, int], int] = {}

    def reserved(rows: int, limit: int) -> int:
        if (rows, limit) not in seen:
            argv = [
                "--model_name_or_path",
                name,
                "--max_steps",
                "2",
                "--report_to",
                "none",
                *target,
                *_flags(one, rows),
            ]
            config = parse_config(METHODS[one.method], [*argv, *(["--use_cpu"] if card is None else [])], card)
            where = CPU if card is None else Cuda(card, budget_bytes=limit + card.context_bytes)
            seen[rows, limit] = predict_run(config, where).reserved_bytes
        return seen[rows, limit]

    result = {}
    low = 0
    for limit in limits(rehearsed):  # ascending: what fits less fits more
        high = max(1, low)
        while low < MOST and reserved(high, limit) <= limit:
            low, high = high, min(high * 2, MOST + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if reserved(middle, limit) <= limit else (low, middle)
        fitting = reserved(low, limit) if low else 0
        result[str(limit)] = {"rows": low, "reserved": fitting, "one_more": reserved(low + 1, limit)}
    return result


def tried(ladder: dict[str, Any], rows: int, limit: int, expected: str, work: str, rehearsed: bool) -> dict[str, Any]:
    """Trains two steps under the limit; whether it fitted as expected."""
    one = Ladder(**ladder)
    it = device(rehearsed)
    output = str(Path(work) / "measured" / slug(f"fits {limit} {one.name} {rows}"))
    argv = training.flags(work, one.model, _flags(one, rows), output, rehearsed)
    it.limit(limit)
    found: dict[str, Any] = {}
    from on_gpu.pool import is_out_of_memory

    try:
        found = training.measured(one.method, argv)[1]
        peak = found["peak"]["reserved_bytes"]
        outcome = "fits" if peak <= limit else "runs out"  # a CPU has no limit: a rehearsal compares
        found = {"peak": found["peak"], "allocator": found.get("allocator")}
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        outcome, found = "runs out", {"error": " ".join(str(error).split())[:600]}
    return found | {
        "expected": expected,
        "outcome": outcome,
        "agrees": outcome == expected,
        "says": f"{outcome}, predicted: {expected}",
    }
