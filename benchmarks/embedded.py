"""Base model, LoRA and full fine-tuning on the embedded task over 3 seeds: the scores in benchmarks/README.md.

    python benchmarks/embedded.py

Runs the recipes as a user does and writes benchmarks/results/embedded.json. Nothing is tuned here: the recipes' defaults were
chosen on the validation split. Each run uses one core, so `make demo`, which uses all cores, is faster.
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
    """Runs one recipe with its defaults; returns its run.json, the saved bytes and the end of its output."""
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
    """Runs all recipes and seeds, one run per core, and writes the result file."""
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
    result["demo"] = records[0]["shown"]  # LoRA's first seed: the end of `make demo`'s output
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
