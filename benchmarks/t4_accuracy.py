"""Accuracy of predictions on 36 LoRA and QLoRA runs that somebody else measured on a Tesla T4.

    python benchmarks/t4_accuracy.py ../shared/data/memory/t4_lora_measured.csv
    python benchmarks/t4_accuracy.py --show                # the table of the committed results
    python benchmarks/t4_accuracy.py --session fitcheck_llm-0.3.1/data/measurements/t4-qlora-2026-09-01.json

The runs are those of fitcheck-llm 0.3.1 (MIT; Kaggle T4). No constant of the predictor was fitted to them. This uses
`third_party.py`, where `loops/t4.yaml` describes the loop. This file only adds what is special to the set: phases, other tools'
predictions, and an earlier session.

`--session` takes the ten NF4 runs of an earlier session on the same card. The CSV does not have them; fitcheck-llm's source
distribution does (only peaks, in whole MiB). Model shapes come from our catalogue, LoRA settings from the CSV.

The results also have other tools' predictions: fitcheck-llm's own (its formulas and the overheads that it fitted to this card;
only if the package is installed), `accelerate estimate-memory`, and DeepSpeed's ZeRO-2 estimator on one GPU.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import third_party

MIB = 2**20
RESULTS = Path(__file__).parent / "results" / "t4_accuracy.json"
SESSION = Path(__file__).parent / "results" / "t4_session.json"
PHASES = ("after_load", "forward", "backward", "optimizer_step")
COLUMNS = {  # ours -> theirs
    "after_load": "after_load_allocated_mib",
    "forward": "peak_forward_mib",
    "backward": "peak_backward_mib",
    "optimizer_step": "peak_optimizer_mib",
    "peak_allocated": "peak_allocated_mib",
    "peak_reserved": "peak_reserved_mib",
    "process": "process_mib",
}


def predict(row: dict[str, str]) -> dict[str, float]:
    """The predicted columns of one measured run, MiB."""
    figures = third_party.predict(third_party.run_of(third_party.description("t4"), row))
    figures["peak_allocated"] = figures["last_step_peak_allocated"]
    return {name: round(figures[name] / MIB, 2) for name in COLUMNS}


def peers(row: dict[str, str]) -> dict[str, float]:
    """Other tools' predictions for the row's process, in MiB; fitcheck has two: allocated ("tensors") and process."""
    from accelerate.commands.estimate import estimate_training_usage

    total = int(row["total_params"])
    estimate = estimate_training_usage(4 * total, "float16")
    result = {"accelerate": estimate["step"] / MIB, "deepspeed": (2 + 18) * total / MIB}  # ZeRO-2, one GPU, no offload
    try:
        from fitcheck.config_parser import ModelConfig
        from fitcheck.estimator import TrainingConfig
        from fitcheck.estimator import estimate as fitcheck_estimate
        from fitcheck.gpu_db import get_gpu
    except ImportError:
        return result
    sizes = {
        name: int(row[column])
        for name, column in {
            "hidden_size": "hidden_size",
            "num_layers": "num_layers",
            "num_attention_heads": "num_attention_heads",
            "num_kv_heads": "num_kv_heads",
            "intermediate_size": "intermediate_size",
            "vocab_size": "vocab_size",
            "head_dim": "head_dim",
        }.items()
    }
    report = fitcheck_estimate(
        ModelConfig(
            name=row["model"],
            num_params=total - int(row["trainable_params"]),
            tie_word_embeddings=row["tied_embeddings"] == "True",
            **sizes,
        ),
        TrainingConfig(
            precision="fp16",
            quantization=row["quantization"],
            batch_size=int(row["batch_size"]),
            seq_len=int(row["seq_len"]),
            lora_rank=int(row["lora_rank"]),
            grad_checkpoint=True,
            flash_attn=row["attention"].startswith("sdpa"),
        ),
        get_gpu("t4"),
    )
    result["fitcheck_allocated"] = report.total_mib - report.overhead_mib
    result["fitcheck_process"] = report.total_mib
    return {name: round(value, 1) for name, value in result.items()}


def run_one(index: int, row: dict[str, str]) -> dict[str, Any]:
    """One row's entry of the results file."""
    began = time.perf_counter()
    predicted = predict(row)
    measured = {name: float(row[column]) for name, column in COLUMNS.items()}
    return {
        "index": index,
        "model": row["model"],
        "quantization": row["quantization"],
        "attention": row["attention"].split()[0],
        "batch_size": int(row["batch_size"]),
        "seq_len": int(row["seq_len"]),
        "stack": row["stack"],
        "measured_mib": measured,
        "predicted_mib": predicted,
        "error_percent": {name: round(third_party.error(predicted[name], measured[name]), 3) for name in COLUMNS},
        "peers_mib": peers(row),
        "seconds": round(time.perf_counter() - began, 1),
    }


def session_rows(path: Path) -> list[dict[str, str]]:
    """The runs of an archived session as rows like the CSV's, with `peak_allocated_mib` and `peak_reserved_mib`."""
    from toolkit.models.catalogue import config_of

    rows = []
    for run in json.loads(path.read_text(encoding="utf-8"))["runs"]:
        settings, config = run["run"], config_of(run["model_id"])
        assert config is not None, f"{run['model_id']} is not in the catalogue"
        row = {
            "model": run["model_id"],
            "architecture": config.model_type,
            "hidden_size": config.hidden_size,
            "num_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_kv_heads": config.num_key_value_heads,
            "intermediate_size": config.intermediate_size,
            "vocab_size": config.vocab_size,
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            "tied_embeddings": config.tie_word_embeddings,
            "quantization": settings["quantization"],
            "attention": settings["attn_impl"],
            "lora_rank": settings["lora_rank"],
            "batch_size": settings["batch_size"],
            "seq_len": settings["seq_len"],
            "stack": "torch 2.10.0+cu128, transformers 5.0.0, peft 0.19.1",
            **{name: run["measured"][name] for name in ("peak_allocated_mib", "peak_reserved_mib")},
        }
        rows.append({name: str(value) for name, value in row.items()})
    return rows


