"""The pages of `--help`: how a flag becomes a line, and the short page of a recipe from its file of texts."""

import argparse
import json
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHORT_HELP = Path(__file__).with_name("short_help.json")  # written by `python benchmarks/cli_reference.py`
WIDTH, COLUMN = 80, 35  # of a line, and where the meaning begins


def short_help(method: str, command: str = "", own: Sequence[str] = ()) -> str:
    """The help of the recipe for `method` in at most 40 lines, or of a `command` that has the lines `own` and runs that recipe.

    Empty if the method is newer than the file of help texts.
    """
    text = json.loads(SHORT_HELP.read_text(encoding="utf-8")).get(method)
    return "" if text is None else assemble(method, text, command, own)


def assemble(method: str, text: dict[str, Any], command: str = "", own: Sequence[str] = ()) -> str:
    """The page of `short_help`, from the groups of lines in `text`."""
    groups = dict(text["groups"])
    begin = f"{command} {method}" if command else f"accelerate launch recipes/{method}.py"
    every = f"{command} {method} --help all" if command else f"python recipes/{method}.py --help all"
    if own:
        groups = {"this command": list(own)} | groups
    if "--gpu" in "".join(own):  # a prediction leaves no folder
        del groups["run"]
    elif own:
        groups["run"] = [one for one in groups["run"] if "--predict" not in one]
    lines = [f"usage: {begin} [--flag value ...]", *text["about"]]
    for title, flags in groups.items():
        lines += [f"{title}:", *flags]
    return "\n".join([*lines, *text["notes"], f"All flags: {every}"])


def card_lines(actions: Sequence[argparse.Action]) -> list[str]:
    """The lines of a command's own flags, such as those of footprint predict, for the short page."""
    return [line(one, one.help or "", None) for one in actions if one.option_strings and one.dest != "help"]


def line(action: argparse.Action, text: str, default: Any) -> str:
    """`  --lora_r 16          Rank`: a flag with its default value and what it means."""
    head = f"{f'  {flag(action, default)}':<{COLUMN - 1}} "
    return f"{head}{brief(text, WIDTH - len(head))}".rstrip()


def flag(action: argparse.Action, default: Any) -> str:
    """`--lora_r 16`, `--dataset_name TEXT`, `--use_dora`."""
    name = next(option for option in action.option_strings if option.startswith("--"))
    if default not in (None, "", [], {}, argparse.SUPPRESS) and default is not False:
        return f"{name} {spelt(default)}"
    if action.nargs == 0 or isinstance(default, bool) or (action.nargs == "?" and action.const is True):
        return name
    kinds: dict[Any, str] = {int: "N", float: "X", Path: "PATH"}
    value = str(action.metavar or kinds.get(action.type, "TEXT"))
    if action.nargs == "?":
        return f"{name} [{value}]"
    return f"{name} {value} ..." if action.nargs == "+" else f"{name} {value}"


def brief(text: str, room: int) -> str:
    """The beginning of a flag's meaning that fits into a line: a sentence, or a part of one."""
    said = re.sub(r" \(arXiv:[^)]*\)", "", " ".join(text.split())).split(". ")[0].rstrip(".")
    while len(said) > room and "; " in said:
        said = said.rsplit("; ", 1)[0]
    return textwrap.shorten(said, room, placeholder=" ...")


def spelt(value: Any) -> str:
    """A default as it follows a flag."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return (
        str(value).lower()
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(getattr(value, "value", value))
    )
