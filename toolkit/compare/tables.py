"""A comparison as tables: the same rows for the terminal, Markdown, CSV and the page."""

from dataclasses import dataclass
from typing import Any

from toolkit.files import csv_text
from toolkit.memory.report import GROUPS, format_error, grouped
from toolkit.tasks.metrics import score_title
from toolkit.units import format_bytes

NONE = "–"


@dataclass(frozen=True)
class Table:
    """Plain text cells with a title and a caption that explains them."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    caption: str


def tables(data: dict[str, Any]) -> list[Table]:
    """The tables of quality, differences, cost, in-context learning and memory, without empty ones."""
    made = [_quality(data), *_differences(data), _cost(data), _context(data), _memory(data)]
    return [table for table in made if table.rows]


def failures(data: dict[str, Any]) -> list[str]:
    """A line for each run that is not finished."""
    return [
        f"{entry['method']}, seed {one['seed']}: {one['why']}" for entry in data["entries"] for one in entry["failed"]
    ]


def with_half(value: dict[str, Any] | None, digits: int = 4) -> str:
    """`0.5291 ± 0.0460`; without the interval if there is only one seed."""
    if not value:
        return NONE
    half = value.get("half")
    return f"{value['mean']:,.{digits}f}" + (f" ± {half:,.{digits}f}" if half is not None else "")


def _quality(data: dict[str, Any]) -> Table:
    rows = []
    for entry in data["entries"]:
        runs = str(len(entry["seeds"])) if entry["method"] != "base" else NONE
        if entry["failed"]:
            runs += f" of {len(entry['seeds']) + len(entry['failed'])}"
        scores = [with_half(entry["scores"].get(metric)) for metric in data["metrics"]]
        rows.append([entry["method"], runs, *scores])
    rows_of_test = data["data"]["rows"]["test"]
    caption = (
        f"Scores on the test split of {data['data']['name']} ({rows_of_test:,} rows); mean ± 95 % interval over seeds "
        "(Student's t), which needs at least two seeds. base: the model before training."
    )
    return Table("Quality", ["method", "seeds", *map(score_title, data["metrics"])], rows, caption)


def _differences(data: dict[str, Any]) -> list[Table]:
    made = []
    for other, meaning in (("full", "full fine-tuning"), ("base", "the base model")):
        rows = []
        for entry in data["entries"]:
            if found := entry["difference"].get(other):
                p = "< 0.001" if found["p"] < 0.001 else f"{found['p']:.3f}"
                span = f"{found['low']:+.4f} to {found['high']:+.4f}"
                verdict = "yes" if found["more_than_noise"] else "no"
                verdict += "" if found.get("covers") == "test rows and seeds" else " (of test rows only)"
                rows.append([entry["method"], f"{found['mean']:+.4f}", span, p, verdict])
        direction = "" if data["higher_is_better"] else " (lower is better)"
        caption = (
            f"{score_title(data['headline'])}{direction} minus that of {meaning}. Paired bootstrap over "
            f"{data['data']['different_texts']:,} different test texts (Koehn 2004): 10,000 resamples of scores averaged over "
            "seeds, each with a random term for other seeds (Student's t, Welch). more than noise: the interval excludes 0. "
            "With one seed the spread over seeds is unknown: `of test rows only`."
        )
        columns = ["method", "difference", "95 % interval", "p", "more than noise"]
        made.append(Table(f"Against {meaning}", columns, rows, caption))
    return made


def _cost(data: dict[str, Any]) -> Table:
    columns = [
        "method",
        "trainable",
        "percent",
        "saved",
        "peak",
        "predicted",
        "error",
        "tokens/s",
        "train s",
        "total s",
    ]
    rows = []
    for entry in data["entries"]:
        if not entry.get("trainable"):
            continue
        memory = entry.get("memory") or {}
        measured = memory.get("measured", {}).get("reserved_bytes")
        predicted = memory.get("predicted", {}).get("reserved_bytes")
        rows.append(
            [
                entry["method"],
                f"{entry['trainable']:,}",
                f"{entry['trainable'] / entry['all']:.3%}",
                format_bytes(entry["saved_bytes"]) if entry["saved_bytes"] else NONE,
                format_bytes(measured) if measured else NONE,
                format_bytes(predicted) if predicted else NONE,
                format_error(predicted, measured) if measured and predicted else NONE,
                with_half(entry.get("tokens_per_second"), 0),
                with_half(entry.get("train_seconds"), 0),
                with_half(entry["seconds"], 0),
            ]
        )
    caption = (
        f"On {data['device'] or 'an unknown device'}. saved: weights on disk. peak: reserved memory, measured in the first two "
        "steps of the seed that needed the most; predicted: for the same batches. tokens/s: real tokens while training, after "
        "those two steps; train: within steps; total: with loading and both evaluations. ± is the 95 % interval over seeds."
    )
    return Table("Cost", columns, rows, caption)


def _context(data: dict[str, Any]) -> Table:
    rows = [
        [entry["method"], with_half(cost["prompt_tokens"], 0), with_half(cost["seconds_a_row"], 3)]
        for entry in data["entries"]
        if (cost := entry.get("context"))
    ]
    caption = (
        "The cost of the examples in the prompt for every answer: prompt tokens, and seconds per row of the test split."
    )
    return Table("In-context learning", ["method", "prompt tokens", "seconds a row"], rows, caption)


def _memory(data: dict[str, Any]) -> Table:
    found = {e["method"]: e["memory"] for e in data["entries"] if e.get("memory")}
    used = [
        group
        for group in GROUPS
        if any(grouped(peak["categories"])[group] for memory in found.values() for peak in memory.values())
    ]
    rows = [
        [
            method,
            source,
            *(format_bytes(grouped(peak["categories"])[group]) for group in used),
            format_bytes(peak["reserved_bytes"]),
        ]
        for method, memory in found.items()
        for source, peak in memory.items()
    ]
    caption = "Memory at the peak by category, measured and predicted for the same batches."
    return Table("Memory at the peak", ["method", "", *used, "reserved"], rows, caption)


def to_markdown(data: dict[str, Any]) -> str:
    """compare.md."""
    lines = [f"# {title(data)}", "", about(data), ""]
    for table in tables(data):
        aligned = "|".join(["---", *["---:"] * (len(table.columns) - 1)])
        lines += [f"## {table.title}", "", "| " + " | ".join(table.columns) + " |", f"|{aligned}|"]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table.rows]
        lines += ["", table.caption, ""]
    if failed := failures(data):
        lines += ["## Not done", "", *(f"- {line}" for line in failed), ""]
    return "\n".join(lines)


def title(data: dict[str, Any]) -> str:
    """The methods and the data set, such as `lora, full on DialogSum`."""
    methods = [entry["method"] for entry in data["entries"] if entry["method"] != "base"]
    return f"{', '.join(methods)} on {data['data']['name']}"


def about(data: dict[str, Any]) -> str:
    """One paragraph: model, data, seeds, flags, stack."""
    rows = data["data"]["rows"]
    stack = ", ".join(f"{name} {version}" for name, version in data["versions"].items() if version)
    flags = f" Flags: `{' '.join(data['flags'])}`." if data["flags"] else ""
    return (
        f"{data['model']} on {data['data']['name']}: {rows['train']:,} rows to train, {rows['validation']:,} to validate, "
        f"{rows['test']:,} to test; {data['seeds']} seeds; {data['device'] or 'device unknown'}; {data['date']}.{flags} {stack}."
    )


def to_csv(data: dict[str, Any]) -> str:
    """compare.csv: a row for each method, plain numbers; sizes in bytes, times in seconds."""
    rows = [_flat(entry, data["metrics"]) for entry in data["entries"]]
    names = list(dict.fromkeys(name for row in rows for name in row))
    return csv_text(names, ([row.get(name, "") for name in names] for row in rows))


def _flat(entry: dict[str, Any], metrics: list[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"method": entry["method"], "seeds": len(entry["seeds"])}
    row["failed"] = "; ".join(f"seed {one['seed']}: {one['why']}" for one in entry["failed"])
    row |= {name: entry.get(name, "") for name in ("trainable", "all", "saved_bytes")}
    for source in ("measured", "predicted"):
        peak = (entry.get("memory") or {}).get(source)
        row[f"{source}_allocated_bytes"] = peak["allocated_bytes"] if peak else ""
        row[f"{source}_reserved_bytes"] = peak["reserved_bytes"] if peak else ""
        for category, size in (peak["categories"] if peak else {}).items():
            row[f"{source}_{category}_bytes"] = size
    for name in ("tokens_per_second", "train_seconds", "seconds"):
        value = entry.get(name) or {}
        row |= {name: value.get("mean", ""), f"{name}_half": value.get("half", "")}
    for metric in metrics:
        value = entry["scores"].get(metric, {})
        row |= {metric: value.get("mean", ""), f"{metric}_half": value.get("half", "")}
    for other, found in entry["difference"].items():
        row |= {f"against_{other}_{name}": value for name, value in found.items()}
    return row
