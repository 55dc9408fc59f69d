"""Measures what training with callbacks, guards and ledger adds to a step, and the seconds from launch to the first step.

    python benchmarks/overhead.py            # some minutes on two CPU cores, which must be idle
    python benchmarks/overhead.py --show     # the committed results

A step of a very small model takes milliseconds, so that what is added shows: the same model, rows, loss and optimizer in a bare loop,
in transformers' Trainer, and in ours. What is added grows with the number of layers and of weights, and with nothing else, so it is also
given as a share of a step of the Llama of `ladder.py`, which has as many. Steps are counted from the fourth: the ledger traces two,
and the guards look at three. All on one thread, in CPU time.

The launch is that of recipes/lora.py with its embedded model, each of its calls timed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import ladder

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "overhead.json"
SMALL = ladder.LLAMA | {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 4096}  # with as many layers
SHORT = ["--max_length", "64", "--max_target_length", "32"]
LOOPS = ("bare loop", "Trainer", "ours")
FIRST, TIMED, LARGE_TIMED = 3, 200, 6  # steps
REPETITIONS = 5
PARTS = {  # of recipes/lora.py, in order: the call, and what it is
    "parse_config": "flags and configuration",
    "prepare": "preflight: the model's config, data, tokenization",
    "say_prediction": "prediction of the memory",
    "load_model": "weights",
    "evaluate_by_generation": "scoring the base model on the test split",
}


def step_seconds(loop: str, shape: dict[str, int], lengths: list[str], timed: int) -> list[float]:
    """Seconds of each of `timed` steps of LoRA on a random Llama, from the end of one step to the end of the next."""
    import torch
    from torch.utils.data import DataLoader
    from transformers import AutoConfig, AutoTokenizer, Trainer, TrainerCallback

    from toolkit.config import parse_config
    from toolkit.memory.measure import MemoryCallback
    from toolkit.methods.lora import Lora
    from toolkit.models.chunked_loss import chunks_of
    from toolkit.runs.preflight import prepare
    from toolkit.training.trainer import FineTuner

    torch.set_num_threads(1)
    steps = FIRST + timed
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = AutoTokenizer.from_pretrained(ladder.TOKENIZER)
        tokenizer.save_pretrained(folder / "model")
        AutoConfig.for_model("llama", **({"max_position_embeddings": 512} | shape), pad_token_id=0).save_pretrained(
            folder / "model"
        )
        argv = ["--model_name_or_path", str(folder / "model"), "--random_weights", "--output_dir", str(folder / "run")]
        argv += ["--dataset_name", str(ladder.rows(folder)), *lengths]
        argv += ["--use_cpu", "--save_strategy", "no", "--report_to", "none", "--lora_dropout", "0"]
        argv += ["--per_device_train_batch_size", str(ladder.BATCH), "--gradient_accumulation_steps", "1"]
        config = parse_config(Lora, [*argv, "--max_steps", str(steps)])
        ready = prepare(config)
        model = config.method.attach(ready.load_model())
        ends: list[float] = []

        class Watch(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                ends.append(time.process_time())

        if loop == "ours":
            FineTuner(model, config, ready.data, [MemoryCallback(), Watch()]).train()
        else:
            chunk = chunks_of(model, config.training.loss_chunk_tokens)
            collator = ready.data.collator(model)
            in_chunks = {"loss_chunk_tokens": chunk, "label_smoothing": 0.0}
            if loop == "Trainer":

                class Plain(Trainer):
                    def compute_loss(self, model: Any, inputs: Any, num_items_in_batch: Any = None, **_: Any) -> Any:
                        return model(**inputs, num_items_in_batch=num_items_in_batch, **in_chunks).loss

                Plain(model, config.training, collator, ready.data.train, callbacks=[Watch()]).train()
            else:
                _bare_loop(
                    model, DataLoader(ready.data.train, ladder.BATCH, True, collate_fn=collator), in_chunks, steps, ends
                )
    return [end - start for start, end in zip(ends[FIRST - 1 :], ends[FIRST:], strict=False)]


def _bare_loop(model: Any, loader: Any, in_chunks: dict[str, Any], steps: int, ends: list[float]) -> None:
    import torch

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    model.train()
    while True:
        for batch in loader:
            tokens = (batch["labels"][:, 1:] != -100).sum()
            model(**batch, num_items_in_batch=tokens, **in_chunks).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            ends.append(time.process_time())
            if len(ends) == steps:
                return


def launch_seconds(began: float) -> dict[str, float]:
    """Seconds of each part of recipes/lora.py from `began` (seconds since the epoch) to the end of its first steps."""
    from transformers import TrainerCallback

    found: dict[str, float] = {}
    spec = importlib.util.spec_from_file_location("recipe", ROOT / "recipes" / "lora.py")
    assert spec is not None and spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    found["Python, PyTorch, transformers, PEFT"] = time.time() - began

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.time()
            result = call(*args, **kwargs)
            found[PARTS[name]] = time.time() - start
            return result

        return run

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if not state.global_step:
                found["making the trainer"] = time.time() - self.start
            self.start = time.time()

        def on_step_end(self, args: Any, state: Any, control: Any, **__: Any) -> None:
            names = ("the first step, traced", "the second step, traced", "the third step", "the fourth step")
            found[names[state.global_step - 1]] = time.time() - self.start
            if state.global_step == len(names):
                raise KeyboardInterrupt  # the run has shown what it should

    prepare, make = recipe.prepare, recipe.FineTuner
    for name in ("parse_config", "say_prediction", "evaluate_by_generation"):
        setattr(recipe, name, timed(name, getattr(recipe, name)))

    def prepared(config: Any) -> Any:
        ready = timed("prepare", prepare)(config)
        object.__setattr__(ready, "load_model", timed("load_model", ready.load_model))
        return ready

    def made(*args: Any, callbacks: list[Any]) -> Any:
        watch = Watch()
        watch.start = time.time()
        return make(*args, callbacks=[*callbacks, watch])

    setattr(recipe, "prepare", prepared)  # noqa: B010
    setattr(recipe, "FineTuner", made)  # noqa: B010
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["lora.py", "--use_cpu", "--output_dir", str(Path(folder) / "run")]
        with suppress(KeyboardInterrupt, SystemExit):
            recipe.main()
    return found


def load() -> dict[str, Any]:
    """The committed results."""
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def show(result: dict[str, Any]) -> None:
    """Prints the results."""
    for loop, seconds in result["milliseconds"].items():
        print(
            f"{loop:10s} {seconds['median']:7.2f} ms a step (repetitions: {', '.join(map(str, seconds['repetitions']))})"
        )
    print(
        f"added to a bare loop: {result['added_milliseconds']:.2f} ms, {result['share_of_a_step']:.2%} of a step of {result['large_milliseconds']:.0f} ms"
    )
    for part, seconds in result["launch_seconds"].items():
        print(f"{part:50s} {seconds:6.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="print the committed results")
    if parser.parse_args().show:
        show(load())
        return
    from toolkit.files import atomic_write
    from toolkit.memory.environment import stack_versions

    spawn = multiprocessing.get_context("spawn")

    def apart(call: Callable[..., Any], *args: Any) -> Any:
        with ProcessPoolExecutor(1, spawn) as pool:
            return pool.submit(call, *args).result()

    medians: dict[str, list[float]] = {loop: [] for loop in LOOPS}
    for _ in range(REPETITIONS):
        for loop in LOOPS:
            medians[loop].append(1000 * median(apart(step_seconds, loop, SMALL, SHORT, TIMED)))
    _, shape, lengths = ladder.MODELS["llama"]
    large = 1000 * median(apart(step_seconds, "ours", shape, lengths, LARGE_TIMED))
    launches = [apart(launch_seconds, time.time()) for _ in range(REPETITIONS)]
    rounded = {
        loop: {"median": round(median(ms), 3), "repetitions": [round(one, 2) for one in ms]}
        for loop, ms in medians.items()
    }
    added = rounded["ours"]["median"] - rounded["bare loop"]["median"]
    result = {
        "milliseconds": rounded,
        "added_milliseconds": round(added, 3),
        "large_milliseconds": round(large, 1),
        "share_of_a_step": round(added / large, 5),
        "launch_seconds": {part: round(median(one[part] for one in launches), 2) for part in launches[0]},
        "cores": os.cpu_count(),
        "date": datetime.date.today().isoformat(),
        "stack": stack_versions(),
    }
    show(result)
    atomic_write(RESULTS, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
