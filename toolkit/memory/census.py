"""The census: which storages are parameters, quantization state, buffers, gradients and optimizer state.

The measurement and the shadow step both call it, after loading and before and after the optimizer's step. So each category
means the same in predictions and measurements.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from toolkit.memory.trace import Trace

# Attributes in which DeepSpeed's optimizers (stage_1_and_2.py, stage3.py, bf16_optimizer.py) keep tensors other than the moments.
# A missing attribute raises no error here, so a test checks each name: seam "attributes of ZeRO's optimizers".
ZERO = {
    "optimizer_state": (
        "single_partition_of_fp32_groups",
        "fp32_partitioned_groups_flat",
        "fp32_groups_flat_partition",
    ),
    "gradients": ("averaged_gradients", "grad_partitions_flat_buffer", "fp32_groups_gradients_flat"),
}
PAGED = "is_paged"  # bitsandbytes' mark of state in managed memory; seam "state of paged optimizers"
# Those of ZeRO, and those of its buffers, that are in host memory when the optimizer is offloaded.
OFFLOADED = (
    "single_partition_of_fp32_groups",
    "fp32_partitioned_groups_flat",
    "grad_partitions_flat_buffer",
    "param_buffer_of_bit16_for_cpu_offload_groups",
    "temp_grad_buffer_for_cpu_offload",
    "accumulated_grads_in_cpu",
)


def label_model(trace: Trace, model: nn.Module) -> None:
    """Labels parameters (frozen, trainable), quantization state and buffers, each with the path of its module."""
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            kind = "parameters_trainable" if parameter.requires_grad else "parameters_frozen"
            trace.adopt(local(parameter), kind, path)
            shard = getattr(parameter, "ds_tensor", None)
            if shard is not None:
                trace.adopt(shard, kind, path)
        for tensor in quantization_tensors(module):
            block = trace.block_of(tensor)
            if block is None or not (block.category or "").startswith("parameters_"):
                trace.adopt(tensor, "parameters_quantization_state", path)
        for tensor in [*module._buffers.values(), *plain_tensors(module)]:
            if tensor is not None and trace.block_of(tensor) is None:
                trace.adopt(tensor, "buffers", path)


def label_gradients(trace: Trace, model: nn.Module) -> None:
    """Labels the current gradients. Under DDP they are views into its buckets, so the buckets are labelled."""
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.grad is not None:
                trace.adopt(local(parameter.grad), "gradients", path)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of `tensor` that this process holds: all of it, or its shard under FSDP2."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor


def label_optimizer_state(trace: Trace, optimizer: Any) -> None:
    """Labels every tensor that the optimizer keeps between steps, under any name; of a LayerWiseDummyOptimizer, those of the
    optimizers that it has for each weight.

    Under ZeRO these include the master weights and the partition of the gradients, which the optimizer keeps as well. What
    the optimizer keeps in host memory or in managed memory is marked as offloaded.
    """
    for value in optimizer.state.values():
        for tensor in nested_tensors(value):
            trace.adopt(local(tensor), "optimizer_state")
            if getattr(tensor, PAGED, False):
                _offload(trace, [tensor])
    zero: Any = getattr(optimizer, "optimizer", None)
    for one in (getattr(zero, "optimizer_dict", None) or {}).values():
        label_optimizer_state(trace, one)
    for category, names in ZERO.items():
        for name in names:
            for tensor in nested_tensors(getattr(zero, name, None)):
                if tensor.numel() and not tensor.is_meta:
                    trace.adopt(tensor, category)
    if getattr(zero, "cpu_offload", False) or getattr(zero, "offload_optimizer", False):
        _label_offloaded(trace, optimizer, zero)
    if getattr(zero, "offload_param", False):
        parameters = list(zero.module.parameters())
        _offload(trace, [getattr(p, "ds_tensor", None) for p in parameters])
        for swapper in _swappers(parameters):
            _offload(trace, [swapper.buffers, swapper.partitioned_swap_buffer])


def paged_bytes(optimizer: Any) -> int:
    """Bytes of optimizer state in managed memory, which PyTorch's allocator does not count."""
    state = getattr(optimizer, "state", {})
    return sum(t.nbytes for value in state.values() for t in nested_tensors(value) if getattr(t, PAGED, False))