def predict_session(path: Path) -> None:
    """Predicts an archived session's runs, and writes predicted and measured peaks."""
    from importlib.metadata import version

    entries = []
    for row in session_rows(path):
        predicted = predict(row)
        peaks = {name: (float(row[f"{name}_mib"]), predicted[name]) for name in ("peak_allocated", "peak_reserved")}
        entries.append(
            {name: row[name] for name in ("model", "attention", "batch_size", "seq_len")}
            | {"measured_mib": {name: pair[0] for name, pair in peaks.items()}}
            | {"predicted_mib": {name: pair[1] for name, pair in peaks.items()}}
            | {"error_percent": {name: round(third_party.error(p, m), 3) for name, (m, p) in peaks.items()}}
        )
        print(entries[-1], flush=True)
    content = {
        "what": "predicted against measured on a Tesla T4; NF4 runs of fitcheck-llm's session of 2026-09-01",
        "date": datetime.date.today().isoformat(),
        "predicted_with": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
        "rows": entries,
    }
    SESSION.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def summary(entries: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Group -> column -> mean and worst absolute error in percent."""
    groups: dict[str, list[dict[str, Any]]] = {"all": entries}
    for entry in entries:
        groups.setdefault(f"{entry['quantization']} {entry['attention']}", []).append(entry)
    result: dict[str, dict[str, dict[str, float]]] = {}
    for group, members in sorted(groups.items()):
        columns = {name: [abs(e["error_percent"][name]) for e in members] for name in COLUMNS}
        for peer, column in (
            ("fitcheck_allocated", "peak_allocated"),
            ("fitcheck_process", "process"),
            ("accelerate", "process"),
            ("deepspeed", "process"),
        ):
            known = [e for e in members if peer in e["peers_mib"]]
            if known:
                columns[peer] = [abs(third_party.error(e["peers_mib"][peer], e["measured_mib"][column])) for e in known]
        result[group] = {
            name: {"mean": round(sum(v) / len(v), 3), "worst": round(max(v), 3), "rows": len(v)}
            for name, v in columns.items()
        }
    return result


def write(entries: Iterable[dict[str, Any]], path: Path) -> None:
    """Writes the results file: rows, summary, stack and date."""
    from importlib.metadata import version

    ordered = sorted(entries, key=lambda e: e["index"])
    stack = {name: version(name) for name in ("torch", "transformers", "peft", "accelerate", "bitsandbytes")}
    content = {
        "what": "predicted against measured on a Tesla T4; the runs are those of fitcheck-llm 0.3.1",
        "date": datetime.date.today().isoformat(),
        "predicted_with": stack,
        "runs": f"{len(ordered)} of the 36",
        "summary_percent": summary(ordered),
        "rows": ordered,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def show(path: Path) -> None:
    """Prints rows and summary of a results file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    print(f"errors in percent, {content['runs']} runs, {content['date']}, predicted with {content['predicted_with']}\n")
    print(f"{'run':<52}{'load':>8}{'forward':>9}{'backward':>9}{'step':>8}{'alloc.':>8}{'reserved':>9}{'fitcheck':>10}")
    for e in content["rows"]:
        name = f"{e['model'].split('/')[1][:22]} {e['quantization']} {e['attention']} {e['batch_size']}x{e['seq_len']}"
        cells = [e["error_percent"][n] for n in (*PHASES, "peak_allocated", "peak_reserved")]
        peer = e["peers_mib"].get("fitcheck_process")
        other = f"{third_party.error(peer, e['measured_mib']['process']):>+10.1f}" if peer else f"{'-':>10}"
        widths = (8, 9, 9, 8, 8, 9)
        print(f"{name:<52}" + "".join(f"{c:>+{w}.2f}" for c, w in zip(cells, widths, strict=True)) + other)
    print("\nmean / worst absolute error, percent")
    for group, columns in content["summary_percent"].items():
        print(f"  {group}")
        for name, value in columns.items():
            print(f"    {name:<20}{value['mean']:>9.3f}{value['worst']:>9.3f}   ({value['rows']} rows)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path, help="CSV of measured runs")
    parser.add_argument(
        "--rows", type=int, nargs="*", help="only these rows, counted from 0; results of the others are kept"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--show", action="store_true", help="print the results file and do nothing else")
    parser.add_argument(
        "--session", type=Path, metavar="JSON", help="predict the runs of this archived session instead"
    )
    args = parser.parse_args()
    if args.session:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        predict_session(args.session)
        return 0
    if not args.show:
        if args.data is None:
            parser.error("give the CSV of measured runs, or --show")
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        rows = list(csv.DictReader(args.data.open(encoding="utf-8")))
        wanted = range(len(rows)) if args.rows is None else args.rows
        entries = []
        if args.rows is not None and args.out.is_file():  # keep the other rows
            known = json.loads(args.out.read_text(encoding="utf-8"))["rows"]
            entries = [entry for entry in known if entry["index"] not in args.rows]
        with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
            for future in as_completed([pool.submit(run_one, i, rows[i]) for i in wanted]):
                entries.append(future.result())
                write(entries, args.out)
                done = entries[-1]
                print(done["index"], done["model"], done["error_percent"], done["seconds"], flush=True)
    show(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
