"""`footprint predict METHOD [flags]`: a recipe's memory, on this machine or on a card that is not in it."""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from toolkit.errors import UserError, did_you_mean


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see footprint predict --help")


def predict_command(method: str, flags: Sequence[str]) -> int:
    """Prints the predicted ledger as a table, or as one JSON object; 0 where it fits (or no card is given), else 1.

    Raises: UserError for what cannot be predicted, an unknown method or card, or a budget that does not parse.
    """
    own = _Parser(add_help=False, allow_abbrev=False)
    own.add_argument("--gpu")
    own.add_argument("--gpu_memory")
    own.add_argument("--launch")
    own.add_argument("--num_processes", type=int)
    own.add_argument("--json", action="store_true")
    args, rest = own.parse_known_args(list(flags))
    if args.gpu and args.gpu_memory:
        raise UserError("--gpu and --gpu_memory exclude each other; give one of them")
    if args.num_processes is not None and args.launch is None:
        raise UserError(
            "--num_processes has no effect without --launch; add for instance --launch zero3, or leave it out"
        )
    with _stdout_kept_clean() as out:
        import torch
        from rich.console import Console

        from toolkit.distributed.engine import EngineKind
        from toolkit.distributed.launch_files import ONE_PROCESS, read_launch_file
        from toolkit.memory.cuda.cards import find_card, generic_card
        from toolkit.memory.report import print_ledger
        from toolkit.methods import METHODS
        from toolkit.runs.prediction import PredictionJob, this_card

        if method not in METHODS:
            raise UserError(
                f"unknown method {method!r}{did_you_mean(method, METHODS)}; there are: {', '.join(sorted(METHODS))}"
            )
        named = find_card(args.gpu) if args.gpu else generic_card(args.gpu_memory) if args.gpu_memory else None
        card = named or (None if "--use_cpu" in rest else this_card())
        launch = read_launch_file(args.launch, args.num_processes) if args.launch is not None else ONE_PROCESS
        launched = PredictionJob.of(method, rest, launch, card)
        apart = launch.engine.kind is not EngineKind.NONE and torch.cuda.is_available()
        ledger = launched.predict_apart() if apart else launched.predict()
        if args.json:
            print(json.dumps(ledger.to_json()), file=out)
        else:
            print_ledger(Console(file=out), ledger)
    return 0 if ledger.fits else 1


@contextmanager
def _stdout_kept_clean() -> Iterator:
    """Gives a stream to the real stdout; what libraries write to stdout meanwhile, from C too, goes to stderr."""
    sys.stdout.flush()
    kept = os.dup(1)
    stdout = sys.stdout
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    try:
        with os.fdopen(os.dup(kept), "w", encoding="utf-8") as out:
            yield out
    finally:
        sys.stdout = stdout
        os.dup2(kept, 1)
        os.close(kept)
