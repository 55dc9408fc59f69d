"""Measures everything that the project claims about GPUs on this machine's GPU, in a given number of minutes.

    make gpu                                            # nine minutes; or python3 benchmarks/gpu.py --minutes 9
    python benchmarks/gpu.py --minutes 4 --only memory  # one part: runs, facts, memory, speed, fits
    python benchmarks/gpu.py --predict-only             # predicts the measured runs, on any machine
    python benchmarks/gpu.py --rehearse                 # every part on the CPU with tiny models, in under three minutes

It needs neither hub nor network: models have real shapes and random weights. The parts, in order: do recipes run (train, kill,
resume, reload, generate, merge, engines); facts that were inferred from sources (context, workspaces, kernels); does predicted
memory equal measured memory; speed; does a run that is predicted to fit really fit. Each result is written at once to
`benchmarks/results/gpu/CARD.json`. A later call continues where this one stopped, for each card and stack. An item only starts if
it can end in time. The last output is a table of what agreed, what differed and what is left. The exit code is 1 if anything
failed or differed.

On a machine without network, put wheels of missing packages into .whl/ (from `pip download`) in the repository's root, then:

    python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/site .whl/*.whl && \\
      PYTHONPATH=/tmp/site make gpu PYTHON=python3 OUT=$OUT

OUT is the folder of the results (default: `benchmarks/results/gpu`). Ledgers, snapshots and logs are archives in OUT/CARD: at
most six files.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BEGAN = time.monotonic()  # before the imports below, which are slow if the files are not cached yet
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from on_gpu import facts, fits, memory, models, runs, speed  # noqa: E402
from on_gpu.items import WHOLE, Estimates, Item  # noqa: E402
from on_gpu.pool import Outcome, Pool  # noqa: E402
from on_gpu.results import PARTS, RESULTS, Results, table, verdict  # noqa: E402

ORDER = ("runs", "facts", "memory", "speed", "fits")  # the most valuable first
SHARES = {"runs": 1.0, "facts": 0.75, "memory": 3.75, "speed": 2.0, "fits": 1.5}  # of the remaining time
LONG = 60.0  # seconds: longer runs start together with the memory part
ROOM = 0.92  # share of the card's memory for all items together


class Session:
    """One call: its items, the pool that runs them, and their results."""

    def __init__(self, args: argparse.Namespace, deadline: float) -> None:
        self.args, self.deadline, self.began = args, deadline, BEGAN
        self.rehearsed: bool = args.rehearse
        self.work = args.work / ("rehearsed" if args.rehearse else "card")
        if args.rehearse:
            shutil.rmtree(self.work, ignore_errors=True)
        for name in ("models", "kept"):
            (self.work / name).mkdir(parents=True, exist_ok=True)
        cores = os.cpu_count() or 2
        workers = args.workers or min(6, max(2, cores // 2))
        self.estimates = Estimates()
        least = 300.0 if args.rehearse else 40.0  # a rehearsal may run on a busy machine
        behind = max(1, cores // 3)
        self.pool = Pool(self.work, workers, behind, WHOLE, deadline, least, self.estimates, self.finished)
        for model in models.by_label(self.rehearsed).values():
            item = model.item
            item.arguments.update(work=str(self.work), rehearsed=self.rehearsed)
            self.pool.helpers[item.name] = item
        self.facts: dict[str, Any] = {}
        self.results: Results | None = None
        self.left: list[Item] = []

    # ---- results

    def finished(self, outcome: Outcome) -> None:
        """Writes the result of an item, and queues the prediction that follows from it."""
        item, name = outcome.item, outcome.item.name
        last = outcome.error.strip().splitlines()[-1][:200] if outcome.error else ""
        found = outcome.found | ({"error": outcome.error, "says": last} if outcome.error else {})
        if item.part == "card":
            if outcome.status != "ok":
                raise SystemExit(f"error: this machine's GPU cannot be used:\n{outcome.error}")
            self.facts = outcome.found
            return
        assert self.results is not None
        self.results.elapsed(time.monotonic() - self.began)
        if item.part == "plans":
            if outcome.status == "ok":
                path = self.results.artifacts / "fits.json" if not self.args.plan else fits.PLAN
                fits.keep_plan(self.facts, name.removeprefix("plan "), outcome.found, path)
        elif item.part == "predictions":
            self._predicted(name.removeprefix("predict "), outcome)
        else:
            took = {"took_seconds": round(outcome.seconds, 2), "cpu_seconds": outcome.cpu_seconds}
            self.results.put(name, item.part, status=outcome.status, **took, **found)
            if item.part == "memory" and outcome.status == "ok":
                self._predict(name)
        says = found.get("says") or (outcome.error.strip().splitlines()[-1][:200] if outcome.error else "")
        print(
            f"{time.monotonic() - self.began:6.1f} s  {name}: {outcome.status}, {outcome.seconds:.1f} s  {says}",
            flush=True,
        )

    def _predicted(self, name: str, outcome: Outcome) -> None:
        assert self.results is not None
        row = self.results.row(name)
        assert row is not None
        if outcome.status == "ok":
            outcome.found = memory.compared(row, outcome.found)
            self.results.update(name, **outcome.found)
        else:
            self.results.update(name, agrees=False, says="not predicted", prediction_error=outcome.error)

    def _predict(self, name: str) -> None:
        assert self.results is not None
        row = self.results.row(name)
        assert row is not None
        known = self.facts | {"context_bytes": (self.results.row("facts context") or {}).get("context_bytes")}
        self.pool.behind.append(memory.prediction_item(row, known, self.work, self.rehearsed))

    # ---- items

    def ask_for_the_card(self) -> None:
        """Waits for the facts about the card and the stack, and opens their results."""
        card = Item("card", "card", "on_gpu.fact_jobs:card", {"rehearsed": self.rehearsed}, 30.0, 1.0)
        self.pool.run([card])
        self.pool.drain()
        if not self.facts:
            raise SystemExit("error: the GPU did not answer in time; give more --minutes")
        self.pool.gib = WHOLE if self.rehearsed else ROOM * self.facts["total_bytes"] / fits.GIB
        card_facts = {name: value for name, value in self.facts.items() if name != "versions"}
        self.results = Results.of(self.args.out, card_facts, self.facts["versions"])
        self.results.begin(self.args.minutes, commit())

    def items(self) -> dict[str, list[Item]]:
        """The items of each part that no earlier call has finished; failed ones come last."""
        assert self.results is not None
        results, work, small = self.results, self.work, self.rehearsed
        plans = fits.known_plan(self.facts, results.artifacts / "fits.json")
        every = {
            "runs": [scenario.item(work, small) for scenario in runs.scenarios(small)],
            "facts": facts.items(work, small),
            "memory": [one.item(work, work / "kept", small) for one in memory.grid(small)],
            "speed": speed.items(work, small),
            "fits": [*fits.reach_items(work, small), *fits.items(plans, work, small)],
        }
        for item in (item for part in every.values() for item in part):
            if (row := results.row(item.name)) is not None and row["status"] in ("ok", "out of memory"):
                self.estimates.learn(item, row["took_seconds"])
        chosen = {part: items if self.args.only in (None, part) else [] for part, items in every.items()}
        todo = {part: [item for item in items if not results.is_done(item.name)] for part, items in chosen.items()}
        return {
            part: sorted(items, key=lambda item: results.row(item.name) is not None) for part, items in todo.items()
        }

    def plan_what_is_not_planned(self) -> None:
        """Queues predictions for the last part (which batch fits within each limit), for idle processors."""
        assert self.results is not None
        if self.args.only in (None, "fits"):
            known = fits.known_plan(self.facts, self.results.artifacts / "fits.json")
            for ladder in fits.ladders(self.rehearsed):
                if ladder.name not in known:
                    self.pool.behind.append(fits.plan_item(ladder, self.facts, self.work, self.rehearsed))

    def measure(self) -> None:
        """Runs one part after the other, each within its share of the time; then whatever still fits."""
        assert self.results is not None
        results = self.results
        models.write_rows(self.work)
        self.plan_what_is_not_planned()
        self.predict_measured()
        late: list[Item] = []
        for number, part in enumerate(ORDER):
            items = self.items()[part]
            if part == "runs":
                late = [item for item in items if item.seconds > LONG]
                items = [item for item in items if item.seconds <= LONG]
            elif part == "memory":
                items = [*late, *items]
            now = time.monotonic()
            share = SHARES[part] / sum(SHARES[later] for later in ORDER[number:])
            if part == "fits":
                self._wait_for_plans()
                items = self.items()[part]
            self.left += self.pool.run(items, now + share * (self.deadline - now))
            results.pack(self.work)  # after each part, because this call may be killed without warning
        self.left = self.pool.run(self.left)
        self.left += self.pool.drain()
        self.left = [item for item in (*self.pool.cut_off, *self.left) if item.part not in ("predictions", "plans")]

    def predict_measured(self) -> None:
        """Queues predictions of measured rows that have none, for idle processors."""
        assert self.results is not None
        for row in self.results.rows("memory"):
            if row["status"] == "ok" and "error_percent" not in row:
                self._predict(row["name"])

    def finish(self) -> None:
        """Adds the speeds as fractions of the card's own rates."""
        assert self.results is not None
        for name, found in speed.fractions(self.results.rows("speed")).items():
            self.results.update(name, **found)

    def _wait_for_plans(self) -> None:
        """Waits until the plans of the last part are known, or no time would be left to try them."""
        while time.monotonic() < self.deadline - 30 and self.pool.has("plans"):
            self.pool.look_after_the_rest()
            time.sleep(0.1)


