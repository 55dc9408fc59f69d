"""The events of a whole model, made of those of a folded step (`folding`): each stand-in gets the events of its template.

Both templates must have had the same events: blocks of the same sizes, from the same operators of the same modules, that end at the same
points. A block is named by the phase, its operator and module, its size, and its number among those alike in its layer. So "the layer
before ends its second `mul` of 8,192 bytes here" is said in the same words for each layer, and can be carried out for a stand-in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import groupby
from typing import Any, NamedTuple

from toolkit.memory.shadow.stacks import Stack, TemplatesDiffer
from toolkit.memory.trace import Allocation, Sink

Layer = tuple[int, int]  # the number of the stack, and the layer's place in it
Name = tuple[int, str, str, int, int]  # of a block in a layer: phase, module, operator, bytes, number among those alike


class Kind(Enum):
    """What happened."""

    BORN = auto()  # a block
    DIED = auto()  # a block
    PHASE = auto()  # (phase, step) begins
    STOOD_IN = auto()  # a stand-in ran
    GRADIENT = auto()  # (block, place of the weight): a stand-in gave a weight its gradient


class Item(NamedTuple):
    """An event of a folded step."""

    kind: Kind
    what: Any
    where: Layer | None  # None: outside of layers
    in_loop: bool  # over the layers of something else than the model, where stand-ins do not run


@dataclass
class Stretch:
    """Events that follow one another in the same place."""

    where: Layer | None
    in_loop: bool
    items: list[Item]


@dataclass
class Phase:
    """The events between two beginnings of a phase."""

    name: str
    step: int
    stretches: list[Stretch]
    visits: dict[Layer, list[Stretch]] = field(default_factory=dict)  # the stretches of each layer, in order
    in_words: dict[tuple[Layer, int], list[Event]] = field(default_factory=dict)  # see `Unfolding._events`


class Event(NamedTuple):
    """An event of a template, such that it can be carried out for its stand-ins."""

    steps: int  # from the template to the layer of the block
    name: Name
    block: Allocation | None  # that is born; None: the block dies
    inside: str | None  # the path of its module within the layer; None: another module
    place: int | None  # of the weight whose gradient it is


class Unfolding:
    """Sends the events of all layers to `sinks`.

    Args:
        items: the events of the folded step, from the first phase after loading.
        gradients: the place of a weight among those of its layer that train, by the id of its gradient's block, for templates.
    """

    def __init__(self, stacks: Sequence[Stack], items: list[Item], gradients: dict[int, int], sinks: Sequence[Sink]):
        self.stacks, self.gradients, self.sinks = stacks, gradients, sinks
        self.phases = list(_phases(items))
        self.names: dict[int, tuple[Layer, Name]] = {}  # of blocks that were born in layers, by their ids
        self.alive: dict[tuple[Layer, Name], Allocation] = {}

    def run(self) -> None:
        """Raises: TemplatesDiffer if templates differ, or if it is not known where a stand-in's block ends."""
        for number, phase in enumerate(self.phases):
            self._name_blocks(number, phase)
        for phase in self.phases:
            self._check_templates(phase)
            for sink in self.sinks:
                sink.entered(phase.name, phase.step)
            visits: Counter[Layer] = Counter()
            for stretch in phase.stretches:
                where = stretch.where
                if where is None:
                    self._outside(stretch.items)
                    continue
                number, i = where
                stack = self.stacks[number]
                if stack.is_stand_in(i):  # its n-th run is like the n-th of its template, loops left out
                    of_template = phase.visits[number, stack.template_of(i)]
                    runs = [visit for visit, one in enumerate(of_template) if not one.in_loop]
                    self._stand_in(phase, where, runs[visits[where]], stretch.items)
                else:
                    self._inside(where, stretch.items)
                if stretch.in_loop and i == stack.templates[-1]:
                    for stand_in in stack.stand_ins:  # the loop goes on with those, which are not in it
                        self._stand_in(phase, (number, stand_in), visits[where], [])
                visits[where] += 1
        self._check_ends()

    # ---- names

    def _name_blocks(self, number: int, phase: Phase) -> None:
        seen: Counter[Any] = Counter()
        for stretch in phase.stretches:
            where = stretch.where
            if where is None:
                continue
            phase.visits.setdefault(where, []).append(stretch)
            path = f"{self.stacks[where[0]].path}.{where[1]}"
            for item in stretch.items:
                if item.kind is Kind.BORN:
                    block = item.what
                    alike = (number, block.module.removeprefix(path), block.op, block.nbytes)
                    self.names[id(block)] = where, (*alike, seen[where, alike])
                    seen[where, alike] += 1

    def _events(self, phase: Phase, template: Layer, visit: int) -> list[Event]:
        """The events of a template in its stretch of that number."""
        if (template, visit) not in phase.in_words:
            stack = self.stacks[template[0]]
            path = f"{stack.path}.{template[1]}"
            events = []
            for item in phase.visits[template][visit].items:
                block: Allocation = item.what
                layer, name = self.names[id(block)]
                steps = stack.steps(template[1], layer[1])
                if item.kind is Kind.BORN:
                    is_inside = f"{block.module}.".startswith(f"{path}.")
                    inside = block.module.removeprefix(path) if is_inside else None
                    events.append(Event(steps, name, block, inside, self.gradients.get(id(block))))
                else:
                    events.append(Event(steps, name, None, None, None))
            phase.in_words[template, visit] = events
        return phase.in_words[template, visit]

    # ---- checks

    def _check_templates(self, phase: Phase) -> None:
        """Raises TemplatesDiffer unless both templates had the same events, and each stand-in ran as often as its template."""
        for number, stack in enumerate(self.stacks):
            for i in stack.templates:
                before, template = (number, i - stack.period), (number, i)
                stretches = phase.visits.get(template, [])
                if self._described(before, phase.visits.get(before, [])) != self._described(template, stretches):
                    raise TemplatesDiffer(
                        f"layers {before[1]} and {i} of {stack.path} differ in the phase {phase.name} of step {phase.step}"
                    )
                runs = sum(not stretch.in_loop for stretch in stretches)
                for stand_in in stack.stand_ins:
                    if stack.template_of(stand_in) == i and len(phase.visits.get((number, stand_in), [])) != runs:
                        raise TemplatesDiffer(f"layer {stand_in} of {stack.path} does not run as often as layer {i}")

    def _described(self, where: Layer, stretches: list[Stretch]) -> list[Any]:
        """The events of a layer in words that are the same for equal layers. Blocks that end together do so in any order."""
        described: list[Any] = []
        for stretch in stretches:
            described.append(stretch.in_loop)
            for is_birth, group in groupby(stretch.items, key=lambda item: item.kind is Kind.BORN):
                if is_birth:
                    described += [self._birth_in_words(item.what) for item in group]
                else:
                    described.append(frozenset(self._death_in_words(where, item.what) for item in group))
        return described

    def _birth_in_words(self, block: Allocation) -> Any:
        kept = block.died_in_segment != block.segment
        name = self.names[id(block)][1]
        return name, block.category, block.builds_graph, block.at_head, block.offloaded, block.pinned, kept

    def _death_in_words(self, where: Layer, block: Allocation) -> Any:
        layer, name = self.names.get(id(block), (None, None))
        if layer is None or layer[0] != where[0]:
            return id(block)  # no two layers end the same block, so this is equal to nothing
        return self.stacks[where[0]].steps(where[1], layer[1]), name

    def _check_ends(self) -> None:
        """Raises TemplatesDiffer unless each block that is still alive is so in all layers of its kind."""
        found: Counter[Any] = Counter()
        for (number, i), name in self.alive:
            stack = self.stacks[number]
            if stack.first <= i < stack.last:
                found[number, stack.template_of(i), name] += 1
        for (number, _, _), count in found.items():
            stack = self.stacks[number]
            if count != (stack.last - stack.first) // stack.period:
                raise TemplatesDiffer(f"a block ends in some layers of {stack.path} only")

    # ---- events

    def _birth(self, block: Allocation) -> None:
        if (name := self.names.get(id(block))) is not None:
            self.alive[name] = block
        for sink in self.sinks:
            sink.born(block)

    def _death(self, layer: Layer, name: Name) -> None:
        block = self.alive.pop((layer, name), None)
        if block is None:
            raise TemplatesDiffer(f"layer {layer[1]} of {self.stacks[layer[0]].path} has no block of {name[2]} to end")
        self._send_death(block)

    def _send_death(self, block: Allocation) -> None:
        for sink in self.sinks:
            sink.died(block)

    def _inside(self, where: Layer, items: list[Item]) -> None:
        """The events of a layer that ran. A block of the layer beside it, on the other side of the stand-ins, is the nearest stand-in's."""
        for item in items:
            if item.kind is Kind.BORN:
                self._birth(item.what)
                continue
            found = self.names.get(id(item.what))
            if found is None:
                self._send_death(item.what)
                continue
            (number, i), name = found
            stack = self.stacks[number]
            if number == where[0] and stack.gap_between(i, where[1]):
                steps = stack.steps(where[1], i)
                if abs(steps) == 1:
                    i = where[1] + steps
                elif stack.is_template(i):
                    raise TemplatesDiffer(f"layer {where[1]} of {stack.path} ends a block of layer {i}")
            self._death((number, i), name)

    def _stand_in(self, phase: Phase, where: Layer, visit: int, items: list[Item]) -> None:
        """A stand-in gets its template's events. The gradients that it made itself take the place of the template's."""
        number, i = where
        stack = self.stacks[number]
        if any(item.kind in (Kind.BORN, Kind.DIED) for item in items):
            raise TemplatesDiffer(f"layer {i} of {stack.path} makes or ends a block, though it does not run")
        made: dict[int | None, Allocation] = {
            item.what[1]: item.what[0] for item in items if item.kind is Kind.GRADIENT
        }
        for event in self._events(phase, (number, stack.template_of(i)), visit):
            if event.block is None:
                self._death((number, i + event.steps), event.name)
                continue
            block = made.pop(event.place, None)
            if block is None:
                block = event.block.copy()
            elif block.nbytes == event.block.nbytes:
                self.names[id(block)] = where, event.name
                block.op = event.block.op
            else:
                raise TemplatesDiffer(f"a gradient of {stack.path}.{i} has another size than its weight")
            block.module = event.block.module if event.inside is None else f"{stack.path}.{i}{event.inside}"
            self.alive[where, event.name] = block
            for sink in self.sinks:
                sink.born(block)
        if made:
            raise TemplatesDiffer(f"a gradient of {stack.path}.{i} appears at another point than its template's")

    def _outside(self, items: list[Item]) -> None:
        """Events outside of layers. Where the blocks of both templates end together, those of the stand-ins do so too."""
        for is_birth, group in groupby(items, key=lambda item: item.kind is Kind.BORN):
            if is_birth:
                for item in group:
                    self._birth(item.what)
                continue
            ended: Counter[tuple[Layer, Name]] = Counter()
            for item in group:
                found = self.names.get(id(item.what))
                if found is None:
                    self._send_death(item.what)
                    continue
                (number, i), name = found
                self._death((number, i), name)
                if self.stacks[number].is_template(i):
                    ended[(number, self.stacks[number].template_of(i)), name] += 1
            for ((number, template), name), count in ended.items():
                stack = self.stacks[number]
                if count != 2:
                    raise TemplatesDiffer(f"a block of {stack.path} ends in one layer only")
                for i in stack.stand_ins:
                    block = self.alive.get(((number, i), name))
                    if stack.template_of(i) == template and block is not None and id(block) not in self.names:
                        self._death((number, i), name)  # gradients have names: their own ends are among the events


def _phases(items: list[Item]) -> Iterator[Phase]:
    phase: Phase | None = None
    for item in items:
        if item.kind is Kind.PHASE:
            if phase is not None:
                yield phase
            name, step = item.what
            phase = Phase(name, step, [])
            continue
        assert phase is not None, "events begin with a phase"
        last = phase.stretches[-1] if phase.stretches else None
        if last is None or (last.where, last.in_loop) != (item.where, item.in_loop):
            phase.stretches.append(last := Stretch(item.where, item.in_loop, []))
        last.items.append(item)
    if phase is not None:
        yield phase
