"""The chance that a predicted run takes more memory than the card has, from how far measured runs were from their predictions.

`error_distribution.json` has the relative error of every committed run on a GPU, by method, card family and attention. A new run is
compared with those that resemble it: with the narrowest group that has `FEWEST` runs. If it is one more run of that kind, each place
among the errors of the n measured runs is equally likely for its own error. So where k of them took more than there is room for, it
runs out with a chance of k / (n + 1) to (k + 1) / (n + 1), whatever the distribution of errors (Hill's assumption A(n), JASA 63, 1968;
as upper and lower probabilities: Augustin and Coolen, Journal of Statistical Planning and Inference 124, 2004). The upper end is
given. No curve is fitted: most errors are 0 and a few are large, so the tail of a normal or a t-distribution would promise more than
a few dozen runs can show.

Where it can be wrong: for a card, a model or a stack of libraries unlike the few that were measured; for several processes, which
nobody measured on GPUs; where the CUDA context is an estimate, for most of the measured figures are without it. Not counted is what
later steps with rows of other lengths leave in the cache (up to 29 % more reserved in a run on the H200): before PyTorch runs out it
gives back what is cached, except in segments that are partly in use. For the same reason the chance is too high where cached memory
could be given back.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

DISTRIBUTION = Path(__file__).parent / "error_distribution.json"
FITS, TIGHT, SPILLS, TOO_LARGE = "fits", "next to no room", "spills", "does not fit"
NEGLIGIBLE = 0.01  # up to this chance a run fits; also where no measured run took as much, for few groups have the 99 runs to show it
FEWEST = 19  # with fewer runs the smallest chance that they can show, 1 / (n + 1), is above the customary 5 %

Group = tuple[str, ...]  # method, architecture, attention; or the first one or two of them, or none: all measured runs
_METHODS = {
    "full": " of full fine-tuning",
    "adapter": " with an unquantized frozen base",
    "quantized": " with a quantized base",
}


@dataclass(frozen=True)
class Risk:
    """The chance that a run takes more than the budget, and what follows from it.

    `probability` is an upper bound: (k + 1) / (n + 1), where `exceeding` (k) of `measured_runs` (n) took more than their prediction by
    a larger share than `room`. `room` is budget / prediction - 1, and below 0 for a run that does not fit.
    """

    probability: float
    verdict: str  # FITS, TIGHT, SPILLS or TOO_LARGE
    group: Group
    measured_runs: int
    exceeding: int
    room: float

    @property
    def chance(self) -> str:
        """`probability` in words, no more exact than so few runs allow: `"at most 1 in 30"`, `"about 2 in 10"`."""
        if not self.exceeding:
            return f"at most 1 in {_leading_digit(self.measured_runs + 1)}"
        if self.probability > 0.95:
            return "more than 9 in 10"
        if self.probability < 0.15:
            unit = 1 if self.probability > 0.1 else 10
            return f"about 1 in {round(1 / self.probability / unit) * unit}"
        return f"about {round(10 * self.probability)} in 10"

    @property
    def runs(self) -> str:
        """The measured runs in words: `"32 measured runs with a quantized base on Turing"`."""
        method, architecture, attention = (*self.group, *[""] * (3 - len(self.group)))
        card = f" on {architecture}" if architecture else ""
        kernel = f", {attention} attention" if attention else ""
        return f"{self.measured_runs} measured runs{_METHODS.get(method, '')}{card}{kernel}"

    @property
    def reason(self) -> str:
        """One sentence: what the chance is counted from."""
        if self.room < 0:
            fitting = self.measured_runs - self.exceeding
            return f"{fitting or 'none'} of {self.runs} took at least {-100 * self.room:.1f} % less than predicted"
        return f"{self.exceeding or 'none'} of {self.runs} took over {100 * self.room:.1f} % more than predicted"

    def to_json(self) -> dict[str, Any]:
        """A plain object with all fields, and the chance and the reason in words."""
        numbers = {"probability": round(self.probability, 4), "room": round(self.room, 4)}
        return asdict(self) | numbers | {"group": list(self.group), "chance": self.chance, "reason": self.reason}


def risk(needed_bytes: int, budget_bytes: int, group: Group, spills: bool = False) -> Risk:
    """The risk of a run that is predicted to need `needed_bytes` of `budget_bytes`.

    Args:
        group: the run's method ("full", "adapter" or "quantized"), the card's architecture and the attention ("sdpa"). Where too
            few such runs were measured, the last one is left out, then the last two, then all.
        spills: whether the driver moves to the host what does not fit.
    """
    found, errors = comparable(group)
    room = budget_bytes / max(1, needed_bytes) - 1
    exceeding = sum(error > 100 * room for error in errors)
    probability = (exceeding + 1) / (len(errors) + 1)
    if needed_bytes > budget_bytes:
        verdict = SPILLS if spills else TOO_LARGE
    else:
        verdict = FITS if probability <= NEGLIGIBLE or not exceeding else TIGHT
    return Risk(probability, verdict, found, len(errors), exceeding, room)


def comparable(group: Group) -> tuple[Group, list[float]]:
    """The narrowest group around `group` with at least `FEWEST` measured runs, otherwise all runs, and their errors.

    An error is measured / predicted - 1 in percent, above 0 where the run took more.
    """
    groups = json.loads(DISTRIBUTION.read_text(encoding="utf-8"))["groups"]
    measured = [(tuple(one["group"]), one["excess_percent"]) for one in groups]
    errors = [error for name, found in measured if name[: len(group)] == group for error in found]
    return (group, errors) if len(errors) >= FEWEST or not group else comparable(group[:-1])


def _leading_digit(number: int) -> int:
    """`33` -> `30`, `131` -> `100`."""
    unit = 10 ** (len(str(number)) - 1)
    return number // unit * unit
