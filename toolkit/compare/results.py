"""Run folders become one plain object: what compare.json holds, and every table and plot is made from."""

import csv
import json
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import toolkit
from toolkit.compare.launch import why_failed
from toolkit.compare.plan import Plan, Run
from toolkit.compare.statistics import interval, paired_bootstrap
from toolkit.errors import UserError
from toolkit.finished_run import read_json
from toolkit.memory.ledger import Ledger


def row_scores(task: str, predictions: Sequence[str], references: Sequence[str]) -> tuple[str, list[float]]:
    """The metric that stands for the task, and each row's own score by it."""
    from toolkit.metrics.rouge import Rouge

    scores = Rouge(keep_in_memory=True).compute(
        predictions=list(predictions), references=list(references), use_aggregator=False
    )
    return "rougeL", scores["rougeL"]


def collect(plan: Plan) -> dict[str, Any]:
    """The comparison of all runs that are done. Sizes are bytes, times seconds, scores as in each run.json.

    Raises: UserError where no run is done, or runs were scored on different rows.
    """
    done = [run for run in plan.runs if run.is_done]
    if not done:
        reasons = "; ".join(f"{run.method}: {why_failed(run)}" for run in plan.runs[:3])
        raise UserError(f"{plan.folder}: no run is done, so there is nothing to compare ({reasons})")
    records = {run: read_json(run.folder / "run.json") for run in done}
    first = records[done[0]]
    for run in done:
        if records[run]["data"]["sha256"]["test"] != first["data"]["sha256"]["test"]:
            raise UserError(f"{run.folder} was scored on other rows than {done[0].folder}; start a new comparison")
    task = first.get("task", "summarization")
    metrics = list(first["scores"]["base"])
    texts, references, _ = _completions(done[0].folder)
    headline, score = _remembering(task, references)
    entries = [_entry(method, plan.runs_of(method), records, metrics) for method in plan.methods]
    base_scores = {metric: [records[run]["scores"]["base"][metric] for run in done] for metric in metrics}
    base = {"method": "base", "seeds": [], "failed": [], "scores": _intervals(_distinct(base_scores))}
    rows = {"base": _mean_rows([score(_completions(run.folder)[2]["base"]) for run in done])}
    for entry in entries:
        if mine := [run for run in plan.runs_of(entry["method"]) if run in records]:
            rows[entry["method"]] = _mean_rows([score(_completions(run.folder)[2]["tuned"]) for run in mine])
    for entry in (base, *entries):
        entry["difference"] = {
            other: paired_bootstrap(rows[entry["method"]], rows[other], texts)
            for other in ("full", "base")
            if other in rows and entry["method"] in rows and other != entry["method"]
        }
    devices = {Ledger.load(run.folder / "memory.json").device for run in done if (run.folder / "memory.json").is_file()}
    return {
        "footprint": toolkit.__version__,
        "date": date.today().isoformat(),
        "task": task,
        "metrics": metrics,
        "headline": headline,
        "data": first["data"] | {"different_texts": len(set(texts))},
        "model": _model(done[0], first),
        "device": ", ".join(sorted(devices)) or None,
        "versions": first["versions"],
        "seeds": plan.seeds,
        "flags": read_json(plan.folder / "comparison.json").get("flags", []),
        "entries": [base, *entries],
    }


def _entry(method: str, runs: list[Run], records: dict[Run, dict[str, Any]], metrics: list[str]) -> dict[str, Any]:
    mine = [run for run in runs if run in records]
    failed = [{"seed": run.seed, "why": why_failed(run)} for run in runs if run not in records]
    entry: dict[str, Any] = {"method": method, "seeds": [run.seed for run in mine], "failed": failed, "scores": {}}
    if not mine:
        return entry
    own = [records[run] for run in mine]
    curves = [_curve(run.folder) for run in mine]
    entry |= {
        "trainable": own[0]["parameters"]["trainable"],
        "all": own[0]["parameters"]["all"],
        "saved_bytes": _saved_bytes(mine[0].folder),
        "precision": own[0]["precision"],
        "scores": _intervals({metric: [record["scores"]["tuned"][metric] for record in own] for metric in metrics}),
        "seconds": interval([record["seconds"] for record in own]),
        "train_seconds": interval([c[-1]["seconds"] for c in curves if c]) if all(curves) else None,
        "tokens_per_second": interval([c[-1]["tokens_per_second"] for c in curves if c]) if all(curves) else None,
        "curves": [{"seed": run.seed, "lines": lines} for run, lines in zip(mine, curves, strict=True)],
    }
    entry["memory"] = _memory([run.folder for run in mine])
    return entry


def _intervals(values: dict[str, list[float]]) -> dict[str, Any]:
    return {metric: interval(each) | {"values": each} for metric, each in values.items()}


def _distinct(values: dict[str, list[float]]) -> dict[str, list[float]]:
    """The base model's scores: those of one run where all agree, as they do without a random head."""
    return {metric: each if len(set(each)) > 1 else each[:1] for metric, each in values.items()}


def _memory(folders: list[Path]) -> dict[str, Any] | None:
    """The measured peak of the seed that needed most, and what was predicted for that seed's very batches."""
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
    if not path.is_file():
        return []
    kept = ("step", "loss", "eval_loss", "seconds", "tokens_per_second")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{name: line[name] for name in kept if name in line} for line in lines]


def _completions(folder: Path) -> tuple[list[str], list[str], dict[str, list[str]]]:
    """Texts and references of the test split, and what the base and the tuned model answered."""
    with (folder / "completions.csv").open(newline="", encoding="utf-8") as stream:
        _, *rows = csv.reader(stream)
    texts, references, base, tuned = (list(column) for column in zip(*rows, strict=True))
    return texts, references, {"base": base, "tuned": tuned}


def _remembering(task: str, references: list[str]) -> tuple[str, Callable[[list[str]], list[float]]]:
    """The task's metric, and what scores answers row by row, each pair of answer and reference once: the base model's
    answers are the same in all runs."""
    known: dict[tuple[str, str], float] = {}

    def score(answers: list[str]) -> list[float]:
        pairs = list(zip(answers, references, strict=True))
        if new := list(dict.fromkeys(pair for pair in pairs if pair not in known)):
            known.update(zip(new, row_scores(task, *zip(*new, strict=True))[1], strict=True))
        return [known[pair] for pair in pairs]

    return row_scores(task, references[:1], references[:1])[0], score


def _mean_rows(scores: list[list[float]]) -> list[float]:
    """Each row's score averaged over seeds."""
    return [sum(row) / len(row) for row in zip(*scores, strict=True)]


def _model(run: Run, record: dict[str, Any]) -> str:
    from toolkit.finished_run import FinishedRun

    return FinishedRun(run.folder).base.model_name_or_path or "the tiny T5 that comes with footprint"
