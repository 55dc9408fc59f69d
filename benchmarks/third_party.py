"""Accuracy of predictions on runs that other people measured: any published set, as a CSV with a description of its loop.

    python benchmarks/third_party.py t4 ../shared/data/memory/t4_lora_measured.csv --rows 8 9
    python benchmarks/third_party.py rtx4080 path/to/rows.csv
    python benchmarks/third_party.py --show                # the committed results

benchmarks/loops/NAME.yaml describes a set: the source of the runs, how each column (or a constant) becomes a field of `Run`, which
columns are measurements, and known differences. The predictor is the one behind `footprint predict --gpu`: `meta` builds the model,
`fake` makes its parameters fake, `cuda.Cuda` provides allocator, overlay and loading. Only the loop is the set's own: when
gradients are freed, how long the model's output lives, masks, clipping, steps.

The runs used older libraries than the installed ones. Known differences that affect memory are undone (`of_the_stack`); the
others are listed in the set's `differs`. No constant is fitted to any row. The rows themselves are not in the repository.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml

HERE = Path(__file__).parent
LOOPS = HERE / "loops"
RESULTS = HERE / "results" / "third_party.json"
UNITS = {"bytes": 1, "mib": 2**20, "gib": 2**30}
PHASES = ("forward", "backward", "optimizer_step")


@dataclass(frozen=True)
class Run:
    """One measured run: what was trained, how, and where. Comments list the valid values."""

    card: str
    model: str  # a hub id of the catalogue or of loops/models.yaml; with `architecture`, any name
    batch_size: int
    seq_len: int  # tokens of each row
    architecture: str = ""  # with `config`: the model's type and fields, if the set gives them
    config: dict[str, Any] = field(default_factory=dict)
    method: str = "full"  # full, lora
    quantization: str = "none"  # none, nf4, nf4_double_quant, int8
    dtype: str = "float32"  # of the weights; for quantized weights, the compute dtype
    autocast: str = ""  # bfloat16, float16 or none
    kbit_prepare: bool = False  # prepare_model_for_kbit_training
    lora_r: int = 16
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    lora_targets: str = "all-linear"  # names, or all-linear
    adapters_on_device: bool = True  # attached to a model that was on the GPU already
    optimizer: str = "adamw"
    max_grad_norm: float = 0.0  # 0: no clipping
    gradient_checkpointing: bool = False
    use_reentrant: bool = False
    use_cache: bool = True  # the config's default: without checkpointing, unused keys and values are kept
    # sdpa, efficient (pinned), eager, flash_attention_2, default (as transformers of the time chose)
    attention: str = "sdpa"
    built_with_flash: bool = True
    mask: str = "ones"  # none, ones, padded (all rows but the first end in padding)
    zero_grad: str = "before the batch"  # before the batch, before backward, after the step
    # forward (as in Trainer), step (deleted after it), next forward (until a new one replaces it)
    output_lives: str = "step"
    keys_repeated: bool = False  # for each query head, before attention
    steps: int = 3
    stack: str = ""  # "torch 2.6.0+cu124, transformers 4.51.3, ..."

    def version(self, library: str) -> tuple[int, ...]:
        """The library's version in `stack`, such as `(4, 51)`; () if it is not named."""
        found = re.search(rf"\b{library} (\d+)\.(\d+)", self.stack)
        return tuple(map(int, found.groups())) if found else ()


def description(name: str) -> dict[str, Any]:
    """The description of a set, by the name of its file in benchmarks/loops."""
    return yaml.safe_load((LOOPS / f"{name}.yaml").read_text(encoding="utf-8"))


def value(spec: Any, row: dict[str, str]) -> Any:
    """The value that `spec` gives for `row`: a constant, or from {column, pattern, read, else}.

    `pattern` extracts a part of the cell, `read` translates it, and `else` is the value of cells that `read` does not have.
    An empty cell without a translation gives None. Raises KeyError for a column that the row lacks.
    """
    if not isinstance(spec, dict):
        return spec
    if "column" not in spec:
        return {name: value(inner, row) for name, inner in spec.items()}
    cell = row[spec["column"]].strip()
    if "pattern" in spec:
        found = re.search(spec["pattern"], cell)
        cell = found[1] if found else ""
    return spec.get("read", {}).get(cell, spec.get("else", cell or None))


