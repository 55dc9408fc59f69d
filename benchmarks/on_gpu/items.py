"""What is to be done: one `Item` is one process, which leaves one row of the results."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

WHOLE = float("inf")  # GiB: nothing else may be on the card meanwhile


@dataclass(frozen=True)
class Item:
    """A function, to be run in a process of its own with JSON-able `arguments`.

    `seconds` and `gib` are guesses for a data-centre card: how long it takes (what was learned corrects it), and how much
    of the card it may take beside others. `needs` names the items that must have been done in the same folder before.
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
        """Whether it has the card for itself."""
        return self.gib == WHOLE

    def made_alone(self) -> Item:
        """The same with the whole card: for one that ran out of memory beside others."""
        return replace(self, gib=WHOLE)


class Estimates:
    """Seconds that items take: what the same one took before, else its guess, corrected by how wrong guesses of its part were."""

    def __init__(self, known: Iterable[tuple[Item, float]] = ()) -> None:
        self._took: dict[str, float] = {}
        self._ratios: dict[str, list[float]] = {}
        for item, seconds in known:
            self.learn(item, seconds)

    def learn(self, item: Item, seconds: float) -> None:
        """`item` took so many seconds."""
        self._took[item.name] = seconds
        self._ratios.setdefault(item.part, []).append(seconds / item.seconds)

    def of(self, item: Item) -> float:
        """How long `item` will take."""
        if item.name in self._took:
            return self._took[item.name]
        ratios = self._ratios.get(item.part)
        return item.seconds * (median(ratios[-9:]) if ratios else 1.0)
