"""Starts recipes for the footprint command: checks their flags, shows their help, and makes the launcher's command line."""

import os
import runpy
import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit.config import page, sources, start
from toolkit.config.start import say_start
from toolkit.distributed.folders import find_launch_file, find_recipe
from toolkit.distributed.launcher import STARTED_AS, without_secrets
from toolkit.errors import UserError, check_filled, did_you_mean
from toolkit.errors.numbers import check_numbers
from toolkit.errors.reading import read_yaml

__all__ = [
    "check",
    "check_evaluation",
    "check_run_folder",
    "command_after",
    "data_flags",
    "find_launch_file",
    "find_recipe",
    "flags_with",
    "holds_model",
    "launch_command",
    "own_flags",
    "say_start",
    "settings",
    "show_help",
    "train",
]
EXCLUSIVE = (("bf16", "fp16"), ("load_in_4bit", "load_in_8bit"))  # switches of which a run has one at most
OF_A_RUN = ("run.json", "config.yaml")


def check(method: str, flags: Sequence[str], predict: bool = False) -> None:
    """Checks the name of a method and its recipe's flags, without importing PyTorch or transformers.

    Raises: UserError as `toolkit.config.start.check` does, and for an unknown method.
    """
    _check_method(method)
    start.check(method, [*flags, "--predict"] if predict else flags)


def _check_method(name: str) -> None:
    """Raises UserError if `name` is no method."""
    there = sources.methods()
    if name not in there:
        raise UserError(f"unknown method {name!r}{did_you_mean(name, there)}; there are: {', '.join(there)}")


def own_flags(method: str) -> set[str]:
    """The names of the flags that `method` itself has, besides those of model, data and training.

    Raises: UserError for an unknown method.
    """
    _check_method(method)
    return set(sources.own_fields(method))


def flags_with(changes: Sequence[str], method: str, flags: Sequence[str], other: str) -> list[str]:
    """The flags of `method` that `changes` makes of `flags`, given for the method `other`.

    Left out are flags that `method` lacks, and those that a change excludes: `--fp16` replaces `--bf16`.

    Raises: UserError for an unknown method or flag.
    """
    changed = settings(method, changes)
    dropped = own_flags(other) - own_flags(method)
    dropped |= {name for pair in EXCLUSIVE for name in pair if any(changed.get(one) is True for one in pair)}
    found, takes = [], True
    for word in flags:
        if word.startswith("--"):
            name = word[2:].split("=")[0].replace("-", "_")
            takes = not {name, name.removeprefix("no_")} & dropped
        if takes:
            found.append(word)
    return [*found, *changes]


def settings(method: str, flags: Sequence[str]) -> dict[str, Any]:
    """The values in the flags of the recipe for `method`, by name, without defaults.

    Raises: UserError for an unknown method or flag, and for a mistyped value.
    """
    _check_method(method)
    return start.QuickParser(method).given(flags)


def show_help(command: ArgumentParser, words: Sequence[str]) -> bool:
    """Prints the help of `footprint predict METHOD` or `footprint train METHOD`; returns False if `words` do not ask for it."""
    method = next((word for word in words if word in sources.methods()), None)
    if method is None or not {"-h", "--help"}.intersection(words):
        return False
    own = page.card_lines(command._actions)
    if start.wants_short_help(words) and (text := page.short_help(method, command.prog, own)):
        print(text)
        return True
    from toolkit.config import RecipeParser, help
    from toolkit.methods import METHODS

    parser = RecipeParser(METHODS[method])
    whole = not start.wants_short_help(words)
    print(help.long_help(parser, command.prog, own) if whole else help.short_page(parser, command.prog, own))
    return True


def holds_model(path: Path) -> bool:
    """Whether `path` is a folder of a run, a model or an adapter; also safe for texts that are too long to be a path."""
    try:
        return any((path / name).exists() for name in (*OF_A_RUN, "config.json", "adapter_config.json"))
    except (OSError, ValueError):
        return False


