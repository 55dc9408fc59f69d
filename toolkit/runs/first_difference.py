"""The first event in which a predicted step and a measured one differ: `python -m toolkit.runs.first_difference METHOD [flags]`.

Two steps of a recipe run on the device of this machine, and the same two steps are predicted for the same batches. Each allocation
and each release is an event, with its bytes, operator, module and phase. Where the two lists first differ is what is predicted
wrongly. Operators are shown, not compared: on fake tensors PyTorch clips and steps by other ones, which allocate the same.
"""

import difflib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby, zip_longest
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from toolkit.config import Config, Flags, configure, read_flags
from toolkit.console import console, say
from toolkit.distributed.engine import EngineKind
from toolkit.distributed.ranks import exits_cleanly
from toolkit.errors import CommandParser, UserError
from toolkit.memory.cuda.device import Cuda
from toolkit.memory.measure import MemoryCallback
from toolkit.memory.shadow.step import CPU, STEPS, keep_only, real_zero_losses, rows_needed
from toolkit.memory.trace import Allocation
from toolkit.methods import METHODS, method_named
from toolkit.runs.prediction import predict_run, this_card
from toolkit.runs.preflight import prepare
from toolkit.training.trainer import FineTuner
from toolkit.units import format_bytes, parse_bytes

SHOWN = 10  # events
AHEAD = 400  # events behind the difference among which the lists are brought together again
SMALLEST_BLOCK = 512  # bytes, of PyTorch's allocator on a GPU: numbers that lie on the host in a prediction are below
WIDTH = 80  # of a terminal that has room for a table
# Flags of whole runs, by the beginnings of their names: here two steps run, and nothing is kept.
WHOLE_RUNS = (
    *("early_stopping", "eval_", "hub_", "load_best", "max_steps", "metric_for", "num_train_epochs", "output_dir"),
    *("predict", "push_to_hub", "report_to", "resume", "run_name", "save_", "allow_changed", "memory_snapshot"),
)


@dataclass(frozen=True, order=True)
class Event:
    """A block is allocated (`sign` 1) or released (-1) in `phase` of `step`; `op` and `module` are those that allocated it."""

    sign: int
    nbytes: int
    op: str
    module: str
    phase: str
    step: int

    @property
    def compared(self) -> tuple[int, int, str, str, int]:
        """What must be equal."""
        return self.sign, self.nbytes, self.module, self.phase, self.step

    def __str__(self) -> str:
        return f"{'+' if self.sign > 0 else '-'}{self.nbytes:,} {self.op or 'made outside'}"


class Pair(NamedTuple):
    """One event, predicted and measured; None: it happens only on the other side."""

    predicted: Event | None
    measured: Event | None

    @property
    def is_equal(self) -> bool:
        """Whether it is the same event on both sides."""
        return None not in self and self.predicted.compared == self.measured.compared  # type: ignore[union-attr]


class Listener:
    """A sink that keeps the events of the steps, without loading and without what no trace of a real run sees."""

    def __init__(self, at_least: int = 0) -> None:
        self.at_least = at_least  # bytes
        self.events: list[Event] = []
        self.phase, self.step = "load", 0

    def entered(self, phase: str, step: int) -> None:
        self.phase, self.step = phase, step

    def born(self, block: Allocation) -> None:
        self._keep(1, block)

    def died(self, block: Allocation) -> None:
        self._keep(-1, block)

    def _keep(self, sign: int, block: Allocation) -> None:
        if self.phase != "load" and block.category != "workspaces" and block.nbytes >= self.at_least:
            self.events.append(Event(sign, block.nbytes, block.op, block.module, self.phase, self.step))


