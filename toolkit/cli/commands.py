"""The commands: one function each, of the same name. Each imports what it needs itself, so that listings start quickly."""

import argparse
import itertools
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from toolkit.cli.listing import gpus, methods, models
from toolkit.errors import CONTROLS, UserError, printable
from toolkit.memory.cuda.cards import find_card, generic_card

__all__ = [
    "compare",
    "evaluate",
    "generate",
    "gpus",
    "merge",
    "methods",
    "models",
    "predict",
    "recipe",
    "report",
    "train",
]


def predict(args: argparse.Namespace) -> int:
    """Shows the memory that a run with these flags will need. Returns 1 if the GPU has less, otherwise 0."""
    from toolkit.cli.output import clean_stdout
    from toolkit.runs import api, launching

    launching.check(args.method, args.flags, predict=True)
    if args.launch is not None:
        launching.find_launch_file(args.launch)
    elif args.gpu:
        find_card(args.gpu)
    elif args.gpu_memory:
        generic_card(args.gpu_memory)
    launching.say_start(f"predict {args.method}", sys.stderr)
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
            if ledger.fits:
                processes = ledger.processes if args.launch else None
                print("next:", launching.command_after(args.method, args.flags, args.launch, processes), file=out)
    return 0 if ledger.fits else 1


def train(args: argparse.Namespace) -> None:
    """Runs a recipe."""
    from toolkit.runs.launching import train

    train(args.method, args.flags, args.launch, args.num_processes)


def recipe(args: argparse.Namespace) -> None:
    """Prints a recipe."""
    from toolkit.runs.launching import find_recipe

    print(find_recipe(args.method).read_text(encoding="utf-8"), end="")


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


def evaluate(args: argparse.Namespace) -> None:
    """Scores a finished run."""
    from toolkit.runs import launching

    given = launching.data_flags(args.flags)
    if args.dataset_name is not None:
        given["dataset_name"] = args.dataset_name
    launching.check_evaluation(args.run_dir, given, args.per_device_eval_batch_size)
    launching.say_start(f"evaluate {args.run_dir}", sys.stderr)
    from toolkit.cli.output import clean_stdout

    with clean_stdout() if args.json else nullcontext() as out:
        from toolkit.runs.scoring import evaluate

        evaluate(args.run_dir, given, args.per_device_eval_batch_size, args.output_file, out)


def generate(args: argparse.Namespace) -> None:
    """Prints the answers of one or several models to the given texts, or to each typed line."""
    from toolkit.errors.numbers import check_numbers
    from toolkit.runs import launching

    paths = list(itertools.takewhile(launching.holds_model, map(Path, args.arguments)))
    texts = args.arguments[len(paths) :]
    check_numbers({"num_beams": args.num_beams})
    if not paths:
        raise UserError(
            f"{args.arguments[0]} is not a run folder: it has no run.json and config.yaml, and no config.json of a model; give the "
            "output folder of a recipe, or the folder of a model"
        )
    if not texts and not args.interactive:
        raise UserError("no text was given; write it after the run folders, or add --interactive")
    launching.say_start("generate", sys.stderr)
    from toolkit.runs.finished_run import FinishedRun, Models, is_run_folder
    from toolkit.runs.model_folder import ModelFolder

    runs = [FinishedRun(path) if is_run_folder(path) else ModelFolder(path) for path in paths]
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
    from toolkit.runs import launching

    launching.check_run_folder(args.run_dir)
    launching.say_start(f"merge {args.run_dir}")
    from toolkit.runs.merge import merge

    merge(args.run_dir, args.output_dir, args.dtype)
