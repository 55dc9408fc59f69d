"""The contenders of `speed`, each in its own process."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from on_gpu import training
from on_gpu.card import device
from on_gpu.speed import SHAPES

WARM, TIMED = 3, 8  # steps


def rates(rehearsed: bool) -> dict[str, Any]:
    """The best of ten: operations per second of bf16 matrix products; bytes read and written per second by copies on the card."""
    it = device(rehearsed)
    size = 128 if rehearsed else 8192
    a, b = (torch.randn(size, size, device=it.type, dtype=torch.bfloat16) for _ in range(2))
    product = 2 * size**3 / min(it.timed(lambda: a @ b, 10))
    source = torch.empty(2**16 if rehearsed else 2**30, device=it.type, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / min(it.timed(lambda: target.copy_(source), 10))
    says = f"matrix products {product / 1e12:.1f} T operations/s, copies {copy / 1e9:.0f} GB/s"
    return {"product_operations_per_second": product, "copy_bytes_per_second": copy, "says": says}


class Stopwatch(TrainerCallback):
    """Records the seconds of each optimizer step, with the device synchronized at both ends; resets peaks after the warm-up."""

    def __init__(self, it: Any) -> None:
        self.it, self.seconds = it, []  # type: ignore[var-annotated]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.it.wait()
        if state.global_step == WARM:
            self.it.reset()
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.it.wait()
        self.seconds.append(time.perf_counter() - self.began)


def measure(label: str, step: dict[str, Any], contender: str, work: str, rehearsed: bool) -> dict[str, Any]:
    """Median tokens per second and peak memory of one contender."""
    from toolkit.config import parse_config
    from toolkit.methods import METHODS
    from toolkit.runs.preflight import prepare

    it = device(rehearsed)
    rows, length = SHAPES[label]
    warm, timed = (1, 2) if rehearsed else (WARM, TIMED)
    own = ("--bf16", "--per_device_train_batch_size", str(rows), "--max_length", str(length), *step["flags"])
    output = str(Path(work) / "measured" / "speed" / label / contender.replace(" ", "-"))
    argv = training.flags(work, label, own, output, rehearsed, steps=warm + timed)
    config = parse_config(METHODS[step["method"]], argv)
    ready = prepare(config)
    watch = Stopwatch(it)
    if contender == "footprint":
        model = _footprint(config, ready, watch)
    else:
        arguments = _plain_arguments(config.training)
        model = _plain_model(config, ready, it)
        data = ready.data.train.select_columns([n for n in ready.data.train.column_names if n != "length"])
        collator = DataCollatorForSeq2Seq(
            ready.data.tokenizer, model=model if ready.model_config.is_encoder_decoder else None
        )
        if contender == "Trainer + PEFT":
            Trainer(model, arguments, collator, data, callbacks=[watch]).train()
        else:
            _bare_loop(model, collator, data, rows, warm + timed, arguments.learning_rate, watch)
    taken = watch.seconds[warm:]
    batch = [len(ids) for ids in ready.data.train[:rows]["input_ids"]]
    targets = [len(ids) for ids in ready.data.train[:rows]["labels"]] if ready.model_config.is_encoder_decoder else [0]
    tokens = sum(batch) + sum(targets)  # real tokens; the rows repeat
    padded = rows * (max(batch) + max(targets))
    weights, trained = _weights(model)
    seconds = median(taken)
    result: dict[str, Any] = {
        "seconds": [round(one, 5) for one in taken],
        "tokens_per_second": round(tokens / seconds, 1),
        "padded_tokens_per_second": round(padded / seconds, 1),
        "operations": padded * (4 * weights + 2 * trained),
        "read_bytes": 2 * sum(p.numel() * p.element_size() for p in model.parameters()),
        **dict(zip(("allocated_bytes", "reserved_bytes"), it.peaks(), strict=True)),
    }
    result["says"] = f"{result['padded_tokens_per_second']:,.0f} tokens/s, {result['allocated_bytes'] / 2**30:.2f} GiB"
    return result


def _footprint(config: Any, ready: Any, watch: Stopwatch) -> Any:
    from toolkit.memory.measure import MemoryCallback
    from toolkit.training.trainer import FineTuner

    model = config.method.attach(ready.load_model())
    FineTuner(model, config, ready.data, callbacks=[MemoryCallback(), watch]).train()
    return model


def _plain_arguments(ours: TrainingArguments) -> TrainingArguments:
    """The run's settings as plain `TrainingArguments`."""
    names = ("output_dir", "max_steps", "per_device_train_batch_size", "learning_rate", "bf16", "use_cpu", "optim")
    given = {name: getattr(ours, name) for name in names} | {"train_sampling_strategy": "sequential"}
    return TrainingArguments(**given, save_strategy="no", report_to="none", disable_tqdm=True)


def _plain_model(config: Any, ready: Any, it: Any) -> Any:
    """A bf16 base with PEFT's LoRA, with the recipe's rank and targets."""
    from peft import LoraConfig, get_peft_model

    from toolkit.models.heads import auto_class

    folder = config.model.source
    model = auto_class(ready.model_config).from_pretrained(folder, dtype=torch.bfloat16).to(it.type)
    mine = config.method
    lora = LoraConfig(
        r=mine.lora_r,
        lora_alpha=mine.lora_alpha,
        lora_dropout=mine.lora_dropout,
        target_modules=mine.lora_target_modules,
        task_type="SEQ_2_SEQ_LM" if ready.model_config.is_encoder_decoder else "CAUSAL_LM",
    )
    model = get_peft_model(model, lora)
    model.config.use_cache = False
    return model


def _bare_loop(model: Any, collator: Any, data: Any, rows: int, steps: int, rate: float, watch: Stopwatch) -> None:
    """Forward, backward, clip, step: nothing else."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, fused=watch.it.type == "cuda")
    loader = torch.utils.data.DataLoader(data, rows, collate_fn=collator, drop_last=True)
    model.train()

    class State:
        global_step = 0

    while State.global_step < steps:
        for batch in loader:
            watch.on_step_begin(None, State, None)
            batch = {name: tensor.to(watch.it.type) for name, tensor in batch.items()}
            with torch.autocast(watch.it.type, torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            State.global_step += 1
            watch.on_step_end(None, State, None)
            if State.global_step == steps:
                return


def _weights(model: Any) -> tuple[int, int]:
    """The number of weights in matrix products, and of trained ones among them; quantized weights count unpacked."""
    every = trained = 0
    for name, parameter in model.named_parameters():
        looked_up = any(part in name for part in ("embed", "shared", "wte")) and "lora" not in name
        if parameter.dim() < 2 or looked_up:
            continue
        state = getattr(parameter, "quant_state", None)
        count = parameter.numel() if state is None else state.shape.numel()
        every += count
        trained += count if parameter.requires_grad else 0
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None and any(head.weight is p for n, p in model.named_parameters() if "embed" in n or "shared" in n):
        every += head.weight.numel()  # tied to the embeddings, which were skipped above
    return every, trained
