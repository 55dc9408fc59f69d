"""Turns run folders into one plain object: the content of compare.json, from which every table and plot is made."""

import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from toolkit.compare.plan import FILE, Plan, Run
from toolkit.compare.runner import why_failed
from toolkit.compare.statistics import interval, paired_bootstrap
from toolkit.errors import UserError
from toolkit.errors.reading import check_shape, read_json, read_text
from toolkit.memory.ledger import Ledger
from toolkit.runs.finished_run import AGAIN, FinishedRun, read_completions, read_record
from toolkit.tasks import TASKS
from toolkit.tasks.base import Task
from toolkit.version import __version__


def collect(plan: Plan) -> dict[str, Any]:
    """The comparison of all finished runs. Sizes are in bytes, times in seconds, scores as in each run.json.

    There is an entry for the base model, for each method, and for each number of examples of in-context learning.

    Raises: UserError if no run is finished, or runs were scored on different rows.
    """
    records = {run: _record(run) for run in plan.runs if run.is_done}
    if not records:
        reasons = "; ".join(f"{run.method}: {why_failed(run)}" for run in plan.runs[:3])
        raise UserError(f"{plan.folder}: no run is done, so there is nothing to compare ({reasons})")
    begun, first = next(iter(records.items()))
    for run, record in records.items():
        if record["data"]["sha256"]["test"] != first["data"]["sha256"]["test"]:
            raise UserError(f"{run.folder} was scored on other rows than {begun.folder}; start a new comparison")
    completions = {run: read_completions(run.folder) for run in records}
    scored: dict[str, dict[Run, str]] = {"base": {}}  # entry -> run -> column in completions.csv and key in scores
    for run, record in records.items():
        for column in record["scores"]:
            scored.setdefault(_name(run.method, column), {})[run] = column
    entries = [_entry("base", (), scored["base"], records)] if scored["base"] else []
    for method in plan.methods:
        runs = plan.runs_of(method)
        own = [name for name in scored if name == method or name.startswith(f"{method}, ")] or [method]
        entries += [_entry(name, runs, scored.get(name, {}), records) for name in own]
    task = TASKS[first["task"]]
    rows, texts = _row_scores(task, completions, scored)
    for entry in entries:
        name = entry["method"]
        entry["difference"] = {
            other: paired_bootstrap(rows[name], rows[other], texts)
            for other in ("full", "base")
            if name in rows and other in rows and name != other
        }
    devices = {
        Ledger.load(run.folder / "memory.json").device for run in records if (run.folder / "memory.json").is_file()
    }
    return {
        "footprint": __version__,
        "date": date.today().isoformat(),
        "task": first["task"],
        "metrics": list(next(iter(first["scores"].values()))),
        "headline": task.metric,
        "higher_is_better": task.higher_is_better,
        "data": first["data"] | {"different_texts": len(set(texts))},
        "model": FinishedRun(begun.folder).base.model_name_or_path or "the tiny T5 that comes with footprint",
        "device": ", ".join(sorted(devices)) or None,
        "versions": first["versions"],
        "seeds": plan.seeds,
        "flags": read_json(plan.folder / FILE).get("flags", []),
        "entries": entries,
    }


def _record(run: Run) -> dict[str, Any]:
    """The record of a finished run, with what a comparison reads.

    Raises: UserError if it is damaged.
    """
    record, what = read_record(run.folder), f"{run.folder / 'run.json'} is damaged"
    needed: dict[str, Any] = {"scores": {str: {str: float}}, "precision": str, "seconds": float, "versions": dict}
    needed |= {"parameters": dict, "data": {"sha256": {"test": str}}}
    check_shape(record, needed, what, AGAIN)
    if not record["scores"] or any(not one for one in record["scores"].values()):
        raise UserError(f"{what}: it has no scores; {AGAIN}")
    return record


def _name(method: str, column: str) -> str:
    """The entry to which a column of completions.csv belongs."""
    return {"base": "base", "tuned": method}.get(column, f"{method}, {column}")


