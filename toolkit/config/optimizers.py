"""Optimizers that transformers' Trainer does not know by name. `OWN` is their registry: each entry adds a name to --optim."""

import ast
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import prodigyopt
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainingArguments


def name_of(training: TrainingArguments) -> str:
    """The name that `--optim` gives; transformers stores its own optimizers as enum members."""
    return str(getattr(training.optim, "value", training.optim))


class Prodigy(prodigyopt.Prodigy):
    """Prodigy (Mishchenko and Defazio 2023, arXiv:2306.06101): Adam that finds its own step size; leave its rate at 1.

    The state has four numbers per weight: Adam's two, the initial weight, and a sum of gradients. The library does not store
    the initial weight of a tensor that starts at zero. We always store it, so that memory does not depend on values.
    """

    def step(self, closure: Any = None) -> Any:
        """One optimizer step. It also runs in the shadow step: fake tensors have no values, so each number is read as 1."""
        fake = False
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            fake = fake or isinstance(p.data, FakeTensor)
            if "step" not in self.state[p]:
                first = p.detach().flatten().clone()
                zeros = {name: torch.zeros_like(p.detach()) for name in ("exp_avg", "exp_avg_sq")}
                self.state[p] = {"step": 0, "s": torch.zeros_like(first), "p0": first, **zeros}
        if not fake:
            return super().step(closure)
        with ReadAsOne():
            return super().step(closure)


class ReadAsOne(TorchDispatchMode):
    """Reading a number from a fake tensor returns 1."""

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if op is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0
        return op(*args, **(kwargs or {}))


def prodigy_arguments(args: TrainingArguments) -> dict[str, Any]:
    """The keyword arguments of `Prodigy`; `--optim_args "d_coef=2,safeguard_warmup=True"` adds more.

    Raises: ValueError for an argument that Prodigy does not have.
    """
    known = set(inspect.signature(prodigyopt.Prodigy).parameters) - {"params", "lr", "weight_decay", "slice_p"}
    chosen: dict[str, Any] = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2)}
    chosen["eps"] = args.adam_epsilon
    for pair in filter(None, (args.optim_args or "").replace(" ", "").split(",")):
        name, _, value = pair.partition("=")
        if name not in known:
            raise ValueError(f"--optim_args {pair}: Prodigy has no argument {name}; it has {', '.join(sorted(known))}")
        try:
            chosen[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise ValueError(f"--optim_args {pair}: {value!r} is not a number, True or False") from None
    return chosen


@dataclass(frozen=True)
class OwnOptimizer:
    """An optimizer that `--optim` accepts in addition to Trainer's own."""

    optimizer: type[torch.optim.Optimizer]
    arguments: Callable[[TrainingArguments], dict[str, Any]]  # its keyword arguments; ValueError for a bad --optim_args
    paper: str  # arXiv id
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of training flags that the user does not set
    one_learning_rate: bool = False  # whether all parameter groups must have the same learning rate


OWN: dict[str, OwnOptimizer] = {
    # Prodigy finds the step size itself, and the learning rate multiplies it.
    "prodigy": OwnOptimizer(
        Prodigy, prodigy_arguments, "arXiv:2306.06101", {"learning_rate": 1.0}, one_learning_rate=True
    )
}
