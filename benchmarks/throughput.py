"""Measures real (not padding) tokens a second and peak memory: ours beside what people use instead, on the same rows in the same order.

    pip install --no-deps --target PEERS "trl==1.16.*"
    python benchmarks/throughput.py --data DIALOGSUM --llama STORIES260K --t5_tokenizer T5_SMALL --peers PEERS
    python benchmarks/throughput.py --show   # the committed results

DIALOGSUM is a folder of knkarthick/dialogsum's files, STORIES260K one of karpathy's tiny Llama in transformers' form, T5_SMALL one
of t5-small's tokenizer. TRL needs nothing that Footprint does not; it stays in a folder of its own. Without --peers it is left out.

    padded script     Trainer and PEFT; inputs and targets padded to 512 while they are tokenized, as write-ups do (their loss over
                      padded targets is left out, or no loss would agree)
    dynamic padding   Trainer and PEFT; DataCollatorForSeq2Seq pads each batch to its longest row
    TRL               SFTTrainer, with neither bf16 nor checkpointing, which it would switch on; GPT-like models only
    TRL padding-free  the same with --padding_free
    ours              FineTuner with its defaults; --packing where the model is GPT-like
    ours, grouped by length    with --train_sampling_strategy group_by_length: the same rows in another order. So few rows are grouped
                      by two batches; a whole data set by fifty, which leaves less padding

LoRA of rank 32 on all linear layers, without dropout. Each repetition runs every way once, each in a process of its own on one
thread, and measures from the end of one step to the end of the next, so that waiting for data counts. The rates are medians of the
repetitions, by CPU time, because the machine is shared; by wall time they are in the results too. Peak memory is traced in the first
two steps, by the same callback in every way. A way is void if its losses differ from those of the padded script (in another order:
their mean), or a gradient norm is not above zero.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean, median
from typing import Any

RESULTS = Path(__file__).parent / "results" / "throughput.json"
T5 = {
    "d_model": 256,
    "d_kv": 32,
    "d_ff": 1024,
    "num_layers": 4,
    "num_heads": 8,
    "dropout_rate": 0.0,
}  # 15 million weights
GROUPED = "ours, grouped by length"
GPT_LIKE = ("padded script", "dynamic padding", "TRL", "TRL padding-free", "ours")
CASES = {  # name -> model, flags, ways
    "T5, dialogues": ("t5", [], ("padded script", "dynamic padding", "ours", GROUPED)),
    "Llama, dialogues": ("llama", [], GPT_LIKE),  # most rows are cut at 512 tokens, so that there is little padding
    "Llama, summaries": ("llama", ["--task", "text", "--text_column", "summary"], GPT_LIKE),
}
BATCH, PADDED = 8, 512  # rows; tokens
TRACED, WARM = 2, 1  # steps that are not timed
LOSS_TOLERANCE, MEAN_TOLERANCE = 1e-4, 1e-2  # relative: only roundings differ; in another order rows meet other weights
MARKS = {
    "padded script": 2.5,
    "dynamic padding": 1.3,
    "TRL": 1.0,
    "TRL padding-free": 1.0,
}  # ours is to be so many times as fast


def measured(case: str, way: str, given: dict[str, Any]) -> dict[str, Any]:
    """One run: seconds and real tokens of the timed steps, losses, gradient norms, peak bytes."""
    model, flags, _ = CASES[case]
    if given["peers"]:
        sys.path.append(given["peers"])
    import torch
    from transformers import AutoConfig, AutoTokenizer, TrainerCallback

    from toolkit.config import parse_config
    from toolkit.memory.measure import MemoryCallback
    from toolkit.methods.lora import Lora
    from toolkit.runs.preflight import prepare

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[
                tuple[float, float, float]
            ] = []  # at the end of each step: wall, CPU, and waiting, in seconds
            self.waited = 0.0

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append((time.perf_counter(), time.process_time(), self.waited))

        def fetch(self, *args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            fetched = type(trainer).get_batch_samples(trainer, *args, **kwargs)
            self.waited += time.process_time() - began
            return fetched

    torch.set_num_threads(1)
    steps = TRACED + WARM + given["steps"]
    with tempfile.TemporaryDirectory() as name:
        folder = source = Path(name) / "model"
        if model == "llama":
            source = Path(given["llama"])
        else:
            tokenizer = AutoTokenizer.from_pretrained(given["t5_tokenizer"])
            special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
            config = AutoConfig.for_model("t5", **T5, vocab_size=32_128, **special, decoder_start_token_id=0)
            config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        argv = ["--model_name_or_path", str(source), "--dataset_name", given["data"], "--output_dir", f"{name}/run"]
        argv += ["--max_train_samples", str(BATCH * steps), "--max_eval_samples", "2", "--max_length", str(PADDED)]
        argv += [
            "--lora_r",
            "32",
            "--lora_target_modules",
            "all-linear",
            "--lora_dropout",
            "0",
            "--max_steps",
            str(steps),
        ]
        order = "group_by_length" if way == GROUPED else "sequential"
        argv += ["--per_device_train_batch_size", str(BATCH), "--train_sampling_strategy", order, "--use_cpu"]
        argv += ["--save_strategy", "no", "--report_to", "none", "--logging_steps", "1"]
        argv += ["--random_weights"] if model == "t5" else ["--packing"] if way == "ours" else []
        run = parse_config(Lora, [*argv, *flags])
        ready = prepare(run)
        torch.manual_seed(0)
        tuned = run.method.attach(ready.load_model())
        watch, memory = Watch(), MemoryCallback()
        trainer = _trainer(way, tuned, run, ready.data, [memory, watch])
        trainer.get_batch_samples = watch.fetch
        trainer.train()
    assert memory.ledger is not None, memory.problem
    order = list(trainer._get_train_sampler(trainer.train_dataset))[BATCH * (TRACED + WARM) :]
    rows = ready.data.train[order]
    # for a GPT-like model the labels are the same tokens again
    columns = ("input_ids", "labels") if tuned.config.is_encoder_decoder else ("input_ids",)
    begun, ended = watch.ends[TRACED + WARM - 1], watch.ends[-1]
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "tokens": sum(len(ids) for column in columns for ids in rows[column]),
        "wall_seconds": ended[0] - begun[0],
        "cpu_seconds": ended[1] - begun[1],
        "waiting_seconds": ended[2] - begun[2],
        "peak_bytes": memory.ledger.allocated_bytes,
        "losses": [entry["loss"] for entry in logged],
        "norms": [entry["grad_norm"] for entry in logged],
    }


def _trainer(way: str, model: Any, run: Any, data: Any, callbacks: list[Any]) -> Any:
    """The trainer of a way, with the same training arguments."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, default_data_collator

    from toolkit.training.trainer import FineTuner

    if way in ("ours", GROUPED):
        return FineTuner(model, run, data, callbacks)
    names = ("output_dir", "max_steps", "per_device_train_batch_size", "learning_rate", "train_sampling_strategy")
    names += ("use_cpu", "save_strategy", "report_to", "logging_steps", "optim")
    settings = {name: getattr(run.training, name) for name in names} | {"disable_tqdm": True}
    rows = data.train
    if way.startswith("TRL"):
        from trl import SFTConfig, SFTTrainer

        settings |= {"bf16": False, "gradient_checkpointing": False, "padding_free": way == "TRL padding-free"}
        args = SFTConfig(**settings, max_length=None)
        return SFTTrainer(model, args, train_dataset=rows, processing_class=data.tokenizer, callbacks=callbacks)
    collator: Any = DataCollatorForSeq2Seq(data.tokenizer, model if model.config.is_encoder_decoder else None)
    if way == "padded script":

        def padded(row: dict[str, list[int]]) -> dict[str, list[int]]:
            fills = {"input_ids": data.tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}
            return {name: row[name] + [fill] * (PADDED - len(row[name])) for name, fill in fills.items()}

        rows, collator = rows.map(padded), default_data_collator
    return Trainer(model, TrainingArguments(**settings), collator, rows, callbacks=callbacks)


