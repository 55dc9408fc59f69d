"""The `footprint` command: what is done with runs besides training, which is `accelerate launch recipes/METHOD.py`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from toolkit import __version__
from toolkit.errors import UserError
from toolkit.ranks import exits_cleanly


class Parser(argparse.ArgumentParser):
    """argparse with one clear line instead of a usage page."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def generate(args: argparse.Namespace) -> None:
    """Prints the text that a run's model writes for each of the given texts."""
    from toolkit.finished_run import FinishedRun

    run = FinishedRun(args.run_dir)
    for text in run.generate(args.text, num_beams=args.num_beams):
        print(text)


def predict(args: argparse.Namespace) -> int:
    """Shows the memory that a recipe's flags will need; 1 where it is more than the card has."""
    from toolkit.predict_command import predict_command

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

    command = commands.add_parser("generate", help="let the model of a finished run write for a text")
    command.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the folder that a recipe left")
    command.add_argument("text", nargs="+", metavar="TEXT", help="what goes into the run's prompt")
    command.add_argument("--num_beams", type=int, default=1, help="beams; 1 is greedy (default: %(default)s)")
    command.set_defaults(run=generate)

    command = commands.add_parser(
        "predict",
        help="show what memory a run will need, on this machine or on a GPU that is not in it",
        usage="footprint predict METHOD [any flag of its recipe] [--gpu NAME | --gpu_memory 24GiB] [--json]",
    )
    command.add_argument("method", metavar="METHOD", help="a recipe's name, such as lora")
    command.add_argument("flags", nargs=argparse.REMAINDER, help="the recipe's flags, and --gpu, --gpu_memory, --json")
    command.set_defaults(run=predict)

    command = commands.add_parser("report", help="show where the memory of one run went, or of several side by side")
    command.add_argument("ledger", nargs="+", metavar="LEDGER", help="a run's folder, or its memory.json")
    command.set_defaults(run=report)
    return top


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int | None:
    """The entry point of the `footprint` command."""
    args = parser().parse_args(argv)
    return args.run(args)
