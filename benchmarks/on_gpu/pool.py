"""Runs items in separate processes, several at a time, within the time limit.

Processes are forked from one that has imported everything (`preload`) and never initialized CUDA. If it did initialize CUDA, new
processes are started instead, which is slower. Each leads its own process group, which is killed at its deadline. A process writes
its result to a file, so the pool continues however a process ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from on_gpu import machine
from on_gpu.items import Estimates, Item

PATIENCE = 3.0  # an item is killed after this many times its estimate, but not before `least` seconds
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass
class Outcome:
    """How an item ended: `status` is "ok", "out of memory", "failed", "cut off" (the time limit was reached), or "try again"."""

    item: Item
    status: str
    seconds: float
    found: dict[str, Any]
    error: str = ""  # the whole traceback, or the end of its output
    cpu_seconds: float = 0.0


def _both_ends(text: str) -> str:
    """A long output without its middle: the stack of a killed item has many lines."""
    return text if len(text) < 16000 else f"{text[:4000]}\n[...]\n{text[-12000:]}"


@dataclass
class _Running:
    item: Item
    process: Any
    began: float
    deadline: float
    beside: bool  # whether other items were on the card too


class Pool:
    """Runs at most `workers` processes at a time on the card, within `gib` together, and at most `behind` without the card.

    `work` is the folder that items share; `finished` is called with each `Outcome`. An item only starts if it can end before
    `deadline` (of `time.monotonic`); items that still run then are killed.
    """

    def __init__(
        self,
        work: Path,
        workers: int,
        behind: int,
        gib: float,
        deadline: float,
        least: float,
        estimates: Estimates,
        finished: Callable[[Outcome], None],
        method: str = "forkserver",
    ) -> None:
        self.work, self.workers, self.most_behind, self.gib = work, workers, behind, gib
        self.deadline, self.least = deadline, least
        self.estimates, self.finished = estimates, finished
        self.behind: list[Item] = []  # items without the card, for idle processors
        self.helpers: dict[str, Item] = {}  # items that others need; they run when the first of these is due
        self.logs = work / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        (work / "made").mkdir(exist_ok=True)
        os.environ |= machine.environment()
        self._context: Any = multiprocessing.get_context(method)
        self._context.set_forkserver_preload(["on_gpu.preload"])
        self.cut_off: list[Item] = []  # killed at the deadline: still to be done
        self._running: list[_Running] = []
        self._failed: dict[str, str] = {}  # helper -> why

    def run(self, items: Iterable[Item], until: float | None = None) -> list[Item]:
        """Starts `items` in their order, as long as they can end before `until`; returns those that were not started.

        Items may still run when this returns: a later call or `drain` collects them.
        """
        until = self.deadline if until is None else min(until, self.deadline)
        waiting = list(items)
        while waiting:
            waiting = self._look_after(waiting)
            waiting = self._start(waiting, until)
            if not any(self._fits_in_time(item, until) for item in waiting):
                break
            time.sleep(0.02)
        return waiting

    def drain(self) -> list[Item]:
        """Waits for running items and runs those in `behind`; returns those for which no time was left."""
        waiting: list[Item] = []
        while self._running or any(self._fits_in_time(item, self.deadline) for item in (*self.behind, *waiting)):
            waiting = self._look_after(waiting)
            waiting = self._start(waiting, self.deadline)
            time.sleep(0.02)
        return [*waiting, *self.behind]

    def look_after_the_rest(self) -> None:
        """One round without new items for the card: collects finished items, and starts those in `behind`."""
        self._start(self._look_after([]), self.deadline)

    def has(self, part: str) -> bool:
        """Whether items of `part` are running or waiting in `behind`."""
        return any(item.part == part for item in (*self.behind, *(running.item for running in self._running)))

    def close(self) -> None:
        """Kills all running items."""
        for running in self._running:
            _kill(running.process.pid)
        self._running = []

    # ---- starting

    def _start(self, waiting: list[Item], until: float) -> list[Item]:
        """Starts every item for which there is room; returns the others."""
        left: list[Item] = []
        for at, item in enumerate(waiting):
            lacks = [name for name in item.needs if not self._made(name).exists()]
            if lacks and lacks[0] in self._failed:
                self.finished(Outcome(item, "failed", 0.0, {}, f"{lacks[0]} failed:\n{self._failed[lacks[0]]}"))
                continue
            candidate = self.helpers[lacks[0]] if lacks else item
            started = False
            if self._fits_in_time(item, until) and not self._runs(candidate) and self._has_room(candidate):
                self._launch(candidate)
                started = candidate is item
            if not started:
                left.append(item)
                if item.alone and not lacks and self._fits_in_time(item, until):
                    left += waiting[at + 1 :]  # if later items went first, it would never get the whole card
                    break
        quiet = not any(running.item.alone for running in self._running)
        for item in list(self.behind):
            busy = sum(not running.item.gib for running in self._running)
            if quiet and busy < self.most_behind and self._fits_in_time(item, self.deadline):
                self.behind.remove(item)
                self._launch(item)
        return left

    def _runs(self, item: Item) -> bool:
        return any(running.item.name == item.name for running in self._running)

    def _fits_in_time(self, item: Item, until: float) -> bool:
        before = sum(self.estimates.of(self.helpers[n]) for n in item.needs if not self._made(n).exists())
        return time.monotonic() + before + self.estimates.of(item) <= until

    def _has_room(self, item: Item) -> bool:
        on_card = [running.item for running in self._running if running.item.gib]
        if any(other.alone for other in on_card) or len(on_card) >= self.workers:
            return False
        return not on_card or item.gib + sum(other.gib for other in on_card) <= self.gib

    def _launch(self, item: Item) -> None:
        log, answer = self._files(item)
        answer.unlink(missing_ok=True)
        others = [running for running in self._running if running.item.gib] if item.gib else []
        for running in others:
            running.beside = True
        process = self._context.Process(target=work, args=(item.job, item.arguments, item.env, str(log), str(answer)))
        process.start()
        now = time.monotonic()
        patience = max(PATIENCE * self.estimates.of(item), self.least)
        self._running.append(_Running(item, process, now, min(now + patience, self.deadline), bool(others)))

    # ---- ending

    def _look_after(self, waiting: list[Item]) -> list[Item]:
        """Reports finished items; returns `waiting` with the items to retry."""
        for outcome in self._reap():
            item = outcome.item
            if outcome.status == "try again":
                if item.name not in self.helpers:
                    (waiting if item.gib else self.behind).insert(0, item)
            elif outcome.status == "out of memory" and outcome.found.pop("beside", False) and not item.alone:
                waiting.insert(0, item.made_alone())
            elif outcome.status != "cut off":
                if outcome.status != "failed":
                    self.estimates.learn(item, outcome.seconds)
                elif item.name in self.helpers:
                    self._failed[item.name] = outcome.error
                if item.name not in self.helpers:
                    self.finished(outcome)
            elif item.name not in self.helpers:
                self.cut_off.append(item)
        return waiting

    def _reap(self) -> list[Outcome]:
        ended = []
        for running in list(self._running):
            process, now = running.process, time.monotonic()
            late = now > running.deadline
            if process.is_alive() and not late:
                continue
            if process.is_alive():
                _kill(process.pid, signal.SIGUSR1)
                time.sleep(0.2)  # gives it time to write its stack
                _kill(process.pid)
                process.join()
            self._running.remove(running)
            ended.append(self._outcome(running, now - running.began, late))
        return ended

    def _outcome(self, running: _Running, seconds: float, late: bool) -> Outcome:
        item = running.item
        log, answer = self._files(item)
        try:
            result = json.loads(answer.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            if late and running.deadline >= self.deadline:
                return Outcome(item, "cut off", seconds, {})
            why = f"killed after {seconds:.0f} s" if late else f"ended with exit code {running.process.exitcode}"
            text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
            return Outcome(item, "failed", seconds, {}, f"{why}, and left no answer; its output:\n{_both_ends(text)}")
        if result["status"] == "cannot fork":
            self._context = multiprocessing.get_context("spawn")
            self.least = max(self.least, 150.0)  # each imports everything
            print(
                "the fork server has initialized CUDA: new processes are started instead, which is slower",
                flush=True,
            )
            return Outcome(item, "try again", seconds, {})
        if result["status"] == "ok":
            self._made(item.name).touch()
        found = result["found"] | ({"beside": running.beside} if result["status"] == "out of memory" else {})
        return Outcome(item, result["status"], seconds, found, result["error"], result["cpu_seconds"])

    def _files(self, item: Item) -> tuple[Path, Path]:
        name = item.name.replace("/", "-").replace(" ", "_")
        return self.logs / f"{name}.log", self.logs / f"{name}.json"

    def _made(self, name: str) -> Path:
        return self.work / "made" / name.replace("/", "-").replace(" ", "_")


def _kill(pid: int, number: int = signal.SIGKILL) -> None:
    for kill in (os.killpg, os.kill):  # it may not lead its group yet
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, number)


# ---- in the process of an item


def work(job: str, arguments: dict[str, Any], env: dict[str, str], log: str, answer: str) -> None:
    """Runs `job` and writes its result to the file `answer`: status, return value, and traceback if it failed."""
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # the item ends when its parent ends
    with Path(log).open("w", encoding="utf-8") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1, closefd=False), os.fdopen(2, "w", 1, closefd=False)
    faulthandler.register(signal.SIGUSR1, sys.stderr, all_threads=True)  # prints the stack before the item is killed
    os.environ |= env | {"ITEM_LOG": log}
    result: dict[str, Any] = {"status": "ok", "found": {}, "error": ""}
    try:
        import torch

        if torch.cuda.is_available() and torch.cuda._is_in_bad_fork():
            result["status"] = "cannot fork"
        else:
            module, _, function = job.partition(":")
            result["found"] = getattr(importlib.import_module(module), function)(**arguments)
    except BaseException as error:  # also the toolkit's SystemExit
        result |= {"status": "out of memory" if is_out_of_memory(error) else "failed", "error": traceback.format_exc()}
    result["cpu_seconds"] = round(sum(os.times()[:4]), 2)  # its own and its children's
    temporary = Path(f"{answer}.partial")
    temporary.write_text(json.dumps(result), encoding="utf-8")
    temporary.replace(answer)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # skips the teardown of libraries


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the card ran out of memory: torch's own error, or messages of CUDA and its libraries."""
    said = str(error)
    phrases = ("CUDA out of memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "GPU's memory is full")
    return type(error).__name__ == "OutOfMemoryError" or any(phrase in said for phrase in phrases)
