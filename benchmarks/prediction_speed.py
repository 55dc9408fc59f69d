"""Measures how long `footprint predict` takes, imports included, and how the time grows with the number of layers.

    python benchmarks/prediction_speed.py
    python benchmarks/prediction_speed.py --show       # the committed results

Each prediction runs in its own process: LoRA with gradient checkpointing for an RTX 4090, with Llama 3.1 8B and 70B from the
catalogue, and the 8B's shape with 16 and 64 layers. CPU seconds count, because on a busy machine wall-clock seconds (also those
after imports) mean little. As a measure of the machine's speed, the results also have the seconds for ten million additions
in Python.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "prediction_speed.json"
FLAGS = ["--per_device_train_batch_size", "1", "--max_length", "1024", "--gradient_checkpointing"]
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
LAYERS = (16, 64)


def additions() -> float:
    """Seconds of CPU for ten million additions in a Python loop."""
    began, total = time.process_time(), 0
    for number in range(10_000_000):
        total += number
    return time.process_time() - began


def predict(model: str) -> dict[str, Any]:
    """CPU and wall-clock seconds, peak memory and result of one `footprint predict` process."""
    main = "import sys; from toolkit.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", main, "predict", "lora", "--model_name_or_path", model, *FLAGS]
    command += ["--gpu", "RTX 4090", "--json"]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True)
    assert process.stdout is not None
    ledger = json.loads(process.stdout.read())
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode in (0, 1)
    cpu = usage.ru_utime + usage.ru_stime
    return {
        "cpu_seconds": round(cpu, 1),
        "wall_seconds": round(time.perf_counter() - began, 1),
        "after_imports_seconds": round(ledger["seconds"], 1),
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "reserved_bytes": ledger["peak"]["reserved_bytes"],
    }


def measure() -> dict[str, Any]:
    """The content of the results file."""
    from importlib.metadata import version

    runs = {name: predict(f"meta-llama/{name}") for name in ("Llama-3.1-8B", "Llama-3.1-70B")}
    with tempfile.TemporaryDirectory() as folder:
        for layers in LAYERS:
            path = Path(folder) / str(layers)
            path.mkdir()
            (path / "config.json").write_text(json.dumps(LLAMA_8B | {"num_hidden_layers": layers}))
            runs[f"8B's shape with {layers} layers"] = predict(str(path))
    return {
        "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count(),
        "ten_million_additions_seconds": round(additions(), 2),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "runs": runs,
    }


def show(content: dict[str, Any]) -> None:
    """Prints the results as a table."""
    print(
        f"{content['date']}, ten million additions: {content['ten_million_additions_seconds']} s; {content['versions']}\n"
    )
    print(f"{'':<28}{'CPU, s':>8}{'wall, s':>9}{'after imports, s':>18}{'RAM, MiB':>10}")
    for name, run in content["runs"].items():
        cells = f"{run['cpu_seconds']:>8}{run['wall_seconds']:>9}{run['after_imports_seconds']:>18}"
        print(f"{name:<28}{cells}{run['peak_rss_bytes'] / 2**20:>10.0f}")


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
