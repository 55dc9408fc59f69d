"""`--help` of a recipe: what most people need in at most 40 lines, and `--help all`, with the defaults that are really used."""

import argparse
import dataclasses
import inspect
import re
import shutil
import sys
import textwrap
from collections.abc import Collection, Sequence
from typing import Any

from transformers import HfArgumentParser

from toolkit.config.arguments import OVERRIDDEN
from toolkit.config.page import WIDTH, assemble, flag, line, spelt
from toolkit.methods import Method

# The flags that most people need, with a meaning that fits into a line.
SHORT: dict[str, dict[str, str]] = {
    "model and data": {
        "model_name_or_path": "hub id or folder (default: a tiny T5)",
        "load_in_4bit": "4 bits for each weight of the frozen base",
        "task": "auto: by the data; or chat, text ...",
        "dataset_name": "hub id, file or folder (default: dialogues)",
        "text_column": "also --summary_column, --label_column ...",
        "max_length": "tokens of a row; activations grow with it",
        "max_train_samples": "train on N rows only",
    },
    "training": {
        "learning_rate": "",
        "num_train_epochs": "or --max_steps N",
        "per_device_train_batch_size": "rows of one pass",
        "gradient_accumulation_steps": "passes of one optimizer step",
        "activation_checkpointing": "less memory, more time",
        "bf16": "default: where the card has it; or --fp16",
        "optim": "adamw_torch, adafactor, prodigy ...",
        "seed": "",
    },
    "run": {
        "output_dir": "default: runs/METHOD-MODEL-TIME",
        "eval_strategy": "evaluate while training: no, steps, epoch",
        "load_best_model_at_end": "keep the checkpoint that validates best",
        "resume_from_checkpoint": "go on with the run in --output_dir",
        "report_to": "wandb, tensorboard, trackio ...",
        "config": "a YAML file whose keys are these flags",
        "predict": "show the memory that is needed; do not run",
    },
}
OWN_FLAGS = 7  # of a method are shown at most


class HelpAction(argparse.Action):
    """`--help` prints the short page, `--help all` the long one; both on standard output."""

    def __init__(self, option_strings: Sequence[str], dest: str, **rest: Any) -> None:
        super().__init__(option_strings, dest, nargs="?", default=argparse.SUPPRESS, help="Show this page.")

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Prints the page and ends."""
        print(long_help(parser) if values == "all" else short_page(parser))
        parser.exit(0)


def short_texts(parser: Any) -> dict[str, Any]:
    """The lines of the short page: what the recipe is (`about`), `groups` of flags by title, and `notes`."""
    method: type[Method] = parser.method
    defaults, actions = defaults_of(method), _actions(parser)
    own = [field.name for field in dataclasses.fields(method) if field.name != "kbit_upcast"][:OWN_FLAGS]
    used = method.used_training_flags
    shown = {
        title: {name: text for name, text in flags.items() if title == "model and data" or _has_effect(name, used)}
        for title, flags in SHORT.items()
    }
    if not method.freezes_base:
        del shown["model and data"]["load_in_4bit"]
    groups = {"model and data": shown["model and data"]}
    if own:
        groups[str(getattr(method, "_argument_group_name", method.name))] = {
            name: actions[name].help or "" for name in own
        }
    groups |= {title: flags for title, flags in shown.items() if title not in groups}
    summary = " ".join((inspect.getdoc(sys.modules[method.__module__]) or "").split()).split(". ")[0].rstrip(".")
    if (optim := method.optimizer(on_gpu=True)[0]) and "optim" in groups["training"]:
        defaults, groups["training"]["optim"] = defaults | {"optim": optim}, "on a GPU; else adamw_torch_fused"
    return {
        "about": textwrap.wrap(f"{summary}.", WIDTH, max_lines=2, placeholder=" ..."),
        "groups": {
            title: [
                line(actions[name], text, defaults.get(name, actions[name].default)) for name, text in flags.items()
            ]
            for title, flags in groups.items()
        },
        "notes": ["The tiny T5 trains with defaults of its own, which --help all lists."],
    }


def _has_effect(name: str, used: Collection[str] | None) -> bool:
    """Whether a flag of training has an effect, where those of `used` have; None: all have."""
    return used is None or name in used or name in ("config", "predict")


def _optimizer(method: type[Method]) -> list[str]:
    optim, _ = method.optimizer(on_gpu=True)
    return [f"On a GPU the default is --optim {optim}."] if optim else []


def short_page(parser: Any, command: str = "", own: Sequence[str] = ()) -> str:
    """The page of `toolkit.config.page.short_help`, from the classes of the flags."""
    return assemble(parser.method.name, short_texts(parser), command, own)


def long_help(parser: Any, command: str = "", own: Sequence[str] = ()) -> str:
    """Every flag that has an effect, in groups, in the width of the terminal; `command` and `own` as for the short page."""
    method: type[Method] = parser.method
    defaults, width = defaults_of(method), min(shutil.get_terminal_size().columns, 120)
    meanings = {name: text for flags in SHORT.values() for name, text in flags.items()}
    begin = f"{command} {method.name}" if command else f"accelerate launch recipes/{method.name}.py"
    lines = [f"usage: {begin} [--flag value ...]", ""]
    lines += textwrap.wrap(" ".join((inspect.getdoc(method) or "").split()), width)
    lines += ["", "this command:", *own] if own else []
    for group in parser._action_groups:
        actions = [one for one in group._group_actions if one.dest not in OVERRIDDEN and not is_negation(one)]
        if actions:
            lines += ["", f"{'every recipe' if group.title in ('options', 'optional arguments') else group.title}:"]
        for action in actions:
            text = " ".join((action.help or "").split())
            if (alias := re.match(r"Deprecated alias of `(\w+)`", text)) is not None:
                text = meanings.get(action.dest, f"The same as --{alias[1]}.")
            lines.append(f"  {flag(action, defaults.get(action.dest, action.default))}")
            lines += textwrap.wrap(
                text, width, initial_indent=" " * 8, subsequent_indent=" " * 8, break_on_hyphens=False
            )
    tiny = {name: value for name, value in method.defaults({}).items() if value != defaults.get(name)}
    words = " ".join(f"--{name} {spelt(value)}" for name, value in tiny.items())
    lines += ["", *_optimizer(method)]
    return "\n".join(lines + textwrap.wrap(f"Defaults for the tiny T5: {words}", width, break_on_hyphens=False))


def defaults_of(method: type[Method]) -> dict[str, Any]:
    """The defaults of a recipe for a model that the user names, where they differ from those of the flags."""
    return method.defaults({"model_name_or_path": "any"})


def is_negation(action: argparse.Action) -> bool:
    """Whether this is a `--no_...` flag, which transformers adds to each flag that is on by default."""
    return isinstance(action, argparse._StoreFalseAction) and action.option_strings[0].startswith("--no_")


def _actions(parser: HfArgumentParser) -> dict[str, argparse.Action]:
    return {action.dest: action for action in parser._actions if not is_negation(action)}
