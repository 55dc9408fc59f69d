"""The runs of a comparison, the flags of each method, and the check that a folder does not hold another comparison."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from toolkit.config import RecipeParser, TrainArguments, parse_config
from toolkit.config.arguments import OVERRIDDEN
from toolkit.config.hints import refuse_unknown
from toolkit.errors import UserError, did_you_mean
from toolkit.errors.numbers import check_numbers
from toolkit.errors.reading import check_shape, read_json
from toolkit.files import atomic_write
from toolkit.methods import METHODS
from toolkit.runs.finished_run import read_record
from toolkit.runs.launching import find_launch_file, find_recipe
from toolkit.version import __version__

FILE = "comparison.json"

REFUSED = {
    "config": "its keys would have to suit every method; give them as flags, each goes to the methods that have it",
    "seed": "--seeds N gives each method the seeds 0 to N - 1",
    "output_dir": "each run has its own folder in that of the comparison",
    "predict": "it shows memory instead of running; use footprint predict",
    "resume_from_checkpoint": "give the same command again: runs that are done are not done again",
    "push_to_hub": "push the run that you choose",
    "hub_token": "every flag is written into the comparison; push the run that you choose, with `hf auth login`",
}


@dataclass(frozen=True)
class Run:
    """One method with one seed, in its own process."""

    method: str
    seed: int
    folder: Path
    argv: tuple[str, ...]  # of its recipe

    @property
    def log(self) -> Path:
        """The file with the process's terminal output."""
        return self.folder.with_suffix(".log")

    @property
    def is_done(self) -> bool:
        """Whether its folder holds a finished run."""
        try:
            return bool(read_record(self.folder).get("finished"))
        except UserError:
            return False


@dataclass(frozen=True)
class Plan:
    """All runs of a comparison, in starting order: all methods with the first seed, then with the next."""

    folder: Path
    methods: tuple[str, ...]
    seeds: int
    launch: str
    runs: tuple[Run, ...]

    def runs_of(self, method: str) -> list[Run]:
        """The runs of one method, by seed."""
        return [run for run in self.runs if run.method == method]


def new_plan(folder: Path, methods: str | None, seeds: int, launch: Path | None, flags: Sequence[str]) -> Plan:
    """The comparison that the command line describes, plus what `folder` already holds; starts nothing.

    Raises: UserError for an unknown method or flag, an impossible setting, and a folder with other settings.
    """
    names = _methods(methods)
    check_numbers({"seeds": seeds})
    for name in names:
        find_recipe(name)
    launch_file = find_launch_file(str(launch or "single")).resolve()
    shared = _split(flags, names)
    settings = {"launch": str(launch_file), "flags": list(flags)}
    if (folder / FILE).is_file():
        before = _settings(folder)
        for what in ("flags", "launch"):
            if before.get(what) != settings[what]:
                was = " ".join(before[what]) if isinstance(before.get(what), list) else before.get(what)
                raise UserError(
                    f"--output_dir {folder} holds a comparison with other settings ({what}: {was or 'none'}); "
                    "give a new folder, or the same flags"
                )
        old = [name for name in before.get("methods", []) if name not in names]
        shared |= _split(before["flags"], old)
        names, seeds = (
            [*before["methods"], *(n for n in names if n not in before["methods"])],
            max(seeds, before["seeds"]),
        )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output_dir {folder} is not empty and holds no comparison; give a new folder")
    plan = _plan(folder, names, seeds, str(launch_file), shared)
    for name in names:
        _check(plan.runs_of(name)[0])
    return plan


def read_plan(folder: Path) -> Plan:
    """The comparison in `folder`.

    Raises: UserError if there is none.
    """
    if not (folder / FILE).exists():
        raise UserError(f"--output_dir {folder} holds no comparison; start one with --methods")
    before = _settings(folder)
    return _plan(folder, before["methods"], before["seeds"], before["launch"], {})


