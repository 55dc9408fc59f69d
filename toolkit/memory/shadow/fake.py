"""Makes a model without weights runnable: parameters and buffers become fake tensors, control tensors stay real.

A fake tensor has a shape, a dtype and a storage without memory. Its `FakeTensorMode` is never entered. So only operators
with a fake argument are fake; everything else (ids, masks, positions) is computed for real, and code that inspects a mask
takes the same branch as in training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from toolkit.units import MIB

CPU = torch.device("cpu")
_SMALL = MIB  # code may branch on integer tensors up to this size, so they become real zeros


def make_fake(model: nn.Module) -> FakeTensorMode:
    """Replaces the meta tensors in `model` by fake tensors on the CPU, in place; tied weights stay tied.

    bitsandbytes' own functions quantize its layers, on fake tensors.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    memo: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if parameter not in memo:
                    memo[parameter] = _fake_parameter(mode, module, name, parameter)
                module._parameters[name] = memo[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = _fake_or_small(mode, buffer)
        _replace_plain(mode, module)
    model._apply = lambda fn, recurse=True: model  # `.to(device)` has no effect
    return mode


def fake_like(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    """A fake tensor on the CPU with the shape, dtype and strides of a meta tensor."""
    return FakeTensor(mode, tensor, CPU)


def _fake_parameter(mode: FakeTensorMode, module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
    fake = fake_like(mode, parameter.data)
    kind = type(parameter).__name__
    if kind == "Params4bit" and name == "weight":
        return _quantized_4bit(module, parameter, fake)
    if kind == "Int8Params" and name == "weight" and not parameter.has_fp16_weights:
        return _quantized_8bit(fake)
    return nn.Parameter(fake, requires_grad=parameter.requires_grad)


def _quantized_4bit(module: Any, parameter: Any, fake: torch.Tensor) -> nn.Parameter:
    """The result of `Params4bit.to(device)` for a weight (out, in): packed (ceil(out x in / 2), 1), and its `QuantState`."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(
        fake,
        blocksize=parameter.blocksize,
        compress_statistics=parameter.compress_statistics,
        quant_type=parameter.quant_type,
        quant_storage=parameter.quant_storage,
    )
    result: Any = nn.Parameter(packed, requires_grad=False)
    for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage"):
        setattr(result, name, getattr(parameter, name))
    result.quant_state = module.quant_state = state
    result.bnb_quantized, result.module = True, module
    return result


def _quantized_8bit(fake: torch.Tensor) -> nn.Parameter:
    """The result of `Int8Params.to(device)` for a weight (out, in): int8 `CB` of the same shape, float32 `SCB` (out,)."""
    from bitsandbytes.functional import int8_vectorwise_quant

    weight, scale, _ = int8_vectorwise_quant(fake.to(torch.float16))
    result: Any = nn.Parameter(weight, requires_grad=False)
    result.CB, result.SCB, result.has_fp16_weights = result.data, scale, False
    return result


def _fake_or_small(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_floating_point() and tensor.nbytes <= _SMALL:
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    return fake_like(mode, tensor)


def _replace_plain(mode: FakeTensorMode, module: nn.Module) -> None:
    """Replaces tensors that are plain attributes, or in a dict, such as the token ids of soft prompts."""
    for name, value in list(vars(module).items()):
        if isinstance(value, torch.Tensor) and value.is_meta:
            setattr(module, name, _fake_or_small(mode, value))
        elif isinstance(value, dict) and value is not module._parameters and value is not module._buffers:
            for key, item in value.items():
                if isinstance(item, torch.Tensor) and item.is_meta:
                    value[key] = _fake_or_small(mode, item)
