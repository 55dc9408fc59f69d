"""Makes a model without weights runnable: parameters and buffers become fake tensors, control tensors stay real.

A fake tensor has a shape, a dtype and a storage without memory. Its `FakeTensorMode` is never entered. So only operators
with a fake argument are fake; everything else (ids, masks, positions) is computed for real, and code that inspects a mask
takes the same branch as in training.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from toolkit.memory import meta_ops
from toolkit.units import MIB

_SMALL = MIB  # code may branch on integer tensors up to this size, so they become real zeros


def make_fake(model: nn.Module) -> FakeTensorMode:
    """Replaces the meta tensors in `model` by fake tensors on the CPU, in place; tied weights stay tied.

    bitsandbytes' own functions quantize its layers, on fake tensors.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    memo: dict[nn.Parameter, nn.Parameter] = {}
    quantized: dict[Any, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if parameter not in memo:
                    memo[parameter] = _fake_parameter(mode, module, name, parameter, quantized)
                module._parameters[name] = memo[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = _fake_or_small(mode, buffer)
        _replace_plain(mode, module)
    model._apply = lambda fn, recurse=True: model  # `.to(device)` has no effect
    return mode


def fake_like(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    """A fake tensor on the CPU with the shape, dtype and strides of a meta tensor."""
    return meta_ops.fake(mode, tensor, has_address=True)


def _fake_parameter(
    mode: FakeTensorMode, module: nn.Module, name: str, parameter: nn.Parameter, quantized: dict[Any, Any]
) -> Any:
    fake: Any = fake_like(mode, parameter.data)
    kind = type(parameter).__name__
    if kind == "Params4bit" and name == "weight":
        return _quantized_4bit(module, parameter, fake, quantized)
    if kind == "Int8Params" and name == "weight" and not parameter.has_fp16_weights:
        return _quantized_8bit(fake)
    fake.requires_grad_(parameter.requires_grad)
    fake._is_param = True  # as nn.Parameter does, which first detaches: that takes longer than all else here
    return fake


def _quantized_4bit(module: Any, parameter: Any, fake: torch.Tensor, quantized: dict[Any, Any]) -> nn.Parameter:
    """The result of `Params4bit.to(device)` for a weight (out, in): packed (ceil(out x in / 2), 1), and its `QuantState`.

    `quantized` keeps one result of each shape, because layers repeat.
    """
    from bitsandbytes.functional import quantize_4bit

    options = {
        name: getattr(parameter, name) for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage")
    }
    key = (fake.shape, fake.dtype, *options.values())
    if key not in quantized:
        quantized[key] = quantize_4bit(fake, **options)
    packed, state = (_copied(part) for part in quantized[key])
    result: Any = nn.Parameter(packed, requires_grad=False)
    for name, value in options.items():
        setattr(result, name, value)
    result.quant_state = module.quant_state = state
    result.bnb_quantized, result.module = True, module
    return result


def _copied(part: Any) -> Any:
    """A copy of a tensor, or of a `QuantState` with copies of its tensors."""
    if isinstance(part, FakeTensor):
        return fake_like(
            part.fake_mode, torch.empty_strided(part.shape, part.stride(), dtype=part.dtype, device="meta")
        )
    if isinstance(part, torch.Tensor):
        return part.clone()
    if part is None:
        return None
    state = copy.copy(part)
    for name in ("absmax", "code", "offset", "state2"):
        setattr(state, name, _copied(getattr(part, name)))
    return state


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
