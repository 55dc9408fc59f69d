"""Writes toolkit/cli/README.md, the reference of every command and flag, and the short help, from the parsers.

`--check` only compares.

    python benchmarks/cli_reference.py

The text comes from the parsers' arguments, not from `--help`: the format of that depends on Python's version and the terminal.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PATH = ROOT / "toolkit" / "cli" / "README.md"
SHORT_HELP = ROOT / "toolkit" / "config" / "short_help.json"
RECIPE = "lora"  # the recipe with all flags shown

HEAD = f"""# The command line

<!-- Written by `python benchmarks/cli_reference.py` from the parsers' own texts. -->

Training is `accelerate launch recipes/METHOD.py`, or `footprint train METHOD`; everything else is a `footprint` command. Each
command and each recipe shows its main flags with `--help`, and a recipe all of them with `--help all`. A mistake ends it with exit code 2 and one line that says what to change.

- [Commands](#commands)
- [Flags of recipes/{RECIPE}.py](#flags-of-recipes{RECIPE}py), most of which every recipe has
- [Flags of the other methods](#flags-of-the-other-methods)

## Commands
"""
FLAGS = f"""## Flags of recipes/{RECIPE}.py

Each flag is also a key of the YAML file that `--config` names. `--lora_r 8` and `--lora_r=8` mean the same. A flag shown with
`[true]` is a switch: `--use_dora` turns it on, `--use_dora false` turns it off.
"""
OTHERS = """## Flags of the other methods

Each of these recipes also has the flags of model, data and training.
"""
TRAINING = """All fields of transformers'
[`TrainingArguments`](https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments) are flags. Listed
here are those that Footprint adds, and those whose default or meaning it changes.
"""


def reference() -> str:
    """The whole file."""
    sys.path.insert(0, str(ROOT))
    from toolkit.cli import parser
    from toolkit.config import RecipeParser, TrainArguments
    from toolkit.methods import METHODS

    lines = [HEAD]
    for action in parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                lines += [f"### {command.prog}", "", str(command.description), "", "```text", usage(command), "```", ""]
                lines += [*table(command._actions), "", command.epilog or "", ""]
    lines.append(FLAGS)
    for title, actions in groups(RecipeParser(METHODS[RECIPE])).items():
        lines += [f"### {title.split(' (')[0]}", ""]
        if title.startswith("training"):
            ours = list(TrainArguments.__annotations__)
            actions = sorted((a for a in actions if a.dest in ours), key=lambda action: ours.index(action.dest))
            lines.append(TRAINING)
        lines += [*table(actions), ""]
    lines += [own_defaults(METHODS[RECIPE]), "", OTHERS]
    for name, method in METHODS.items():
        if name != RECIPE:
            names = {field.name for field in fields(method)}
            actions = [action for action in RecipeParser(method)._actions if action.dest in names]
            lines += [f"### recipes/{name}.py", "", *table(actions), "", own_defaults(method), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def short_help() -> str:
    """The texts of each recipe's short `--help`, which is printed without importing the classes of the flags."""
    sys.path.insert(0, str(ROOT))
    from toolkit.config import RecipeParser
    from toolkit.config.help import short_texts
    from toolkit.methods import METHODS

    return json.dumps({name: short_texts(RecipeParser(method)) for name, method in METHODS.items()}, indent=1) + "\n"


def groups(parser: argparse.ArgumentParser) -> dict[str, list[argparse.Action]]:
    """A recipe's flags by title: common flags, then those of method, model, data and training."""
    found = {str(group.title): group._group_actions for group in parser._action_groups if group._group_actions}
    return {"every recipe" if title == "options" else title: actions for title, actions in found.items()}


def own_defaults(method: Any) -> str:
    """The recipe's defaults for a model that the user names."""
    settings = method.defaults({"model_name_or_path": "any"})
    words = [f"`--{name} {shown(value)}`" for name, value in settings.items()]
    return f"Defaults of this recipe: {', '.join(words)}." if words else ""


def usage(command: argparse.ArgumentParser) -> str:
    """The usage line of a command: its own, or one built from its arguments."""
    if command.usage:
        return command.usage
    words = [spelt(action) for action in command._actions if not action.option_strings]
    words += [f"[{spelt(action)}]" for action in command._actions if action.option_strings and action.dest != "help"]
    return " ".join([command.prog, *words])


def table(actions: Iterable[argparse.Action]) -> list[str]:
    """A row for each argument, with its form, default and meaning; a sentence if there are none."""
    actions = [action for action in actions if action.dest not in ("help", "version") and not is_negation(action)]
    rows = []
    for action in actions:
        meaning = (action.help or "") % {**vars(action), "prog": ""}
        found = re.search(r"\s*\(default: (.+)\)$", meaning)
        default = found[1] if found else "" if action.default in (None, False) else f"`{shown(action.default)}`"
        meaning = meaning.removesuffix(found[0]) if found else meaning
        cells = [f"`{spelt(action)}`", default, " ".join(meaning.split())]
        rows.append(" ".join(["|", *(f"{cell.replace('|', '&#124;')} |".lstrip() for cell in cells)]))
    return ["| | default | meaning |", "|---|---|---|", *rows] if rows else ["It has no flags of its own."]


def is_negation(action: argparse.Action) -> bool:
    """Whether this is a `--no_...` flag, which transformers adds to each flag that is on by default."""
    return isinstance(action, argparse._StoreFalseAction) and action.option_strings[0].startswith("--no_")


def spelt(action: argparse.Action) -> str:
    """`--lora_r N`, `--dtype {auto,float32}`, `METHOD`."""
    kinds = {int: "N", float: "X", Path: "PATH"}
    if action.nargs == 0:
        value = ""
    elif action.choices:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    else:
        value = str(action.metavar or kinds.get(action.type, "TEXT"))
    if action.nargs == "?":
        value = "[true]" if action.const is True else f"[{value}]"
    if action.nargs == "+" and "..." not in value:
        value += " ..."
    return f"{action.option_strings[0]} {value}".strip() if action.option_strings else value


def shown(value: object) -> str:
    """A default value in the form that follows a flag."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def main() -> int:
    """Writes the files; with `--check`, returns 1 if one differs from the parsers."""
    texts = {PATH: reference(), SHORT_HELP: short_help()}
    if "--check" in sys.argv:
        return int(any(not path.exists() or path.read_text(encoding="utf-8") != text for path, text in texts.items()))
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