def events_of(method: str, flags: Flags, at_least: int | None = None) -> tuple[list[Event], list[Event]]:
    """The events of two steps of `method` with `flags`, predicted and measured, of blocks of `at_least` bytes.

    Raises: UserError for flags that cannot be right or have no effect here, and for what cannot be predicted.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = _two_steps(method, flags, folder)
        on_gpu = config.training.device.type == "cuda"
        smallest = (SMALLEST_BLOCK if on_gpu else 0) if at_least is None else at_least
        predicted, measured = Listener(smallest), Listener(smallest)
        ready = prepare(config)
        memory = MemoryCallback(steps=tuple(range(1, STEPS + 1)), sinks=[measured])
        model, rows = config.method.attach(ready.load_model()), ready.data.train
        # so that both steps are of one epoch, as in the prediction
        wanted = max(len(rows), rows_needed(config.training))
        data = replace(ready.data, train=rows.select([number % len(rows) for number in range(wanted)]))
        trainer = FineTuner(model, config, data, callbacks=[memory])
        keep_only(trainer, memory)
        with real_zero_losses():  # as in the prediction, whose losses have no values
            trainer.train()
        if memory.problem is not None:
            say("warning", memory.problem)
        card = this_card() if on_gpu else None
        device = CPU if card is None else Cuda(card)
        predict_run(config, device, memory.batches, sinks=[predicted])
    return predicted.events, measured.events


def _two_steps(method: str, flags: Flags, folder: str) -> Config:
    if not METHODS[method].trains:
        raise UserError(f"{method} trains nothing, so there is no step to compare")
    kept = {name: value for name, value in flags.from_file.items() if not name.startswith(WHOLE_RUNS)}
    for name in ["predict"] if flags.predict else flags.given:
        if name.startswith(WHOLE_RUNS):
            raise UserError(f"--{name} has no effect here: two steps run, and nothing is kept; leave it out")
    own = {"max_steps": STEPS, "save_strategy": "no", "output_dir": folder}
    config = configure(METHODS[method], Flags({**flags.given, **own}, kept))
    if config.engine.kind is not EngineKind.NONE:
        raise UserError(
            f"events are compared on one process, and the launch asked for {config.engine}; start it with python"
        )
    return config


def with_sorted_releases(events: Sequence[Event]) -> list[Event]:
    """The events, with consecutive releases sorted by size.

    What is released together has no fixed order: autocast, for example, releases its copies of weights in the order of their
    addresses.
    """
    groups = groupby(events, key=lambda event: (event.sign, event.phase, event.step))
    return [event for (sign, *_), group in groups for event in (sorted(group) if sign < 0 else group)]


def aligned(predicted: Sequence[Event], measured: Sequence[Event]) -> list[Pair]:
    """About `SHOWN` events around the first difference side by side, so that equal ones share a row; empty: no difference."""
    predicted, measured = with_sorted_releases(predicted), with_sorted_releases(measured)
    rows = [Pair(*both) for both in zip_longest(predicted, measured)]
    first = next((number for number, row in enumerate(rows) if not row.is_equal), None)
    if first is None:
        return []
    before, mine, its = (
        rows[max(0, first - SHOWN // 2 + 1) : first],
        predicted[first:][:AHEAD],
        measured[first:][:AHEAD],
    )
    some, others = ([event.compared for event in events] for events in (mine, its))
    codes = difflib.SequenceMatcher(None, some, others, autojunk=False).get_opcodes()
    behind = [Pair(*both) for _, at, to, start, end in codes for both in zip_longest(mine[at:to], its[start:end])]
    return [*before, *behind][:SHOWN]


def sentence(predicted: Event | None, measured: Event | None) -> str:
    """What differs in one row."""
    if predicted is None or measured is None:
        event = predicted or measured
        assert event is not None
        does, other = ("predicted", "measured") if measured is None else ("measured", "predicted")
        what = "allocation" if event.sign > 0 else "release"
        return f"{_place(event)}: {what} of {event.nbytes:,} bytes {does}, none {other} at this point"
    if measured.compared == replace(predicted, nbytes=measured.nbytes).compared:
        what = "" if measured.sign > 0 else "release of a block: "
        return f"{_place(predicted)}: {what}predicted {predicted.nbytes:,} bytes, measured {measured.nbytes:,}"
    whats = ["allocation" if event.sign > 0 else "release" for event in (predicted, measured)]
    return (
        f"predicted: {whats[0]} of {predicted.nbytes:,} bytes ({_place(predicted)}); "
        f"measured: {whats[1]} of {measured.nbytes:,} bytes ({_place(measured)})"
    )


def _place(event: Event) -> str:
    where = f"step {event.step}, {event.phase.replace('_', ' ')}, {event.module or 'no module'}"
    return f"{where}, {event.op or 'made outside'}"


def show(out: Console, rows: Sequence[Pair]) -> None:
    """The rows as a table, or a line for each event where the terminal has no room for one; `≠` marks what differs."""
    if out.width < WIDTH:
        for row in rows:
            events = {"": row.measured} if row.is_equal else {"predicted ": row.predicted, "measured ": row.measured}
            for who, event in events.items():
                what = "nothing" if event is None else f"{event} ({event.module or 'no module'}, {event.phase})"
                out.print(f"{'  ' if row.is_equal else '≠ '}{who}{what}", soft_wrap=True, markup=False)
        return
    out.print("Events around the first difference (+ allocated, - released, in bytes)")
    table = Table()
    for name in ("", "phase", "predicted", "measured", "module"):
        table.add_column(name, overflow="fold")
    for row in rows:
        there = [event for event in row if event is not None]
        modules = dict.fromkeys(event.module.removeprefix("base_model.model.") for event in there)
        phases = dict.fromkeys(event.phase.replace("_", " ") for event in there)
        sizes = ["" if event is None else str(event) for event in row]
        cells = ("" if row.is_equal else "≠", "\n".join(phases), *sizes, "\n".join(modules))
        table.add_row(*map(Text, cells), style="" if row.is_equal else "bold")
    out.print(table)


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Compares and prints; 0 where all events are equal, 1 where some differ."""
    parser = CommandParser(
        prog="python -m toolkit.runs.first_difference",
        usage="%(prog)s METHOD [--at_least SIZE] [any flag of its recipe]",
        description="Run two steps of a recipe, predict them, and show the first event in which they differ.",
        allow_abbrev=False,
    )
    parser.add_argument("method", metavar="METHOD", help="a recipe's name, such as lora")
    parser.add_argument(
        "--at_least",
        metavar="SIZE",
        help=f"leave out smaller blocks; default: {format_bytes(SMALLEST_BLOCK)} on a GPU, where smaller numbers may lie on the host",
    )
    own, rest = parser.parse_known_args(argv)
    method = method_named(own.method)
    at_least = None if own.at_least is None else parse_bytes(own.at_least)
    predicted, measured = events_of(own.method, read_flags(method, rest), at_least)
    rows = aligned(predicted, measured)
    if not rows:
        say("equal", f"all {len(measured):,} events of {STEPS} steps are predicted as they were measured")
        return 0
    show(console, rows)
    say("differs", sentence(*next(row for row in rows if not row.is_equal)))
    return 1


if __name__ == "__main__":
    main()
