"""Writes the generated parts of README.md anew from committed results; `--check` only compares.

    python benchmarks/readme.py

A part stands between `<!-- NAME -->` and `<!-- end NAME -->`.
"""

import ast
import json
import re
import sys
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"


def embedded_scores() -> str:
    """Base, LoRA and full fine-tuning on the embedded test split: mean over seeds, and the range of ROUGE-L."""
    result = json.loads((RESULTS / "embedded.json").read_text(encoding="utf-8"))
    runs = result["runs"]
    lines = [
        "| | trained parameters | saved | ROUGE-1 | ROUGE-2 | ROUGE-L (least to most) | seconds |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    base = runs[0]["scores"]["base"]
    scores = " | ".join(f"{base[kind]:.3f}" for kind in ("rouge1", "rouge2", "rougeL"))
    lines.append(f"| base model | | | {scores} | |")
    for method in ("lora", "full"):
        own = [run for run in runs if run["method"] == method]
        tuned = [run["scores"]["tuned"] for run in own]
        ls = [t["rougeL"] for t in tuned]
        lines.append(
            f"| `recipes/{method}.py` | {own[0]['parameters']['trainable']:,} | {own[0]['saved_bytes'] / 2**20:.2f} MiB "
            f"| {mean(t['rouge1'] for t in tuned):.3f} | {mean(t['rouge2'] for t in tuned):.3f} "
            f"| {mean(ls):.3f} ({min(ls):.3f} to {max(ls):.3f}) | {mean(run['seconds'] for run in own):.0f} |"
        )
    seeds = len({run["seed"] for run in runs})
    lines += [
        "",
        f"Test split of {result['rows']['test']} rows, {seeds} seeds, {result['date']}, {result['cores']} CPU cores, "
        f"torch {result['versions']['torch']}, transformers {result['versions']['transformers']}, "
        f"peft {result['versions']['peft']}; made by `python benchmarks/embedded.py`.",
    ]
    return "\n".join(lines)


def demo_output() -> str:
    """How a run of `recipes/lora.py` on the embedded default ends in the terminal."""
    result = json.loads((RESULTS / "embedded.json").read_text(encoding="utf-8"))
    return "\n".join(["```", *result["demo"], "```"])


def comparison() -> str:
    """Every trained method on the embedded task over three seeds: the headline score, and what it costs."""
    sys.path.insert(0, str(ROOT))
    from toolkit.units import format_bytes

    data = json.loads((RESULTS / "comparison.json").read_text(encoding="utf-8"))
    metric = data["headline"]
    lines = [
        "| | trained parameters | ROUGE-L, mean ± 95 % over seeds | above the base | against full | memory, peak | seconds |",
        "|---|---:|---:|---|---|---:|---:|",
    ]

    def against(entry: dict[str, Any], other: str) -> str:
        found = entry["difference"].get(other)
        return "" if found is None else f"{found['mean']:+.3f}" + ("" if found["more_than_noise"] else " (noise)")

    for entry in sorted(data["entries"], key=lambda entry: -entry["scores"][metric]["mean"]):
        score = entry["scores"][metric]
        half = f" ± {score['half']:.3f}" if score.get("half") is not None else ""
        cells = ["", f"{score['mean']:.3f}{half}", against(entry, "base"), against(entry, "full"), "", ""]
        if entry["method"] != "base":
            peak = entry["memory"]["measured"]["reserved_bytes"]
            cells[0], cells[4], cells[5] = (
                f"{entry['trainable']:,}",
                format_bytes(peak),
                f"{entry['seconds']['mean']:.0f}",
            )
        lines.append(f"| {entry['method']} | {' | '.join(cells)} |")
    rows, versions = data["data"]["rows"]["test"], data["versions"]
    lines += [
        "",
        f"Test split of {rows} rows, {data['seeds']} seeds, each recipe on its defaults; differences by paired bootstrap over the rows "
        f"with Student's t for the seeds, `noise` where their 95 % interval holds 0. {data['date']}, a busy CPU, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, peft {versions['peft']}; made by `footprint compare --methods "
        f"{','.join(e['method'] for e in data['entries'] if e['method'] != 'base')} --seeds {data['seeds']}`.",
    ]
    return "\n".join(lines)


def t4_accuracy() -> str:
    """Predicted against measured on a Tesla T4, with the peers' predictions of the same runs; errors in percent."""
    result = json.loads((RESULTS / "t4_accuracy.json").read_text(encoding="utf-8"))
    lines = ["| runs | allocated, mean (worst) | reserved, mean (worst) |", "|---|---:|---:|"]
    for group, errors in result["summary_percent"].items():
        cells = [f"{errors[k]['mean']:.2f} % ({errors[k]['worst']:.2f} %)" for k in ("peak_allocated", "peak_reserved")]
        lines.append(f"| {group}: {errors['process']['rows']} | {cells[0]} | {cells[1]} |")
    peers = result["summary_percent"]["all"]
    lines += [
        "",
        f"{result['runs']} measured runs have been predicted so far ({result['date']}). On the same ones, mean error on allocated memory: "
        f"fitcheck-llm {peers['fitcheck_allocated']['mean']:.2f} %, accelerate {peers['accelerate']['mean']:.0f} %, "
        f"DeepSpeed {peers['deepspeed']['mean']:.0f} %; made by `python benchmarks/t4_accuracy.py`.",
        "",
        _session(result),
    ]
    return "\n".join(lines)


def _session(result: dict[str, Any]) -> str:
    """The same people's other session on that card, and how far runs of one configuration are from each other."""
    session = json.loads((RESULTS / "t4_session.json").read_text(encoding="utf-8"))
    rows = session["rows"]
    errors = [abs(row["error_percent"]["peak_reserved"]) for row in rows]
    exact = sum(row["predicted_mib"]["peak_reserved"] == row["measured_mib"]["peak_reserved"] for row in rows)
    measured: dict[tuple, list[float]] = {}
    for row in (*rows, *(row for row in result["rows"] if row["quantization"] == "nf4")):
        key = (row["model"], row["attention"], int(row["batch_size"]), int(row["seq_len"]))
        measured.setdefault(key, []).append(row["measured_mib"]["peak_reserved"])
    spread = max((max(found) / min(found) - 1, key) for key, found in measured.items())[1]
    return (
        f"Of the {len(rows)} NF4 runs of an earlier session on that card (predicted {session['date']}, `--session`), the reserved memory of "
        f"{exact} was predicted to the MiB; mean error {sum(errors) / len(errors):.2f} %, worst {max(errors):.2f} %. What was measured "
        f"differs between sessions: for {spread[0].split('/')[1]}, {spread[1]}, {spread[2]} x {spread[3]} tokens it was "
        f"{' and '.join(f'{mib:,.0f}' for mib in sorted(measured[spread]))} MiB."
    )


def third_party() -> str:
    """Predicted against measured on sets of runs that others published; errors in percent, and what is known of them."""
    result = json.loads((RESULTS / "third_party.json").read_text(encoding="utf-8"))
    lines = [
        "| set | rows | allocated, mean (worst) | what decides whether it fits, mean (worst; most under) |",
        "|---|---:|---:|---:|",
    ]
    notes = []
    for name, about in result["sets"].items():
        rows = [row for row in result["rows"] if row["set"] == name]
        errors = result["summary_percent"][name]
        allocated, decides = errors.get("peak_allocated"), errors[rows[0]["decides"]]
        cell = f"{allocated['mean']:.3f} % ({allocated['worst']:.3f} %)" if allocated else "not measured"
        lines.append(
            f"| {about['what']} | {len(rows)} | {cell} | {rows[0]['decides'].replace('peak_', '')}: "
            f"{decides['mean']:.2f} % ({decides['worst']:.2f} %; {decides['under']:.2f} %) |"
        )
        notes.append(f"- `{name}` ({'; '.join(sorted({row['stack'] for row in rows}))}): {about['misses']}")
    stack = ", ".join(f"{library} {version}" for library, version in result["predicted_with"].items())
    dates = sorted(row["date"] for row in result["rows"])
    return "\n".join(
        [*lines, "", *notes, "", f"{dates[-1]}, predicted with {stack}; made by `python benchmarks/third_party.py`."]
    )


def methods() -> str:
    """Every recipe with the first line of its docstring."""
    lines = ["| recipe | what it does |", "|---|---|"]
    for path in sorted((ROOT / "recipes").glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines.append(f"| `recipes/{path.name}` | {text.splitlines()[0]} |")
    return "\n".join(lines)


def combinations() -> str:
    """How many cells of the matrix train, of those that were run, by method and form of the weights; and why others do not."""
    path = RESULTS / "matrix.json"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"] if path.is_file() else {}
    if not cells:
        return "No cell has been run yet: `make matrix`."
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    reasons: dict[tuple[str, str], list[list[str]]] = {}
    for name, outcome in cells.items():
        method, weights, *where = name.split("-")
        groups.setdefault((method, weights), []).append(outcome)
        if outcome["outcome"] == "refused":
            reasons.setdefault((method, outcome["reason"]), []).append([weights, *where])
    kinds = ("unquantized", "int8", "nf4")
    lines = ["| | unquantized | 8-bit | NF4 |", "|---|---:|---:|---:|"]
    for method in sorted({method for method, _ in groups}):
        found = [groups.get((method, kind), []) for kind in kinds]
        counts = [f"{sum(o['outcome'] == 'trains' for o in f)} of {len(f)}" if f else "not run" for f in found]
        lines.append(f"| `{method}` | {' | '.join(counts)} |")
    dates = sorted({outcome["date"] for outcome in cells.values()})
    lines += ["", f"{len(cells)} cells run, {' to '.join(dates[:: max(len(dates) - 1, 1)])}; `make matrix` runs all."]
    if reasons:
        lines += ["Refused, in the recipe's own words, with what those cells have in common:", ""]
    for (method, reason), places in reasons.items():
        common = [values[0] for values in zip(*places, strict=True) if len(set(values)) == 1]
        lines.append(f"- `{method}`, {', '.join(common)} ({len(places)} cells): {reason}")
    return "\n".join(lines)


def launches() -> str:
    """Which recipe runs under which file of launch/, and how its ranks ended; why others do not."""
    path = RESULTS / "launch_matrix.json"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"] if path.is_file() else {}
    if not cells:
        return "No cell has been run yet: `make matrix`."
    columns = ("full", "lora", "qlora")
    rows: dict[str, dict[str, str]] = {}
    others: dict[str, list[str]] = {}
    reasons: dict[str, list[str]] = {}
    for name, cell in cells.items():
        preset, method, *model = name.split("-")
        row = f"`{preset}`" + (f", {model[0]} model" if model else "")
        found = rows.setdefault(row, {})
        if method in columns:
            found[method] = cell["outcome"]
        else:
            others.setdefault(row, []).append(cell["outcome"])
        if cell["outcome"] == "refused":
            reasons.setdefault(cell["reason"], []).append(f"{row} `{method}`")
    ran = {name.split("-")[0] for name in cells}
    rows |= {f"`{path.stem}`": {} for path in (ROOT / "launch").glob("*.yaml") if path.stem not in ran}
    lines = ["| | `full` | `lora` | `qlora` | the other recipes |", "|---|---|---|---|---|"]
    number = len(list((ROOT / "recipes").glob("*.py"))) - len(columns)
    for row, found in sorted(rows.items(), key=lambda pair: pair[0].replace("`", "")):
        asked = row in ("`ddp`", "`zero2`")  # the files that every recipe is run under
        last = f"{others.get(row, []).count('runs')} of {number} run" if asked else ""
        lines.append(f"| {row} | {' | '.join(found.get(column, 'not run') for column in columns)} | {last} |")
    together = [cell for cell in cells.values() if cell["processes"] > 1 and cell["outcome"] != "refused"]
    codes = [code for cell in together for code in cell["codes"]]
    swapped = [cell["swapped_bytes"] for cell in cells.values() if "swapped_bytes" in cell]
    dates = sorted({cell["date"] for cell in cells.values()})
    disk = f"; under `zero3_nvme` each left {min(swapped) / 2**20:.0f} MiB or more on the disk" if swapped else ""
    lines += [
        "",
        f"{len(together)} runs of 2 processes: exit code 0 on {codes.count(0)} of {len(codes)} ranks, {sum(code < 0 for code in codes)} "
        f"aborts{disk}. {len(cells)} cells, {' to '.join(dates[:: max(len(dates) - 1, 1)])}; `make matrix` runs all.",
    ]
    if reasons:
        lines += ["Refused, with the recipe's own words:", ""]
        lines += [f"- {', '.join(places)}: {reason}" for reason, places in reasons.items()]
    return "\n".join(lines)


def prediction_speed() -> str:
    """Seconds of CPU for a prediction, by model and by number of layers."""
    result = json.loads((RESULTS / "prediction_speed.json").read_text(encoding="utf-8"))
    lines = ["| | CPU with imports, s | RAM, MiB |", "|---|---:|---:|"]
    for name, run in result["runs"].items():
        lines.append(f"| {name} | {run['cpu_seconds']:.0f} | {run['peak_rss_bytes'] / 2**20:.0f} |")
    lines += [
        "",
        f"{result['date']}, on a core that needs {result['ten_million_additions_seconds']:.1f} s for ten million additions in Python; "
        "made by `python benchmarks/prediction_speed.py`.",
    ]
    return "\n".join(lines)


def reliability() -> str:
    """What the kill tests found."""
    path = RESULTS / "reliability.json"
    if not path.is_file():
        return "The kill tests have not been run yet: `make matrix`."
    result = json.loads(path.read_text(encoding="utf-8"))
    figures, versions = result["figures"], result["versions"]
    kinds = Counter(f"`{case['launch']}`" if case.get("launch") else None for case in result["cases"])
    alone = kinds.pop(None, 0)
    where = f"{alone} on one process" + "".join(f", {count} on two under {name}" for name, count in kinds.items())
    return (
        f"{figures['kills']} runs ({where}) were stopped by `kill -9` of a rank or all, {figures['while_saving']} of them while "
        f"saving, and {figures['damaged_files']} newest checkpoints spoilt: {figures['resumes_equal']} of {figures['runs']} went on "
        "to the weights of a run that was never stopped (the same bits, or within 1e-6 over two processes); bytes of whole "
        f"checkpoints lost: {figures['bytes_lost']} ({result['date']}, torch {versions['torch']}, `{result['command']}`)."
    )


def engines_equal() -> str:
    """How far two processes are from one of the same global batch: any loss of 20 steps, by engine, model and method."""
    path = RESULTS / "engines_equal.json"
    if not path.is_file():
        return "The engines have not been compared yet: `make matrix`."
    result = json.loads(path.read_text(encoding="utf-8"))
    cells, methods = result["cells"], ("full", "lora", "qlora")
    lines = ["| | | " + " | ".join(f"`{method}`" for method in methods) + " |", "|---|---|---:|---:|---:|"]
    for engine in dict.fromkeys(name.split("-")[0] for name in cells):
        for kind, title in (("t5", "T5"), ("llama", "Llama")):
            found = [cells.get(f"{engine}-{kind}-{method}") for method in methods]
            shown = [f"{cell['loss']:.1e}" if cell else "not run" for cell in found]
            lines.append(f"| `{engine}` | {title} | {' | '.join(shown)} |")
    gradient = max(found["gradient"] for found in cells.values())
    dates, stack = sorted(found["date"] for found in cells.values()), result["stack"]
    lines += [
        "",
        f"The gradient of the first step differs by at most {gradient:.1e}. {dates[-1]}, torch {stack['torch']}, transformers "
        f"{stack['transformers']}, DeepSpeed {stack['deepspeed']}; made by `{result['command']}`.",
    ]
    return "\n".join(lines)


def distributed_accuracy() -> str:
    """Predicted against real ranks, the greatest errors by launch file, beside DeepSpeed's own estimators."""
    result = json.loads((RESULTS / "distributed_accuracy.json").read_text(encoding="utf-8"))
    lines = [
        "| | runs | states, worst | peak, worst | DeepSpeed's estimate of states, worst |",
        "|---|---:|---:|---:|---:|",
    ]
    for launch, errors in result["summary_percent"].items():
        runs = sum(row["launch"] == launch for row in result["rows"])
        peer = f"{errors['deepspeed_states']:.0f} %" if "deepspeed_states" in errors else ""
        states = "exact" if errors["states"] == 0 else f"{errors['states']:.3f} %"
        lines.append(f"| `{launch}` | {runs} | {states} | {errors['peak']:.3f} % | {peer} |")
    stack = result["rows"][0]["stack"]
    lines += [
        "",
        f"{result['date']}, torch {stack['torch']}, transformers {stack['transformers']}, DeepSpeed {result['deepspeed']}; made by "
        "`python benchmarks/distributed_accuracy.py`.",
    ]
    return "\n".join(lines)


def distributed_fits() -> str:
    """The fewest cards of 24 GB on which a run fits, by model, method and launch file."""
    sys.path.insert(0, str(Path(__file__).parent))
    import distributed_fits as fits

    result = fits.load()
    found = fits.table(result["rows"])
    lines = [
        "| | " + " | ".join(f"`{launch}`" for launch in fits.LAUNCHES) + " |",
        "|---|" + "---|" * len(fits.LAUNCHES),
    ]
    for method in fits.METHODS:
        for model in fits.MODELS:
            cells = [found[model, method, launch] for launch in fits.LAUNCHES]
            lines.append(f"| `{method}` {model.split('/')[1]} | {' | '.join(cells)} |")
    dates = sorted(row["date"] for row in result["rows"])
    lines += ["", f"{len(dates)} predicted so far, {dates[-1]}; made by `python benchmarks/distributed_fits.py`."]
    return "\n".join(lines)


def stacks() -> str:
    """The ends of pyproject.toml's ranges as they were tried."""
    path = RESULTS / "stacks.json"
    if not path.is_file():
        return "The ends of these ranges have not been tried yet: `make stacks`."
    result = json.loads(path.read_text(encoding="utf-8"))
    names = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "deepspeed")
    shown = []
    for end, stack in result["stacks"].items():
        versions = ", ".join(f"{name} {stack['versions'][name]}" for name in names if name in stack["versions"])
        recipe = "`recipes/lora.py` ran" if stack["recipe"] else "`recipes/lora.py` failed"
        shown.append(
            f"on the {end} (Python {stack['python']}, {versions}) {stack['passed']} fast tests passed, {stack['failed']} failed, "
            f"and {recipe}"
        )
    return f"`{result['command']}` tried both ends of these ranges on {result['date']}: {'; '.join(shown)}."


def gpu_accuracy() -> str:
    """What `make gpu` measured, by card: how far predictions were, and what ran, fitted and was fast; or that nothing was yet."""
    sys.path.insert(0, str(Path(__file__).parent))
    from on_gpu.results import Results, summary, verdict

    files = sorted(path for path in (RESULTS / "gpu").glob("*.json") if path.name != "fits.json")
    if not files:
        return "On a GPU nothing has been measured by this project yet: `make gpu` stands ready for it."
    lines = [
        "| card | configurations | allocated, mean (worst) | without the trace | reserved, mean (worst) | recipes that ran "
        "| limits as predicted |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    notes = []
    for path in files:
        results = Results.load(path)
        errors = summary(results.rows("memory"))
        cells = [
            f"{errors[kind]['mean']:.2f} % ({errors[kind]['worst']:.2f} %)" if kind in errors else "not predicted yet"
            for kind in ("allocated_bytes", "untraced_allocated_bytes", "reserved_bytes")
        ]
        shares = []
        for part in ("runs", "fits"):
            found = [verdict(row) for row in results.rows(part)]
            shares.append(f"{found.count('agrees')} of {len(found)}")
        name, number = results.content["card"]["name"], len(results.rows("memory"))
        lines.append(f"| {name} | {number} | {' | '.join(cells)} | {shares[0]} | {shares[1]} |")
        call = results.content["calls"][-1]
        notes.append(f"{name}: {call['date']}, {call['seconds']:.0f} s, {results.stack}")
    return "\n".join([*lines, "", "; ".join(notes) + "; made by `make gpu`."])


PARTS = {
    "gpu accuracy": gpu_accuracy,
    "stacks": stacks,
    "distributed accuracy": distributed_accuracy,
    "distributed fits": distributed_fits,
    "engines equal": engines_equal,
    "comparison": comparison,
    "demo output": demo_output,
    "embedded scores": embedded_scores,
    "t4 accuracy": t4_accuracy,
    "third party": third_party,
    "prediction speed": prediction_speed,
    "methods": methods,
    "combinations": combinations,
    "launches": launches,
    "reliability": reliability,
}


def rewritten(text: str) -> str:
    """README with every generated part made anew."""
    for name, make in PARTS.items():
        pattern = re.compile(f"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"README.md has no part between <!-- {name} --> and <!-- end {name} -->")
        text = pattern.sub(lambda found, make=make: f"{found[1]}{make()}\n{found[2]}", text)
    return text


def main() -> int:
    """Writes README.md, or with `--check` exits 1 where it is not what the results say."""
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = rewritten(old)
    if "--check" in sys.argv:
        return int(new != old)
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
