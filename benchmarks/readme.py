"""Rewrites the generated parts of every README from committed results; `--check` only compares.

    python benchmarks/readme.py

A part is between `<!-- NAME -->` and `<!-- end NAME -->` in any README. A part that no README uses, and a marker without a part,
are errors.
"""

import ast
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
READMES = (
    "README.md",
    "recipes/README.md",
    "launch/README.md",
    "benchmarks/README.md",
    "toolkit/README.md",
    "toolkit/memory/README.md",
)
MARKER = re.compile(r"<!-- (end )?([^>]*?) -->")
OF_NO_METHOD = {"bare_loop"}  # recipes that are another way to run a method
LINES_OF_DEMO = 10  # the scores, the peak, and the bar with its legend


def embedded_scores() -> str:
    """Base, LoRA and full fine-tuning on the embedded test split: mean over seeds, and the range of ROUGE-L."""
    result = json.loads((RESULTS / "embedded.json").read_text(encoding="utf-8"))
    runs = result["runs"]
    lines = [
        "| | trained parameters | saved | ROUGE-1 | ROUGE-2 | ROUGE-L (lowest to highest seed) | seconds |",
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
    """The last lines that `recipes/lora.py` prints on the embedded default."""
    result = json.loads((RESULTS / "embedded.json").read_text(encoding="utf-8"))
    return "\n".join(["```", *result["demo"], "```"])


def demo() -> str:
    """The demo's output without the table of memory by phase."""
    result = json.loads((RESULTS / "embedded.json").read_text(encoding="utf-8"))
    return "\n".join(["```", *result["demo"][:LINES_OF_DEMO], "```"])


def predictions() -> str:
    """Every committed third-party run with its prediction: the figure that decides whether it fits."""
    result = json.loads((RESULTS / "third_party.json").read_text(encoding="utf-8"))
    forms = {"none": "", "nf4_double_quant": "4-bit "}
    lines = ["| GPU | run, rows x tokens | measured | predicted | error |", "|---|---|---:|---:|---:|"]
    for row in sorted(result["rows"], key=lambda row: row["measured_bytes"][row["decides"]]):
        sizes = [f"{row[kind][row['decides']] / 2**30:.2f} GiB" for kind in ("measured_bytes", "predicted_bytes")]
        what = f"{forms[row['quantization']]}{row['method']}, {row['model'].split('/')[-1]}, {row['batch_size']} x {row['seq_len']:,}"
        card = row["card"].removeprefix("NVIDIA ").removeprefix("GeForce ")
        lines.append(f"| {card} | {what} | {' | '.join(sizes)} | {row['error_percent'][row['decides']]:+.2f} % |")
    t4 = json.loads((RESULTS / "t4_accuracy.json").read_text(encoding="utf-8"))["summary_percent"]["all"]
    allocated, reserved = t4["peak_allocated"], t4["peak_reserved"]
    lines += [
        "",
        f"On {reserved['rows']} more runs, on a Tesla T4, peak allocated memory is {allocated['mean']:.2f} % off on average "
        f"({allocated['worst']:.2f} % at worst), peak reserved memory {reserved['mean']:.1f} % ({reserved['worst']:.0f} % at worst).",
    ]
    return "\n".join(lines)


def comparison() -> str:
    """Every trained method on the embedded task over three seeds: the headline score and the cost."""
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
        f"Test split of {rows} rows, {data['seeds']} seeds, each recipe with its defaults. Differences: paired bootstrap over the rows, "
        f"Student's t over the seeds; `noise` means that the 95 % interval contains 0. {data['date']}, a busy CPU, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, peft {versions['peft']}; made by `footprint compare --methods "
        f"{','.join(e['method'] for e in data['entries'] if e['method'] != 'base')} --seeds {data['seeds']}`.",
    ]
    return "\n".join(lines)


