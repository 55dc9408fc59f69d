"""Models whose weights ZeRO-3 or FSDP2 shards among processes."""

from collections.abc import Iterable

from torch import nn


def share_tied_tables(model: nn.Module) -> None:
    """Makes embeddings with tied weights one module, as FSDP2 needs it (otherwise torch 2.13 refuses T5 and BART)."""
    table = model.get_input_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is not table and type(child) is type(table) and child.weight is table.weight:
                setattr(parent, name, table)


def gather_together(modules: Iterable[nn.Module]) -> None:
    """Makes ZeRO-3 gather the weights of all parts of a module when the module itself runs, once, however often its parts run.

    A module without parts already is so; as a leaf, its gradients would be taken before those of a weight that is tied to it.
    """
    from deepspeed.utils import set_z3_leaf_module

    for module in modules:
        if any(True for _ in module.children()):
            set_z3_leaf_module(module, True)


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds only a shard of `model`'s weights; it then computes on all ranks or on none."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) or hasattr(p, "ds_tensor") for p in model.parameters())
