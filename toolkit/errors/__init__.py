"""`UserError`, the one exception for a user's mistake, the guard that makes one of what libraries raise, and hints for misspelt names."""

import argparse
import errno
import os
import re
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

OURS = str(Path(__file__).resolve().parents[1])
# What a terminal would obey, and what reverses the order of a line; lone surrogates cannot be printed at all.
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
PASSED_ON = {"OutOfMemoryError", "Preempted"}  # names, because torch may not have been imported


def printable(text: str) -> str:
    """`text` in which control characters are written as `\\x1b`, so that a name from outside cannot direct the terminal."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class UserError(Exception):
    """A mistake in flags, files or data. The message is one line: what was got, what is valid, and what to change.

    A library's exception that led to it is its `__cause__`: the traceback is then written to a file, which the line names.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(re.sub(r"\s*[\r\n]+\s*", " ", message.strip())))


class NothingToDo(Exception):
    """What was asked for is done already. The message is one line."""


class CommandParser(argparse.ArgumentParser):
    """argparse with one-line errors instead of a usage page."""

    def error(self, message: str) -> NoReturn:
        if found := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)$", message):
            there = [name.strip("' ") for name in found[2].split(",")]
            message = message.replace(f"'{found[1]}'", f"'{found[1]}'{did_you_mean(found[1], there)}", 1)
        raise UserError(f"{message}; see {self.prog} --help")


def did_you_mean(got: str, valid: Iterable[str]) -> str:
    """`" (did you mean x?)"` with the valid name closest to `got`, or an empty string if none is close."""
    near = get_close_matches(got[:100], list(valid), n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""


def check_filled(settings: Mapping[str, Any]) -> None:
    """Raises UserError for the first text in `settings` (by flag name), alone or in a list, that is empty or blank."""
    for name, value in settings.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, str) and not one.strip():
                raise UserError(f"--{name} is empty; give a value, or leave it out")


def words_of(error: BaseException, longest: int = 200) -> str:
    """What `error` says, in one line; with the name of its type where the text alone would be a riddle."""
    said = " ".join(str(error).split())
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MemoryError) and not said:
        return "there is not enough memory for it"
    plain = isinstance(error, OSError | ValueError | ImportError) and said
    return said[:longest] if plain else f"{type(error).__name__}: {said[:longest]}".removesuffix(": ")


class _TooLong(BaseException):
    """Raised by the alarm of `time_limit`; no Exception, so that no library catches it."""


@contextmanager
def guarded(what: str, remedy: str) -> Iterator[None]:
    """A boundary: whatever a library raises within the block becomes a UserError: `what` (libraries' words); `remedy`.

    The traceback stays the error's cause. An exception that our own code raises passes unchanged, because it is a bug of ours,
    and so does one that says that a disk or a GPU is full.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        # tokenizers' Rust code panics with a BaseException of this name
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or type(error).__name__ in PASSED_ON or _is_ours(error):
            raise
        raise UserError(f"{what} ({words_of(error)}); {remedy}") from error


def _is_ours(error: BaseException) -> bool:
    """Whether a line of this package raised `error`: not if its type is a library's, as compiled code has no lines."""
    if type(error).__module__.split(".")[0] not in ("builtins", "toolkit") or isinstance(error, RecursionError):
        return False
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return at is not None and at.tb_frame.f_code.co_filename.startswith(OURS)


@contextmanager
def time_limit(seconds: float, message: str) -> Iterator[None]:
    """Ends the block with `UserError(message)` after `seconds`, where the system has an alarm (in the main thread, not on Windows).

    An alarm that was set before goes on afterwards.
    """
    if threading.current_thread() is not threading.main_thread() or os.name == "nt":
        yield
        return

    def ring(number: int, frame: Any) -> NoReturn:
        raise _TooLong

    began = time.monotonic()
    handler = signal.signal(signal.SIGALRM, ring)
    left, again = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _TooLong:
        raise UserError(message) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 0.001), again)


LESS_MEMORY = (
    "to need less: --activation_checkpointing, a smaller --per_device_train_batch_size (with --gradient_accumulation_steps) or "
    "--max_length, recipes/qlora.py, or a launch file that offloads"
)
