"""`footprint predict METHOD ... --against ...`: the second configuration, and the difference of both in sentences or as JSON."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from toolkit.errors import CommandParser, UserError
from toolkit.runs import launching

SAME = "both configurations are the same; name after --against what is different, such as --max_length 2048"
# The flags of predict itself; one of a group replaces all of it.
OWN = (("gpu", "gpu_memory"), ("launch",), ("num_processes",), ("host_memory",), ("disk",))


def second(command: CommandParser, first: argparse.Namespace) -> argparse.Namespace:
    """The arguments of configuration B: those of A, which `command` parsed, with the changes in `first.against`.

    Flags that only A's method has are left out. A card, however given, replaces that of A.

    Raises: UserError for no change, a second --against, and for a method or flag that there is not.
    """
    words = (
        first.against if first.against[:1] and not first.against[0].startswith("-") else [first.method, *first.against]
    )
    other, changes = command.parse_known_args(words)
    if other.against is not None:
        raise UserError("--against is given twice; predict compares two configurations")
    if words == [first.method]:
        raise UserError(SAME)
    for names in OWN:
        if all(getattr(other, name) is None for name in names):
            vars(other).update({name: getattr(first, name) for name in names})
    other.flags = launching.flags_with(changes, other.method, first.flags, first.method)
    first.json = first.json or other.json
    if _asked(first) == _asked(other):
        raise UserError(SAME)
    return other


def _asked(args: argparse.Namespace) -> tuple[Any, ...]:
    """What `args` ask for, of which equal values are the same prediction."""
    own = [getattr(args, name) for names in OWN for name in names]
    return args.method, launching.settings(args.method, args.flags), own


def show(first: argparse.Namespace, before: Any, after: Any, out: TextIO) -> None:
    """Prints the difference of the ledgers `before` (of `first`) and `after` (of `first.against`).

    Raises: UserError if both have the same settings, given or by default.
    """
    from toolkit.console import PlainConsole
    from toolkit.memory.explain import print_difference

    changed = _changed(first, first.against, before, after)
    if not changed:
        raise UserError(SAME)
    if first.json:
        both = {"a": before.to_json(), "b": after.to_json(), "difference": before.difference(after).to_json()}
        print(json.dumps(both), file=out)
    else:
        print_difference(PlainConsole(file=out), before, after, changed)


def _changed(first: argparse.Namespace, other: argparse.Namespace, before: Any, after: Any) -> list[str]:
    """`--max_length 2048 instead of 512` for each setting that differs, given or by default; also method, launch and device.

    Flags that only one of both methods has are left out.
    """
    from toolkit.memory.explain import processes_of

    launches = [_file(args.launch) for args in (first, other)]
    named: dict[str, tuple[Any, ...]] = {
        "method": (first.method, other.method),
        "device": (before.device, after.device),
    }
    if launches[0] != launches[1]:
        named["--launch"] = first.launch or "one process", other.launch or "one process"
    else:
        named[""] = processes_of(before), processes_of(after)
    for name in ("host_memory", "disk"):
        named[f"--{name}"] = tuple(getattr(args, name) or "its default" for args in (first, other))
    of_one = launching.own_flags(first.method) ^ launching.own_flags(other.method)
    for name in {**before.config, **after.config}:
        if name not in of_one:
            named[f"--{name}"] = _spelt(before.config.get(name)), _spelt(after.config.get(name))
    changed = {name: values for name, values in named.items() if values[0] != values[1]}
    return [
        f"{name} {two} instead of {one}".strip()
        for name, (one, two) in changed.items()
        if not name.endswith("_kwargs") or name.removesuffix("_kwargs") not in changed  # they follow the flag
    ]


def _file(launch: str | None) -> Path | None:
    return None if launch is None else launching.find_launch_file(launch).resolve()


def _spelt(value: Any) -> str:
    """A setting as it follows its flag."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, Mapping | bool):
        return json.dumps(value)
    return "its default" if value is None else str(value)
