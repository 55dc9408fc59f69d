"""What holds for all processes of a run together: how they end, and what one decides for all."""

import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

from toolkit.errors import UserError


def exits_cleanly(main: Callable[..., int | None]) -> Callable[..., None]:
    """Wraps an entry point: a `UserError` becomes one line on stderr and exit code 2, an interrupt becomes 130.

    Every rank that meets the mistake exits with 2; rank 0 alone says it. At a good end the ranks wait for each other
    and leave their process group: without that, some are torn down by SIGABRT.
    """

    @wraps(main)
    def run(*args: Any) -> None:
        try:
            code = main(*args)
        except UserError as error:
            if os.environ.get("RANK", "0") == "0":
                print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)
        _leave_process_group()
        sys.exit(code)

    return run


def _leave_process_group() -> None:
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
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
