"""Checks "fits": under an allocator limit, the largest batch predicted to fit must run, and the next larger one must run out.

And under the limits of smaller cards, one row that is longer than others publish must run with all levers (`REACH`).

The plan (which batch fits within which limit) is predicted without the card: by idle processors while the other parts run, or
beforehand (`--plan`), into `results/gpu/fits.json`. It takes no GPU time. The limit is on memory that PyTorch reserves, as set by
`torch.cuda.set_per_process_memory_fraction`; the CUDA context is not included.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
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
MOST = models.TRAIN_ROWS // 2 - 1  # rows; so that two steps with one row more are still whole batches


@dataclass(frozen=True)
class Ladder:
    """Configurations that only differ in their number of rows."""

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
REACH = {8: 2_972, 12: 21_848, 16: 40_724}  # GB of a card -> tokens that others publish for it
REACHED_IN_REHEARSAL = {8: 63}
LIMITS = (8, 12, 16, 24)  # GiB; MiB in a rehearsal


def ladders(rehearsed: bool) -> tuple[Ladder, ...]:
    """The ladders to try."""
    return REHEARSED if rehearsed else LADDERS


def limits(rehearsed: bool) -> list[int]:
    """The limits in bytes, ascending."""
    return [limit * (MIB if rehearsed else GIB) for limit in (LIMITS[:1] if rehearsed else LIMITS)]


def plan_key(facts: dict[str, Any]) -> str:
    """The key of a plan: GPU architecture, versions of the libraries that affect memory, and a hash of the toolkit's code."""
    names = ("torch", "transformers", "peft", "bitsandbytes")
    versions = {name: facts["versions"][name].split("+")[0] for name in names if name in facts["versions"]}
    capability = facts.get("capability")
    where = "cpu" if capability is None else f"sm_{capability[0]}{capability[1]}"
    code = hashlib.sha256()
    for path in sorted((ROOT / "toolkit").rglob("*.py")):
        code.update(path.read_bytes())
    return f"{where}, {stack_key(versions)}, toolkit {code.hexdigest()[:12]}"


def known_plan(facts: dict[str, Any], extra: Path | None = None) -> dict[str, dict[str, dict[str, int]]]:
    """The known plans: ladder -> limit -> {"rows": most rows that fit, "reserved": their bytes, "one_more": bytes of one row more}."""
    found: dict[str, Any] = {}
    for path in (PLAN, extra):
        if path is not None and path.is_file():
            found |= json.loads(path.read_text(encoding="utf-8")).get(plan_key(facts), {})
    return found


def keep_plan(facts: dict[str, Any], ladder: str, plan: dict[str, Any], path: Path) -> None:
    """Adds a ladder's plan to a file of plans."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    content.setdefault(plan_key(facts), {})[ladder] = plan
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def plan_item(ladder: Ladder, facts: dict[str, Any], work: Path, rehearsed: bool) -> Item:
    """The item that plans one ladder."""
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
    """For each planned ladder and limit, two items: the most rows that are predicted to fit, and one row more."""
    result = []
    for ladder in ladders(rehearsed):
        for limit, found in plans.get(ladder.name, {}).items():
            for rows, expected in ((found["rows"], "fits"), (found["rows"] + 1, "runs out")):
                if rows == 0 or found["rows"] > MOST:  # if even more rows might fit, the boundary is unknown
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


def reach_items(work: Path, rehearsed: bool) -> list[Item]:
    """One item for each card of `REACH`: QLoRA of Llama-3.1-8B with one row of one token more than others publish."""
    model = "small-llama" if rehearsed else "llama-8b"
    return [
        Item(
            f"fits {gb} GB card, {tokens + 1} tokens",
            "fits",
            "on_gpu.fits:reached",
            {"gb": gb, "tokens": tokens + 1, "model": model, "work": str(work), "rehearsed": rehearsed},
            30 + tokens / 1000,
            gb + 1.5,
            (f"model {model}",),
        )
        for gb, tokens in (REACHED_IN_REHEARSAL if rehearsed else REACH).items()
    ]


# ---- jobs


def reached(gb: int, tokens: int, model: str, work: str, rehearsed: bool) -> dict[str, Any]:
    """Trains two steps on one row of `tokens` tokens under the limit of a card with `gb` GB."""
    import reach

    from toolkit.config import parse_config
    from toolkit.memory.cuda.cards import find_card
    from toolkit.memory.measure import MemoryCallback
    from toolkit.methods.qlora import QLora
    from toolkit.models.loading import load_model
    from toolkit.runs.prediction import Batches, worst_batch
    from toolkit.training.trainer import FineTuner

    it, card = device(rehearsed), find_card(reach.CARDS[gb])
    limit = card.budget_bytes - card.context_bytes
    it.limit(limit)
    levers = reach.LEVERS[
        "and MLP in tiles" if rehearsed else "and layer inputs on the host"
    ]  # a CPU has no other host
    argv = ["--model_name_or_path", str(models.folder_of(work, model)), *reach.RECIPE, *levers, "--max_steps", "2"]
    argv += ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1", "--max_length", str(tokens)]
    argv += [
        "--output_dir",
        str(Path(work) / "measured" / slug(f"reach {gb}")),
        "--save_strategy",
        "no",
        "--report_to",
        "none",
    ]
    config = parse_config(QLora, [*argv, *(["--use_cpu"] if rehearsed else [])])
    batches = [worst_batch(config, config.model_config, (tokens, tokens - 1))] * 2
    memory = MemoryCallback()

    def train() -> dict[str, Any]:
        base = load_model(config.model, config.model_config, config.dtype, config.training, config.engine)
        FineTuner(config.method.attach(base), config, Batches(batches), [memory]).train()
        assert memory.ledger is not None, memory.problem
        return training.ledger_row(memory.ledger)

    return outcome_of(train, limit, "fits") | {"limit_bytes": limit}


def outcome_of(train: Callable[[], dict[str, Any]], limit: int, expected: str) -> dict[str, Any]:
    """What `train()` found, with the outcome: whether it ran within `limit` bytes. A CPU enforces none, so sizes are compared too."""
    from on_gpu.pool import is_out_of_memory

    try:
        found = train()
        outcome = "fits" if found["peak"]["reserved_bytes"] <= limit else "runs out"
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


def _flags(ladder: Ladder, rows: int) -> tuple[str, ...]:
    # qlora's default is true; earlier calls had whole logits
    own = ("--gradient_checkpointing", "false", "--loss_chunk_tokens", "0")
    return ("--bf16", "--per_device_train_batch_size", str(rows), "--max_length", str(ladder.length), *own)


def plan(ladder: dict[str, Any], facts: dict[str, Any], work: str, rehearsed: bool) -> dict[str, dict[str, int]]:
    """For each limit, the most rows that are predicted to fit (0: none), by bisection."""
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
    for limit in limits(rehearsed):  # ascending, so the last limit's rows fit too
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
    """Trains two steps under the limit, and compares the outcome with the expected one."""
    one = Ladder(**ladder)
    it = device(rehearsed)
    output = str(Path(work) / "measured" / slug(f"fits {limit} {one.name} {rows}"))
    argv = training.flags(work, one.model, _flags(one, rows), output, rehearsed)
    it.limit(limit)

    def train() -> dict[str, Any]:
        found = training.measured(one.method, argv)[1]
        return {"peak": found["peak"], "allocator": found.get("allocator")}

    return outcome_of(train, limit, expected)
