"""Writes a comparison's folder with synthetic runs: the files of recipes, made in a moment; every number follows from the seed."""

import json
import random
from pathlib import Path

from toolkit.files import csv_text, read_csv
from toolkit.memory.ledger import CATEGORIES, Ledger, PhaseUse

SHAPES = {  # method: share of rows answered well, memory in MiB of each category, trainable parameters
    "full": (
        0.80,
        {"parameters_trainable": 3.5, "gradients": 3.5, "optimizer_state": 7.0, "activations_saved": 46.0},
        906_368,
    ),
    "lora": (
        0.82,
        {"parameters_frozen": 3.5, "parameters_trainable": 0.7, "optimizer_state": 1.3, "activations_saved": 46.0},
        172_032,
    ),
    "ia3": (
        0.60,
        {"parameters_frozen": 3.5, "parameters_trainable": 0.1, "optimizer_state": 0.1, "activations_saved": 41.0},
        3_584,
    ),
    "prompt_tuning": (0.25, {"parameters_frozen": 3.5, "activations_saved": 44.0, "temporaries": 2.0}, 1_280),
}
WORDS = [
    "the",
    "man",
    "asks",
    "about",
    "price",
    "of",
    "tickets",
    "for",
    "Friday",
    "and",
    "woman",
    "says",
    "it",
    "is",
    "too",
    "high",
]


def ledger(source: str, mib: dict[str, float], stretch: float = 1.0) -> Ledger:
    cells = {name: {"": int(size * stretch * 2**20)} for name, size in mib.items()}
    peak = PhaseUse(sum(part[""] for part in cells.values()), 0, cells)
    assert set(cells) <= set(CATEGORIES)
    return Ledger(
        source, "cpu", {"backward": peak}, {}, int(peak.allocated_peak_bytes * 1.02), {"trainable": 1, "all": 2}
    )


def write_run(folder: Path, method: str, seed: int, rows: int = 60, finished: bool = True) -> None:
    """One run: `rows` test rows, two references for each text."""
    from toolkit.tasks.metrics.rouge import rouge

    good, mib, trainable = SHAPES[method]
    rng, common = random.Random(f"{method}{seed}"), random.Random(1)
    folder.mkdir(parents=True)
    texts = [f"dialogue {i // 2}" for i in range(rows)]
    references = [" ".join(common.sample(WORDS, 8)) for _ in range(rows)]
    answers = {
        "base": [" ".join(common.sample(WORDS, 4)) for _ in range(rows)],
        "tuned": [r if rng.random() < good else " ".join(rng.sample(WORDS, 8)) for r in references],
    }
    lines = zip(texts, references, *answers.values(), strict=True)
    (folder / "completions.csv").write_text(csv_text(["text", "reference", *answers], lines), encoding="utf-8")
    record = {
        "method": method,
        "seed": seed,
        "task": "summarization",
        "command": f"accelerate launch recipes/{method}.py",
        "versions": {"torch": "2.13.0"},
        "precision": "fp32: no GPU",
        "weights": "float32",
        "parameters": {"trainable": trainable, "all": 1_078_400},
        "data": {"name": "embedded", "rows": {"train": 4000, "validation": 100, "test": rows}, "sha256": {"test": "x"}},
        "prompt_template": "{text}",
        "label_names": [],
        "max_length": 256,
        "max_target_length": 48,
        "scores": {who: rouge(texts, references) for who, texts in answers.items()},
        "seconds": 170.0 + rng.random() * 9,
        "finished": finished,
    }
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    (folder / "config.yaml").write_text("prompt_template: '{text}'\n", encoding="utf-8")
    ledger("measured", mib, 1 + seed / 100).save(folder / "memory.json")
    ledger("predicted", mib, 1.01 + seed / 100).save(folder / "predicted_memory.json")
    (folder / "adapter_model.safetensors").write_bytes(b"0" * 4 * trainable)
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as stream:
        for step in range(10, 501, 10):
            loss = 0.6 + 3 * (1 - good) + 2.5 * 0.985**step + rng.gauss(0, 0.05)
            line = {"step": step, "loss": loss, "seconds": 0.2 * step, "tokens_per_second": 9000 + rng.random() * 200}
            stream.write(json.dumps(line) + "\n")


def write_in_context(folder: Path, rows: int = 60) -> None:
    """A run without training: two numbers of examples."""
    write_run(folder, "ia3", 7, rows)
    for name in ("memory.json", "predicted_memory.json", "metrics.jsonl", "adapter_model.safetensors"):
        (folder / name).unlink()
    completions = read_csv(folder / "completions.csv")
    columns = {"text": "text", "reference": "reference", "0-shot": "base", "2-shot": "tuned"}
    answers = zip(*(completions[of] for of in columns.values()), strict=True)
    (folder / "completions.csv").write_text(csv_text(list(columns), answers), encoding="utf-8")
    record = json.loads((folder / "run.json").read_text())
    record |= {"method": "in_context", "parameters": {"trainable": 0, "all": 906_368}}
    record["scores"] = {"0-shot": record["scores"]["base"], "2-shot": record["scores"]["tuned"]}
    record["context"] = {
        s: {"prompt_tokens": t, "seconds_a_row": t / 1000} for s, t in (("0-shot", 80), ("2-shot", 260))
    }
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")


def write_comparison(folder: Path, methods=tuple(SHAPES), seeds: int = 3, in_context: bool = False) -> Path:
    """The whole comparison; the last method's last seed is missing, as if its process had run out of memory."""
    for method in methods:
        for seed in range(seeds):
            if (method, seed) != (methods[-1], seeds - 1):
                write_run(folder / "runs" / f"{method}-{seed}", method, seed)
    if in_context:
        write_in_context(folder / "runs" / "in_context-0")
    log = folder / "runs" / f"{methods[-1]}-{seeds - 1}.log"
    launcher = "subprocess.CalledProcessError: Command '['python']' returned non-zero exit status 1."
    log.write_text(f"step 1\nTraceback\n  line\ntorch.OutOfMemoryError: CUDA out of memory\nTraceback\n{launcher}\n")
    methods = [*methods, "in_context"] if in_context else list(methods)
    about = {"methods": methods, "seeds": seeds, "launch": "launch/single.yaml", "flags": ["--max_steps", "500"]}
    (folder / "comparison.json").write_text(json.dumps(about), encoding="utf-8")
    return folder
