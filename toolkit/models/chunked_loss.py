"""The loss of a generating model, a chunk of positions at a time, so that the logits of a batch are never in memory at once.

Logits are the largest tensor of a step: a token of Llama 3 has 128,256 of them, which with their fp32 copy and gradients are 1 MiB
and more. Here only positions that have a label meet the output head, N at a time. The gradient of each chunk is computed with its
loss, in the memory of its logits, so that nothing is kept for the backward pass but the gradient of the hidden states, and
nothing is computed twice (the idea of Liger's kernels, Hsu et al. 2024, arXiv:2410.10989; this is plain PyTorch).

What a model does after its head (a softcap, a scale, a bias) is the model's own code: `_Run` runs the forward pass of the model with
hidden states in place of everything before the head. So there is nothing here for one architecture or another.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from types import MethodType
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from toolkit.errors import UserError
from toolkit.models.heads import has_head
from toolkit.models.losses import IGNORE_INDEX
from toolkit.models.soft_prompts import base_model
from toolkit.seams import patched

# Model types whose loss is not the mean cross entropy of each position's next token (GPT-like) or of its own label (T5-like).
OWN_LOSS = {
    "bamba": "it adds a term of all logits",
    "encoder-decoder": "its decoder is a whole model",
    "fsmt": "its decoder computes the logits",
    "prophetnet": "it predicts several tokens at each position",
    "xlm": "it predicts the label of the same position",
    "xlnet": "it predicts the label of the same position",
}
# Decoders of encoder-decoder models, loaded alone: they do not shift their labels
UNSHIFTED = {"bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "cpmant", "marian", "mbart", "mvp", "pegasus"}
UNSHIFTED |= {"plbart", "trocr", "whisper"}
_ACCEPTING: WeakSet[nn.Module] = WeakSet()  # models whose `forward` computes a loss in chunks


def whole_loss_reason(model: nn.Module) -> str:
    """Why the loss of `model` is not computed in chunks, in words; empty if it can be."""
    model = base_model(model)
    config = model.config
    if has_head(config):
        return "a classification head has one row of logits a text"
    if config.model_type in OWN_LOSS:
        return f"the loss of {config.model_type} is its own: {OWN_LOSS[config.model_type]}"
    if config.model_type in UNSHIFTED and not config.is_encoder_decoder:
        return f"the loss of {config.model_type}'s decoder is its own: it does not shift labels"
    if config.is_encoder_decoder and _adds_router_loss(model):
        return f"the loss of {config.model_type} includes that of its routers"
    if model.get_output_embeddings() is None:
        return f"{config.model_type} has no output head that can be found"
    return ""


def _adds_router_loss(model: PreTrainedModel) -> bool:
    return getattr(model.config, "output_router_logits", False)


@dataclass
class LossOutput(ModelOutput):
    """What a model returns for a loss in chunks.

    Args:
        loss: the sum over label tokens divided by `num_items_in_batch`, by default their number in this batch, and what the model
            adds to it; ().
        row_losses: the summed loss of each row, fp32, without gradients; (rows,).
        row_tokens: the number of label tokens of each row; (rows,).
    """

    loss: torch.Tensor | None = None
    row_losses: torch.Tensor | None = None
    row_tokens: torch.Tensor | None = None


def chunks_of(model: nn.Module, tokens: int) -> int:
    """The number of label tokens in a chunk: `tokens`, which `model` then accepts, or 0 if its loss is not computed in chunks."""
    if not tokens or whole_loss_reason(model):
        return 0
    accept_chunks(model)
    return tokens


def accept_chunks(model: nn.Module) -> None:
    """Teaches the `forward` of a model, or of the base model in a PEFT model, the argument `loss_chunk_tokens`.

    With it, the model returns a `LossOutput` instead of logits. Wrappers and engines pass the argument on. Two more go with it:
    `label_smoothing` (see `torch.nn.functional.cross_entropy`) and `num_items_in_batch` (the label tokens to divide by).
    A call without `loss_chunk_tokens` is as before.
    """
    model = base_model(model)
    if model in _ACCEPTING:
        return
    _ACCEPTING.add(model)
    plain = model.forward

    @wraps(plain.__func__)  # PEFT looks for names in its signature
    def forward(self: PreTrainedModel, *args: Any, loss_chunk_tokens: int = 0, **kwargs: Any) -> Any:
        if not loss_chunk_tokens:
            return plain.__func__(self, *args, **kwargs)
        named = dict(zip(inspect.signature(plain).parameters, args, strict=False))
        return _in_chunks(self, plain.__func__, loss_chunk_tokens, **named, **kwargs)

    model.forward = MethodType(forward, model)


def _in_chunks(
    model: PreTrainedModel,
    forward: Callable[..., ModelOutput],
    chunk: int,
    labels: torch.Tensor,
    shift_labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | float | None = None,
    label_smoothing: float = 0.0,
    **inputs: Any,
) -> LossOutput:
    """The loss of a batch. `labels` are (rows, length); so are `shift_labels`, which stand where they are predicted."""
    seq2seq = model.config.is_encoder_decoder
    if shift_labels is None:
        shift_labels = labels if seq2seq else pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
    run = _Run(model, forward, inputs)
    hidden = run.until_head(labels)
    if hidden.shape[:2] != shift_labels.shape:
        raise UserError(
            f"the loss of this {model.config.model_type} model cannot be computed in chunks: it has hidden states of "
            f"{tuple(hidden.shape[:2])} positions for {tuple(shift_labels.shape)} labels; give --loss_chunk_tokens 0"
        )
    is_label = shift_labels.ne(IGNORE_INDEX).to(hidden.device)
    places = is_label.flatten().nonzero().squeeze(1)  # (tokens,)
    targets = shift_labels.to(hidden.device).flatten()[places]
    items = (len(places) or math.nan) if num_items_in_batch is None else num_items_in_batch

    def at_head(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        compute = _recomputed_losses if _computes_in_fp16(hidden) else _token_losses
        loss, each = compute(run.logits, hidden, targets, chunk, label_smoothing, items)
        if _adds_router_loss(model):
            loss = loss + run.added_loss(hidden) * (len(places) / items)
        return loss, each

    # The head is called once, so that an engine gathers its weights once, and passes their gradients on once.
    with patched("an output head's forward", at_head, owner=run.head):
        loss, each = run.head(hidden.flatten(0, 1).index_select(0, places))
    rows = each.new_zeros(len(labels)).index_add(0, places // labels.shape[1], each)
    return LossOutput(loss=loss, row_losses=rows, row_tokens=is_label.sum(1))


class _Run:
    """One forward pass of a model whose parts run once: run again, each part returns what it has returned before.

    So the model's own code computes the logits of any hidden states, whatever it does between its last part and its logits.
    """

    head: nn.Module  # the part with the output embedding, once `until_head` has come to it

    def __init__(self, model: PreTrainedModel, forward: Callable[..., ModelOutput], inputs: dict[str, Any]) -> None:
        self.forward, self.inputs = forward, inputs
        self.calls = _Calls(model.get_output_embeddings())
        # The same model, with stand-ins for its parts; nothing of the real one is touched. No part refers to this object: a cycle
        # would keep the graph of the step alive until Python's next collection.
        self.model = object.__new__(type(model))
        parts = {name: part and _Part(part, self.calls) for name, part in model.__dict__["_modules"].items()}
        self.model.__dict__.update(model.__dict__, _modules=parts)

    def until_head(self, labels: torch.Tensor) -> torch.Tensor:
        """Runs the parts before the output head; returns the hidden states (rows, length, width) of the last one.

        T5-like models make the inputs of their decoder from `labels`.

        Raises: UserError for a model that does not call its head after another part.
        """
        with suppress(_AtHead):
            self.forward(self.model, labels=labels, **self.inputs)
        if self.calls.head is None or not self.calls.returned:
            raise UserError(
                f"the loss of this {self.model.config.model_type} model cannot be computed in chunks: it does not call its output "
                "head after its decoder; give --loss_chunk_tokens 0"
            )
        self.head, self.calls.head_forward = self.calls.head, self.calls.head.forward
        output = self.calls.returned[self.calls.last]
        return output if isinstance(output, torch.Tensor) else output[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits (tokens, vocabulary) of `hidden` (tokens, width)."""
        options = {"output_router_logits": False} if _adds_router_loss(self.model) else {}
        return self._continued(hidden, **options).logits.squeeze(0)

    def added_loss(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the model adds to the cross entropy, such as the loss of its routers: its own loss of no position at all."""
        nothing = torch.empty(1, 0, dtype=torch.long, device=hidden.device)
        return self._continued(hidden[:0], labels=nothing, num_items_in_batch=1).loss

    def _continued(self, hidden: torch.Tensor, **options: Any) -> ModelOutput:
        """The rest of the forward pass, with `hidden` (tokens, width) from the last part."""
        returned, last = self.calls.returned, self.calls.last
        before = returned[last]
        returned[last] = _with_first(before, hidden.unsqueeze(0))
        try:
            return self.forward(self.model, **self.inputs | options)
        finally:
            returned[last] = before


class _Calls:
    """What the parts of a model return: each runs once. The first call of the part with `embedding`, the head, ends the run."""

    def __init__(self, embedding: nn.Module) -> None:
        self.embedding = embedding
        self.returned: dict[nn.Module, Any] = {}  # in the order of calls
        self.head: nn.Module | None = None
        self.head_forward: Callable[..., torch.Tensor] | None = None  # if the head is to run, this runs

    @property
    def last(self) -> nn.Module:
        """The part before the head."""
        return next(reversed(self.returned))

    def __call__(self, part: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What `part` returns. Raises: _AtHead at the first call of the head."""
        if part in self.returned:
            return self.returned[part]
        if any(one is self.embedding for one in part.modules()):
            if self.head_forward is None:
                self.head = part
                raise _AtHead
            return self.head_forward(*args, **kwargs)
        self.returned[part] = part(*args, **kwargs)
        return self.returned[part]


class _AtHead(Exception):
    """The forward pass has come to the output head."""


class _Part:
    """Stands for a part of a model in a `_Run`, with its attributes."""

    def __init__(self, part: nn.Module, calls: _Calls) -> None:
        self._part, self._calls = part, calls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._calls(self._part, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._part, name)
        return _Part(value, self._calls) if isinstance(value, nn.Module) else value


def _with_first(output: Any, hidden: torch.Tensor) -> Any:
    """A part's output with `hidden` as its first tensor."""
    if isinstance(output, torch.Tensor):
        return hidden
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    changed = copy.copy(output)
    changed[next(iter(output))] = hidden
    return changed


def _token_losses(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    targets: torch.Tensor,
    chunk: int,
    smoothing: float,
    items: torch.Tensor | float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the losses divided by `items`, (), with gradients, and the loss of each token, (tokens,), without; both fp32.

    Args:
        logits_of: from hidden states (n, width) to logits (n, vocabulary).
        hidden: (tokens, width).
        targets: (tokens,).
    """
    each: list[torch.Tensor] = []
    leaves: list[torch.Tensor] = []  # trained weights of the head
    sums: list[torch.Tensor] = []  # their gradients, in fp32 while there are more chunks to come
    of_hidden = torch.empty_like(hidden) if torch.is_grad_enabled() and hidden.requires_grad else None
    for start in range(0, max(len(targets), 1), chunk):
        part = hidden[start : start + chunk].detach().requires_grad_(of_hidden is not None)
        logits = logits_of(part)
        # taken now, because the graph of a view changes when its memory is changed
        edge = get_gradient_edge(logits) if logits.requires_grad else None
        losses, gradient = _loss_and_gradient(logits.detach(), targets[start : start + chunk], smoothing)
        each.append(losses)
        if edge is None:
            continue
        gradient *= 1 / items
        if not sums:
            leaves = [leaf for leaf in _leaves(edge.node) if leaf is not part]
        wanted = [*leaves, part] if of_hidden is not None else leaves
        found = list(torch.autograd.grad(edge, wanted, gradient.to(logits.dtype)))
        del logits, gradient
        if of_hidden is not None:
            of_hidden[start : start + chunk] = found.pop()
        if len(targets) > chunk:
            found = [one.float() for one in found]
        sums = [total.add_(one) for total, one in zip(sums, found, strict=True)] if sums else found
    loss = torch.cat(each).sum() / items
    gradients = [total.to(leaf.dtype) for total, leaf in zip(sums, leaves, strict=True)]
    inputs = [*leaves]
    if of_hidden is not None:
        gradients, inputs = [*gradients, of_hidden], [*inputs, hidden]
    if inputs:
        loss = _WithGradients.apply(loss, gradients, *inputs)
    return loss, torch.cat(each)


def _computes_in_fp16(hidden: torch.Tensor) -> bool:
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return dtype == torch.float16


def _recomputed_losses(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    targets: torch.Tensor,
    chunk: int,
    smoothing: float,
    items: torch.Tensor | float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_token_losses` for fp16: each chunk is recomputed in the backward pass, where the gradient scaler's factor is known.

    Gradients in fp16 that did not have this factor would vanish or overflow, and no later factor would mend that.
    """

    def losses(part: torch.Tensor, of_part: torch.Tensor) -> torch.Tensor:
        return cross_entropy(logits_of(part).float(), of_part, reduction="none", label_smoothing=smoothing)

    parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    each = torch.cat([checkpoint(losses, *part, use_reentrant=False) for part in parts])
    return each.sum() / items, each.detach()


def _loss_and_gradient(
    logits: torch.Tensor, targets: torch.Tensor, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each row (n,), and the gradient of their sum (n, vocabulary), fp32, in the memory of fp32 `logits`."""
    scores = logits.float()
    scores -= scores.amax(1, keepdim=True)
    of_target = scores.gather(1, targets.unsqueeze(1))
    wanted = of_target.squeeze(1)
    if smoothing:
        wanted = (1 - smoothing) * wanted + smoothing * scores.mean(1)
    sums = scores.exp_().sum(1, keepdim=True)
    losses = sums.log().squeeze(1) - wanted
    scores /= sums
    if smoothing:
        scores -= smoothing / scores.shape[1]
    at_target = scores.gather(1, targets.unsqueeze(1)) - (1 - smoothing)
    return losses, scores.scatter_(1, targets.unsqueeze(1), at_target)


def _leaves(last: Node) -> Iterator[torch.Tensor]:
    """The leaves that require gradients in the graph that ends with the node `last`, each once."""
    seen, nodes = set(), [last]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::AccumulateGrad":  # seam "AccumulateGrad.variable"
            yield node.variable
        nodes += [following for following, _ in node.next_functions]


class _WithGradients(torch.autograd.Function):
    """A value whose gradients are already known: `gradients`, one for each of `inputs`."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, gradients: list[torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # they are used once, and changed in place
        return None, None, *(one.mul_(gradient) for one in gradients)