def _settings(folder: Path) -> dict[str, Any]:
    """The settings of the comparison in `folder`.

    Raises: UserError if its file is damaged.
    """
    what, remedy = f"{folder / FILE} is damaged", "start the comparison in a new folder"
    found = read_json(folder / FILE, what, remedy)
    check_shape(found, {"methods": [str], "seeds": int, "launch": str, "flags?": [str]}, what, remedy)
    if unknown := [name for name in found["methods"] if name not in METHODS]:
        raise UserError(f"{what}: its method {unknown[0]!r} is unknown; {remedy}")
    try:
        check_numbers({"seeds": found["seeds"]})
    except UserError as error:
        raise UserError(f"{what}: {str(error).removeprefix('--')}; {remedy}") from None
    return found


def claim(plan: Plan, flags: Sequence[str]) -> None:
    """Makes the comparison's folder, and writes its settings into it."""
    try:
        (plan.folder / "runs").mkdir(parents=True, exist_ok=True)
        content: dict[str, Any] = {"footprint": __version__, "methods": list(plan.methods), "seeds": plan.seeds}
        content |= {"launch": plan.launch, "flags": list(flags)}
        atomic_write(plan.folder / FILE, json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"--output_dir {plan.folder} cannot be written ({error.strerror}); give a folder that can"
        ) from None


def _methods(given: str | None) -> list[str]:
    if not given:
        raise UserError(f"--methods is missing; name some of {', '.join(sorted(METHODS))}, with commas, or add --show")
    names = list(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))
    for name in names:
        if name == "base":
            raise UserError("--methods base: the base model is scored with every method, so its row is always there")
        if name not in METHODS:
            raise UserError(
                f"--methods {name} is unknown{did_you_mean(name, METHODS)}; there are: {', '.join(sorted(METHODS))}"
            )
    return names


def _plan(folder: Path, methods: Sequence[str], seeds: int, launch: str, flags: dict[str, list[str]]) -> Plan:
    runs = [
        Run(
            name,
            seed,
            path := folder / "runs" / f"{name}-{seed}",
            (*flags.get(name, ()), "--seed", str(seed), "--output_dir", str(path)),
        )
        for seed in range(seeds)
        for name in methods
    ]
    return Plan(folder, tuple(methods), seeds, launch, tuple(runs))


def _split(flags: Sequence[str], methods: Sequence[str]) -> dict[str, list[str]]:
    """For each method, those of `flags` that its recipe has.

    Raises: UserError for a flag that no recipe has, and for one without meaning in a comparison.
    """
    known = {name: _flags(name) for name in methods}
    shares: dict[str, list[str]] = {name: [] for name in methods}
    if flags and not flags[0].startswith("--"):
        raise UserError(f"unexpected value {flags[0]!r}: every setting is a flag, --name value")
    starts = [i for i, token in enumerate(flags) if token.startswith("--")]
    for start, end in itertools.pairwise([*starts, len(flags)]):
        name = flags[start].lstrip("-").split("=")[0].replace("-", "_")
        if name in REFUSED:
            raise UserError(f"--{name} has no place in a comparison: {REFUSED[name]}")
        takers = [method for method in methods if name in known[method]]
        if methods and not takers:
            owners = [m for m, cls in METHODS.items() if name in RecipeParser(cls).flags()]
            if owners:
                raise UserError(f"unknown flag --{name} (it belongs to the method {owners[0]}, which is not compared)")
            refuse_unknown(flags[start], "", set().union(*known.values()), OVERRIDDEN, ())
        for method in takers:
            shares[method] += flags[start:end]
    return shares


def _flags(method: str) -> set[str]:
    """The flags that have an effect with a method. A method that trains nothing ignores most training flags."""
    flags, used = set(RecipeParser(METHODS[method]).flags()), METHODS[method].used_training_flags
    return flags if used is None else flags - {f.name for f in fields(TrainArguments)} | used


def _check(run: Run) -> None:
    """Raises UserError, with the method's name in front, if the recipe would refuse its flags."""
    try:
        parse_config(METHODS[run.method], run.argv)
    except UserError as error:
        raise UserError(f"{run.method}: {error}") from None