def result(case: str, way: str, runs: list[dict[str, Any]], plain: dict[str, Any]) -> dict[str, Any]:
    """The row of the results for all repetitions of a way; `plain` is a run of the padded script."""
    for run in runs:
        same = zip(run["losses"], plain["losses"], strict=True)
        off = max(abs(one / other - 1) for one, other in same)
        if way == GROUPED:
            off = abs(mean(run["losses"]) / mean(plain["losses"]) - 1)
        if off > (MEAN_TOLERANCE if way == GROUPED else LOSS_TOLERANCE) or not all(norm > 0 for norm in run["norms"]):
            raise SystemExit(f"{case}, {way}: void, its losses are off by {off:.2g}: {run['losses']}")
    steps = len(plain["losses"]) - TRACED - WARM
    rates = {kind: [round(run["tokens"] / run[f"{kind}_seconds"], 1) for run in runs] for kind in ("cpu", "wall")}
    return {
        "case": case,
        "way": way,
        "tokens_per_second": median(rates["cpu"]),  # of CPU time
        "of_each_repetition": rates["cpu"],
        "of_each_repetition_by_wall_time": rates["wall"],
        "waiting_for_data_percent": round(100 * median(run["waiting_seconds"] / run["cpu_seconds"] for run in runs), 2),
        "peak_bytes": runs[0]["peak_bytes"],
        "loss": [runs[0]["losses"][0], runs[0]["losses"][-1]],
        "steps": steps,
        "real_tokens": runs[0]["tokens"],
        "date": datetime.date.today().isoformat(),
    }


