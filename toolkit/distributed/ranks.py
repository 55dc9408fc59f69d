"""What holds for all processes of a run together: how they end, and what one decides for all."""

import errno
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

from toolkit.errors import LESS_MEMORY, UserError

FIRST_SECONDS = 1.0  # how long the other ranks let rank 0 say an error that all of them have met
LAST_SECONDS = 10.0  # how long after an error was said a rank that still computes or waits is left to find its own end
PATIENCE = 0.9  # of --ddp_timeout: before NCCL's own time-out, which ends a process without asking Python
ROLL_CALL_SECONDS = 4.0  # how long after its own time-out a rank lets the others meet theirs
# What gloo says, and within a backward pass; and NCCL, where it is told to raise an exception: seam "texts of a time-out".
TIMED_OUT = r"(gloo|NCCL|ProcessGroup)[\s\S]*(timed out|time-?out)|Application timeout caused pair closure"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
TERMINATED = 128 + signal.SIGTERM  # 143, as shells call a process that SIGTERM ended


class Preempted(Exception):
    """All ranks have saved what they were asked to leave with, and leave together."""


class Sigterm:
    """What SIGTERM does in a recipe: it ends the process with 143; while training, at the end of a step, with a checkpoint.

    The launcher also sends it to those that wait for a rank that has failed: they leave at once.
    """

    def __init__(self) -> None:
        self.received = self.deferred = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Within, the signal is taken here (signals are the main thread's alone)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.received, self.process = False, os.getpid()
        before = signal.signal(signal.SIGTERM, self._take)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    @contextmanager
    def deferred_to_a_step(self) -> Iterator[None]:
        """Within, the signal is only noted; whoever looks at `received` answers it."""
        self.deferred = True
        try:
            yield
        finally:
            self.deferred = False
        if self.received:
            _leave(TERMINATED)

    def _take(self, number: int, frame: Any) -> None:
        if os.getpid() != self.process:  # a process that was forked, whose end is not the run's
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        self.received = True
        if (mark := _error_mark()) is not None and mark.exists():
            _leave(1)
        if not self.deferred:
            _leave(TERMINATED)


sigterm = Sigterm()


class RollCall:
    """Asks all ranks something at the same place of each step; called by all of them.

    On one machine it goes over gloo: on GPUs that leaves their queue alone, and a rank that does not answer is an exception
    here, which names it, where NCCL's watchdog would end the process. Between machines it goes over the run's own group,
    for gloo might take a network of its own choice.
    """

    def __init__(self, device: Any, timeout: float) -> None:
        self.device, self.group = device, None
        if _in_group() and os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
            from torch.distributed import new_group

            self.device, self.group = "cpu", new_group(backend="gloo", timeout=timedelta(seconds=PATIENCE * timeout))

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank."""
        if not _in_group():
            return flag
        import torch

        found = torch.tensor(int(flag), device=self.device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=self.group)
        return bool(found)


def exits_cleanly(main: Callable[..., int | None]) -> Callable[..., None]:
    """Wraps an entry point: a `UserError` becomes one line on stderr and exit code 2, an interrupt 130, SIGTERM 143.

    At a good end the ranks wait for each other and leave their process group: without that, some are torn down by
    SIGABRT. An error on any rank ends them all: the rank that met it says so and leaves at once, the launcher stops
    those that still wait for it, and what they say about a lost connection is left unsaid.
    """

    @wraps(main)
    def run(*args: Any) -> None:
        threading.Thread(target=_end_after_an_error, daemon=True).start()
        with sigterm.handled():
            try:
                code = main(*args)
            except Preempted:
                code = TERMINATED
            except UserError as error:
                _say_error(str(error))
                _leave(2)
            except KeyboardInterrupt:
                _leave(130)
            except Exception as error:
                if isinstance(error, OSError) and error.errno in NO_ROOM:
                    where = f" for {error.filename}" if error.filename else ""
                    _say_error(
                        f"no space is left on the disk{where}; make room, and go on with --resume_from_checkpoint true"
                    )
                    _leave(2)
                if type(error).__name__ == "OutOfMemoryError":  # torch's, which need not have been imported
                    _say_error(f"the GPU's memory is full ({' '.join(str(error).split())[:160]}); {LESS_MEMORY}")
                    _leave(2)
                if not _in_group():
                    raise
                if (lost := _time_out(error)) is not None:
                    _say_error(lost)
                elif _speaks():
                    print(f"{_who()}{traceback.format_exc()}", file=sys.stderr, flush=True, end="")
                _leave(1)
            leave_process_group()
        sys.exit(code)

    return run


def _end_after_an_error() -> None:
    """Ends this rank some seconds after another has said an error: one that waits for a GPU does not hear the launcher's SIGTERM."""
    mark = _error_mark()
    while mark is not None:
        time.sleep(1)
        if mark.exists():
            time.sleep(LAST_SECONDS)
            os._exit(1)


def _say_error(text: str) -> None:
    if _speaks():
        print(f"error: {_who()}{text}", file=sys.stderr, flush=True)


def _time_out(error: Exception) -> str | None:
    """What to say where `error` is a collective that timed out: which ranks do not answer; None where it is another error.

    Each rank that meets its time-out says so in the store through which all have found each other; after a while those
    that have not are the ones that hang. Where the store does not answer either, it hangs with the rank or machine that keeps it.
    """
    if not re.search(TIMED_OUT, str(error), re.IGNORECASE):
        return None
    from torch.distributed import TCPStore, get_rank, get_world_size

    who = "the rank or launcher that keeps the store"
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=ROLL_CALL_SECONDS))
        store.set(f"footprint/timed_out/{get_rank()}", "yes")
        time.sleep(ROLL_CALL_SECONDS)
        silent = [rank for rank in range(get_world_size()) if not store.check([f"footprint/timed_out/{rank}"])]
        if silent:
            who = f"rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent))}"
        else:
            who = "no rank in particular (all of them have waited): the network"
    except (RuntimeError, KeyError):  # torch's own kinds are RuntimeErrors
        pass
    return (
        f"{who} did not answer within --ddp_timeout, so all ranks end; see what holds it up there, and go on with "
        "--resume_from_checkpoint true"
    )


def _who() -> str:
    """`"rank 1: "` on every rank but the first."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"rank {rank}: "


def _speaks() -> bool:
    """Whether this rank is the one that says the error: the first on this machine to ask, where the launcher gave a folder.

    An error that all ranks meet is said by rank 0, for which the others wait. Without a folder each of them says it.
    """
    rank, mark = os.environ.get("RANK", "0"), _error_mark()
    if rank != "0":
        time.sleep(FIRST_SECONDS)
    if mark is None:
        return True
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # the launcher has already taken its folder away
        return rank == "0"
    return True


def _error_mark() -> Path | None:
    """The file that says, to the other ranks of this machine, that an error was said; None without a launcher's folder."""
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(own).parent.parent / "error_was_said" if own else None


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


def leave_process_group() -> None:
    """Waits for the other ranks, and leaves them: what a rank does from then on, none waits for."""
    if _in_group():
        distributed = sys.modules["torch.distributed"]
        distributed.barrier()
        distributed.destroy_process_group()


def broadcast_from_main(decide: Callable[[], Any]) -> Any:
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


def raise_on_all_ranks(check: Callable[[], None]) -> None:
    """Runs `check` on every rank; a `UserError` that it raises on any of them is raised on all."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    said = None
    try:
        check()
    except UserError as error:
        said = str(error)
    found = gather_object([said]) if PartialState().num_processes > 1 else [said]
    for said in filter(None, found):
        raise UserError(said)
