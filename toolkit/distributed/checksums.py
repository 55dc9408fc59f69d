"""Checksums of weights, to find out whether they are bit for bit the same later, or on another rank."""

import torch
from torch import nn


@torch.no_grad()
def checksums(model: nn.Module, trainable: bool) -> dict[str, int]:
    """Checksums by name of the parameters that train (or do not): the sum of their bytes as 64-bit integers, modulo 2**64.

    A single changed bit changes the sum, and so does scaling or shifting all elements; changes that cancel exactly do not. The
    sum is computed on the weight's device, without a copy of the weight.
    """
    found = {name: _checksum(p) for name, p in model.named_parameters() if p.requires_grad == trainable}
    return {name: int(total) for name, total in found.items()}


def _checksum(parameter: nn.Parameter) -> torch.Tensor:
    tensor = getattr(parameter, "ds_tensor", parameter).detach()  # ZeRO-3: this rank's shard
    if hasattr(tensor, "to_local"):  # FSDP2
        tensor = tensor.to_local()
    flat = tensor.contiguous().view(-1)
    if not flat.numel():
        return torch.zeros((), dtype=torch.long)
    if flat.data_ptr() % 8 or flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()
    octets = flat.view(torch.uint8)
    whole = octets.numel() // 8 * 8
    return octets[:whole].view(torch.long).sum() + octets[whole:].sum(dtype=torch.long)
