"""The commands: one function each, of the same name. Each imports what it needs itself, so that listings start quickly."""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from toolkit.cli.listing import gpus, methods, models
from toolkit.errors import CONTROLS, UserError, printable

__all__ = ["compare", "generate", "gpus", "merge", "methods", "models", "predict", "report"]


def predict(args: argparse.Namespace) -> int:
    """Shows the memory that a run with these flags will need. Returns 1 if the GPU has less, otherwise 0."""
    from toolkit.cli.output import clean_stdout
    from toolkit.runs import api

    with clean_stdout() as out:
        ledger = api.predict(
            args.method,
            *args.flags,
            gpu=args.gpu,
            gpu_memory=args.gpu_memory,
            launch=args.launch,
            num_processes=args.num_processes,
            advise=True,
        )
        if args.json:
            import json

            print(json.dumps(ledger.to_json()), file=out)
        else:
            from toolkit.console import PlainConsole
            from toolkit.memory.report import print_ledger

            print_ledger(PlainConsole(file=out), ledger)
    return 0 if ledger.fits else 1


def compare(args: argparse.Namespace) -> int:
    """Runs methods side by side and compares them. Returns 1 if a run failed, otherwise 0."""
    from toolkit.compare.command import compare

    return compare(args)


def report(args: argparse.Namespace) -> None:
    """Shows one ledger, or several side by side."""
    from toolkit.console import console
    from toolkit.memory.report import load_all, print_ledger, print_side_by_side

    ledgers = load_all(args.ledger)
    if len(ledgers) == 1:
        print_ledger(console, ledgers[0][1])
    else:
        print_side_by_side(console, ledgers)


def generate(args: argparse.Namespace) -> None:
    """Prints the answers of one or several runs' models to the given texts, or to each typed line."""
    from toolkit.errors.numbers import check_numbers
    from toolkit.runs.finished_run import FinishedRun, Models, is_run_folder

    paths = list(itertools.takewhile(is_run_folder, map(Path, args.arguments)))
    texts = args.arguments[len(paths) :]
    check_numbers({"num_beams": args.num_beams})
    if not paths:
        raise UserError(
            f"{args.arguments[0]} is not a run folder: it has no run.json and config.yaml; give the output folder of a recipe"
        )
    if not texts and not args.interactive:
        raise UserError("no text was given; write it after the run folders, or add --interactive")
    runs = [FinishedRun(path) for path in paths]
    models = Models()
    width = max(len(run.path.name) for run in runs)

    def answer(some: Sequence[str]) -> None:
        for run in runs:
            for text in run.generate(some, models.of(run), num_beams=args.num_beams):
                text = CONTROLS.sub(lambda found: found[0] if found[0] in "\n\t" else printable(found[0]), text)
                print(text if len(runs) == 1 else f"{run.path.name:>{width}}  {text}", flush=True)

    if texts:
        answer(texts)
    while args.interactive:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line:
            answer([line])


def merge(args: argparse.Namespace) -> None:
    """Merges a run's adapter into its base."""
    from toolkit.runs.merge import merge

    merge(args.run_dir, args.output_dir, args.dtype)