def run_of(described: dict[str, Any], row: dict[str, str]) -> Run:
    """The run that `row` of the set describes."""
    kinds: dict[str, Callable[[Any], Any]] = {"int": int, "float": float, "bool": _flag, "str": str}
    given = {name: value(spec, row) for name, spec in described["run"].items()}
    known = {
        one.name: kinds.get(str(one.type), lambda fields: {k: _number(v) for k, v in fields.items()})
        for one in fields(Run)
    }
    return Run(**{name: known[name](said) for name, said in given.items() if said is not None})


def _flag(said: Any) -> bool:
    return str(said).lower() in ("1", "true", "yes")


def _number(said: Any) -> Any:
    return yaml.safe_load(str(said))  # "64" is 64, "True" true


def measured(described: dict[str, Any], row: dict[str, str]) -> dict[str, float]:
    """The measured values in bytes, by our figures' names, without those that the row lacks."""
    unit, found = UNITS[described["unit"]], {}
    for figure, column in described["measured"].items():
        own = column if isinstance(column, dict) else {"column": column}
        cell = (row.get(own["column"]) or "").strip()
        if cell and float(cell) > 0:
            found[figure] = float(cell) * UNITS.get(own.get("unit", ""), unit)
    return found


# ---- the model


def config_of(run: Run) -> Any:
    """The model's config: from the row's own fields, the catalogue, or loops/models.yaml, in this order.

    Raises: LookupError for a model that is in none of them.
    """
    from transformers import AutoConfig

    from toolkit.models import catalogue

    if run.architecture:
        return AutoConfig.for_model(run.architecture, **run.config)
    known = catalogue.config_of(run.model)
    if known is None:
        models = yaml.safe_load((LOOPS / "models.yaml").read_text(encoding="utf-8"))
        short = {name.split("/")[-1].lower(): entry for entry in models for name in entry["names"].split()}
        short |= {name.split("/")[-1].lower(): name for name in catalogue.names()}
        entry = short.get(run.model.split("/")[-1].lower())
        if entry is None:
            raise LookupError(
                f"{run.model}: its config is neither in the catalogue nor in benchmarks/loops/models.yaml"
            )
        known = catalogue.config_of(entry) if isinstance(entry, str) else None
        known = known or AutoConfig.for_model(entry["model_type"], **entry["fields"])
    for name, said in run.config.items():
        setattr(known, name, said)
    return known


