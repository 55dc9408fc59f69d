"""The `footprint` command: training, predictions, comparisons, and what can be done with a finished run."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolkit.distributed.ranks import exits_cleanly
from toolkit.errors import CommandParser, UserError, did_you_mean
from toolkit.version import __version__


def parser() -> CommandParser:
    """The command line. Each command is the function of its name in `toolkit.cli.commands`, imported when it runs."""
    top = CommandParser(prog="footprint", description="Fine-tune language models, and know where the memory goes.")
    top.add_argument("--version", action="version", version=f"footprint {__version__}")
    subparsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, help: str, **more: Any) -> CommandParser:
        return subparsers.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.", **more)

    def takes_method(command: CommandParser) -> None:
        command.add_argument(
            "method", metavar="METHOD", help="a recipe's name, such as lora; footprint methods lists them"
        )

    def takes_processes(command: CommandParser) -> None:
        command.add_argument(
            "--num_processes", metavar="N", type=int, help="number of processes (default: the launch file's own number)"
        )

    command = add(
        "predict",
        "show the memory that a run will need, on this machine or on GPUs that are not in it",
        usage="footprint predict METHOD [any flag of its recipe] [--gpu NAME | --gpu_memory 24GiB]\n"
        "                         [--launch zero3 | --launch FILE.yaml] [--num_processes N] [--host_memory SIZE] [--disk SIZE] [--json]\n"
        "                         [--against [METHOD] what differs]",
        epilog="All other flags are the recipe's own: footprint predict METHOD --help lists them, for instance footprint predict "
        "lora --help. The exit code is 0 if nothing runs out, 1 if the GPU, the host's memory or a disk does, and 2 for a mistake or a "
        "run that cannot be predicted; with --against it is that of the first configuration.",
        allow_abbrev=False,
    )
    takes_method(command)
    command.add_argument(
        "--gpu",
        metavar="NAME",
        help="a GPU that need not be in this machine, such as 'RTX 4090'; footprint gpus lists them (default: this "
        "machine's GPU, or its CPU without one)",
    )
    command.add_argument(
        "--gpu_memory",
        metavar="SIZE",
        help="instead of --gpu: 24GB or 24 for a card sold as 24 GB, 24GiB for as much usable memory",
    )
    command.add_argument(
        "--launch",
        metavar="FILE",
        help="predict one of several processes: the name of a file of launch/, such as zero3, or a path (default: one process)",
    )
    takes_processes(command)
    for name, what in (
        ("--host_memory", "memory of the host"),
        ("--disk", "space on the disk for caches and run folder"),
    ):
        command.add_argument(
            name,
            metavar="SIZE",
            help=f"the free {what}, such as 32GiB, to compare with what the run needs (default: this machine's, unless --gpu, "
            "--gpu_memory or --launch name another)",
        )
    command.add_argument("--json", action="store_true", help="print the ledger as one JSON object")
    command.add_argument(
        "--against",
        metavar="CHANGES",
        nargs=argparse.REMAINDER,
        help="last: compare with the same run changed, such as --against qlora --max_length 1024",
    )
    command.set_defaults(flags=[])

    command = add(
        "train",
        "train: run a recipe, in this process or by accelerate launch",
        usage="footprint train METHOD [any flag of its recipe]\n"
        "       footprint train METHOD --launch zero3 [--num_processes N] [any flag of its recipe]",
        epilog="All other flags are the recipe's own: footprint train METHOD --help lists them, for instance footprint train lora "
        "--help. Signals and the exit code are the recipe's.",
        allow_abbrev=False,
    )
    takes_method(command)
    command.add_argument(
        "--launch",
        metavar="FILE",
        help="start accelerate launch with a file of launch/, such as zero3, or a path (default: one process)",
    )
    takes_processes(command)
    command.set_defaults(flags=[])

    command = add("recipe", "print a recipe, to make your own: footprint recipe lora > my_recipe.py")
    command.add_argument("method", metavar="METHOD", help="a recipe's name, such as lora, or bare_loop")

    command = add(
        "compare",
        "run methods side by side, each in its own process, and compare quality, memory and time",
        usage="footprint compare --methods full,lora,... [--seeds 3] [any flag of the recipes] --output_dir DIR\n"
        "       footprint compare --show --output_dir DIR",
        epilog="The exit code is 0 if every run finished, 1 if one failed, and 2 for a mistake.",
        allow_abbrev=False,
    )
    command.add_argument("--methods", help="names of recipes, with commas; each flag goes to the recipes that have it")
    command.add_argument(
        "--seeds", type=int, default=3, help="runs of each method, with the seeds 0, 1, ... (default: 3)"
    )
    command.add_argument(
        "--output_dir", type=Path, required=True, help="folder of the comparison; finished runs in it are not repeated"
    )
    command.add_argument(
        "--launch",
        metavar="FILE",
        help="accelerate's configuration: the name of a file of launch/, or a path (default: single)",
    )
    command.add_argument("--show", action="store_true", help="run nothing; write and show the results of finished runs")
    command.set_defaults(flags=[])

    command = add("report", "show where the memory of one run went, or of several side by side")
    command.add_argument("ledger", nargs="+", metavar="LEDGER", help="a run's folder, or its memory.json")

    command = add(
        "evaluate",
        "score a finished run on its own test rows, or on other data",
        usage="footprint evaluate RUN_DIR [--dataset_name FILE] [any flag of the data] [--output_file FILE] [--json]",
        epilog="Of other data the test split is scored, or all rows if it has none. Nothing is written into RUN_DIR.",
        allow_abbrev=False,
    )
    command.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the output folder of a recipe")
    command.add_argument("--dataset_name", metavar="DATA", help="hub id, file or folder (default: the run's own data)")
    command.add_argument(
        "--per_device_eval_batch_size",
        metavar="N",
        type=int,
        default=8,
        help="rows of one batch (default: %(default)s)",
    )
    command.add_argument(
        "--output_file", type=Path, help="a new CSV file for text, reference and answer of each row (default: none)"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    command.set_defaults(flags=[])

    command = add(
        "generate",
        "let models answer a text: those of finished runs, or of any model folder",
        usage='footprint generate RUN_DIR [RUN_DIR ...] ["text" ...] [--interactive] [--num_beams N]',
    )
    command.add_argument(
        "arguments",
        nargs="+",
        metavar="RUN_DIR ... TEXT",
        help="output folders of recipes, or folders of models (merged, or with a chat template), then the texts to answer",
    )
    command.add_argument("--interactive", action="store_true", help="answer each typed line, until Ctrl-D")
    command.add_argument("--num_beams", type=int, default=1, help="beams; 1 is greedy (default: %(default)s)")

    command = add("merge", "merge a run's adapter into its base, for use without PEFT")
    command.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the output folder of a recipe")
    command.add_argument("--output_dir", type=Path, help="a new folder (default: RUN_DIR-merged)")
    command.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="type of the merged weights (default: auto, the type of the run's base)",
    )

    command = add(
        "doctor",
        "show what this machine has, what it means for a run, and what to change",
        epilog="The exit code is 0 if nothing stops a run (advice alone is 0), 1 if there is a problem, and 2 for a mistake.",
    )
    command.add_argument(
        "--launch",
        metavar="FILE",
        help="check that launch file against this machine too: the name of a file of launch/, such as zero3, or a path "
        "(default: the one that accelerate uses)",
    )
    command.add_argument("--json", action="store_true", help="print one JSON object instead of a list")

    command = add("cache", "show where predictions are kept, so that the same one is not made twice, or delete them")
    command.add_argument("--clear", action="store_true", help="delete all of them")

    for name, help in (
        ("gpus", "list the GPUs that --gpu knows: memory, compute capability, other names"),
        ("models", "list the models that can be predicted without the hub"),
        ("methods", "list the fine-tuning methods"),
    ):
        add(name, help).add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return top


def subcommands(top: CommandParser) -> dict[str, CommandParser]:
    """The parsers of the commands, by name."""
    (found,) = [action.choices for action in top._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found)


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int | None:
    """The entry point of the `footprint` command."""
    top, words = parser(), list(sys.argv[1:] if argv is None else argv)
    if words[:1] in (["predict"], ["train"]):
        from toolkit.runs.launching import show_help

        if show_help(subcommands(top)[words[0]], words[1:]):
            return None
    args, rest = top.parse_known_args(words)
    if "flags" in args:
        args.flags = rest
    elif rest:
        there = [flag for action in subcommands(top)[args.command]._actions for flag in action.option_strings]
        raise UserError(
            f"{'unknown flag' if rest[0].startswith('-') else 'unexpected'} {rest[0]}{did_you_mean(rest[0], there)}; footprint {args.command} --help lists those of {args.command}"
        )
    if "against" in args and args.against is not None:
        if any(word.startswith("--against=") for word in words):
            raise UserError("--against takes the rest of the line; write it without =")
        from toolkit.cli.against import second

        args.against = second(subcommands(top)["predict"], args)
    from toolkit.cli import commands

    return getattr(commands, args.command)(args)