def t4_accuracy() -> str:
    """Predictions against measurements on a Tesla T4, and those of other tools for the same runs; errors in percent."""
    result = json.loads((RESULTS / "t4_accuracy.json").read_text(encoding="utf-8"))
    lines = ["| runs | allocated, mean (worst) | reserved, mean (worst) |", "|---|---:|---:|"]
    for group, errors in result["summary_percent"].items():
        cells = [f"{errors[k]['mean']:.2f} % ({errors[k]['worst']:.2f} %)" for k in ("peak_allocated", "peak_reserved")]
        lines.append(f"| {group}: {errors['process']['rows']} | {cells[0]} | {cells[1]} |")
    peers = result["summary_percent"]["all"]
    lines += [
        "",
        f"{result['runs']} measured runs are predicted ({result['date']}). Other tools on the same runs, mean error of allocated memory: "
        f"fitcheck-llm {peers['fitcheck_allocated']['mean']:.2f} %, accelerate {peers['accelerate']['mean']:.0f} %, "
        f"DeepSpeed {peers['deepspeed']['mean']:.0f} %; made by `python benchmarks/t4_accuracy.py`.",
        "",
        _session(result),
    ]
    return "\n".join(lines)


def _session(result: dict[str, Any]) -> str:
    """An earlier session of the same authors on that card, and how far two measurements of one configuration differ."""
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
        f"An earlier session on that card has {len(rows)} NF4 runs (predicted {session['date']}, `--session`). The prediction of reserved "
        f"memory is exact to the MiB for {exact} of them; mean error {sum(errors) / len(errors):.2f} %, worst {max(errors):.2f} %. The "
        f"two sessions measured different figures for the same configuration: {spread[0].split('/')[1]}, {spread[1]}, {spread[2]} x "
        f"{spread[3]} tokens took {' and '.join(f'{mib:,.0f}' for mib in sorted(measured[spread]))} MiB."
    )


