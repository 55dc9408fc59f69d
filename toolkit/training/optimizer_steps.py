"""Optimizer steps that need less memory: in the backward pass, or over a part of the weights at a time."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from toolkit.errors import UserError
from toolkit.memory.census import local
from toolkit.memory.trace import current_trace

CHUNK_BYTES = 2**28  # of weights that one call of a foreach implementation updates: enough for a GPU to be busy
# Where optimizers are that keep all of their state by weight, so that weights can be updated one at a time
BY_WEIGHT = ("torch.optim.", "transformers.optimization", "bitsandbytes.optim.")


class StepInBackward:
    """Updates each weight in the backward pass, as soon as its gradient is complete, and frees the gradient.

    So one gradient is in memory instead of all (Lv et al. 2023, arXiv:2306.09782). The optimizer is the usual one, and steps once for
    each weight; weights without a gradient it skips. Weights, state and checkpoints are those of the usual step
    without clipping and accumulation, bit for bit: both need the gradients of all weights at once.
    """

    def __init__(self) -> None:
        self._norms: dict[nn.Parameter, torch.Tensor] = {}  # of the gradients of this step

    @contextmanager
    def open(self, optimizer: Optimizer) -> Iterator[None]:
        """While open, each backward pass is also a step of `optimizer`.

        Raises (in the backward pass): UserError if a weight gets its gradient in more than one part.
        """
        self._norms.clear()
        group_of = {weight: group for group in optimizer.param_groups for weight in group["params"]}
        # bitsandbytes knows settings of single weights by their places in the groups, so it walks over all of them
        narrows = not type(optimizer).__module__.startswith("bitsandbytes.")

        def update(weight: nn.Parameter) -> None:
            if weight in self._norms:
                raise UserError(
                    f"--optimizer_in_backward: a weight of shape {tuple(weight.shape)} got its gradient in more than one part, as "
                    "with use_reentrant in --activation_checkpointing_kwargs; leave one of them out"
                )
            assert weight.grad is not None
            if (trace := current_trace()) is not None:
                trace.adopt(weight.grad, "gradients")
            self._norms[weight] = torch.linalg.vector_norm(weight.grad)
            with _narrowed(optimizer, group_of[weight], [weight]) if narrows else nullcontext():
                optimizer.step()
            weight.grad = None

        with ExitStack() as hooks:
            for weight in group_of:
                hooks.callback(weight.register_post_accumulate_grad_hook(update).remove)
            yield

    def gradient_norm(self) -> torch.Tensor:
        """The norm over all gradients since the last call: a number, which `clip_grad_norm_` would have returned."""
        norms = list(self._norms.values())
        self._norms.clear()
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def refuse_unless_by_weight(kind: type, name: str) -> None:
    """Raises UserError for an optimizer class whose step `StepInBackward` cannot take one weight at a time; `name` is its --optim."""
    if not kind.__module__.startswith(BY_WEIGHT):
        raise UserError(
            f"--optimizer_in_backward with --optim {name}: its step is one for all weights; give adamw_torch_fused, adamw_bnb_8bit, "
            "paged_adamw_8bit or adafactor, or leave it out"
        )


def step_in_chunks(optimizer: Optimizer, chunk_bytes: int = CHUNK_BYTES) -> None:
    """Limits what the steps of PyTorch's foreach implementations allocate: they update `chunk_bytes` of weights at a time.

    Their temporaries are as large as all weights they update together: AdamW of an 8B model in bf16 needs 15 GiB for them. The
    updates are the same, bit for bit, because each weight's depends on no other. Other optimizers are not changed.
    """
    own = type(optimizer).__module__.startswith("torch.optim.") and "foreach" in optimizer.defaults
    if not own or optimizer.defaults.get("fused"):  # fused implementations have no temporaries
        return

    def step(self: Optimizer, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for weights in _chunks(group["params"], chunk_bytes):
                with _narrowed(self, group, weights):
                    type(self).step(self)
        return loss

    optimizer.step = MethodType(step, optimizer)


@contextmanager
def _narrowed(optimizer: Optimizer, group: dict[str, Any], weights: list[nn.Parameter]) -> Iterator[None]:
    """While open, `optimizer` has only these `weights` of `group`."""
    groups = optimizer.param_groups
    optimizer.param_groups = [group | {"params": weights}]
    try:
        yield
    finally:
        optimizer.param_groups = groups


def _chunks(weights: list[nn.Parameter], chunk_bytes: int) -> Iterator[list[nn.Parameter]]:
    """`weights` in order, in lists of at most `chunk_bytes` on this process, or of one larger weight."""
    chunk: list[nn.Parameter] = []
    held = 0
    for weight in weights:
        nbytes = local(weight).nbytes
        if chunk and held + nbytes > chunk_bytes:
            yield chunk
            chunk, held = [], 0
        chunk.append(weight)
        held += nbytes
    yield chunk
