"""Base, LoRA and full fine-tuning on the embedded default, over 3 seeds: the scores that benchmarks/README.md shows.

    python benchmarks/embedded.py

Runs the recipes as a user does and writes benchmarks/results/embedded.json. Nothing here chooses anything: the recipes'
defaults were chosen on the validation split. Each run has one core, so `make demo`, which has them all, is faster.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
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
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, env=env)
    print(done.stdout, flush=True)
    weights = next(folder.glob("*model.safetensors"))
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    shown = done.stdout[done.stdout.index("Scores on the test split") : done.stdout.rindex("     folder")]
    return record | {"saved_bytes": weights.stat().st_size, "shown": [line.rstrip() for line in shown.splitlines()]}


def main() -> None:
    """Runs all of it, one run a core, and writes the result file."""
    result: dict = {
        "date": date.today().isoformat(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "runs": [],
    }
    cases = [(method, seed) for seed in SEEDS for method in ("lora", "full")]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        records = list(pool.map(lambda case: run(*case, Path(folder) / "-".join(map(str, case))), cases))
    for record in records:
        kept = ("method", "seed", "scores", "seconds", "parameters", "saved_bytes")
        result["runs"].append({name: record[name] for name in kept})
    result |= {"versions": records[0]["versions"], "rows": records[0]["data"]["rows"]}
    result["demo"] = records[0]["shown"]  # LoRA's first seed: how `make demo` ends
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
