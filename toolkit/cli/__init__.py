"""The `footprint` command: everything except training, which is `accelerate launch recipes/METHOD.py`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolkit.distributed.ranks import exits_cleanly
from toolkit.errors import CommandParser, UserError
from toolkit.version import __version__


def parser() -> CommandParser:
    """The command line. Each command is the function of its name in `toolkit.cli.commands`, imported when it runs."""
    top = CommandParser(prog="footprint", description="Fine-tune language models, and know where the memory goes.")
    top.add_argument("--version", action="version", version=f"footprint {__version__}")
    subparsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, help: str, **more: Any) -> CommandParser:
        return subparsers.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.", **more)

    command = add(
        "predict",
        "show the memory that a run will need, on this machine or on GPUs that are not in it",
        usage="footprint predict METHOD [any flag of its recipe] [--gpu NAME | --gpu_memory 24GiB]\n"
        "                         [--launch zero3 | --launch FILE.yaml] [--num_processes N] [--json]",
        epilog="All other flags are the recipe's own: python recipes/METHOD.py --help lists them, for instance python "
        "recipes/lora.py --help. The exit code is 0 if the run fits or no GPU is known, 1 if it does not fit, and 2 for a mistake or a "
        "run that cannot be predicted.",
        allow_abbrev=False,
    )
    command.add_argument("method", metavar="METHOD", help="a recipe's name, such as lora; footprint methods lists them")
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
    command.add_argument(
        "--num_processes",
        metavar="N",
        type=int,
        help="number of processes (default: the launch file's own number)",
    )
    command.add_argument("--json", action="store_true", help="print the ledger as one JSON object")
    command.set_defaults(flags=[])

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
    command.add_argument("--launch", type=Path, help="accelerate's configuration (default: launch/single.yaml)")
    command.add_argument("--show", action="store_true", help="run nothing; write and show the results of finished runs")
    command.set_defaults(flags=[])

    command = add("report", "show where the memory of one run went, or of several side by side")
    command.add_argument("ledger", nargs="+", metavar="LEDGER", help="a run's folder, or its memory.json")

    command = add(
        "generate",
        "let the models of finished runs answer a text",
        usage='footprint generate RUN_DIR [RUN_DIR ...] ["text" ...] [--interactive] [--num_beams N]',
    )
    command.add_argument(
        "arguments",
        nargs="+",
        metavar="RUN_DIR ... TEXT",
        help="output folders of recipes, then the texts to answer",
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

    for name, help in (
        ("gpus", "list the GPUs that --gpu knows: memory, compute capability, other names"),
        ("models", "list the models that can be predicted without the hub"),
        ("methods", "list the fine-tuning methods"),
    ):
        add(name, help).add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return top


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int | None:
    """The entry point of the `footprint` command."""
    args, rest = parser().parse_known_args(argv)
    if "flags" in args:
        args.flags = rest
    elif rest:
        raise UserError(f"unrecognized arguments: {' '.join(rest)}; see footprint {args.command} --help")
    from toolkit.cli import commands

    return getattr(commands, args.command)(args)