def _entry(
    name: str, runs: Sequence[Run], scored: dict[Run, str], records: dict[Run, dict[str, Any]]
) -> dict[str, Any]:
    """One entry; `runs` are the method's runs (none for base), `scored` the finished ones."""
    scores = [records[run]["scores"][column] for run, column in scored.items()]
    values = {metric: [one[metric] for one in scores] for metric in (scores[0] if scores else ())}
    failed = [{"seed": run.seed, "why": why_failed(run)} for run in runs if run not in records]
    entry: dict[str, Any] = {"method": name, "seeds": [run.seed for run in scored], "failed": failed}
    if name == "base":  # all runs score the base model; their scores agree, unless a random head depends on the seed
        values = {metric: each if len(set(each)) > 1 else each[:1] for metric, each in values.items()}
        return entry | {"seeds": [], "scores": _intervals(values)}
    entry["scores"] = _intervals(values)
    if not scored:
        return entry
    own = {run: records[run] for run in scored}
    some = next(iter(own.values()))
    entry |= {
        "trainable": some["parameters"]["trainable"],
        "all": some["parameters"]["all"],
        "saved_bytes": _saved_bytes(next(iter(own)).folder),
        "precision": some["precision"],
        "seconds": interval([record["seconds"] for record in own.values()]),
        "memory": _memory([run.folder for run in own]),
    }
    if "context" in some:
        costs = [record["context"][scored[run]] for run, record in own.items()]
        entry["context"] = {key: interval([cost[key] for cost in costs]) for key in costs[0]}
    curves = [_curve(run.folder) for run in own]
    if all(curves):
        entry |= {
            "train_seconds": interval([lines[-1]["seconds"] for lines in curves]),
            "tokens_per_second": interval([lines[-1]["tokens_per_second"] for lines in curves]),
            "curves": [{"seed": run.seed, "lines": lines} for run, lines in zip(own, curves, strict=True)],
        }
    return entry


def _intervals(values: dict[str, list[float]]) -> dict[str, Any]:
    return {metric: interval(each) | {"values": each} for metric, each in values.items()}


def _memory(folders: list[Path]) -> dict[str, Any] | None:
    """The measured peak of the seed that needed the most memory, and the prediction for the same batches."""
    measured = {f: Ledger.load(f / "memory.json") for f in folders if (f / "memory.json").is_file()}
    if not measured:
        return None
    worst = max(measured, key=lambda folder: measured[folder].reserved_bytes)
    found = {"measured": _peak(measured[worst])}
    if (worst / "predicted_memory.json").is_file():
        found["predicted"] = _peak(Ledger.load(worst / "predicted_memory.json"))
    return found


def _peak(ledger: Ledger) -> dict[str, Any]:
    return {
        "device": ledger.device,
        "allocated_bytes": ledger.allocated_bytes,
        "reserved_bytes": ledger.reserved_bytes,
        "process_bytes": ledger.process_bytes,
        "categories": ledger.categories_at_peak,
    }


def _saved_bytes(folder: Path) -> int:
    """Bytes of the saved adapter or model, without tokenizer and checkpoints."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _curve(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl: step, loss or eval_loss, seconds, tokens_per_second."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    kept = ("step", "loss", "eval_loss", "seconds", "tokens_per_second")
    try:
        lines = [json.loads(line) for line in read_text(path).splitlines()]
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged: a line is no JSON; {AGAIN}") from None
    check_shape(lines, [{f"{name}?": float for name in kept}], f"{path} is damaged", AGAIN)
    return [{name: line[name] for name in kept if name in line} for line in lines]


def _row_scores(
    task: Task, completions: dict[Run, dict[str, list[str]]], scored: dict[str, dict[Run, str]]
) -> tuple[dict[str, list[list[float]]], list[str]]:
    """The scores (seeds, rows) of every entry, and the rows' texts.

    Each pair of answer and reference is scored once, because the base model's answers are the same in all runs.
    """
    first = next(iter(completions.values()))
    references, rows = first["reference"], {}
    known: dict[tuple[str, str], float] = {}
    for name, runs in scored.items():
        answers = [list(zip(completions[run][column], references, strict=True)) for run, column in runs.items()]
        if new := list({pair: None for pairs in answers for pair in pairs if pair not in known}):
            known.update(zip(new, task.row_scores(*zip(*new, strict=True)), strict=True))
        if answers:
            rows[name] = [[known[pair] for pair in pairs] for pairs in answers]
    return rows, first["text"]
