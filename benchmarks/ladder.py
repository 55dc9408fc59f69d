"""Measures one lever after another, cumulative: peak memory, predicted and measured, and tokens a second, for a T5 and a Llama.

    python benchmarks/ladder.py              # some minutes on two CPU cores, which must be idle
    python benchmarks/ladder.py --show       # the committed results

Small random models with the vocabularies of T5 and Llama 2, LoRA on all linear layers or full fine-tuning, one set of rows in one
order: as long as the flags allow, or uneven for packing, which saves nothing where all rows are as long. Each repetition runs every step of the ladder once, in a process of its own; tokens a second are medians of the steps of all
repetitions. A row is void if its losses differ from those of the first one, or a gradient norm is not above zero.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import random
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results" / "ladder.json"
TOKENIZER = Path(__file__).parent.parent / "toolkit" / "embedded" / "model"
LLAMA = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
T5 = {"d_model": 256, "d_kv": 32, "d_ff": 1024, "num_layers": 4, "num_heads": 8, "dropout_rate": 0.0}
MODELS = {  # name -> architecture, shape, flags
    "llama": (
        "llama",
        LLAMA | {"vocab_size": 32_000, "max_position_embeddings": 2048},
        ["--max_length", "512", "--max_target_length", "450"],
    ),
    "t5": ("t5", T5 | {"vocab_size": 32_128}, ["--max_length", "256", "--max_target_length", "128"]),
}
LORA = ["--lora_target_modules", "all-linear", "--lora_dropout", "0"]
UNEVEN = "lora, uneven rows"
LEVERS: dict[str, dict[str, list[str]]] = {  # method (and rows) -> levers, cumulative
    "lora": {
        "none": [*LORA, "--loss_chunk_tokens", "0"],
        "loss in chunks": LORA,
        "and MLP in tiles": [*LORA, "--mlp_tile_tokens", "256"],
        "and layers recomputed": [*LORA, "--mlp_tile_tokens", "256", "--activation_checkpointing"],
    },
    "full": {
        "none": ["--max_grad_norm", "0", "--loss_chunk_tokens", "0"],
        "loss in chunks": ["--max_grad_norm", "0"],
        "and layers recomputed": ["--max_grad_norm", "0", "--activation_checkpointing"],
        "and optimizer in backward": ["--activation_checkpointing", "--optimizer_in_backward"],
    },
    UNEVEN: {"none": LORA, "and rows end to end": [*LORA, "--packing"]},
}
LADDERS = [(model, method) for method in LEVERS for model in MODELS if method != UNEVEN or model == "llama"]
BATCH, TRACED, WARM, TIMED = 4, 2, 1, 4  # rows; steps
REPETITIONS = 2
LOSS_TOLERANCE = 1e-4  # relative: only roundings differ


def rows(folder: Path, uneven: bool = False) -> Path:
    """A data set whose texts and summaries are longer than any limit here; or, if `uneven`, shorter ones of 4 to 60 words."""
    generator, lengths = random.Random(0), random.Random(1)
    words = ["rain", "sun", "river", "stone", "bird", "cloud", "field", "road", "house", "tree"]
    data = folder / "rows.jsonl"
    with data.open("w", encoding="utf-8") as file:
        for _ in range(BATCH * (TRACED + WARM + TIMED) + 30):
            sizes = [lengths.randint(4, 60) if uneven else 700 for _ in range(2)]
            text, summary = (" ".join(generator.choices(words, k=size)) for size in sizes)
            file.write(json.dumps({"text": text, "summary": summary}) + "\n")
    return data


def measured(model: str, method: str, levers: str) -> dict[str, Any]:
    """One run: peak bytes measured and predicted, seconds of each timed step, losses, and tokens of a step."""
    import torch
    from transformers import AutoConfig, AutoTokenizer

    from toolkit.config import parse_config
    from toolkit.memory.measure import MemoryCallback
    from toolkit.methods import METHODS
    from toolkit.runs.prediction import predict_run
    from toolkit.runs.preflight import prepare
    from toolkit.training.trainer import FineTuner

    architecture, shape, flags = MODELS[model]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
        tokenizer.model_max_length = 2048
        tokenizer.save_pretrained(folder / "model")
        special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        config = AutoConfig.for_model(architecture, **shape, **special, decoder_start_token_id=tokenizer.pad_token_id)
        config.save_pretrained(folder / "model")
        argv = [
            "--model_name_or_path",
            str(folder / "model"),
            "--random_weights",
            "--dataset_name",
            str(rows(folder, method == UNEVEN)),
        ]
        argv += ["--output_dir", str(folder / "run"), "--use_cpu", "--save_strategy", "no", "--report_to", "none"]
        argv += ["--learning_rate", "1e-4", "--logging_steps", "1"]
        argv += ["--per_device_train_batch_size", str(BATCH), "--max_steps", str(TRACED + WARM + TIMED)]
        run = parse_config(METHODS[method.split(",")[0]], [*argv, *flags, *LEVERS[method][levers]])
        ready = prepare(run)
        torch.manual_seed(0)
        watch, memory = _watch(), MemoryCallback()
        trainer = FineTuner(run.method.attach(ready.load_model()), run, ready.data, [memory, watch])
        trainer.train()
        assert memory.ledger is not None, memory.problem
        predicted = predict_run(run, batches=memory.batches)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "measured_bytes": memory.ledger.allocated_bytes,
        "predicted_bytes": predicted.allocated_bytes,
        "seconds": watch.seconds[TRACED + WARM :],
        "losses": [entry["loss"] for entry in logged],
        "norms": [entry["grad_norm"] for entry in logged],
        "tokens": sum(map(_tokens, memory.batches)) / len(memory.batches),
    }


def _tokens(batch: dict[str, Any]) -> int:
    """The tokens of a batch that are no padding."""
    return batch["attention_mask"].sum().item() if "attention_mask" in batch else batch["input_ids"].numel()


def _watch() -> Any:
    import time

    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.began)

    return Watch()


def rung(model: str, method: str, levers: str, runs: list[dict[str, Any]], first: dict[str, Any]) -> dict[str, Any]:
    """The row of the results for all repetitions of one step; `first` is a run without levers."""
    for run in runs:
        off = max(abs(one - other) / abs(other) for one, other in zip(run["losses"], first["losses"], strict=True))
        if off > LOSS_TOLERANCE or not all(norm > 0 for norm in run["norms"]):
            raise SystemExit(f"{model}, {method}, {levers}: void, its losses are off by {off:.2g}: {run['losses']}")
    rates = [runs[0]["tokens"] / seconds for run in runs for seconds in run["seconds"]]
    return {
        "model": model,
        "method": method,
        "levers": levers,
        "flags": LEVERS[method][levers],
        "measured_bytes": runs[0]["measured_bytes"],
        "predicted_bytes": runs[0]["predicted_bytes"],
        "tokens_per_second": round(median(rates), 1),
        "slowest_and_fastest": [round(min(rates), 1), round(max(rates), 1)],
        "loss": [runs[0]["losses"][0], runs[0]["losses"][-1]],
        "date": datetime.date.today().isoformat(),
    }


def load() -> dict[str, Any]:
    """The committed results."""
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def show(found: list[dict[str, Any]]) -> None:
    """Prints the results."""
    for row in found:
        error = 100 * (row["predicted_bytes"] / row["measured_bytes"] - 1)
        print(
            f"{row['model']:6s} {row['method']:17s} {row['levers']:26s} {row['measured_bytes'] / 2**20:8.1f} MiB (predicted {error:+.2f} %)  "
            f"{row['tokens_per_second']:8.1f} tokens/s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="print the committed results")
    if parser.parse_args().show:
        show(load()["rows"])
        return
    from toolkit.files import atomic_write
    from toolkit.memory.environment import stack_versions

    spawn = multiprocessing.get_context("spawn")
    cases = [(*one, levers) for one in LADDERS for levers in LEVERS[one[1]]]
    runs: dict[tuple[str, str, str], list[dict[str, Any]]] = {case: [] for case in cases}
    for case in cases * REPETITIONS:
        with ProcessPoolExecutor(1, spawn) as pool:
            runs[case].append(pool.submit(measured, *case).result())
    found = [rung(*case, made, runs[*case[:2], "none"][0]) for case, made in runs.items()]
    show(found)
    head = {"cores": os.cpu_count(), "repetitions": REPETITIONS, "stack": stack_versions()}
    atomic_write(RESULTS, json.dumps(head | {"rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
