"""Runs a comparison, one process after the other, with overall progress; a failed run does not stop the others."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from toolkit.compare.plan import Plan, Run
from toolkit.console import console, say
from toolkit.runs.finished_run import read_record
from toolkit.runs.launching import find_recipe, launch_command

_ERROR = re.compile(r"^(?:[\w.]+\.)?\w*(?:Error|Exception|Interrupt|Exit|Refused)\b.*")
_SIGNAL = re.compile(r"died with <Signals\.(\w+)")


def run_all(plan: Plan) -> None:
    """Starts every run that is not finished. Runs that failed or were stopped start again, in an empty folder."""
    todo = [run for run in plan.runs if not run.is_done]
    took = {run: read_record(run.folder).get("seconds", 0.0) for run in plan.runs if run not in todo}
    total, before = len(plan.runs), len(plan.runs) - len(todo)
    if before:
        say("done", f"{before} of {total} runs were done before")
    columns = (TextColumn("[bold]comparing"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    note = TextColumn("{task.fields[note]}", markup=False)
    with Progress(*columns, note, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, completed=before, note="")
        for number, run in enumerate(todo):
            name = f"{run.method}, seed {run.seed}"
            if not console.is_terminal:
                say("run", f"{before + number + 1} of {total}: {name}")
            expected = _expected(took, todo[number:])

            def report(spent: float, run: Run = run, name: str = name, expected: float | None = expected) -> None:
                bar.update(task, note=f"{_left(expected, spent)}  {f'{name}: {_last_line(run.log)}':.60}")

            spent = _run(run, plan.launch, report)
            bar.update(task, advance=1)
            if run.is_done:
                took[run] = spent
                say("done", f"{name}: {spent:.0f} s, {_left(_expected(took, todo[number + 1 :]))}")
            else:
                say("failed", f"{name}: {spent:.0f} s, {why_failed(run)} (full output: {run.log})")


def _run(run: Run, launch: str, report: Callable[[float], None]) -> float:
    """Runs one to its end and returns its seconds; calls `report` every second with the seconds so far.

    If this process ends in an orderly way (also by Ctrl-C), so does the run's.
    """
    began = time.monotonic()
    process = _start(run, launch)
    try:
        while process.poll() is None:
            report(time.monotonic() - began)
            time.sleep(1)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
    return time.monotonic() - began


def command(run: Run, launch: str) -> list[str]:
    """The command that starts a run: accelerate's launcher with the file `launch`, the recipe and the run's flags."""
    return launch_command(find_recipe(run.method), Path(launch), run.argv)


def _start(run: Run, launch: str) -> subprocess.Popen:
    shutil.rmtree(run.folder, ignore_errors=True)  # a failed or stopped run left incomplete results
    with run.log.open("w", encoding="utf-8") as log:
        return subprocess.Popen(
            command(run, launch),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that the launcher and its processes end together
        )


def _expected(took: Mapping[Run, float], todo: Sequence[Run]) -> float | None:
    """The expected seconds for `todo`: for each run the mean of finished runs of its method, or of all if there is none."""
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
    """The last error in the log of an unfinished run: the recipe's own, not the launcher's."""
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
            f"the process was killed ({killed}), often because memory ran out"
            if killed == "SIGKILL"
            else f"killed by {killed}"
        )
    return "stopped before it finished" if not errors else errors[-1]