def build(run: Run) -> Any:
    """The run's model on the meta device, quantized, cast and with adapters as in the measured run."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BitsAndBytesConfig

    from toolkit.models.meta import attention_without_its_package, model_on_meta

    config, dtype = config_of(run), getattr(torch, run.dtype)
    config.use_cache = run.use_cache and not run.gradient_checkpointing
    quantization = None
    if run.quantization.startswith("nf4"):
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=run.quantization == "nf4_double_quant",
        )
    elif run.quantization == "int8":
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with attention_without_its_package():
        model: Any = model_on_meta(kind, config, dtype, _attention(run, config.model_type), quantization)
    checkpointing = {"use_reentrant": run.use_reentrant}
    if run.kbit_prepare:
        model = prepare_model_for_kbit_training(model, run.gradient_checkpointing, checkpointing)
    if run.method == "lora":
        targets = run.lora_targets if run.lora_targets == "all-linear" else run.lora_targets.split()
        task = "SEQ_2_SEQ_LM" if config.is_encoder_decoder else "CAUSAL_LM"
        options = {"r": run.lora_r, "lora_alpha": run.lora_alpha, "lora_dropout": run.lora_dropout, "task_type": task}
        with torch.device("meta"):
            model = get_peft_model(model, LoraConfig(target_modules=targets, **options))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if run.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        if run.method == "lora":
            model.enable_input_require_grads()
    return model


def _attention(run: Run, model_type: str) -> str:
    """The attention implementation in transformers."""
    if run.attention == "default":  # GPT-Neo only has eager; T5 had only eager before transformers 5
        eager = model_type == "gpt_neo" or (model_type in ("t5", "mt5") and run.version("transformers") < (5, 0))
        return "eager" if eager else "sdpa"
    return run.attention if run.attention in ("eager", "flash_attention_2") else "sdpa"


def optimizer_of(run: Run, parameters: list[Any]) -> Any:
    """The optimizer by its name, with the default on CUDA (foreach).

    Raises: LookupError for an unknown name.
    """
    import torch

    name = run.optimizer.split()[0].lower().removesuffix("_torch")
    torch_names = {
        "sgd": "SGD",
        "adam": "Adam",
        "adamw": "AdamW",
        "rmsprop": "RMSprop",
        "adagrad": "Adagrad",
        "adafactor": "Adafactor",
    }
    if name in torch_names:
        return getattr(torch.optim, torch_names[name])(parameters, lr=1e-4, foreach=True)
    if name in ("adamw_fused", "adamw_torch_fused"):
        return torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    bitsandbytes_names = {
        "paged_adamw_8bit": "PagedAdamW8bit",
        "adamw_8bit": "AdamW8bit",
        "adamw_bnb_8bit": "AdamW8bit",
    }
    bitsandbytes_names |= {"paged_adamw_32bit": "PagedAdamW32bit", "paged_adamw": "PagedAdamW"}
    if name in bitsandbytes_names:
        import bitsandbytes

        return getattr(bitsandbytes.optim, bitsandbytes_names[name])(parameters, lr=1e-4)
    raise LookupError(f"optimizer {run.optimizer!r} is not known here")


# ---- what older libraries do


@contextmanager
def of_the_stack(run: Run, model: Any, mode: Any) -> Iterator[None]:
    """Makes the installed libraries behave like those of `run.stack`, for known differences that affect memory.

    - Rotary embeddings of transformers up to 5.17 multiply matrices, so cuBLAS allocates its workspace before the first layer.
    - transformers 4 repeats keys and values for each query head before SDPA, makes non-contiguous tensors contiguous, and
      builds one additive mask for all layers; T5's attention adds position bias and mask once and in place.
    - transformers up to 4.48 copies the logits once more to shift them: in its loss, or, up to 4.45 (for GPT-2's relatives up
      to 4.48), in the model's forward, in float32 or in their own type.
    - bitsandbytes up to 0.49 has no fused 4-bit product: it always dequantizes the weight.
    """
    import torch.nn.functional as F
    from transformers.modeling_utils import AttentionInterface

    from toolkit.memory.cuda import quantized
    from toolkit.seams import patched

    transformers, bitsandbytes = run.version("transformers") or (9,), run.version("bitsandbytes") or (9,)
    base = _base(model)
    gpt_like = base.config.model_type in ("gpt2", "gpt_neo", "gpt_bigcode")
    with ExitStack() as stack:
        if transformers < (5, 18):
            _multiply_before_the_first_layer(model, mode)
        if run.keys_repeated:
            repeated = partial(_repeated, F.scaled_dot_product_attention)
            stack.enter_context(patched("F.scaled_dot_product_attention", repeated))
        if transformers < (5, 0):
            mapping = {**AttentionInterface._global_mapping, "sdpa": _sdpa_of_4}
            stack.enter_context(patched("AttentionInterface._global_mapping", mapping))
            stack.enter_context(patched("DynamicLayer.update", _cache_of_4))
            stack.enter_context(patched("T5's eager_attention_forward", _t5_attention_of_4))
        if bitsandbytes < (0, 50):
            stack.enter_context(patch.object(quantized, "fused_rule", lambda: None))
        if transformers < (4, 49) and not base.config.is_encoder_decoder:
            if gpt_like or transformers < (4, 46):
                base.forward = partial(_forward_with_loss, base, not gpt_like)
            else:
                base.loss_function = _loss_of_copied_logits
        yield


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _multiply_before_the_first_layer(model: Any, mode: Any) -> None:
    import torch

    from toolkit.memory.shadow.fake import fake_like

    one = fake_like(mode, torch.empty((1, 1), device="meta"))

    def multiply(module: Any, args: Any, output: Any) -> None:
        with torch.no_grad():
            torch.mm(one, one)

    for module in model.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            module.register_forward_hook(multiply)


def _repeated(attention: Callable[..., Any], query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    if key.size(-3) != query.size(-3):
        groups = query.size(-3) // key.size(-3)
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
        kwargs.pop("enable_gqa", None)
    return attention(query, key, value, *args, **kwargs)


def _sdpa_of_4(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: Any = None,
    **more: Any,
) -> tuple[Any, None]:
    """As in transformers 4.51, integrations/sdpa_attention.py."""
    import torch
    import torch.nn.functional as F
    from transformers.integrations.sdpa_attention import repeat_kv

    groups = getattr(module, "num_key_value_groups", 1)
    query, key, value = (t.contiguous() for t in (query, repeat_kv(key, groups), repeat_kv(value, groups)))
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        if not hasattr(attention_mask, "_additive"):
            zero, never = torch.zeros((), dtype=query.dtype), torch.full((), -torch.inf, dtype=query.dtype)
            attention_mask._additive = torch.where(attention_mask, zero, never)
        attention_mask = attention_mask._additive
    causal = attention_mask is None and query.shape[2] > 1 and getattr(module, "is_causal", True)
    output = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout, causal, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


def _cache_of_4(layer: Any, keys: Any, values: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """As in transformers 4.51, cache_utils.py, `DynamicCache.update`: the first keys and values are not copied."""
    layer.keys, layer.values, layer.is_initialized = keys, values, True
    return keys, values


def _t5_attention_of_4(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    dropout: float = 0.0,
    position_bias: Any = None,
    **more: Any,
) -> tuple[Any, Any]:
    """As in transformers 4.51, models/t5/modeling_t5.py, `T5Attention`: layers share the sum of position bias and mask."""
    import torch
    import torch.nn.functional as F

    scores = torch.matmul(query, key.transpose(3, 2))
    if mask is not None:
        if not hasattr(position_bias, "_masked"):
            position_bias._masked = position_bias + mask
        position_bias = position_bias._masked
    scores += position_bias
    weights = F.dropout(F.softmax(scores.float(), dim=-1).type_as(scores), p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def _forward_with_loss(base: Any, in_float32: bool, input_ids: Any, labels: Any, **more: Any) -> Any:
    """As in transformers 4.45, `forward` of Llama, Mistral, Granite (in float32); up to 4.48, of GPT-2's relatives (in their type)."""
    import torch.nn.functional as F
    from transformers.modeling_outputs import CausalLMOutput

    hidden = base.base_model(input_ids=input_ids, **more)[0]
    logits = base.get_output_embeddings()(hidden)
    scale = getattr(base.config, "logits_scaling", None)
    logits = logits if scale is None else logits / scale
    logits = logits.float() if in_float32 else logits
    shifted = logits[..., :-1, :].contiguous()
    loss = F.cross_entropy(shifted.view(-1, shifted.size(-1)), labels[..., 1:].contiguous().view(-1))
    return CausalLMOutput(loss=loss, logits=logits)


