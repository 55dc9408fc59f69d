"""Operators on fake tensors without the detour: a fake tensor is a meta tensor that says "cpu", so its meta kernel is asked.

`FakeTensorMode` does the same after some hundred microseconds of questions that a shadow step has no use for (symbolic
shapes, caches, constants, devices). Only operators that write to none of their arguments and have a meta kernel go this
way; whatever a meta kernel refuses goes the long way from then on. Layers repeat, and so do operators on tensors of the
same shapes: what an operator returned once is remembered by its shapes, unless it shares storage with an argument.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

_CPU, _META = torch.device("cpu"), torch.device("meta")
_INDEXING = {"aten::index.Tensor", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_refused: set[Any] = set()  # operators whose meta kernel raised once
_remembered: dict[Any, Any] = {}  # an operator with its arguments' shapes -> (shape, stride, dtype) of its results


@cache
def _has_meta_kernel(op: Any) -> bool:
    if op.namespace != "aten" or any(a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments):
        return False
    name = op.name()
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return has(name, "Meta") or has(name, "CompositeExplicitAutograd")


def run(op: Any, args: tuple, kwargs: dict) -> Any:
    """`op(*args, **kwargs)`, with every tensor of the result fake if one of the arguments' is."""
    if op.name() in _INDEXING:
        args = (args[0], _places(args[1]), *args[2:])
    if op in _refused or not _has_meta_kernel(op):
        return op(*args, **kwargs)
    fakes: list[FakeTensor] = []
    signature = (op, _signature(args, fakes), *((name, _signature(value, fakes)) for name, value in kwargs.items()))
    if not fakes:
        return op(*args, **kwargs)
    known = _remembered.get(signature)
    if known is not None:
        return _made(known, fakes[0].fake_mode)
    result = _run_meta(op, args, kwargs)
    results = result if isinstance(result, (tuple, list)) else (result,)
    tensors = [item for item in results if isinstance(item, torch.Tensor)]
    taken = {tensor.untyped_storage()._cdata for tensor in fakes}
    fresh = not any(isinstance(tensor, FakeTensor) and tensor.untyped_storage()._cdata in taken for tensor in tensors)
    if fresh and tensors and all(item is None or isinstance(item, FakeTensor) for item in results):
        _remembered[signature] = _description(result)
    return result


def _places(indices: Any) -> list[Any]:
    """What an indexing operator makes of its indices: a real mask gives the places where it is true, so they are known."""
    places: list[Any] = []
    for index in indices:
        is_mask = isinstance(index, torch.Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        places.extend(index.nonzero(as_tuple=True) if is_mask else [index])
    return places


def _signature(value: Any, fakes: list[FakeTensor]) -> Any:
    """What of an argument decides the shapes of the results; numbers with their types, for 1, 1.0 and True differ."""
    if isinstance(value, torch.Tensor):
        if isinstance(value, FakeTensor):
            fakes.append(value)
        return (value.dtype, value.shape, value.stride())
    if isinstance(value, (list, tuple)):
        return tuple(_signature(item, fakes) for item in value)
    return (type(value), value)


def _description(result: Any) -> Any:
    if isinstance(result, (list, tuple)):
        return [type(result), *(_description(item) for item in result)]
    return None if result is None else (tuple(result.shape), result.stride(), result.dtype)


def _made(known: Any, mode: FakeTensorMode) -> Any:
    if isinstance(known, list):
        return known[0](_made(item, mode) for item in known[1:])
    if known is None:
        return None
    shape, stride, dtype = known
    return FakeTensor(mode, torch.empty_strided(shape, stride, dtype=dtype, device=_META), _CPU)


def _run_meta(op: Any, args: tuple, kwargs: dict) -> Any:
    modes: list[FakeTensorMode] = []
    meta_args = [_as_meta(arg, modes) for arg in args]
    meta_kwargs = {name: _as_meta(value, modes) for name, value in kwargs.items()}
    if meta_kwargs.get("device") is not None:
        meta_kwargs["device"] = _META
    mode = modes[0]
    in_kernel, in_meta = mode.in_kernel_invocation, torch._C._meta_in_tls_dispatch_include()
    guard = torch._C._DisableTorchDispatch()
    mode.in_kernel_invocation = True
    torch._C._set_meta_in_tls_dispatch_include(True)
    try:
        result = op(*meta_args, **meta_kwargs)
    except (NotImplementedError, RuntimeError, TypeError, ValueError):  # what kernels and their checks raise
        _refused.add(op)
        result = None
    finally:
        mode.in_kernel_invocation = in_kernel
        torch._C._set_meta_in_tls_dispatch_include(in_meta)
        del guard
    return op(*args, **kwargs) if result is None else _as_fake(result, mode)


def _as_meta(value: Any, modes: list[FakeTensorMode]) -> Any:
    if isinstance(value, FakeTensor):
        modes.append(value.fake_mode)
        return value
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_META)
    if isinstance(value, (list, tuple)):
        return type(value)(_as_meta(item, modes) for item in value) if _holds_tensor(value) else value
    return value


def _holds_tensor(values: Any) -> bool:
    return any(isinstance(value, torch.Tensor) for value in values)


def _as_fake(value: Any, mode: FakeTensorMode) -> Any:
    if isinstance(value, FakeTensor) or value is None:
        return value
    if isinstance(value, torch.Tensor):
        return FakeTensor(mode, value, _CPU)
    if isinstance(value, (list, tuple)):
        return type(value)(_as_fake(item, mode) for item in value)
    return value