def load() -> dict[str, Any]:
    """The committed results."""
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the results, with how many times as fast ours is."""
    ours = {row["case"]: row["tokens_per_second"] for row in rows if row["way"] == "ours"}
    for row in rows:
        lowest, highest = min(row["of_each_repetition"]), max(row["of_each_repetition"])
        print(
            f"{row['case']:17s} {row['way']:23s} {row['tokens_per_second']:9,.0f} tokens/s ({lowest:,.0f} to {highest:,.0f})  "
            f"{row['peak_bytes'] / 2**20:7.1f} MiB  ours is {ours[row['case']] / row['tokens_per_second']:.2f} x as fast; "
            f"waits {row['waiting_for_data_percent']:.2f} % of a step for data"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="print the committed results")
    for name in ("--data", "--llama", "--t5_tokenizer", "--peers"):
        parser.add_argument(name, help="a folder: see above")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each run")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--cases", nargs="*", choices=[*CASES], default=[*CASES])
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = vars(parser.parse_args())
    if given["show"]:
        show(load()["rows"])
        return
    if not given["data"] or not given["llama"] or not given["t5_tokenizer"]:
        raise SystemExit("give --data, --llama and --t5_tokenizer")
    from toolkit.files import atomic_write
    from toolkit.memory.environment import stack_versions

    os.environ["OMP_NUM_THREADS"] = "1"
    spawn = multiprocessing.get_context("spawn")
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _ in range(given["repetitions"]):
        for case in given["cases"]:
            for way in CASES[case][2]:
                if given["peers"] or not way.startswith("TRL"):
                    with ProcessPoolExecutor(1, spawn) as pool:
                        runs.setdefault((case, way), []).append(pool.submit(measured, case, way, given).result())
    found = [result(*one, made, runs[one[0], "padded script"][0]) for one, made in runs.items()]
    show(found)
    if given["out"].is_file():  # cases that were not run keep their results
        rows = json.loads(given["out"].read_text(encoding="utf-8"))["rows"]
        found = [row for case in CASES for row in (found if case in given["cases"] else rows) if row["case"] == case]
    trl = next((file.name.split("-")[1] for file in Path(given["peers"] or ".").glob("trl-*.dist-info")), None)
    stack = {"stack": stack_versions(), "trl": trl and trl.removesuffix(".dist")}
    head = {"cores": os.cpu_count(), "batch": BATCH} | stack
    atomic_write(given["out"], json.dumps(head | {"rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
