"""`UserError`, the one exception for a user's mistake, a command line that raises it, and hints for misspelt names."""

import argparse
from collections.abc import Iterable
from difflib import get_close_matches
from typing import NoReturn


class UserError(Exception):
    """A mistake in flags, files or data. The message is one line: what was got, what is valid, and what to change."""


class NothingToDo(Exception):
    """What was asked for is done already. The message is one line."""


class CommandParser(argparse.ArgumentParser):
    """argparse with one-line errors instead of a usage page."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def did_you_mean(got: str, valid: Iterable[str]) -> str:
    """`" (did you mean x?)"` with the valid name closest to `got`, or an empty string if none is close."""
    near = get_close_matches(got, list(valid), n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""


LESS_MEMORY = (
    "to need less: --gradient_checkpointing, a smaller --per_device_train_batch_size (with --gradient_accumulation_steps) or "
    "--max_length, recipes/qlora.py, or a launch file that offloads"
)
