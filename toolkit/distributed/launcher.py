"""The command line that started this run, with its launcher's part, and the one that continues it."""

import os
import shlex
import sys
from pathlib import Path

import psutil

STARTED_AS = "FOOTPRINT_STARTED_AS"  # an environment variable with the command line of `footprint train`
LAUNCHERS = ("accelerate", "accelerate-launch", "torchrun", "deepspeed")


def _launchers() -> list[tuple[int, list[str]]]:
    """For each parent process that is a launcher, the nearest first: its pid, and its command before this process's own."""
    argv, found = list(sys.argv), []
    for parent in psutil.Process().parents():
        try:
            words = parent.cmdline()
        except psutil.Error:  # another user's, or gone
            continue
        if words[-len(argv) :] != argv:
            continue
        before = words[: -len(argv)]
        for at, word in enumerate(before):
            if Path(word).name in LAUNCHERS:
                found.append((parent.pid, [Path(word).name, *before[at + 1 :]]))
                break
            if word == "accelerate.commands.launch":  # python -m
                found.append((parent.pid, ["accelerate", "launch", *before[at + 1 :]]))
                break
    return found


def launcher_pid() -> int | None:
    """The launcher's process id, if it started this process itself; None without a launcher."""
    parent = os.getppid()
    return parent if any(pid == parent for pid, _ in _launchers()) else None


def command() -> list[str]:
    """The command that started this run: `footprint train`, its launcher's, if a parent is one, or else python's."""
    if STARTED_AS in os.environ:
        return shlex.split(os.environ[STARTED_AS])
    launchers = _launchers()
    return [*(launchers[0][1] if launchers else ["python"]), *sys.argv]


def command_that_continues(output_dir: str) -> str:
    """The command that resumes the run of this process, which writes to `output_dir`."""
    return without_secrets(shlex.join(_without_flags(command(), "output_dir", "resume_from_checkpoint"))) + (
        f" --output_dir {shlex.quote(output_dir)} --resume_from_checkpoint"
    )


def _without_flags(words: list[str], *names: str) -> list[str]:
    """`words` without these flags and the values that follow them."""
    kept, drops = [], False
    for word in words:
        flag, assigned, _ = word.partition("=")
        if flag.startswith("--"):
            ours = flag[2:].replace("-", "_") in names
            drops = ours and not assigned
            if ours:
                continue
        elif drops:
            drops = False
            continue
        kept.append(word)
    return kept


def without_secrets(command: str) -> str:
    """`command` with HIDDEN instead of the hub's token, because run folders are shared and pushed."""
    words = shlex.split(command)
    for at, word in enumerate(words):
        name, assigned, _ = word.partition("=")
        if name not in ("--hub_token", "--hub-token"):
            continue
        if assigned:
            words[at] = f"{name}=HIDDEN"
        elif at + 1 < len(words):
            words[at + 1] = "HIDDEN"
    return shlex.join(words)
