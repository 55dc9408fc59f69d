"""Weights and optimizer state under FSDP2: every rank saves its shards, and any number of ranks can load them.

    checkpoint-N/shards/   files of torch.distributed.checkpoint: each rank's shards, and an index

Accelerate 1.15 gathers both on rank 0 instead, and cannot load what it saved if embedding tables are tied: the state dict has
every name of the table, but loading looks for one (torch 2.13). Here a parameter has one name, as in `named_parameters`, and each
rank writes its own shards. Frozen parameters are not written, because the base model has them. (In addition, Trainer gathers and
writes the model into the checkpoint, so that others can load it.)
"""

from pathlib import Path

import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

FOLDER = "shards"


def save_shards(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Writes `folder`/shards. Every rank calls this."""
    state = {"weights": _trained(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder / FOLDER)


def load_weight_shards(model: nn.Module, folder: Path) -> None:
    """Loads each rank's shards of the trained weights, in place. Every rank calls this."""
    dcp.load({"weights": _trained(model)}, checkpoint_id=folder / FOLDER)


def load_optimizer_shards(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Loads each rank's shards of the optimizer state. Every rank calls this."""
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder / FOLDER)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name to this rank's shard (a DTensor) of every trained parameter; tied parameters have one name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
