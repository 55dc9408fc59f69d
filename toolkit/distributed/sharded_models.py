"""Models whose weights ZeRO-3 or FSDP2 shards among processes."""

from torch import nn


def share_tied_tables(model: nn.Module) -> None:
    """Makes embeddings with tied weights one module, as FSDP2 needs it (otherwise torch 2.13 refuses T5 and BART)."""
    table = model.get_input_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is not table and type(child) is type(table) and child.weight is table.weight:
                setattr(parent, name, table)


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds only a shard of `model`'s weights; it then computes on all ranks or on none."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) or hasattr(p, "ds_tensor") for p in model.parameters())
