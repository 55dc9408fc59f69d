"""Loading onto a GPU, replayed: how the model was loaded decides what the allocator holds when training begins.

`from_pretrained(device_map=...)`, which quantized models need, first allocates and frees one block of the size of the whole
model (`caching_allocator_warmup`). Then it loads the tensors in the order of their names in the checkpoint. A weight to be
quantized is staged in 16 bits, quantized, and the staged copy is freed. `prepare_model_for_kbit_training` then casts all
other weights to float32, one after the other, and empties the cache (PEFT 0.20 and later). A model without quantization is
moved by `.to(device)`, module by module.

Sources: transformers 5.17 to 5.23 (`core_model_loading.py`, `modeling_utils.py`), PEFT 0.20 (`utils/other.py`),
bitsandbytes 0.50 (`nn/modules.py`, `functional.py`). Seams "order of loading", "caching_allocator_warmup", "order of quantizing" and
"prepare_model_for_kbit_training".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from toolkit.memory import census
from toolkit.memory.trace import Trace


def replay(
    trace: Trace, model: nn.Module, empty_cache: Callable[[], None], adapters_cast_on_device: bool = False
) -> None:
    """Adopts all parameters and buffers of `model` in the order of loading, with the buffers that loading stages them in.

    `adapters_cast_on_device`: the adapters were attached to a model already on the GPU, so each was first allocated there in
    the base model's 16 bits (PEFT casts them to float32 at the end). With `Trainer` they are attached on the CPU.
    """
    if any(_kind(module) for module in model.modules()):
        _from_pretrained(trace, model, empty_cache)
    else:
        _move(trace, model, adapters_cast_on_device)
    census.label_model(trace, model)


def _kind(module: nn.Module) -> str:
    """ "4bit" or "8bit" for a linear layer of bitsandbytes, otherwise ""."""
    weight = module._parameters.get("weight")
    if getattr(weight, "quant_state", None) is not None:
        return "4bit"
    return "8bit" if getattr(weight, "SCB", None) is not None else ""


def _move(trace: Trace, model: nn.Module, adapters_cast_on_device: bool) -> None:
    """`model.to(device)`: a module's children before its own parameters and buffers, as in `nn.Module._apply`."""
    late: list[tuple[str, nn.Parameter]] = []
    seen: set[int] = set()

    def visit(path: str, module: nn.Module) -> None:
        for name, child in module._modules.items():
            if child is not None:
                visit(f"{path}.{name}" if path else name, child)
        for parameter in module._parameters.values():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if parameter.requires_grad and adapters_cast_on_device:
                late.append((path, parameter))
            else:
                _adopt(trace, path, parameter)
        for buffer in module._buffers.values():
            if buffer is not None:
                trace.adopt(buffer, "buffers", path)

    visit("", model)
    halves = [trace.hold(2 * parameter.numel(), "adapter", "temporaries") for _, parameter in late]
    for (path, parameter), half in zip(late, halves, strict=True):
        _adopt(trace, path, parameter)
        trace.release(half)


def _from_pretrained(trace: Trace, model: nn.Module, empty_cache: Callable[[], None]) -> None:
    from transformers.core_model_loading import dot_natural_key

    loaded: dict[str, tuple[str, nn.Module, nn.Parameter]] = {}  # by name in the checkpoint; tied weights once
    adapters: list[tuple[str, nn.Parameter]] = []
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if parameter.requires_grad:
                adapters.append((path, parameter))
            else:
                key = f"{path}.{name}".replace(".base_layer.", ".").removeprefix("base_model.model.")
                loaded[key] = (path, module, parameter)
    staged = _load_dtype(model).itemsize
    quantized_sizes = {"4bit": 0.5, "8bit": 1.0}
    warmup = sum(
        _numel(parameter) * quantized_sizes.get(_kind(module) if key.endswith("weight") else "", staged)
        for key, (_, module, parameter) in loaded.items()
    )
    trace.passing(int(warmup // 2) * 2, "caching_allocator_warmup")
    halves: dict[int, Any] = {}
    for key in sorted(loaded, key=dot_natural_key):
        path, module, parameter = loaded[key]
        kind = _kind(module) if parameter is module._parameters.get("weight") else ""
        if kind:
            _quantize(trace, path, module, parameter, kind, staged)
        elif parameter.dtype == torch.float32 and staged == 2:  # cast below
            halves[id(parameter)] = trace.hold(2 * parameter.numel(), "load", "temporaries")
        else:
            _adopt(trace, path, parameter)
    for path, module in model.named_modules():
        for buffer in module._buffers.values():
            if buffer is not None:
                trace.adopt(buffer, "buffers", path)
    for path, _, parameter in loaded.values():
        if id(parameter) in halves:
            _adopt(trace, path, parameter)
            trace.release(halves.pop(id(parameter)))
    empty_cache()
    for path, parameter in adapters:
        _adopt(trace, path, parameter)


def _quantize(trace: Trace, path: str, module: nn.Module, parameter: Any, kind: str, staged: int) -> None:
    """One weight: the staged copy, then block maxima or scales and packed values, then the staged copy is freed."""
    numel = _numel(parameter)
    blocks = [trace.hold(staged * numel, "load", "temporaries")]
    state = "parameters_quantization_state"
    if kind == "8bit":  # copied back from the CPU, in float16
        blocks.append(trace.hold(2 * numel, "load", "temporaries"))
        trace.adopt(parameter.SCB, state, path)
        _adopt(trace, path, parameter)
    else:
        quant = parameter.quant_state
        if quant.nested:
            blocks.append(trace.hold(4 * quant.absmax.numel(), "load", "temporaries"))
            _adopt(trace, path, parameter)
            trace.adopt(quant.code, state, path)
            trace.adopt(quant.offset, state, path)
            blocks.append(trace.hold(4 * quant.absmax.numel(), "load", "temporaries"))
            for tensor in (quant.state2.code, quant.state2.absmax, quant.absmax):
                trace.adopt(tensor, state, path)
        else:
            trace.adopt(quant.absmax, state, path)
            _adopt(trace, path, parameter)
            trace.adopt(quant.code, state, path)
    for block in blocks:
        trace.release(block)


def _adopt(trace: Trace, path: str, parameter: nn.Parameter) -> None:
    kind = "parameters_trainable" if parameter.requires_grad else "parameters_frozen"
    trace.adopt(parameter, kind, path)


def _numel(parameter: Any) -> int:
    """The number of weights, unpacked."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())


def _load_dtype(model: nn.Module) -> torch.dtype:
    """The dtype in which the checkpoint was loaded: the config's, which later casts do not change."""
    dtype = getattr(getattr(model, "config", None), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32