def commit() -> str:
    """The measured commit; "unknown" without git."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def predict_only(session: Session, out: Path) -> None:
    """Predicts every measured row without a prediction, for every card with results in `out`, on all processors."""
    for path in sorted(path for path in out.glob("*.json") if path.name != fits.PLAN.name):
        session.results = Results.load(path)
        session.facts = session.results.content["card"]
        session.predict_measured()
        session.pool.drain()
        print(f"\n{session.facts['name']}\n{table(session.results.rows(), [])}")


def plan(session: Session, name: str) -> None:
    """Predicts which batch fits within each limit on the named card, and writes it to the committed results."""
    from toolkit.memory.cuda.cards import find_card
    from toolkit.memory.environment import stack_versions

    card = find_card(name)
    session.facts = {"name": card.name, "capability": list(card.capability), "versions": stack_versions()}
    session.facts |= {"multiprocessors": card.multiprocessors, "total_bytes": card.total_bytes}
    session.pool.behind += [fits.plan_item(one, session.facts, session.work, False) for one in fits.LADDERS]
    session.pool.drain()


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, help="time limit (default: 9; a rehearsal runs until everything is done)"
    )
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument(
        "--rehearse", action="store_true", help="on the CPU, with tiny models and each kind of item once"
    )
    parser.add_argument("--predict-only", action="store_true", help="measure nothing: predict the measured runs")
    parser.add_argument(
        "--plan", metavar="CARD", help="measure nothing: predict which batches fit on CARD, for the last part"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the results (default: benchmarks/results/gpu; for a rehearsal, a folder in --work)",
    )
    parser.add_argument("--work", type=Path, default=_roomy(), help="folder for models and runs, kept between calls")
    parser.add_argument(
        "--workers", type=int, help="processes on the card at a time (default: half the processors, from 2 to 6)"
    )
    return parser.parse_args()


def _roomy() -> Path:
    """Shared memory if it has room for the models (about 35 GB), otherwise the folder for temporary files."""
    shared = Path("/dev/shm")
    roomy = shared.is_dir() and shutil.disk_usage(shared).free > 48 * 2**30
    return (shared if roomy else Path(tempfile.gettempdir())) / f"footprint-gpu-{os.getuid()}"


def main() -> int:
    args = arguments()
    args.work = args.work.resolve()
    args.out = (args.out or (args.work / "rehearsed_results" if args.rehearse else RESULTS)).resolve()
    endless = args.predict_only or args.plan
    args.minutes = args.minutes or (1440 if endless else 60 if args.rehearse else 9)
    session = Session(args, BEGAN + 60 * args.minutes)
    for number in (signal.SIGTERM, signal.SIGHUP):
        # results so far are already written; the finally below ends the processes
        signal.signal(number, lambda *_: sys.exit(143))
    try:
        if args.predict_only:
            predict_only(session, args.out)
            return 0
        if args.plan:
            plan(session, args.plan)
            return 0
        session.ask_for_the_card()
        session.measure()
    finally:
        session.pool.close()
        if session.results is not None and not endless:
            session.results.elapsed(time.monotonic() - session.began)
            session.finish()
            session.results.pack(session.work)
            rows = session.results.rows()
            print(f"\n{session.results.content['card']['name']}, {session.results.stack}")
            print(table(rows, [item.name for item in session.left]))
            print(f"results: {session.results.path}", flush=True)
    return int(any(verdict(row) in ("failed", "differs") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
