"""Layers that repeat are run once: a shadow step of 80 equal layers runs 4 of them and lays the events of 80 end to end.

    fold = Fold(model)                    # the layers in the middle become stand-ins
    trace = fold.trace(meter, recording, overlay=overlay)
    ...                                   # the shadow step
    fold.unfold()                         # the sinks receive the events of all layers

In a run of equal layers (`stacks.Stack`) the first one, two *templates* and the last one stay as they are; where sliding and full
attention alternate, a template is a group of layers. Those between become *stand-ins*. They keep their weights, so that loading, the
optimizer and the norm of the gradients see all of them; but their forward pass returns its input, and their backward pass only gives
their weights a gradient. While the step runs, events are kept with the layer in which they happen. Afterwards each stand-in gets those of
its template (`unfolding`), and the allocator receives the events of a whole run. So peaks are exact, not extrapolated.

Where layers are coupled in a way that this does not see, `CannotFold` is raised, and the whole model has to run.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, EncoderDecoderCache

from toolkit.memory import meta_ops
from toolkit.memory.shadow.stacks import CannotFold, find_stacks
from toolkit.memory.shadow.unfolding import Item, Kind, Layer, Unfolding
from toolkit.memory.trace import Allocation, Overlay, Sink, Trace

MARGINS = (0, 1)  # of `find_stacks`, tried in turn
IN_STEPS = ("forward", "backward")  # phases in which nothing but the model loops over its layers
WHOLE = ("load", "optimizer_step")  # phases in which no layer runs, so that their events are those of the whole model


class Fold:
    """The stand-ins of a model, and the events of its step. It is false if there are no stand-ins.

    `margin` and `every` are those of `find_stacks`.
    """

    def __init__(self, model: nn.Module, margin: int = 0, every: int = 1):
        self.stacks = find_stacks(model, margin, every)
        self._owners = [stack.path.rpartition(".")[0] for stack in self.stacks]
        self._paths = {
            f"{stack.path}.{i}": (number, i)
            for number, stack in enumerate(self.stacks)
            for i in range(len(stack.layers))
        }
        self._layer_of_module: dict[str, Layer | None] = {}
        self._layer_of_block: dict[int, Layer] = {}  # by the id of a block that was born in a layer
        self._last: Layer | None = None  # the layer that ran last in this phase
        self._loop: Layer | None = None  # the template whose block the current operator reads, outside of layers
        self._beside_hidden: dict[Layer, Any] = {}  # what a template returned beside its first output
        self._gradients: dict[int, int] = {}  # the place of a template's weight, by the id of its gradient's block
        self._items: list[Item] = []
        for number, stack in enumerate(self.stacks):
            for i in stack.templates:
                stack.layers[i].register_forward_hook(partial(self._remember_output, (number, i)), with_kwargs=True)
            for i in stack.stand_ins:
                stack.layers[i].forward = partial(self._pass_on, (number, i))

    def __bool__(self) -> bool:
        return bool(self.stacks)

    def trace(self, *sinks: Sink, overlay: Overlay | None) -> Trace:
        """A trace whose events reach `sinks` when `unfold` is called; those of loading, at once."""
        self._sinks = sinks
        self._trace = Trace(self, overlay=overlay)
        self._trace.on_operator = self._before_operator
        return self._trace

    def unfold(self) -> None:
        """Sends the events of all layers to the sinks. Raises: CannotFold if those of a stand-in are not known."""
        Unfolding(self.stacks, self._items, self._gradients, self._sinks).run()

    # ---- the trace's sink

    def born(self, block: Allocation) -> None:
        if self._trace.phase == "load":
            for sink in self._sinks:
                sink.born(block)
            return
        where = self._where()
        if where is not None:
            self._layer_of_block[id(block)] = where
        self._keep(Kind.BORN, block, where)

    def died(self, block: Allocation) -> None:
        if self._trace.phase == "load":
            for sink in self._sinks:
                sink.died(block)
        else:
            where = self._where()
            if where is not None and where == self._loop != self._layer_of_block.get(id(block)):
                self._loop = where = None  # what the loop does not touch ends after it
            self._keep(Kind.DIED, block, where)

    def entered(self, phase: str, step: int) -> None:
        self._last = self._loop = None
        self._keep(Kind.PHASE, (phase, step), None)

    def _keep(self, kind: Kind, what: Any, where: Layer | None) -> None:
        self._items.append(Item(kind, what, where, where is not None and where == self._loop))

    # ---- where an event happens

    def _where(self) -> Layer | None:
        """The layer to which the current operator belongs; None outside of layers.

        What the owner of a list does after a layer belongs to that layer, and so does what reads a template's block elsewhere: a loop
        over the layers of a cache.
        """
        if self._trace.phase in WHOLE:
            return None
        layer = self._running()
        return self._loop if layer is None else layer

    def _running(self) -> Layer | None:
        module = self._trace.module
        if module not in self._layer_of_module:
            found = [layer for path, layer in self._paths.items() if f"{module}.".startswith(f"{path}.")]
            self._layer_of_module[module] = found[0] if found else None
        layer = self._layer_of_module[module]
        if layer is not None:
            self._last, self._loop = layer, None
        elif self._last is not None and module == self._owners[self._last[0]]:
            return self._last
        return layer

    def _before_operator(self, read: list[Allocation]) -> None:
        """Raises `CannotFold` for an operator that reads the blocks of templates together with those of layers that are not beside them."""
        self._loop = None
        if self._trace.phase in WHOLE or self._trace.op == "aten::detach":
            return
        where = self._running()
        if where is not None and self.stacks[where[0]].is_stand_in(where[1]):
            return
        layers = {self._layer_of_block[id(block)] for block in read if id(block) in self._layer_of_block}
        templates = {layer for layer in layers if self.stacks[layer[0]].is_template(layer[1])}
        if where is None and len(templates) == 1 and self._trace.phase not in IN_STEPS:
            (self._loop,) = templates
        elif any(
            where is None or where[0] != number or abs(self.stacks[number].steps(where[1], i)) > 1
            for number, i in templates
        ):
            raise CannotFold(f"{self._trace.op} of {self._trace.module or 'the model'} reads what layers made")

    # ---- stand-ins

    def _remember_output(
        self, layer: Layer, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> None:
        """Keeps what a template returned beside its first output: the names of arguments that it passed on, or weak references."""
        hidden, given_hidden = output[0] if isinstance(output, tuple) else output, _hidden(args, kwargs)
        if (hidden.shape, hidden.dtype) != (given_hidden.shape, given_hidden.dtype):
            raise CannotFold(f"{type(module).__name__} returns another shape than it is given")
        if not isinstance(output, tuple):
            self._beside_hidden[layer] = None
            return
        given = _by_name(args, kwargs)
        kept: list[Callable[[dict[Any, Any]], Any]] = []
        for item in output[1:]:
            name = next((name for name, value in given.items() if value is item), None)
            if item is None or name is not None:
                kept.append(operator.methodcaller("get", name))
            elif isinstance(item, torch.Tensor):
                kept.append(partial(_referred, weakref.ref(item)))
            else:
                raise CannotFold(f"{type(module).__name__} returns a {type(item).__name__}")
        self._beside_hidden[layer] = kept

    def _pass_on(self, layer: Layer, /, *args: Any, **kwargs: Any) -> Any:
        """The output of a stand-in: its input, and what its template returned beside it."""
        number, i = layer
        template = number, self.stacks[number].template_of(i)
        given = _by_name(args, kwargs)
        if template not in self._beside_hidden or any(_is_filled(value, i) for value in given.values()):
            raise CannotFold("a layer's output depends on a cache that was filled before")
        hidden = _hidden(args, kwargs)
        block = self._trace.block_of(hidden)
        if self._layer_of_block.get(id(block)) != (number, self.stacks[number].templates[-1]):
            raise CannotFold(
                f"the input of a layer of {self.stacks[number].path} is not the output of the layer before"
            )
        self._keep(Kind.STOOD_IN, None, layer)
        passed = _Passed.apply(hidden, partial(self._pass_back, layer)) if hidden.requires_grad else hidden
        beside = self._beside_hidden[template]
        return passed if beside is None else (passed, *(one(given) for one in beside))

    def _pass_back(self, layer: Layer) -> None:
        """The backward pass of a stand-in: each weight that trains and has no gradient gets one."""
        self._keep(Kind.STOOD_IN, None, layer)
        for place, weight in enumerate(_trained(self.stacks[layer[0]].layers[layer[1]])):
            if weight._post_accumulate_grad_hooks:
                raise CannotFold("weights are updated in the backward pass")
            if weight.grad is None:
                meta = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device="meta")
                weight.grad = meta_ops.fake(weight.fake_mode, meta)
                block = self._trace.track(weight.grad, "gradients")
                born = self._items.pop()
                assert born.what is block
                self._keep(Kind.GRADIENT, (block, place), layer)

    def remember_gradients(self) -> None:
        """Keeps which blocks are the gradients of the templates' weights. Call it when they exist, in each step."""
        for stack in self.stacks:
            for i in stack.templates:
                for place, weight in enumerate(_trained(stack.layers[i])):
                    block = None if weight.grad is None else self._trace.block_of(weight.grad)
                    if block is None:
                        raise CannotFold(f"a weight of {stack.path}.{i} gets no gradient")
                    self._gradients[id(block)] = place


class _Passed(torch.autograd.Function):
    """The identity, which calls a function in the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, pass_back: Callable[[], None]) -> torch.Tensor:
        ctx.pass_back = pass_back
        return hidden

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.pass_back()
        return grad, None


def _hidden(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states among a layer's arguments."""
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, torch.Tensor):
        raise CannotFold("a layer is not given hidden states")
    return hidden


def _by_name(args: tuple, kwargs: dict[str, Any]) -> dict[Any, Any]:
    """The arguments of a call by place or name."""
    return dict(enumerate(args)) | kwargs


def _referred(reference: Callable[[], Any], given: dict[Any, Any]) -> Any:
    return reference()


def _is_filled(value: Any, layer: int) -> bool:
    """Whether `value` is a cache that has keys of a layer which never ran, as a prefix's has."""
    if isinstance(value, EncoderDecoderCache):
        value = value.self_attention_cache
    layers = value.layers if isinstance(value, Cache) else ()
    return layer < len(layers) and getattr(layers[layer], "keys", None) is not None


def _trained(layer: nn.Module) -> list[Any]:
    return [weight for weight in layer.parameters() if weight.requires_grad]
