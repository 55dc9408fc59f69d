"""The `footprint` command: what is done with runs besides training, which is `accelerate launch recipes/METHOD.py`."""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from toolkit import __version__
from toolkit.distributed.ranks import exits_cleanly
from toolkit.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse with one clear line instead of a usage page."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def generate(args: argparse.Namespace) -> None:
    """Prints what the models of one or several runs answer to each of the given texts, or to each line that is typed."""
    from toolkit.runs.finished_run import FinishedRun, Models, is_run_folder

    paths = list(itertools.takewhile(is_run_folder, map(Path, args.arguments)))
    texts = args.arguments[len(paths) :]
    if not paths:
        raise UserError(
            f"{args.arguments[0]} is not a run folder: it has no run.json and config.yaml; give one that a recipe left"
        )
    if not texts and not args.interactive:
        raise UserError("no text was given; write it after the run folders, or add --interactive")
    runs = [FinishedRun(path) for path in paths]
    models = Models()
    width = max(len(run.path.name) for run in runs)

    def answer(some: Sequence[str]) -> None:
        for run in runs:
            for text in run.generate(some, models.of(run), num_beams=args.num_beams):
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
    """Folds a run's adapter into its base."""
    from toolkit.runs.merge import merge

    merge(args.run_dir, args.output_dir, args.dtype)


def compare(args: argparse.Namespace) -> int:
    """Runs methods side by side, and shows how they compare; 1 where a run failed."""
    from toolkit.compare.command import compare

    return compare(args)


def predict(args: argparse.Namespace) -> int:
    """Shows the memory that a recipe's flags will need; 1 where it is more than the card has."""
    from toolkit.runs.predict_command import predict_command

    return predict_command(args.method, args.flags)


def report(args: argparse.Namespace) -> None:
    """Puts ledgers side by side."""
    from toolkit.console import console
    from toolkit.memory.report import load_all, print_ledger, print_side_by_side

    ledgers = load_all(args.ledger)
    if len(ledgers) == 1:
        print_ledger(console, ledgers[0][1])
    else:
        print_side_by_side(console, ledgers)


def parser() -> argparse.ArgumentParser:
    """The command line; each subcommand imports what it needs when it runs, so that `--help` answers at once."""
    top = Parser(prog="footprint", description="Fine-tune language models, and know where the memory goes.")
    top.add_argument("--version", action="version", version=f"footprint {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser(
        "generate",
        help="let the models of finished runs answer a text",
        usage='footprint generate RUN_DIR [RUN_DIR ...] ["text" ...] [--interactive] [--num_beams N]',
    )
    command.add_argument(
        "arguments",
        nargs="+",
        metavar="RUN_DIR ... TEXT",
        help="folders that recipes left, then what goes into the prompt",
    )
    command.add_argument("--interactive", action="store_true", help="answer each line that is typed, until Ctrl-D")
    command.add_argument("--num_beams", type=int, default=1, help="beams; 1 is greedy (default: %(default)s)")
    command.set_defaults(run=generate)

    command = commands.add_parser("merge", help="fold a run's adapter into its base, for use without PEFT")
    command.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the folder that a recipe left")
    command.add_argument("--output_dir", type=Path, help="a new folder (default: RUN_DIR-merged)")
    command.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="type of the merged weights (default: that of the run's base)",
    )
    command.set_defaults(run=merge)

    command = commands.add_parser(
        "compare",
        help="run methods side by side, each in its own process, and compare quality, memory and time",
        usage="footprint compare --methods full,lora,... [--seeds 3] [any flag of the recipes] --output_dir DIR\n"
        "       footprint compare --show --output_dir DIR",
        allow_abbrev=False,
    )
    command.add_argument("--methods", help="names of recipes, with commas; a flag goes to those that have it")
    command.add_argument(
        "--seeds", type=int, default=3, help="runs of each method, with the seeds 0, 1, ... (default: 3)"
    )
    command.add_argument("--output_dir", type=Path, required=True, help="what is done there already is not done again")
    command.add_argument("--launch", type=Path, help="accelerate's configuration (default: launch/single.yaml)")
    command.add_argument("--show", action="store_true", help="run nothing: write and show the results that are there")
    command.set_defaults(run=compare, flags=[])

    command = commands.add_parser(
        "predict",
        help="show what memory a run will need, on this machine, or on a GPU or several that are not in it",
        usage="footprint predict METHOD [any flag of its recipe] [--gpu NAME | --gpu_memory 24GiB]\n"
        "                         [--launch zero3 | --launch FILE.yaml] [--num_processes N] [--json]",
    )
    command.add_argument("method", metavar="METHOD", help="a recipe's name, such as lora")
    command.add_argument("flags", nargs=argparse.REMAINDER, help="the recipe's flags, and these")
    command.set_defaults(run=predict)

    command = commands.add_parser("report", help="show where the memory of one run went, or of several side by side")
    command.add_argument("ledger", nargs="+", metavar="LEDGER", help="a run's folder, or its memory.json")
    command.set_defaults(run=report)
    return top


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int | None:
    """The entry point of the `footprint` command."""
    args, rest = parser().parse_known_args(argv)
    if args.command == "compare":
        args.flags = rest
    elif rest:
        raise UserError(f"unrecognized arguments: {' '.join(rest)}; see footprint {args.command} --help")
    return args.run(args)
