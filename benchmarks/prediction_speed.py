"""Measures how long a prediction takes, against the imports that each needs.

    python benchmarks/prediction_speed.py
    python benchmarks/prediction_speed.py --show       # the committed results

The unit is `python -c "import torch, transformers, peft"` on the same machine: seconds mean little on another one. A prediction in a
process of its own is `footprint predict` without its search for what would fit, since each model is predicted for a card that holds it.
Further predictions run in one process after the first, with another number of rows each, once with layers that repeat run once, and
once with all layers run. CPU seconds count (user and system time), which other programs disturb less; each figure is the median of
`REPETITIONS`. Nothing is read from the cache of predictions.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "prediction_speed.json"
REPETITIONS = 3
FURTHER = 3
IMPORTS = "import torch, transformers, peft"
FLAGS = ["--max_length", "1024", "--activation_checkpointing"]
CASES = {
    "Llama-3.1-8B, LoRA": ("lora", "meta-llama/Llama-3.1-8B", "RTX 4090"),
    "Llama-3.1-8B, QLoRA": ("qlora", "meta-llama/Llama-3.1-8B", "RTX 4090"),
    "Llama-3.1-8B, full": ("full", "meta-llama/Llama-3.1-8B", "H200"),
    "Llama-3.1-70B, LoRA": ("lora", "meta-llama/Llama-3.1-70B", "B200"),
    "Llama-3.1-70B, QLoRA": ("qlora", "meta-llama/Llama-3.1-70B", "A100 80GB"),
    "gemma-2-9b, LoRA": ("lora", "google/gemma-2-9b", "A100 80GB"),
    "t5-3b, LoRA": ("lora", "t5-3b", "A100 80GB"),
}


def process(*arguments: str) -> dict[str, Any]:
    """CPU seconds and peak memory of one Python process, and what it wrote to standard output. It must end with exit code 0."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "FOOTPRINT_CACHE": ""}
    started = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env, text=True
    )
    assert started.stdout is not None
    output = started.stdout.read()
    _, status, usage = os.wait4(started.pid, 0)
    started.returncode = os.waitstatus_to_exitcode(status)
    if started.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with exit code {started.returncode}")
    return {"cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_rss_bytes": usage.ru_maxrss * 1024, "output": output}


def median(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The run with the median of the CPU seconds."""
    runs = sorted((run() for _ in range(REPETITIONS)), key=lambda one: one["cpu_seconds"])
    return runs[len(runs) // 2]


def further(method: str, model: str, gpu: str, folds: bool) -> float:
    """The median of the CPU seconds of predictions in this process, after one."""
    from toolkit.memory.shadow import step
    from toolkit.runs.api import predict

    margins = step.MARGINS
    step.MARGINS = margins if folds else ()
    try:
        seconds = []
        for rows in range(1, FURTHER + 2):
            began = time.process_time()
            predict(method, *FLAGS, gpu=gpu, model_name_or_path=model, per_device_train_batch_size=rows)
            seconds.append(time.process_time() - began)
    finally:
        step.MARGINS = margins
    return statistics.median(seconds[1:])


def measure() -> dict[str, Any]:
    """The content of the results file."""
    os.environ["FOOTPRINT_CACHE"] = ""
    imports = median(lambda: process("-c", IMPORTS))
    main = "import sys; from toolkit.cli import main; sys.exit(main())"
    runs: dict[str, dict[str, Any]] = {}
    for name, (
        method,
        model,
        gpu,
    ) in CASES.items():  # first, because a process counts the memory of the one that starts it
        rows = ["--per_device_train_batch_size", "1"]
        words = ["predict", method, "--model_name_or_path", model, "--gpu", gpu, *rows, *FLAGS, "--json"]
        alone = median(lambda words=words: process("-c", main, *words))
        runs[name] = {
            "cpu_seconds": round(alone["cpu_seconds"], 2),
            "peak_rss_bytes": alone["peak_rss_bytes"],
            "reserved_bytes": json.loads(alone["output"])["peak"]["reserved_bytes"],
        }
    for name, case in CASES.items():
        runs[name] |= {
            "further_cpu_seconds": round(further(*case, folds=True), 2),
            "further_cpu_seconds_all_layers": round(further(*case, folds=False), 2),
        }
        print(name, runs[name], file=sys.stderr, flush=True)
    return {
        "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "imports_cpu_seconds": round(imports["cpu_seconds"], 2),
        "runs": runs,
    }


def show(content: dict[str, Any]) -> None:
    """Prints the results as a table."""
    print(f"{content['date']}, {content['versions']}; {IMPORTS}: {content['imports_cpu_seconds']} s of CPU\n")
    print(f"{'':<24}{'by imports':>12}{'further, s':>12}{'all layers, s':>15}{'RAM, MiB':>10}")
    for name, run in content["runs"].items():
        by_imports = run["cpu_seconds"] / content["imports_cpu_seconds"]
        further_ones = f"{run['further_cpu_seconds']:>12.2f}{run['further_cpu_seconds_all_layers']:>15.2f}"
        print(f"{name:<24}{by_imports:>12.2f}{further_ones}{run['peak_rss_bytes'] / 2**20:>10.0f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="print the results file and do nothing else")
    if not parser.parse_args().show:
        content = measure()
        RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    show(json.loads(RESULTS.read_text(encoding="utf-8")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