def _loss_of_copied_logits(logits: Any, labels: Any, vocab_size: int, **more: Any) -> Any:
    """As in transformers 4.48, loss/loss_utils.py, `ForCausalLMLoss`."""
    import torch.nn.functional as F

    logits = logits.float()
    shifted = logits[..., :-1, :].contiguous().view(-1, vocab_size)
    return F.cross_entropy(shifted, labels[..., 1:].contiguous().view(-1))


# ---- the loop


def predict(run: Run) -> dict[str, int]:
    """The predicted figures of `run`, in bytes:

    - after_load, after_load_reserved;
    - forward, backward, optimizer_step: the phase's peak in the last step;
    - first_forward, first_forward_reserved, ...: allocated and reserved at the end of the phase in the first step;
    - peak_allocated, peak_reserved: over loading and all steps; last_step_peak_allocated;
    - process: peak reserved plus the CUDA context.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from toolkit.config.optimizers import ReadAsOne
    from toolkit.memory.cuda.cards import find_card
    from toolkit.memory.cuda.device import Cuda
    from toolkit.memory.shadow.fake import make_fake
    from toolkit.memory.trace import Trace

    peft = run.version("peft")
    device = Cuda(
        find_card(run.card),
        expandable_segments=False,
        adapters_cast_on_device=run.method == "lora" and run.adapters_on_device,
        empties_cache_after_casts=not peft or peft >= (0, 20),
        built_with_flash=run.built_with_flash,
    )
    meter: Any = device.meter()
    trace = Trace(meter, overlay=device.overlay())
    model = build(run)
    mode = make_fake(model)
    model.train()
    device.load(trace, model)
    figures: dict[str, int] = {"after_load": meter.allocated, "after_load_reserved": meter.reserved}
    peaks = [meter.take_peak()]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer_of(run, parameters)
    batch = _batch(run)
    for tensor in {id(tensor): tensor for tensor in batch.values()}.values():
        trace.adopt(tensor, "inputs")
    output: Any = None

    def ends(phase: str) -> None:
        figures[phase] = meter.take_peak()
        peaks.append(figures[phase])
        if trace.step == 1:
            figures[f"first_{phase}"], figures[f"first_{phase}_reserved"] = meter.allocated, meter.reserved

    with ExitStack() as stack:
        stack.enter_context(device.running())
        stack.enter_context(of_the_stack(run, model, mode))
        stack.enter_context(trace)
        if run.attention == "efficient":
            stack.enter_context(sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION))
        for trace.step in range(1, run.steps + 1):
            trace.enter_phase("forward")
            if run.zero_grad == "before the batch":
                optimizer.zero_grad(set_to_none=True)
            meter.take_peak()
            with torch.autocast("cpu", getattr(torch, run.autocast or "bfloat16"), enabled=bool(run.autocast)):
                output = model(**batch)
            loss = output.loss
            if run.output_lives == "forward":
                output = None
            ends("forward")
            if run.zero_grad == "before backward":
                optimizer.zero_grad(set_to_none=True)
            loss.backward()
            trace.enter_phase("optimizer_step")
            ends("backward")
            if run.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(parameters, run.max_grad_norm, foreach=True)
            with ReadAsOne():  # torch's Adafactor reads the values of norms
                optimizer.step()
            if run.zero_grad == "after the step":
                optimizer.zero_grad(set_to_none=True)
            ends("optimizer_step")
            if run.output_lives == "step":
                output = None
            del loss
    figures["peak_allocated"], figures["peak_reserved"] = max(peaks), meter.peak_reserved
    figures["last_step_peak_allocated"] = max(figures[phase] for phase in PHASES)
    figures["process"] = meter.peak_reserved + device.card.context_bytes
    trace.close()
    return figures


def _batch(run: Run) -> dict[str, Any]:
    import torch

    ids = torch.ones((run.batch_size, run.seq_len), dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids}
    if run.mask != "none":
        batch["attention_mask"] = torch.ones_like(ids)
        if run.mask == "padded":
            batch["attention_mask"][1:, -1] = 0
    return batch


# ---- results


def error(predicted: float, measured: float) -> float:
    """The error in percent of the measured value; negative if the prediction is too low."""
    return 100 * (predicted / measured - 1)


def compared(name: str, index: int, row: dict[str, str]) -> dict[str, Any]:
    """One row's entry of the results file: bytes, and errors in percent."""
    described, began = description(name), time.perf_counter()
    run, found = run_of(described, row), measured(described, row)
    entry: dict[str, Any] = {"set": name, "index": index, "source": value(described["source"], row), "stack": run.stack}
    entry |= {
        n: getattr(run, n) for n in ("card", "model", "method", "quantization", "batch_size", "seq_len", "optimizer")
    }
    predicted = predict(run)
    return entry | {
        "measured_bytes": {figure: round(nbytes) for figure, nbytes in found.items()},
        "predicted_bytes": {figure: predicted[figure] for figure in found},
        "error_percent": {figure: round(error(predicted[figure], nbytes), 3) for figure, nbytes in found.items()},
        "decides": described["decides"],
        "seconds": round(time.perf_counter() - began, 1),
        "date": datetime.date.today().isoformat(),
    }


