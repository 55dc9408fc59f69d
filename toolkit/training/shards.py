"""The weights and the optimizer's state of a model that FSDP2 shares out, saved by all ranks and read by any number of them.

    checkpoint-N/shards/   torch.distributed.checkpoint's own files: each rank's part, and a list of what lies where

Accelerate 1.15 gathers both on rank 0 instead, and cannot read back what it wrote of models whose tables are tied: a state dict has
each of the table's names, and the module tree that it is read by has one (torch 2.13). Here a parameter has one name, as in
`named_parameters`, and each rank writes its own part. Frozen parameters are not written: the base model has them. (Beside these
files Trainer gathers and writes the model, for whoever wants to load a checkpoint.)
"""

from pathlib import Path

import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

FOLDER = "shards"


def save_shards(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Writes `folder`/shards. Called by all ranks."""
    state = {"weights": _trained(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder / FOLDER)


def load_weight_shards(model: nn.Module, folder: Path) -> None:
    """Reads each rank's share of the trained weights, in place. Called by all ranks."""
    dcp.load({"weights": _trained(model)}, checkpoint_id=folder / FOLDER)


def load_optimizer_shards(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Reads each rank's share of the optimizer's state. Called by all ranks."""
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder / FOLDER)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name to this rank's share (a DTensor), of every parameter that is trained; tied ones have one name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