def check_run_folder(path: Path) -> None:
    """Raises UserError if `path` has none of the files of a run."""
    if not any((path / name).exists() for name in OF_A_RUN):
        raise UserError(
            f"{path} is not a run folder: it has no run.json and config.yaml; give the output folder of a recipe"
        )


def data_flags(words: Sequence[str]) -> dict[str, Any]:
    """The flags of the data in `words`, by name.

    Raises: UserError for an unknown flag, and for one that does not belong to the data.
    """
    given = start.QuickParser("lora").given(words)
    for name in given:
        if name not in sources.rows_flags():
            raise UserError(
                f"--{name} has no effect here: the run's own is used; these have: {', '.join(sources.rows_flags())}"
            )
    return given


def check_evaluation(run_dir: Path, given: Mapping[str, Any], batch_size: int) -> None:
    """Raises UserError for a folder that is no run's, and for flags of the data that cannot be right."""
    check_run_folder(run_dir)
    check_filled(given)
    check_numbers({**given, "per_device_eval_batch_size": batch_size})
    start.check_paths(dict(given))


def launch_command(recipe: Path, launch: Path, flags: Sequence[str], processes: int | None = None) -> list[str]:
    """The command that starts `recipe` by accelerate's launcher with the file `launch`.

    DeepSpeed's settings, which a file of launch/ names relative to the repository, are found from every working directory.

    Raises: UserError for a launch file that cannot be read.
    """
    words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(launch)]
    if processes is not None:
        words += ["--num_processes", str(processes)]
    settings = read_yaml(launch, f"--launch {launch}", "see the files of launch/ for examples")
    named = (settings.get("deepspeed_config") or {}).get("deepspeed_config_file")
    beside = launch.resolve().parent.parent / str(named)
    if named and not Path(named).is_file() and beside.is_file():
        words += ["--deepspeed_config_file", str(beside)]
    return [*words, str(recipe), *flags]


def train_command(method: str, flags: Sequence[str], launch: str | None = None, processes: int | None = None) -> str:
    """The command line of `train` with these arguments."""
    words = ["footprint", "train", method, *(["--launch", launch] if launch is not None else [])]
    words += ["--num_processes", str(processes)] if processes is not None else []
    return shlex.join([*words, *flags])


def command_after(method: str, flags: Sequence[str], launch: str | None, processes: int | None) -> str:
    """The command line that trains what was predicted with these arguments; DATA stands for data that were not named."""
    given = settings(method, flags)
    if "model_name_or_path" in given and not {"dataset_name", "config"} & given.keys():
        flags = [*flags, "--dataset_name", "DATA"]
    return train_command(method, flags, launch, processes)


def train(method: str, flags: Sequence[str], launch: str | None, processes: int | None) -> None:
    """Runs the recipe for `method` in this process, or, with the launch file `launch`, becomes accelerate's launcher.

    Signals and exit codes are the recipe's and the launcher's own.

    Raises: UserError as `check` and `launch_command` do, and for an impossible number of processes.
    """
    if processes is not None:
        check_numbers({"num_processes": processes})
    recipe = find_recipe(method)
    if recipe.stem in sources.methods():
        check(method, flags)
    if launch is None and processes not in (None, 1):
        raise UserError(f"--num_processes {processes} needs a launch file; add for instance --launch ddp")
    started_as = without_secrets(train_command(method, flags, launch, processes))
    if launch is None:
        sys.argv, os.environ[STARTED_AS] = [str(recipe), *flags], started_as
        try:
            runpy.run_path(str(recipe), run_name="__main__")
        finally:
            os.environ.pop(STARTED_AS, None)
        return
    file = find_launch_file(launch)
    words = launch_command(recipe, file, flags, processes)
    start.say(f"starting accelerate launch --config_file {file}")
    sys.stdout.flush()
    os.execve(words[0], words, os.environ | {STARTED_AS: started_as})
