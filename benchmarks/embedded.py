"""Base, LoRA and full fine-tuning on the embedded default, over 3 seeds: the scores that README shows.

    python benchmarks/embedded.py

Runs the recipes as a user does and writes benchmarks/results/embedded.json. Nothing here chooses anything: the recipes'
defaults were chosen on the validation split. About two minutes a run on two cores.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULT = Path(__file__).parent / "results" / "embedded.json"
SEEDS = (0, 1, 2)


def run(method: str, seed: int, folder: Path) -> dict:
    """One recipe on its defaults; its run.json, with the size in bytes of what it saved."""
    launch = [Path(sys.executable).parent / "accelerate", "launch", "--config_file", ROOT / "launch" / "single.yaml"]
    recipe = [ROOT / "recipes" / f"{method}.py", "--seed", str(seed), "--output_dir", folder]
    command = [str(part) for part in (*launch, *recipe)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    weights = next(folder.glob("*model.safetensors"))
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    shown = done.stdout[done.stdout.index("Scores on the test split") : done.stdout.rindex("     folder")]
    return record | {"saved_bytes": weights.stat().st_size, "shown": [line.rstrip() for line in shown.splitlines()]}


def main() -> None:
    """Runs all of it and writes the result file."""
    result: dict = {
        "date": date.today().isoformat(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "runs": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for method in ("lora", "full"):
            for seed in SEEDS:
                record = run(method, seed, Path(folder) / f"{method}-{seed}")
                kept = ("method", "seed", "scores", "seconds", "parameters", "saved_bytes")
                result["runs"].append({name: record[name] for name in kept})
                result.setdefault("demo", record["shown"])  # of LoRA's first seed: how `make demo` ends
                result |= {"versions": record["versions"], "rows": record["data"]["rows"]}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
