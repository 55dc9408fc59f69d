"""What holds for all processes of a run together: how they end, and what one decides for all."""

import os
import sys
import time
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

from toolkit.errors import UserError

FIRST_SECONDS = 1.0  # how long the other ranks let rank 0 say an error that all of them have met


def exits_cleanly(main: Callable[..., int | None]) -> Callable[..., None]:
    """Wraps an entry point: a `UserError` becomes one line on stderr and exit code 2, an interrupt becomes 130.

    At a good end the ranks wait for each other and leave their process group: without that, some are torn down by
    SIGABRT. An error on any rank ends them all: the rank that met it says so and leaves at once, the launcher stops
    those that still wait for it, and what they say about a lost connection is left unsaid.
    """

    @wraps(main)
    def run(*args: Any) -> None:
        try:
            code = main(*args)
        except UserError as error:
            if _speaks():
                print(f"error: {_who()}{error}", file=sys.stderr, flush=True)
            _leave(2)
        except KeyboardInterrupt:
            _leave(130)
        except Exception:
            if not _in_group():
                raise
            if _speaks():
                print(f"{_who()}{traceback.format_exc()}", file=sys.stderr, flush=True, end="")
            _leave(1)
        _leave_process_group()
        sys.exit(code)

    return run


def _who() -> str:
    """`"rank 1: "` on every rank but the first."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"rank {rank}: "


def _speaks() -> bool:
    """Whether this rank is the one that says the error: the first on this machine to ask, where the launcher gave a folder.

    An error that all ranks meet is said by rank 0, for which the others wait.
    """
    rank, own = os.environ.get("RANK", "0"), os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not own:
        return rank == "0"
    if rank != "0":
        time.sleep(FIRST_SECONDS)
    try:
        (Path(own).parent.parent / "error_was_said").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # the launcher has already taken its folder away
        return rank == "0"
    return True


def _in_group() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _leave(code: int) -> NoReturn:
    """Ends this process; in a process group without tearing it down, for that would wait for the other ranks."""
    if _in_group():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _leave_process_group() -> None:
    if _in_group():
        distributed = sys.modules["torch.distributed"]
        distributed.barrier()
        distributed.destroy_process_group()


def decided_by_main(decide: Callable[[], Any]) -> Any:
    """What `decide` returns on rank 0, on every rank; a `UserError` that it raises there is raised everywhere."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState()
    outcome: list[Any] = [None, None]
    if state.is_main_process:
        try:
            outcome[0] = decide()
        except UserError as error:
            outcome[1] = str(error)
    if state.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]
