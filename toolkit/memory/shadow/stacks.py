"""Which layers of a model repeat: stacks of equal layers, or of equal groups of layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

LONGEST_GROUP = 8  # layers that are repeated together


class CannotFold(Exception):
    """Layers are coupled in a way that only the whole model shows."""


class TemplatesDiffer(CannotFold):
    """The layers that should stand for others do not behave alike; those farther from the ends of their list may."""


@dataclass(frozen=True)
class Stack:
    """Equal layers of one list: from `first`, two templates of `period` layers each, then stand-ins until `last`."""

    path: str  # of the list
    layers: Sequence[nn.Module]
    first: int
    period: int
    last: int

    @property
    def templates(self) -> range:
        """The layers whose events the stand-ins get: those of the second template."""
        return range(self.first + self.period, self.first + 2 * self.period)

    @property
    def stand_ins(self) -> range:
        return range(self.first + 2 * self.period, self.last)

    def template_of(self, layer: int) -> int:
        """The layer of the second template that a layer from `first` to `last` is like."""
        return self.first + self.period + (layer - self.first) % self.period

    def is_template(self, layer: int) -> bool:
        """Whether a layer belongs to one of both templates."""
        return self.first <= layer < self.first + 2 * self.period

    def is_stand_in(self, layer: int) -> bool:
        return self.first + 2 * self.period <= layer < self.last

    def steps(self, one: int, other: int) -> int:
        """How many layers lie from `one` to `other`, stand-ins left out."""
        places = [i if i < self.last else i - len(self.stand_ins) for i in (one, other)]
        return places[1] - places[0]

    def gap_between(self, one: int, other: int) -> bool:
        """Whether the stand-ins lie between two other layers."""
        return (one < self.last) != (other < self.last)


def find_stacks(model: nn.Module, margin: int = 0, every: int = 1) -> list[Stack]:
    """The lists of layers in `model` of which some can be stood in for.

    The first group and the last layer of a run of equal ones stay beside the templates, with `margin` more layers at each end:
    what comes before and after them is not a layer like themselves. The number of layers in a group is a multiple of `every`.
    """
    stacks: list[Stack] = []
    lists: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not path.startswith(tuple(f"{outer}." for outer in lists)):
            lists.append(path)  # a list inside a layer, such as its experts, is no stack
            by_layer = _values_by_layer(model, path, len(module))
            kinds = [(kind, *(values[i] for values in by_layer)) for i, kind in enumerate(_kinds(list(module)))]
            if (run := _longest_run(kinds, margin, every)) is not None:
                stacks.append(Stack(path, list(module), *run))
    return stacks


def _longest_run(kinds: list[Any], margin: int, every: int) -> tuple[int, int, int] | None:
    """`(first, period, last)` of the run of equal groups that leaves the fewest layers to run; None without one."""
    best, most = None, 0
    for period in range(every, LONGEST_GROUP + 1, every):
        start = 0
        while start < len(kinds):
            end = start + period
            while end < len(kinds) and kinds[end] == kinds[end - period]:
                end += 1
            first = start + period + margin
            stand_ins = (end - 1 - margin - first - 2 * period) // period * period
            if stand_ins > most:
                best, most = (first, period, first + 2 * period + stand_ins), stand_ins
            start = max(start + 1, end - period + 1)
    return best


def _values_by_layer(model: nn.Module, path: str, length: int) -> list[list[Any]]:
    """The lists in the config of a stack's owner that have one item a layer, such as `layer_types`."""
    config = getattr(model.get_submodule(path.rpartition(".")[0]), "config", None)
    values = [] if config is None else vars(config).values()
    return [value for value in values if isinstance(value, list) and len(value) == length]


def _kinds(layers: list[nn.Module]) -> list[Any]:
    """For each layer, what must be equal for its events to be: its modules with their weights and plain attributes.

    Numbers that count layers, such as `layer_idx`, are left out. So a forward pass that depends on such a number itself, and not on
    what was made of it in the constructor, is not seen here; no model of transformers is known to have one.
    """
    described = [_described(layer) for layer in layers]
    counting = {
        name
        for name, value in (described[0].items() if described else ())
        if type(value) is int and all(one.get(name) == value + i for i, one in enumerate(described))
    }
    return [frozenset((name, value) for name, value in one.items() if name not in counting) for one in described]


_NOT_PLAIN = object()


def _plain(value: Any) -> Any:
    """A number, a text, a dtype or None, or a nested collection of them as tuples; otherwise `_NOT_PLAIN`."""
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return value
    if isinstance(value, dict):
        value = tuple(value.items())
    if not isinstance(value, list | tuple):
        return _NOT_PLAIN
    parts = tuple(map(_plain, value))
    return _NOT_PLAIN if any(part is _NOT_PLAIN for part in parts) else parts


def _described(layer: nn.Module) -> dict[tuple[str, str], Any]:
    found: dict[tuple[str, str], Any] = {}
    for path, module in layer.named_modules():
        found[path, ""] = type(module)
        for name, value in vars(module).items():
            if not name.startswith("_") and (plain := _plain(value)) is not _NOT_PLAIN:
                found[path, name] = plain
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found[path, name] = type(parameter), parameter.shape, parameter.dtype, parameter.requires_grad
        for name, buffer in module._buffers.items():
            if buffer is not None:
                found[path, name] = buffer.shape, buffer.dtype
    return found
