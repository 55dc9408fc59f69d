"""Whether weights are the same bits: at another time, or on another rank."""

import torch
from torch import nn


@torch.no_grad()
def checksums(model: nn.Module, trainable: bool) -> dict[str, int]:
    """Name to checksum of the parameters that train (or do not): the sum of their bytes as 64-bit integers, modulo 2**64.

    Any single changed bit changes it, and so does a scaling or a shift of all elements; changes that cancel to the bit
    do not. It is computed where the weight is, without a copy of it.
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