def third_party() -> str:
    """Predictions against published sets of measured runs; errors in percent, and their known causes."""
    result = json.loads((RESULTS / "third_party.json").read_text(encoding="utf-8"))
    lines = [
        "| set | rows | allocated, mean (worst) | figure that decides whether it fits, mean (worst; worst underestimate) |",
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
    """Every recipe with the first line of its docstring; first those of a method."""
    lines = ["| recipe | what it does |", "|---|---|"]
    for path in sorted((ROOT / "recipes").glob("*.py"), key=lambda path: (path.stem in OF_NO_METHOD, path.stem)):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines.append(f"| `recipes/{path.name}` | {text.splitlines()[0]} |")
    return "\n".join(lines)


def combinations() -> str:
    """How many cells of the matrix train, by method and quantization, and the reasons for the refused ones."""
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
    lines += [
        "",
        f"{len(cells)} cells were run, {' to '.join(dates[:: max(len(dates) - 1, 1)])}; `make matrix` runs all.",
    ]
    if reasons:
        lines += ["Refused cells, by what they have in common, with the recipe's message:", ""]
    for (method, reason), places in reasons.items():
        common = [values[0] for values in zip(*places, strict=True) if len(set(values)) == 1]
        lines.append(f"- `{method}`, {', '.join(common)} ({len(places)} cells): {reason}")
    return "\n".join(lines)


def levers() -> str:
    """Which levers go with which recipes and engines, and the reasons for refused ones."""
    path = RESULTS / "levers.json"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"] if path.is_file() else {}
    if not cells:
        return "No cell has been run yet: `make matrix`."
    rows: dict[str, dict[str, list[str]]] = {}
    reasons: dict[str, list[str]] = {}
    for name, cell in cells.items():
        lever, preset, method, _ = name.split("-")
        rows.setdefault(f"--{lever}", {}).setdefault(preset, []).append(cell["outcome"])
        if cell["outcome"] == "refused":
            reasons.setdefault(re.sub(r" on \d+ processes", "", cell["reason"]), []).append(method)
    presets = list(dict.fromkeys(preset for row in rows.values() for preset in row))
    lines = [f"| | {' | '.join(f'`{preset}`' for preset in presets)} |", "|---|" + "---:|" * len(presets)]
    for lever, row in rows.items():
        found = [row.get(preset, []) for preset in presets]
        counts = [f"{outcomes.count('runs')} of {len(outcomes)}" if outcomes else "" for outcomes in found]
        lines.append(f"| `{lever}` | {' | '.join(counts)} |")
    dates = sorted({cell["date"] for cell in cells.values()})
    lines += ["", f"{len(cells)} cells, {' to '.join(dates[:: max(len(dates) - 1, 1)])}; `make matrix` runs all."]
    lines += ["Refused, with the recipe's message:", ""] if reasons else []
    for reason, methods_refused in reasons.items():
        names = ", ".join(f"`{method}`" for method in dict.fromkeys(methods_refused))
        lines.append(f"- {names} ({len(methods_refused)} cells): {reason}")
    return "\n".join(lines)


def launches() -> str:
    """Which recipe runs under which file of launch/, the exit codes of its ranks, and the reasons for refused ones."""
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
    number = len({path.stem for path in (ROOT / "recipes").glob("*.py")} - OF_NO_METHOD) - len(columns)
    for row, found in sorted(rows.items(), key=lambda pair: pair[0].replace("`", "")):
        full_row = row in ("`ddp`", "`zero2`")  # the files under which every recipe is run
        last = f"{others.get(row, []).count('runs')} of {number} run" if full_row else ""
        lines.append(f"| {row} | {' | '.join(found.get(column, 'not run') for column in columns)} | {last} |")
    together = [cell for cell in cells.values() if cell["processes"] > 1 and cell["outcome"] != "refused"]
    codes = [code for cell in together for code in cell["codes"]]
    swapped = [cell["swapped_bytes"] for cell in cells.values() if "swapped_bytes" in cell]
    dates = sorted({cell["date"] for cell in cells.values()})
    disk = f"; each run under `zero3_nvme` wrote at least {min(swapped) / 2**20:.0f} MiB to the disk" if swapped else ""
    lines += [
        "",
        f"{len(together)} runs of 2 processes: exit code 0 on {codes.count(0)} of {len(codes)} ranks, {sum(code < 0 for code in codes)} "
        f"aborts{disk}. {len(cells)} cells, {' to '.join(dates[:: max(len(dates) - 1, 1)])}; `make matrix` runs all.",
    ]
    if reasons:
        lines += ["Refused cells, with the recipe's message:", ""]
        lines += [f"- {', '.join(places)}: {reason}" for reason, places in reasons.items()]
    return "\n".join(lines)


def prediction_speed() -> str:
    """CPU seconds of a prediction by those of the imports, of further ones in the same process, and RAM."""
    result = json.loads((RESULTS / "prediction_speed.json").read_text(encoding="utf-8"))
    lines = [
        "| | one process, by the imports | a further prediction, s | with all layers run, s | RAM, MiB |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, run in result["runs"].items():
        lines.append(
            f"| {name} | {run['cpu_seconds'] / result['imports_cpu_seconds']:.2f} | {run['further_cpu_seconds']:.2f} | "
            f"{run['further_cpu_seconds_all_layers']:.2f} | {run['peak_rss_bytes'] / 2**20:.0f} |"
        )
    lines += [
        "",
        f"{result['date']}, CPU seconds; the imports alone take {result['imports_cpu_seconds']:.1f} s on this machine; made by "
        "`python benchmarks/prediction_speed.py`.",
    ]
    return "\n".join(lines)


def reliability() -> str:
    """The result of the kill tests."""
    path = RESULTS / "reliability.json"
    if not path.is_file():
        return "The kill tests have not been run yet: `make matrix`."
    result = json.loads(path.read_text(encoding="utf-8"))
    figures, versions = result["figures"], result["versions"]
    kinds = Counter(f"`{case['launch']}`" if case.get("launch") else None for case in result["cases"])
    alone = kinds.pop(None, 0)
    where = f"{alone} on one process" + "".join(f", {count} on two under {name}" for name, count in kinds.items())
    return (
        f"{figures['kills']} runs ({where}) were stopped by `kill -9` of one rank or all, {figures['while_saving']} of them while "
        f"saving; in {figures['damaged_files']} the newest checkpoint was then damaged. After resuming, {figures['resumes_equal']} of "
        f"{figures['runs']} ended with the weights of an uninterrupted run (identical bits on one process, within 1e-6 on two). Bytes "
        f"of complete checkpoints lost: {figures['bytes_lost']} ({result['date']}, torch {versions['torch']}, `{result['command']}`)."
    )


def engines_equal() -> str:
    """Two processes against one with the same global batch: the largest difference among 20 losses, by engine, model, method."""
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
        f"The gradients of the first step differ by at most {gradient:.1e}. {dates[-1]}, torch {stack['torch']}, transformers "
        f"{stack['transformers']}, DeepSpeed {stack['deepspeed']}; made by `{result['command']}`.",
    ]
    return "\n".join(lines)


def distributed_accuracy() -> str:
    """Predictions against real ranks: the worst errors by launch file, also of DeepSpeed's own estimators."""
    result = json.loads((RESULTS / "distributed_accuracy.json").read_text(encoding="utf-8"))
    lines = [
        "| | runs | states, worst | peak, worst | DeepSpeed's estimator, states, worst |",
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
    lines += ["", f"{len(dates)} predictions, {dates[-1]}; made by `python benchmarks/distributed_fits.py`."]
    return "\n".join(lines)


def reach() -> str:
    """The longest rows that each card can train on, by levers, beside what others publish; then the largest batches."""
    sys.path.insert(0, str(Path(__file__).parent))
    import reach as made

    found = made.load()["rows"]
    lengths = {(row["gb"], row["levers"]): row for row in found if row["kind"] == "length"}
    batches = {(row["gb"], row["levers"]): row for row in found if row["kind"] == "batch"}
    casts, *levers = made.LEVERS

    def tokens(gb: int, name: str) -> str:
        return f"{lengths[gb, name]['most']:,}" if lengths[gb, name]["most"] else "does not fit"

    def published(gb: int, column: int) -> str:
        value = made.PUBLISHED[gb][column] if gb in made.PUBLISHED else None
        return "" if value is None else f"{value:,}" if value else "does not fit"

    lines = [
        f"| card | {casts} | others: transformers | {' | '.join(levers)} | others: Unsloth | on the host |",
        "|---|" + "---:|" * (len(levers) + 4),
    ]
    for gb, card in made.CARDS.items():
        cells = [tokens(gb, casts), published(gb, 0), *(tokens(gb, name) for name in levers), published(gb, 1)]
        host = lengths[gb, levers[-1]]["host_bytes"] / 2**30
        lines.append(f"| {card}, {gb} GB | {' | '.join(cells)} | {host:.0f} GiB |")
    names = list(dict.fromkeys(name for _, name in batches))
    lines += [
        "",
        f"The most rows of {made.BATCH_LENGTH:,} tokens at once:",
        "",
        f"| card | {' | '.join(names)} |",
        "|---|" + "---:|" * len(names),
    ]
    for gb, card in made.CARDS.items():
        lines.append(f"| {card}, {gb} GB | {' | '.join(str(batches[gb, name]['most']) for name in names)} |")
    dates = sorted(row["date"] for row in found)
    lines += [
        "",
        f"{sum(row['predictions'] for row in found)} predictions, {dates[-1]}; made by `python benchmarks/reach.py`.",
    ]
    return "\n".join(lines)


def ladder() -> str:
    """Peak memory and speed with one lever after another."""
    result = json.loads((RESULTS / "ladder.json").read_text(encoding="utf-8"))
    lines = [
        "| model | method | levers | peak, measured | peak, predicted | tokens a second (slowest and fastest step) |",
        "|---|---|---|---:|---:|---:|",
    ]
    for row in result["rows"]:
        low, high = row["slowest_and_fastest"]
        lines.append(
            f"| {row['model']} | {row['method']} | {row['levers']} | {row['measured_bytes'] / 2**20:.1f} MiB | {row['predicted_bytes'] / 2**20:.1f} MiB "
            f"| {row['tokens_per_second']:,.0f} ({low:,.0f} to {high:,.0f}) |"
        )
    dates = sorted(row["date"] for row in result["rows"])
    lines += [
        "",
        f"{dates[-1]}, {result['cores']} CPU cores, {result['repetitions']} repetitions, torch {result['stack']['torch']}, transformers "
        f"{result['stack']['transformers']}; made by `python benchmarks/ladder.py`.",
    ]
    return "\n".join(lines)


def costs() -> str:
    """What single flags cost or save, predicted."""
    result = json.loads((RESULTS / "costs.json").read_text(encoding="utf-8"))
    lines = ["| change | the run | without | with it | difference |", "|---|---|---:|---:|---:|"]
    for row in result["rows"]:
        without, with_it = (nbytes / 2**30 for nbytes in row["reserved_bytes"])
        cells = [f"{without:.1f} GiB", f"{with_it:.1f} GiB", f"{with_it - without:+.1f} GiB"]
        lines.append(f"| {row['what']}: `{row['flag']}` | `{row['run']}` | {' | '.join(cells)} |")
    lines += [
        "",
        f"Reserved memory on an {result['card']}, predicted {result['rows'][0]['date']}; made by `python benchmarks/costs.py`.",
    ]
    return "\n".join(lines)


def streamed() -> str:
    """Runs whose base is larger than the card, predicted."""
    result = json.loads((RESULTS / "streamed.json").read_text(encoding="utf-8"))
    lines = ["| recipe | model | tokens of a row | the card needs | the host needs |", "|---|---|---:|---:|---:|"]
    for row in result["rows"]:
        card, host = (row[name] / 2**30 for name in ("needed_bytes", "host_bytes"))
        lines.append(f"| `{row['method']}` | {row['model']} | {row['tokens']:,} | {card:.1f} GiB | {host:.0f} GiB |")
    lines += [
        "",
        f"Predicted {result['rows'][0]['date']}, one row, bf16, activation checkpointing; made by `python benchmarks/streamed.py`.",
    ]
    return "\n".join(lines)


def overhead() -> str:
    """What is added to a step, and the seconds from launch to the first step."""
    result = json.loads((RESULTS / "overhead.json").read_text(encoding="utf-8"))
    lines = ["| loop | ms of CPU time a step (slowest and fastest repetition) |", "|---|---:|"]
    for loop, found in result["milliseconds"].items():
        low, high = min(found["repetitions"]), max(found["repetitions"])
        lines.append(f"| {loop} | {found['median']:.1f} ({low:.1f} to {high:.1f}) |")
    lines += [
        "",
        f"So {result['added_milliseconds']:.1f} ms are added to a bare loop: {result['share_of_a_step']:.1%} of a step of "
        f"{result['large_milliseconds']:,.0f} ms, that of the Llama above.",
        "",
        "| from launch to the first step | seconds |",
        "|---|---:|",
    ]
    lines += [f"| {part} | {seconds:.1f} |" for part, seconds in result["launch_seconds"].items()]
    lines += [
        "",
        f"{result['date']}, {result['cores']} CPU cores, one thread; made by `python benchmarks/overhead.py`.",
    ]
    return "\n".join(lines)


def throughput() -> str:
    """Real tokens a second and peak memory: ours beside what people use instead."""
    result = json.loads((RESULTS / "throughput.json").read_text(encoding="utf-8"))
    ours = {row["case"]: row["tokens_per_second"] for row in result["rows"] if row["way"] == "ours"}
    lines = [
        "| model, rows | way | real tokens a second (slowest and fastest repetition) | ours is as fast | peak |",
        "|---|---|---:|---:|---:|",
    ]
    for row in result["rows"]:
        low, high = min(row["of_each_repetition"]), max(row["of_each_repetition"])
        times = f"{ours[row['case']] / row['tokens_per_second']:.2f} x" if row["way"] != "ours" else ""
        lines.append(
            f"| {row['case']} | {row['way']} | {row['tokens_per_second']:,.0f} ({low:,.0f} to {high:,.0f}) | {times} "
            f"| {row['peak_bytes'] / 2**20:,.0f} MiB |"
        )
    waits = [row["waiting_for_data_percent"] for row in result["rows"] if row["way"].startswith("ours")]
    repetitions, steps = len(result["rows"][0]["of_each_repetition"]), [row["steps"] for row in result["rows"]]
    lines += [
        "",
        f"By CPU time of one thread on a busy machine; {repetitions} repetitions of {min(steps)} to {max(steps)} steps of {result['batch']} rows, "
        f"{result['rows'][0]['date']}, torch {result['stack']['torch']}, transformers {result['stack']['transformers']}, TRL {result['trl']}; "
        f"a step of ours waits {min(waits):.1f} to {max(waits):.1f} % of its time for data; made by `python benchmarks/throughput.py`.",
    ]
    return "\n".join(lines)


def stacks() -> str:
    """The tests under the oldest and the newest versions that pyproject.toml admits."""
    path = RESULTS / "stacks.json"
    if not path.is_file():
        return "The oldest and the newest versions have not been tested yet: `make stacks`."
    result = json.loads(path.read_text(encoding="utf-8"))
    names = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "deepspeed")
    shown = []
    for end, stack in result["stacks"].items():
        versions = ", ".join(f"{name} {stack['versions'][name]}" for name in names if name in stack["versions"])
        recipe = "`recipes/lora.py` ran" if stack["recipe"] else "`recipes/lora.py` failed"
        shown.append(
            f"on the {end} versions (Python {stack['python']}, {versions}) {stack['passed']} fast tests passed, {stack['failed']} failed, "
            f"and {recipe}"
        )
    return f"`{result['command']}` tested the oldest and the newest versions on {result['date']}: {'; '.join(shown)}."


def gpu_accuracy() -> str:
    """Results of `make gpu`, by card: errors of predictions, recipes that ran, limits that held; or that there are none."""
    sys.path.insert(0, str(Path(__file__).parent))
    from on_gpu.results import Results, summary, verdict

    files = sorted(path for path in (RESULTS / "gpu").glob("*.json") if path.name != "fits.json")
    if not files:
        return "This project has not measured anything on a GPU yet; `make gpu` does it."
    lines = [
        "| card | configurations | allocated, mean (worst) | same, step without trace | reserved, mean (worst) | recipes that ran "
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


def categories() -> str:
    """The ledger's categories and their meanings, read from `toolkit/memory/ledger.py`."""
    tree = ast.parse((ROOT / "toolkit" / "memory" / "ledger.py").read_text(encoding="utf-8"))
    value = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "CATEGORIES"
    )
    lines = ["| category | meaning |", "|---|---|"]
    return "\n".join([*lines, *(f"| `{name}` | {what} |" for name, what in ast.literal_eval(value).items())])


# Each file of benchmarks/results: its content, and the command that writes it ("": the file names it itself).
COMMITTED = {
    "comparison.json": (
        "[Every trained method](#methods-compared) on the embedded task, over several seeds",
        "footprint compare --methods METHODS --seeds N",
    ),
    "distributed_accuracy.json": (
        "[Predictions for several processes](#several-processes-against-real-ranks) against real ranks on a CPU",
        "python benchmarks/distributed_accuracy.py",
    ),
    "distributed_fits.json": (
        "[The fewest 24 GB cards](#fewest-cards-on-which-a-run-fits) on which each run is predicted to fit",
        "python benchmarks/distributed_fits.py",
    ),
    "embedded.json": (
        "[Scores of LoRA and full fine-tuning](#the-embedded-task) on the embedded task, and the demo's output",
        "python benchmarks/embedded.py",
    ),
    "engines_equal.json": (
        "[Two processes train like one](../launch/README.md#two-processes-train-like-one): differences of losses and gradients",
        "",
    ),
    "launch_matrix.json": (
        "[Recipes under launch files](../launch/README.md#which-recipe-runs-under-which-file) on two real processes",
        "",
    ),
    "levers.json": (
        "[Which levers go with which recipe and engine](../recipes/README.md#need-less-memory) on real processes",
        "",
    ),
    "matrix.json": (
        "[Which options combine](../recipes/README.md#what-combines): a run of two steps for each combination",
        "",
    ),
    "prediction_speed.json": (
        "[Time and RAM of a prediction](#time-of-a-prediction)",
        "python benchmarks/prediction_speed.py",
    ),
    "costs.json": ("[What single flags cost or save](#what-single-flags-cost)", "python benchmarks/costs.py"),
    "overhead.json": ("[What is added to a step](#what-is-added-to-a-step)", "python benchmarks/overhead.py"),
    "streamed.json": (
        "[Runs whose base is larger than the card](../launch/README.md#a-base-larger-than-the-card)",
        "python benchmarks/streamed.py",
    ),
    "ladder.json": (
        "[Memory and speed with one lever after another](#one-lever-after-another)",
        "python benchmarks/ladder.py",
    ),
    "reach.json": (
        "[The longest rows and largest batches](#how-far-a-card-reaches) that each card is predicted to train on",
        "python benchmarks/reach.py",
    ),
    "reliability.json": ("[Runs that were killed and resumed](../launch/README.md#when-a-run-is-interrupted)", ""),
    "stacks.json": (
        "[Tests on the oldest and the newest versions](#oldest-and-newest-versions) of the dependencies",
        "",
    ),
    "t4_accuracy.json": (
        "[Predictions against third-party T4 measurements](#accuracy-on-third-party-t4-measurements)",
        "python benchmarks/t4_accuracy.py CSV",
    ),
    "t4_session.json": (
        "The same for [an earlier session](#accuracy-on-third-party-t4-measurements) on that card",
        "python benchmarks/t4_accuracy.py --session JSON",
    ),
    "third_party.json": (
        "[Predictions against other third-party measurements](#accuracy-on-other-third-party-measurements)",
        "python benchmarks/third_party.py SET CSV",
    ),
    "gpu/fits.json": ("Limits predicted beforehand for `make gpu`", "python benchmarks/gpu.py --plan CARD"),
    "throughput.json": (
        "[Real tokens a second](#real-tokens-a-second) beside what people use instead",
        "python benchmarks/throughput.py --data D --llama L --t5_tokenizer T --peers P",
    ),
}


def results() -> str:
    """Every file of benchmarks/results: its content, the command that writes it, and its dates."""
    lines = ["| file | what it shows | command | date |", "|---|---|---|---|"]
    for path in sorted(
        path for path in RESULTS.rglob("*") if path.is_file() and path.parent in (RESULTS, RESULTS / "gpu")
    ):
        name = path.relative_to(RESULTS).as_posix()
        content = json.loads(path.read_text(encoding="utf-8"))
        if name in COMMITTED:
            what, command = COMMITTED[name]
        elif name.startswith("gpu/"):
            what, command = f"[Measured on {content['card']['name']}](#on-a-gpu)", "make gpu"
        else:
            raise SystemExit(f"benchmarks/results/{name} is not described: add it to COMMITTED in benchmarks/readme.py")
        dates = sorted(set(_dates(content)))
        when = " to ".join(dates[:: max(len(dates) - 1, 1)])
        lines.append(f"| `{name}` | {what} | `{command or content['command']}` | {when} |")
    return "\n".join(lines)


def _dates(tree: Any) -> Iterator[str]:
    """Every "date" in a result, as YYYY-MM-DD."""
    if isinstance(tree, dict):
        if isinstance(tree.get("date"), str):
            yield tree["date"][:10]
        tree = tree.values()
    elif not isinstance(tree, list):
        return
    for value in tree:
        yield from _dates(value)


PARTS = {
    "demo": demo,
    "predictions": predictions,
    "methods": methods,
    "demo output": demo_output,
    "combinations": combinations,
    "launches": launches,
    "levers": levers,
    "engines equal": engines_equal,
    "reliability": reliability,
    "results": results,
    "t4 accuracy": t4_accuracy,
    "third party": third_party,
    "distributed accuracy": distributed_accuracy,
    "distributed fits": distributed_fits,
    "reach": reach,
    "ladder": ladder,
    "costs": costs,
    "overhead": overhead,
    "streamed": streamed,
    "throughput": throughput,
    "prediction speed": prediction_speed,
    "gpu accuracy": gpu_accuracy,
    "comparison": comparison,
    "embedded scores": embedded_scores,
    "stacks": stacks,
    "categories": categories,
}


def rewritten(texts: Mapping[str, str]) -> dict[str, str]:
    """`texts` (name of a README -> its text) with every generated part rewritten.

    Raises: SystemExit with the file and the part for a marker without a part or without its partner, and for a part that no
    README uses.
    """
    made: dict[str, str] = {}
    new = {}
    for file, text in texts.items():
        pieces, start, opened = [], 0, ""
        for found in MARKER.finditer(text):
            end, name = bool(found[1]), found[2]
            if name not in PARTS:
                raise SystemExit(f"{file}: the marker <!-- {name} --> belongs to no part of benchmarks/readme.py")
            if end != bool(opened) or (end and name != opened):
                missing = f"<!-- end {opened} --> is missing" if opened else "no part is open"
                raise SystemExit(f"{file}: {found[0]} stands where {missing}")
            if end:
                made[name] = made[name] if name in made else PARTS[name]()
                pieces.append(made[name] + "\n")
                start, opened = found.start(), ""
            else:
                pieces.append(text[start : found.end()] + "\n")
                opened = name
        if opened:
            raise SystemExit(f"{file}: <!-- {opened} --> is not closed by <!-- end {opened} -->")
        new[file] = "".join([*pieces, text[start:]])
    if missing := [name for name in PARTS if name not in made]:
        raise SystemExit(f"no README has a place for {', '.join(f'<!-- {name} -->' for name in missing)}")
    return new


def main() -> int:
    """Writes the READMEs. With `--check` it only prints those that differ from the results, and returns 1 if any does."""
    old = {name: (ROOT / name).read_text(encoding="utf-8") for name in READMES}
    new = rewritten(old)
    changed = [name for name in READMES if new[name] != old[name]]
    for name in changed:
        if "--check" in sys.argv:
            print(f"{name} differs from the results")
        else:
            (ROOT / name).write_text(new[name], encoding="utf-8")
    return int(bool(changed) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
