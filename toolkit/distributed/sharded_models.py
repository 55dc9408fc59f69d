"""Models whose weights are shared out among processes, by ZeRO-3 or FSDP2."""

from torch import nn


def share_tied_tables(model: nn.Module) -> None:
    """Makes embeddings that are tied by their weight one module, as FSDP2 wants it (torch 2.13 refuses T5 and BART else)."""
    table = model.get_input_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is not table and type(child) is type(table) and child.weight is table.weight:
                setattr(parent, name, table)


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds only a share of `model`'s weights, so that it computes on all ranks or on none."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) or hasattr(p, "ds_tensor") for p in model.parameters())
