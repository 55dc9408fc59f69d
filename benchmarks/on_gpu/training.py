"""Trains as a recipe does, without prediction and scoring, and extracts the fields for the results."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from on_gpu import models
from on_gpu.card import device


def flags(
    work: str,
    model: str,
    method_flags: Iterable[str],
    output: str,
    rehearsed: bool,
    steps: int = 2,
    target: int | None = None,
) -> list[str]:
    """The recipe's flags: the model's folder, rows in order, `steps` steps, nothing saved."""
    known = models.by_label(rehearsed)[model]
    target = target or (128 if known.is_seq2seq else 16)
    if rehearsed:
        target = min(target, 8)
    return [
        *("--model_name_or_path", str(models.folder_of(work, model))),
        *("--dataset_name", str(Path(work) / "rows"), "--max_target_length", str(target)),
        *("--train_sampling_strategy", "sequential", "--max_steps", str(steps), "--output_dir", output),
        *("--save_strategy", "no", "--report_to", "none", *method_flags),
        *(("--use_cpu",) if rehearsed else ()),
    ]


def allocator_settings(settings: str | None) -> None:
    """Sets the allocator as PYTORCH_ALLOC_CONF would; the fork server may already have read that variable."""
    if settings is not None:
        import torch

        torch.cuda.memory._set_allocator_settings(settings)


UNTRACED_STEPS = 12  # --max_steps with room for steps that fp16 skips, and for one without the trace


def measured(
    method: str, argv: Sequence[str], snapshot: str | None = None, allocator: str | None = None
) -> tuple[Any, dict[str, Any]]:
    """Trains two steps with the measuring callback; returns the callback and the fields for the results.

    If `--max_steps` leaves room for more steps, one of them shows the peak without the trace (`Untraced`).

    Raises: every exception of training, also out-of-memory errors; RuntimeError if there is no ledger.
    """
    import torch

    from on_gpu.untraced import Untraced
    from toolkit.config import parse_config
    from toolkit.memory.measure import MemoryCallback
    from toolkit.methods import METHODS
    from toolkit.runs.preflight import prepare
    from toolkit.training.trainer import FineTuner

    seconds, began = {}, time.perf_counter()
    config = parse_config(METHODS[method], list(argv))
    ready = prepare(config)
    seconds["prepare"], began = time.perf_counter() - began, time.perf_counter()
    on_cuda = config.training.device.type == "cuda"
    if on_cuda:
        allocator_settings(allocator)
    model = config.method.attach(ready.load_model())
    memory = MemoryCallback(snapshot=snapshot)
    untraced = Untraced(device(rehearsed=not on_cuda), memory)
    trainer = FineTuner(model, config, ready.data, callbacks=[memory, untraced])
    seconds["load"], began = time.perf_counter() - began, time.perf_counter()
    trainer.train()
    seconds["train"] = time.perf_counter() - began
    if memory.ledger is None:
        raise RuntimeError(f"no measured ledger: {memory.problem}")
    found = ledger_row(memory.ledger) | {"batches": [describe(batch) for batch in memory.batches]}
    found["took"] = {name: round(value, 2) for name, value in seconds.items()}
    if untraced.step is not None:
        found["untraced_step"] = untraced.step
    if on_cuda:
        if untraced.step is not None:
            found["untraced_allocated_bytes"] = untraced.allocated_bytes
        stats = torch.cuda.memory_stats()
        found["allocator"] = {name: stats[name] for name in STATISTICS if name in stats}
        found["attention"] = model.config._attn_implementation
    return memory, found


STATISTICS = (
    *("allocated_bytes.all.peak", "reserved_bytes.all.peak", "active_bytes.all.peak", "inactive_split_bytes.all.peak"),
    *("requested_bytes.all.peak", "segment.all.peak", "num_alloc_retries", "num_ooms", "num_device_alloc"),
)


def ledger_row(ledger: Any) -> dict[str, Any]:
    """The ledger's fields for the results, in bytes: peaks, each phase's peak and end, and categories at the peak."""
    whole = ledger.to_json()
    phases = {
        steps: {
            name: [use["allocated_peak_bytes"], use["allocated_end_bytes"]] for name, use in whole[steps].items()
        }  # peak, end
        for steps in ("phases", "first_step")
    }
    return {"peak": whole["peak"], **phases, "categories": {k: v for k, v in whole["categories_at_peak"].items() if v}}


def describe(batch: dict[str, Any]) -> dict[str, list[int]]:
    """A batch's shapes, and the number of tokens and of labels in each row: memory depends on nothing else."""
    from toolkit.models.losses import IGNORE_INDEX

    found = {name: list(tensor.shape) for name, tensor in batch.items()}
    if "attention_mask" in batch:
        found["tokens"] = batch["attention_mask"].sum(-1).tolist()
    if batch["labels"].dim() == 2:
        found["label_tokens"] = batch["labels"].ne(IGNORE_INDEX).sum(-1).tolist()
    return found


def rebuilt(description: dict[str, list[int]]) -> dict[str, Any]:
    """A batch with the shapes from `describe`, padded on the right as the collator does, with the labels at the end of each row."""
    import torch

    from toolkit.models.losses import IGNORE_INDEX
    from toolkit.runs.prediction import ORDINARY_TOKEN_ID

    shapes = {name: shape for name, shape in description.items() if name not in ("tokens", "label_tokens")}
    batch = {name: torch.full(tuple(shape), ORDINARY_TOKEN_ID) for name, shape in shapes.items()}
    if "tokens" in description:
        rows, length = shapes["attention_mask"]
        batch["attention_mask"] = (
            torch.arange(length).expand(rows, -1).lt(torch.tensor(description["tokens"])[:, None]).long()
        )
    if "label_tokens" in description:
        length = shapes["labels"][1]
        masked = torch.arange(length).lt(length - torch.tensor(description["label_tokens"])[:, None])
        batch["labels"][masked] = IGNORE_INDEX
    return batch
