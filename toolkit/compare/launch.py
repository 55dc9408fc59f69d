"""The runs of a comparison, one process after the other, with overall progress; one that fails does not stop the rest."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from toolkit.compare.plan import Plan, Run, recipe_of
from toolkit.console import console, say
from toolkit.finished_run import read_json

_ERROR = re.compile(r"^(?:[\w.]+\.)?\w*(?:Error|Exception|Interrupt|Exit|Refused)\b.*")
_SIGNAL = re.compile(r"died with <Signals\.(\w+)")


def run_all(plan: Plan) -> None:
    """Runs what is not done yet. Runs that failed or were stopped before are run anew, in an empty folder."""
    todo = [run for run in plan.runs if not run.is_done]
    took = {run: read_json(run.folder / "run.json")["seconds"] for run in plan.runs if run not in todo}
    if len(todo) < len(plan.runs):
        say("done", f"{len(plan.runs) - len(todo)} of {len(plan.runs)} runs were done before")
    columns = (TextColumn("[bold]comparing"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(plan.runs), completed=len(plan.runs) - len(todo), note="")
        for number, run in enumerate(todo):
            if not console.is_terminal:
                say(
                    "run",
                    f"{len(plan.runs) - len(todo) + number + 1} of {len(plan.runs)}: {run.method}, seed {run.seed}",
                )
            began, expected = time.monotonic(), _expected(took, todo[number:])
            process = _start(run, plan.launch)
            try:
                while process.poll() is None:
                    spent = time.monotonic() - began
                    note = f"{run.method}, seed {run.seed}: {_last_line(run.log)}"
                    bar.update(task, note=f"{_left(expected, spent)}  {note[:60]}")
                    time.sleep(0.5)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGTERM)
                    process.wait()
            bar.update(task, advance=1)
            spent = time.monotonic() - began
            if run.is_done:
                took[run] = spent
                say(
                    "done",
                    f"{run.method}, seed {run.seed}: {spent:.0f} s, {_left(_expected(took, todo[number + 1 :]))}",
                )
            else:
                say("failed", f"{run.method}, seed {run.seed}: {spent:.0f} s, {why_failed(run)} (all of it: {run.log})")


def command(run: Run, launch: str) -> list[str]:
    """What starts a run: accelerate's launcher with the file `launch`, its recipe and the run's flags."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", launch]
    return [*launcher, str(recipe_of(run.method)), *run.argv]


def _start(run: Run, launch: str) -> subprocess.Popen:
    shutil.rmtree(run.folder, ignore_errors=True)  # of a run that failed or was stopped: its figures are not whole
    with run.log.open("w", encoding="utf-8") as log:
        return subprocess.Popen(
            command(run, launch),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that the launcher and what it launched end together
        )


def _expected(took: Mapping[Run, float], todo: Sequence[Run]) -> float | None:
    """How many seconds `todo` will take, from the runs that are done: those of the same method, or else all of them."""
    if not took:
        return None
    same = {run.method: [seconds for one, seconds in took.items() if one.method == run.method] for run in todo}
    return sum(mean(same[run.method] or took.values()) for run in todo)


def _left(expected: float | None, spent: float = 0.0) -> str:
    if expected is None:
        return "time left not known yet"
    minutes, seconds = divmod(int(max(0.0, expected - spent)), 60)
    return f"about {minutes // 60}:{minutes % 60:02}:{seconds:02} left"


def _last_line(log: Path) -> str:
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 2000))
        lines = stream.read().decode(errors="replace").split()
    return " ".join(lines[-8:])


def why_failed(run: Run) -> str:
    """The last error in the log of a run that is not done: the recipe's own, not that of the launcher around it."""
    try:
        lines = [line.rstrip() for line in run.log.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return "not run yet"
    errors = [line for line in lines if line.startswith("error: ") or _ERROR.match(line)]
    own = [line for line in errors if "subprocess.CalledProcessError" not in line]
    if own:
        return own[-1].removeprefix("error: ")
    if killed := next((found[1] for line in errors if (found := _SIGNAL.search(line))), None):
        return (
            f"the process was killed ({killed}), often for want of memory"
            if killed == "SIGKILL"
            else f"killed by {killed}"
        )
    return "stopped before it was done" if not errors else errors[-1]
