"""A fast path for operators on fake tensors: a fake tensor is a meta tensor that says "cpu", so its meta kernel can be called.

`FakeTensorMode` does the same, but first spends some hundred microseconds on symbolic shapes, caches, constants and devices,
which a shadow step does not need. An operator takes the fast path if it has a meta kernel and writes to none of its arguments.
If the meta kernel raises once, the operator takes the slow path from then on. Layers repeat, and with them operators on the
same shapes, so results are cached by the shapes of the arguments, unless they share storage with an argument. An operator
that writes into a fake tensor in place has nothing to write: it returns its argument.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from math import prod
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

_CPU, _META = torch.device("cpu"), torch.device("meta")
_INDEXING = {"aten::index.Tensor", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_OPTIMIZER_STEPS = {"bitsandbytes::optimizer_update_8bit_blockwise", "bitsandbytes::optimizer_update_32bit"}
_GROUPED_MM = torch.ops.aten._grouped_mm.default
_refused: set[Any] = set()  # operators whose meta kernel raised once
_templates: WeakKeyDictionary[FakeTensorMode, FakeTensor] = WeakKeyDictionary()
_LARGE = 2**24  # elements; a larger real tensor is a mask of long rows, on whose values no code branches
_mode_of_large: list[FakeTensorMode] = []
# an operator with its arguments' shapes -> (shape, stride, dtype, offset, bytes of the storage) of its results
_remembered: dict[Any, Any] = {}


@cache
def _in_place(op: Any) -> str:
    """ "self" for an operator that writes into its first argument and returns it, "nothing" for one that writes and returns
    nothing, "weight" for a step of bitsandbytes, which writes into its arguments and returns nothing, otherwise ""; also "" for one
    that changes a size or stride."""
    if op.name() in _OPTIMIZER_STEPS:
        return "weight"
    writes = [a for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if op.namespace != "aten" or not writes or any(a.kwarg_only for a in writes) or torch.Tag.inplace_view in op.tags:
        return ""
    if not op._schema.returns:
        return "nothing" if op.name().startswith(("aten::_foreach_", "aten::_fused_")) else ""
    returned = op._schema.returns[0].alias_info
    returns_it = len(op._schema.returns) == 1 and returned is not None and returned.is_write
    return "self" if returns_it and writes == [op._schema.arguments[0]] else ""


@cache
def _has_meta_kernel(op: Any) -> bool:
    if op.namespace == "c10d":
        return torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "Meta")
    if op.namespace != "aten" or any(a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments):
        return False
    name = op.name()
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return has(name, "Meta") or has(name, "CompositeExplicitAutograd")


def run(op: Any, args: tuple, kwargs: dict) -> Any:
    """`op(*args, **kwargs)`; if a tensor among the arguments is fake, all tensors of the result are."""
    if op.name() in _INDEXING:
        args = (args[0], _places(args[1]), *args[2:])
    in_place = _in_place(op)
    if in_place == "self" and isinstance(args[0], FakeTensor):
        return args[0]
    if in_place == "nothing" and all(isinstance(tensor, FakeTensor) for tensor in args[0]):
        return None
    if in_place == "weight" and isinstance(args[2], FakeTensor):  # (name of the optimizer, gradient, weight, ...)
        return None
    if op is _GROUPED_MM and isinstance(args[0], FakeTensor) and args[0].dtype != torch.bfloat16:
        return _grouped_mm(*args, **kwargs)
    if op in _refused or not _has_meta_kernel(op):
        return op(*args, **kwargs)
    fakes: list[FakeTensor] = []
    if op.namespace == "c10d":
        _signature(args, fakes)
        return _run_meta(op, args, kwargs) if fakes else op(*args, **kwargs)
    signature = (op, _signature(args, fakes), *((name, _signature(value, fakes)) for name, value in kwargs.items()))
    if not fakes:
        if _mode_of_large and _would_be_large(op, args):
            return _run_meta(op, args, kwargs, _mode_of_large[-1])
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


@contextmanager
def large_ones_fake(mode: FakeTensorMode) -> Iterator[None]:
    """While open, large real tensors become fake tensors of `mode`. The attention mask of 8 rows of 32,768 tokens takes 8 GiB."""
    _mode_of_large.append(mode)
    try:
        yield
    finally:
        _mode_of_large.pop()


def _would_be_large(op: Any, args: tuple) -> bool:
    shapes = [arg.shape for arg in args if isinstance(arg, torch.Tensor)]
    return torch.Tag.pointwise in op.tags and bool(shapes) and prod(torch.broadcast_shapes(*shapes)) > _LARGE


def _grouped_mm(a: Any, b: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> FakeTensor:
    """A matrix product for each expert, of (rows, k) and (experts, k, n), and its gradients. The meta kernel supports only bf16."""
    groups = () if a.dim() != b.dim() else (len(offs),) if a.dim() == 2 else (len(a),)
    shape = (*groups, a.shape[-2], b.shape[-1])
    return fake(a.fake_mode, torch.empty(shape, dtype=out_dtype or a.dtype, device=_META))


def _places(indices: Any) -> list[Any]:
    """The indices of an indexing operator, with each real mask replaced by the positions where it is true."""
    places: list[Any] = []
    for index in indices:
        is_mask = isinstance(index, torch.Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        places.extend(index.nonzero(as_tuple=True) if is_mask else [index])
    return places


def _signature(value: Any, fakes: list[FakeTensor]) -> Any:
    """The properties of an argument that decide the shapes of the results. Numbers keep their types: 1, 1.0 and True differ."""
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
    if result is None:
        return None
    return (
        tuple(result.shape),
        result.stride(),
        result.dtype,
        result.storage_offset(),
        result.untyped_storage().nbytes(),
    )


def _made(known: Any, mode: FakeTensorMode) -> Any:
    if isinstance(known, list):
        return known[0](_made(item, mode) for item in known[1:])
    if known is None:
        return None
    shape, stride, dtype, offset, nbytes = known
    meta = torch.empty_strided(shape, stride, dtype=dtype, device=_META)
    if meta.untyped_storage().nbytes() != nbytes:  # a kernel returns a part of what it allocates, such as a padded row
        meta = torch.empty(nbytes // dtype.itemsize, dtype=dtype, device=_META).as_strided(shape, stride, offset)
    return fake(mode, meta)


def fake(mode: FakeTensorMode, meta: torch.Tensor, has_address: bool = False) -> FakeTensor:
    """`FakeTensor(mode, meta, "cpu")`, made faster by copying the attributes of an earlier one.

    `has_address`: asking for its `data_ptr` is no error, as for the constructor's.
    """
    if mode not in _templates:
        _templates[mode] = FakeTensor(mode, torch.empty(0, device=_META), _CPU)
    tensor = torch.Tensor._make_subclass(
        FakeTensor, meta, meta.requires_grad, dispatch_device=True, device_for_backend_keys=_CPU
    )
    if not has_address:
        torch._C._set_throw_on_mutable_data_ptr(tensor)
    tensor.__dict__.update(_templates[mode].__dict__)
    return tensor


def _run_meta(op: Any, args: tuple, kwargs: dict, mode: FakeTensorMode | None = None) -> Any:
    modes: list[FakeTensorMode] = [] if mode is None else [mode]
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
    except (NotImplementedError, RuntimeError, TypeError, ValueError):  # from kernels and their checks
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
        return fake(mode, value)
    if isinstance(value, (list, tuple)):
        return type(value)(_as_fake(item, mode) for item in value)
    return value