def summary(entries: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Set -> figure -> mean, worst and largest underestimate in percent, and the number of rows."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    for name in sorted({entry["set"] for entry in entries}):
        errors: dict[str, list[float]] = {}
        for entry in entries:
            for figure, percent in entry["error_percent"].items() if entry["set"] == name else ():
                errors.setdefault(figure, []).append(percent)
        result[name] = {
            figure: {
                "mean": round(sum(map(abs, found)) / len(found), 3),
                "worst": round(max(map(abs, found)), 3),
                "under": round(max(0.0, -min(found)), 3),
                "rows": len(found),
            }
            for figure, found in errors.items()
        }
    return result


def load(path: Path = RESULTS) -> dict[str, Any]:
    """The results file, or an empty one."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rows": []}


def write(entries: list[dict[str, Any]], path: Path) -> None:
    """Writes the results file: old and new entries (new ones replace those of the same row), summary, and notes on each set."""
    from importlib.metadata import version

    kept = {(e["set"], e["source"], e["index"]): e for e in [*load(path)["rows"], *entries]}
    rows = sorted(kept.values(), key=lambda e: (e["set"], e["index"], e["source"]))
    names = sorted({entry["set"] for entry in rows})
    content = {
        "what": "predicted against measured, runs that others published; bytes, and errors in percent of what was measured",
        "predicted_with": {n: version(n) for n in ("torch", "transformers", "peft", "accelerate", "bitsandbytes")},
        "sets": {name: {key: description(name)[key] for key in ("what", "differs", "misses")} for name in names},
        "summary_percent": summary(rows),
        "rows": rows,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def show(content: dict[str, Any]) -> None:
    """Prints each row's errors and the summary."""
    for entry in content["rows"]:
        cells = "  ".join(f"{figure} {percent:+.3f}" for figure, percent in entry["error_percent"].items())
        print(
            f"{entry['set']} {entry['index']} {entry['model']} {entry['method']} {entry['quantization']} {entry['optimizer']} {entry['batch_size']}x{entry['seq_len']}: {cells}"
        )
    for name, figures in content.get("summary_percent", {}).items():
        for figure, errors in figures.items():
            print(
                f"{name:<14}{figure:<28}{errors['mean']:>9.3f}{errors['worst']:>9.3f}   under {errors['under']:.3f}   ({errors['rows']} rows)"
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", nargs="?", choices=sorted(p.stem for p in LOOPS.glob("*.yaml") if p.stem != "models"))
    parser.add_argument("data", nargs="?", type=Path, help="CSV of measured runs")
    parser.add_argument("--rows", type=int, nargs="*", help="only these rows, counted from 0")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="results file; its rows are kept, except those predicted again"
    )
    parser.add_argument("--show", action="store_true", help="print the results file and do nothing else")
    args = parser.parse_args()
    if args.show:
        show(load(args.out))
        return 0
    if args.data is None:
        parser.error("give a set and the CSV of its measured runs, or --show")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, str(HERE.parent))
    with args.data.open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    for index in range(len(rows)) if args.rows is None else args.rows:
        entry = compared(args.set, index, rows[index])
        write([entry], args.out)
        show({"rows": [entry]})
    show({"rows": [], "summary_percent": load(args.out)["summary_percent"]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
