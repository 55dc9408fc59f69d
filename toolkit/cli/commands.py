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
    "cache",
    "compare",
    "doctor",
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
    """Shows what a run with these flags will need. Returns 1 if the GPU, the host's memory or a disk has less, otherwise 0.

    With --against: shows how a second configuration differs. What is returned is that of the first.
    """
    from toolkit.cli import against
    from toolkit.cli.output import clean_stdout
    from toolkit.runs import api, launching

    runs = [args] if args.against is None else [args, args.against]
    for run in runs:
        launching.check(run.method, run.flags, predict=True)
        if run.launch is not None:
            launching.find_launch_file(run.launch)
        elif run.gpu:
            find_card(run.gpu)
        elif run.gpu_memory:
            generic_card(run.gpu_memory)
        for flag in ("host_memory", "disk"):
            api.size_of(flag, getattr(run, flag))
    launching.say_start(f"predict {args.method}", sys.stderr)
    with clean_stdout() as out:
        ledgers = [
            api.predict(
                run.method,
                *run.flags,
                gpu=run.gpu,
                gpu_memory=run.gpu_memory,
                launch=run.launch,
                num_processes=run.num_processes,
                host_memory=run.host_memory,
                disk=run.disk,
                advise=args.against is None,
            )
            for run in runs
        ]
        ledger = ledgers[0]
        if args.against is not None:
            against.show(args, ledger, ledgers[1], out)
        elif args.json:
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


def cache(args: argparse.Namespace) -> None:
    """Says how many predictions are kept, and deletes them with --clear."""
    from toolkit.runs.prediction_cache import cache_folder, clear, size
    from toolkit.units import format_bytes

    folder, (number, nbytes) = cache_folder(), size()
    if folder is None:
        print("no predictions are kept, because FOOTPRINT_CACHE is empty")
        return
    if args.clear:
        clear()
    print(f"{'deleted' if args.clear else 'kept'}: {number:,} predictions, {format_bytes(nbytes)}, in {folder}")


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


def doctor(args: argparse.Namespace) -> int:
    """Shows what this machine has and what to change. Returns 1 if a problem stops or spoils a run, otherwise 0."""
    from toolkit.cli.listing import show_findings
    from toolkit.cli.output import clean_stdout
    from toolkit.runs.doctor import diagnose

    with clean_stdout() as out:
        return show_findings(diagnose(args.launch), args.json, out)


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
