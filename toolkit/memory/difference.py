"""The difference of two breakdowns of memory, in bytes by category and module: data, which `explain` puts into sentences."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Bytes = Mapping[str, Mapping[str, int]]  # category -> module -> bytes


@dataclass(frozen=True)
class Part:
    """One category: its bytes before and after, and how many more each module has after (fewer: negative).

    `modules` holds those that differ, by their folded name in the model without PEFT's wrapper, the largest change first.
    """

    category: str
    before_bytes: int
    after_bytes: int
    modules: Mapping[str, int]

    @property
    def change_bytes(self) -> int:
        """Bytes more after than before; the sum of `modules`."""
        return self.after_bytes - self.before_bytes


@dataclass(frozen=True)
class Difference:
    """The categories that differ, the largest change first."""

    parts: tuple[Part, ...]

    @classmethod
    def of(cls, before: Bytes, after: Bytes) -> Difference:
        """The difference of two breakdowns; what is in neither part of it is the same in both."""
        before, after = _unwrapped(before), _unwrapped(after)
        parts = []
        for category in {**before, **after}:
            first, second = before.get(category, {}), after.get(category, {})
            changes = {module: second.get(module, 0) - first.get(module, 0) for module in {**first, **second}}
            modules = {module: changes[module] for module in sorted(changes, key=lambda one: -abs(changes[one]))}
            modules = {module: change for module, change in modules.items() if change}
            if modules:
                parts.append(Part(category, sum(first.values()), sum(second.values()), modules))
        return cls(tuple(sorted(parts, key=lambda part: -abs(part.change_bytes))))

    @property
    def change_bytes(self) -> int:
        """Bytes more after than before, of all parts together."""
        return sum(part.change_bytes for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        """A plain object: the change of all bytes, and for each part its bytes and the changes of its modules."""
        parts = [
            {
                "category": part.category,
                "before_bytes": part.before_bytes,
                "after_bytes": part.after_bytes,
                "change_bytes": part.change_bytes,
                "modules": dict(part.modules),
            }
            for part in self.parts
        ]
        return {"change_bytes": self.change_bytes, "parts": parts}


def _unwrapped(breakdown: Bytes) -> dict[str, dict[str, int]]:
    """`breakdown` by the names that the modules have in the model itself, so that a model can be compared with its PEFT model.

    PEFT calls the model `base_model.model` with adapters in its layers, `base_model` with a soft prompt beside it.
    """
    names = {module for cells in breakdown.values() for module in cells if module.startswith("base_model.")}
    in_layers = all(f"{name}.".startswith("base_model.model.") for name in names)
    wrapper = re.compile(r"^base_model(\.model)?(\.|$)" if in_layers else r"^base_model(\.|$)")
    found: dict[str, dict[str, int]] = {}
    for category, cells in breakdown.items():
        modules = found.setdefault(category, {})
        for module, nbytes in cells.items():
            name = wrapper.sub("", module.replace(".base_layer", ""))
            modules[name] = modules.get(name, 0) + nbytes
    return found