def swapped_bytes(optimizer: Any) -> int:
    """Size of this rank's files in the folders that DeepSpeed swaps to (ZeRO-Infinity), in bytes."""
    zero: Any = getattr(optimizer, "optimizer", None)
    swappers = _swappers(zero.module.parameters()) if hasattr(zero, "module") else []
    swappers += filter(None, [getattr(zero, "optimizer_swapper", None)])
    files = [file for swapper in swappers for file in Path(swapper.swap_folder).glob("*.swp")]
    return sum(file.stat().st_size for file in files)


def _swappers(parameters: Iterable[nn.Parameter]) -> list[Any]:
    """The objects that move `parameters` between memory and disk; DeepSpeed has one for all parameters."""
    return list({p.nvme_swapper: None for p in parameters if getattr(p, "nvme_swapper", None) is not None})


def _label_offloaded(trace: Trace, optimizer: Any, zero: Any) -> None:
    """Marks what DeepSpeed's offloaded optimizer keeps: its state, master weights, their gradients and pinned buffers."""
    held = [getattr(zero, name, None) for name in OFFLOADED]
    masters = list(nested_tensors(held[:2]))
    swapper = getattr(zero, "optimizer_swapper", None)
    held.append(getattr(getattr(swapper, "swap_buffer_manager", None), "all_buffers", None))
    gradients = [master.grad for master in masters if master.grad is not None]
    for tensor in gradients:
        trace.adopt(tensor, "gradients")
    _offload(trace, [held, gradients, list(optimizer.state.values())])


def _offload(trace: Trace, tensors: Any) -> None:
    for tensor in nested_tensors(tensors):
        if tensor.numel() and not tensor.is_meta and (block := trace.track(tensor, op="")) is not None:
            block.offloaded = True


def quantization_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """bitsandbytes' scales and tables: a 4-bit weight's `QuantState` (nested for double quantization), int8's `SCB`."""
    seen = {id(module._parameters.get("weight"))}
    holders = [getattr(module._parameters.get("weight"), name, None) for name in ("quant_state", "CB", "SCB")]
    holders += [getattr(module, "quant_state", None)]
    holders += [getattr(getattr(module, "state", None), name, None) for name in ("CB", "SCB")]
    for holder in holders:
        for tensor in _quant_state_tensors(holder):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


def _quant_state_tensors(holder: Any) -> Iterator[torch.Tensor]:
    if isinstance(holder, torch.Tensor):
        yield holder
    elif holder is not None:
        for name in ("absmax", "code", "offset", "state2"):
            yield from _quant_state_tensors(getattr(holder, name, None))


def plain_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Tensors that a module keeps as plain attributes: rotary tables, soft prompts' token ids."""
    for value in vars(module).values():
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
            yield value
        elif isinstance(value, dict) and value is not module._parameters and value is not module._buffers:
            yield from (v for v in value.values() if isinstance(v, torch.Tensor) and not isinstance(v, nn.Parameter))


def nested_tensors(tree: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested dicts, lists and tuples, and the matrices with which GaLore and APOLLO project gradients."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from nested_tensors(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from nested_tensors(value)
    elif hasattr(tree, "ortho_matrix"):
        yield from nested_tensors(tree.ortho_matrix)


def head_of(model: nn.Module) -> nn.Module | None:
    """The output embedding, which computes the logits; None for models without one (classifiers)."""
    get = getattr(model, "get_output_embeddings", None)
    try:
        return get() if callable(get) else None
    except (NotImplementedError, AttributeError):
        return None


def count_parameters(model: nn.Module) -> dict[str, int]:
    """`{"trainable", "all"}`: numbers of weights. Tied weights count once, 4-bit weights by their unpacked shape."""
    counts = {"trainable": 0, "all": 0}
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        whole = getattr(parameter, "ds_numel", None) or parameter.numel()  # under ZeRO-3 it is empty between uses
        number = whole if state is None else int(torch.Size(state.shape).numel())
        counts["all"] += number
        counts["trainable"] += number if parameter.requires_grad else 0
    return counts
