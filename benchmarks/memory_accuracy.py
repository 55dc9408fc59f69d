"""Predicted against measured memory on the GPU of this machine, for a grid of models, methods and options.

    python benchmarks/memory_accuracy.py --list                 # the grid
    python benchmarks/memory_accuracy.py                        # measures all of it (a GPU is needed)
    python benchmarks/memory_accuracy.py --only llama-1b --limit 5

Every configuration runs as users run it: `footprint`'s own recipe with `--random_weights` (memory does not depend on the
weights' values), two optimizer steps, in a process of its own, which leaves the measured ledger in its folder; then
`footprint predict` is asked for the same flags and this card. Results are written after each configuration, so a run that is cut short
loses nothing, and one that is started again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "memory_accuracy.json"
NOT_MEASURED = "not measured yet"


@dataclass(frozen=True)
class Configuration:
    """One point of the grid: a recipe and its flags."""

    name: str
    method: str
    model: str
    flags: tuple[str, ...] = field(default=())

    def command(self, output_dir: str) -> list[str]:
        """What runs it: the recipe's own file."""
        recipe = str(ROOT / "recipes" / f"{self.method}.py")
        always = ("--random_weights", "--max_steps", "2", "--output_dir", output_dir)
        return [sys.executable, recipe, "--model_name_or_path", self.model, *always, *self.flags]

    def prediction(self, device: str) -> list[str]:
        """What predicts it for a card of that name, as one JSON object."""
        main = "from toolkit.cli import main; main()"
        flags = ("--model_name_or_path", self.model, "--random_weights", "--max_steps", "2", *self.flags)
        return [sys.executable, "-c", main, "predict", self.method, *flags, "--gpu", device, "--json"]


MODELS = {
    "llama-1b": "meta-llama/Llama-3.2-1B",
    "llama-3b": "meta-llama/Llama-3.2-3B",
    "llama-8b": "meta-llama/Llama-3.1-8B",
    "qwen-1.5b": "Qwen/Qwen2.5-1.5B",
    "flan-t5-base": "google/flan-t5-base",
    "mt0-large": "bigscience/mt0-large",
}
METHODS = {"full": (), "lora": (), "qlora": ("--load_in_4bit",), "ia3": ()}
RECIPES = {"qlora": "lora"}
SHAPES = ((1, 1024), (4, 512))
_TOO_LARGE = {("llama-8b", "full", "adamw_torch")}  # 16 bytes a parameter and more: no room beside activations


def grid() -> list[Configuration]:
    """All configurations, in a fixed order: every model with every method, and each option turned once."""
    result = []
    for (label, model), (method, extra) in product(MODELS.items(), METHODS.items()):
        if (label, method, "adamw_torch") in _TOO_LARGE:
            continue
        for batch, length in SHAPES:
            sizes = ("--per_device_train_batch_size", str(batch), "--max_length", str(length), "--bf16")
            result.append(_configuration(label, model, method, f"{batch}x{length}", (*sizes, *extra)))
    turned = {
        "checkpointed": ("--gradient_checkpointing",),
        "adamw-8bit": ("--optim", "adamw_bnb_8bit"),
        "fp32": (),
        "eager": ("--attn_implementation", "eager"),
    }
    for label in ("llama-1b", "flan-t5-base"):
        for method, (option, flags) in product(("full", "lora"), turned.items()):
            precision = () if option == "fp32" else ("--bf16",)
            sizes = ("--per_device_train_batch_size", "2", "--max_length", "512", *precision)
            result.append(_configuration(label, MODELS[label], method, f"2x512 {option}", (*sizes, *flags)))
    return result


def _configuration(label: str, model: str, method: str, rest: str, flags: tuple[str, ...]) -> Configuration:
    return Configuration(f"{label} {method} {rest}", RECIPES.get(method, method), model, flags)


def errors(predicted: dict[str, Any], measured: dict[str, Any]) -> dict[str, float]:
    """Percent of the measured value, for allocated and reserved peaks of two ledgers' JSON."""
    result = {}
    for name in ("allocated_bytes", "reserved_bytes"):
        result[name] = round(100 * (predicted["peak"][name] / measured["peak"][name] - 1), 3)
    return result


def measure(configuration: Configuration, device: str, timeout_seconds: int) -> dict[str, Any]:
    """Runs one configuration, then predicts it, each in a process of its own; an entry of the results file."""
    entry: dict[str, Any] = {"name": configuration.name, "flags": list(configuration.flags)}
    with tempfile.TemporaryDirectory() as folder:
        done = _run(configuration.command(folder), timeout_seconds)
        ledger = Path(folder) / "memory.json"
        if done.returncode or not ledger.is_file():
            return {**entry, "failed": _why(done)}
        measured = json.loads(ledger.read_text(encoding="utf-8"))
    done = _run(configuration.prediction(device), timeout_seconds)
    if done.returncode not in (0, 1):  # 1: it does not fit
        return {**entry, "measured": measured["peak"], "failed": _why(done)}
    predicted = json.loads(done.stdout)
    return {
        **entry,
        "predicted": predicted["peak"],
        "measured": measured["peak"],
        "stack": measured["stack"],
        "error_percent": errors(predicted, measured),
    }


def _run(command: list[str], timeout_seconds: int) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_seconds, check=False)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"longer than {timeout_seconds} seconds")


def _why(done: subprocess.CompletedProcess[str]) -> str:
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return f"exit code {done.returncode}: {last[:300]}"


def summary(entries: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Column -> mean and worst absolute error in percent, over the entries that were measured."""
    measured = [entry for entry in entries if "error_percent" in entry]
    result: dict[str, dict[str, float]] = {}
    for name in ("allocated_bytes", "reserved_bytes"):
        values = [abs(entry["error_percent"][name]) for entry in measured]
        if values:
            result[name] = {"mean": round(sum(values) / len(values), 3), "worst": round(max(values), 3)}
    return result


def write(entries: list[dict[str, Any]], path: Path, device: str | None) -> None:
    """The results file; without a device it says that nothing was measured yet."""
    content = {
        "status": "measured" if device else NOT_MEASURED,
        "device": device,
        "date": datetime.date.today().isoformat() if device else None,
        "configurations": len(grid()),
        "summary_percent": summary(entries),
        "rows": entries,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the grid and do nothing else")
    parser.add_argument("--only", default="", help="configurations whose name holds this")
    parser.add_argument("--limit", type=int, default=None, help="at most so many")
    parser.add_argument("--timeout", type=int, default=300, help="seconds for each configuration")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    chosen = [c for c in grid() if args.only in c.name][: args.limit]
    if args.list:
        for configuration in chosen:
            print(f"{configuration.name:<36}{configuration.method:<8}{' '.join(configuration.flags)}")
        return 0
    import torch

    if not torch.cuda.is_available():
        print(f"no GPU here: {NOT_MEASURED}", file=sys.stderr)
        write([], args.out, None)
        return 1
    device = torch.cuda.get_device_name()
    known = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {}
    entries = [e for e in known.get("rows", []) if "error_percent" in e] if known.get("device") == device else []
    finished = {entry["name"] for entry in entries}
    for configuration in chosen:
        if configuration.name not in finished:
            entries.append(measure(configuration, device, args.timeout))
            write(entries, args.out, device)
            print(configuration.name, entries[-1].get("error_percent") or entries[-1].get("failed"), flush=True)
    print(summary(entries))
    return 0


if __name__ == "__main__":
    sys.exit(main())
