"""The work items: one `Item` is one process and one row of the results."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

WHOLE = float("inf")  # GiB: the item needs the whole card


@dataclass(frozen=True)
class Item:
    """A function to run in its own process, with JSON-serializable `arguments`.

    `seconds` and `gib` are guesses for a data-center card: its time (corrected by experience), and its share of the card's
    memory next to other items. `needs` names the items that must have finished in the same folder before.
    """

    name: str
    part: str
    job: str  # "module:function"
    arguments: dict[str, Any] = field(default_factory=dict)
    seconds: float = 10.0
    gib: float = 0.0  # 0: it does not use the card
    needs: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)

    @property
    def alone(self) -> bool:
        """Whether it needs the whole card."""
        return self.gib == WHOLE

    def made_alone(self) -> Item:
        """The same item with the whole card, for a retry after it ran out of memory next to others."""
        return replace(self, gib=WHOLE)


class Estimates:
    """The expected seconds of items: the last time of the same item, or its guess times the typical error of its part's guesses."""

    def __init__(self, known: Iterable[tuple[Item, float]] = ()) -> None:
        self._took: dict[str, float] = {}
        self._ratios: dict[str, list[float]] = {}
        for item, seconds in known:
            self.learn(item, seconds)

    def learn(self, item: Item, seconds: float) -> None:
        """Records that `item` took `seconds`."""
        self._took[item.name] = seconds
        self._ratios.setdefault(item.part, []).append(seconds / item.seconds)

    def of(self, item: Item) -> float:
        """The expected seconds of `item`."""
        if item.name in self._took:
            return self._took[item.name]
        ratios = self._ratios.get(item.part)
        return item.seconds * (median(ratios[-9:]) if ratios else 1.0)
