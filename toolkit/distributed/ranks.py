"""Functions for all ranks of a run: how they end together, and how they share decisions and errors."""

import errno
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

from toolkit.distributed.launcher import launcher_pid
from toolkit.errors import LESS_MEMORY, NothingToDo, UserError

RANK0_HEAD_START_SECONDS = 1.0  # the other ranks wait this long for rank 0 to print an error that all of them have
SHUTDOWN_GRACE_SECONDS = 10.0  # after an error was printed, the other ranks have this long to end by themselves
TIMEOUT_SHARE = 0.9  # of --ddp_timeout: earlier than NCCL's own time-out, which ends a process without an exception
ROLL_CALL_SECONDS = 4.0  # after its own time-out a rank waits this long for the others to reach theirs
# Texts of gloo (also inside a backward pass), and of NCCL when it is set to raise exceptions: seam "texts of a time-out".
TIMED_OUT = r"(gloo|NCCL|ProcessGroup)[\s\S]*(timed out|time-?out)|Application timeout caused pair closure"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SIGNALS: dict[int, str] = {
    signal.SIGTERM: "SIGTERM",
    signal.SIGINT: "Ctrl-C",
}  # shells report 128 + their number as the exit code
ONE_SIGNAL_SECONDS = (
    1.0  # one Ctrl-C may arrive twice: the terminal sends it to all processes, and the launcher to its ranks
)
WATCH_SECONDS = 1.0
LONGEST_ERROR = 2000  # characters of a line


class Preempted(Exception):
    """Raised on all ranks together after a signal, its argument, once the checkpoint is saved."""


class Interruption:
    """Handles SIGTERM and Ctrl-C (SIGINT): the process ends with exit code 143 or 130.

    During training it ends after the step and with a checkpoint; a second Ctrl-C ends it at once. The launcher also sends SIGTERM to
    ranks that wait for a failed rank: they end at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None  # the signal
        self.deferred = False
        self.continue_with = ""  # the command that continues the run, once its folder exists
        self.folder = Path()  # the run's

    @contextmanager
    def handled(self) -> Iterator[None]:
        """While open, the signals are handled here (only in the main thread, the only one that receives signals)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.received, self.process, self.continue_with = None, os.getpid(), ""
        # a process that was started in the background ignores Ctrl-C, and so do we
        ours = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._on_signal) for number in ours}
        try:
            yield
        finally:
            for number, handler in before.items():
                was_started = number == signal.SIGINT and handler is signal.SIG_DFL  # see `toolkit.config.start.start`
                signal.signal(number, signal.default_int_handler if was_started else handler)

    @contextmanager
    def deferred_to_a_step(self) -> Iterator[None]:
        """While open, a signal only sets `received`; the training loop checks it and reacts."""
        self.deferred = True
        try:
            yield
        finally:
            self.deferred = False
        if self.received is not None:
            self.leave()

    def leave(self) -> NoReturn:
        """Prints how to continue the run, and ends this process."""
        assert self.received is not None
        if self.continue_with:
            saved = any(self.folder.glob("checkpoint-*"))
            how = "continue with" if saved else "no checkpoint was saved yet; start again with"
            _say("stopped", f"by {SIGNALS[self.received]}; {how}: {self.continue_with}")
        _exit(128 + self.received)

    def _on_signal(self, number: int, frame: Any) -> None:
        if os.getpid() != self.process:  # a forked process has no part in the run, which ends it
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        first, now = self.received, time.monotonic()
        if first is None:
            self.received, self.at = number, now
        if (mark := _error_mark()) is not None and mark.exists():
            _exit(1)
        if not self.deferred:
            self.leave()
        if number != signal.SIGINT:
            return
        if first is None:
            _say(
                "stopping",
                f"after this step, with a checkpoint; to end at once, press Ctrl-C again, or: kill -9 {self.process}",
            )
        elif now - self.at > ONE_SIGNAL_SECONDS:
            self.received = number
            self.leave()


interruption = Interruption()


class RollCall:
    """Collects a number from all ranks at the same point of each step; all ranks must call it.

    On one machine it uses gloo. On GPUs gloo does not touch the CUDA queue, and a rank that does not answer causes an exception
    that names it, whereas NCCL's watchdog would end the process. Between machines it uses the run's own process group, because
    gloo might choose another network.
    """

    def __init__(self, device: Any, timeout: float) -> None:
        self.device, self.group = device, None
        if _in_group() and os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
            from torch.distributed import new_group

            self.device, self.group = (
                "cpu",
                new_group(backend="gloo", timeout=timedelta(seconds=TIMEOUT_SHARE * timeout)),
            )

    def highest(self, number: int) -> int:
        """The highest `number` of all ranks."""
        if not _in_group():
            return number
        import torch

        found = torch.tensor(number, device=self.device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=self.group)
        return int(found)


def exits_cleanly(main: Callable[..., int | None]) -> Callable[..., None]:
    """Wraps an entry point: a `UserError` becomes one line on stderr and exit code 2; Ctrl-C gives 130, SIGTERM 143.

    `NothingToDo` becomes one line and exit code 0. A process whose launcher was killed ends as if it had received SIGTERM.

    At the end of a successful run the ranks wait for each other and leave their process group; otherwise SIGABRT can end some
    of them. An error on any rank ends all: that rank prints the error and exits at once, and the launcher stops the ranks that
    wait for it, whose own errors about a lost connection are not printed.
    """

    @wraps(main)
    def run(*args: Any) -> None:
        threading.Thread(target=_watch, args=(launcher_pid(),), daemon=True).start()
        with interruption.handled():
            try:
                code = main(*args)
            except Preempted as stopped:
                code = 128 + stopped.args[0]
            except NothingToDo as done:
                if os.environ.get("RANK", "0") == "0":
                    print(f"{'finished':>11}  {done}", flush=True)
                code = 0
            except UserError as error:
                _say_error(str(error), error.__cause__)
                _exit(2)
            except KeyboardInterrupt:
                _exit(130)
            except BrokenPipeError:  # whoever reads the output, such as `head`, has read enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                _exit(128 + signal.SIGPIPE)
            except Exception as error:
                if isinstance(error, OSError) and error.errno in NO_ROOM:
                    where = f" for {error.filename}" if error.filename else ""
                    _say_error(
                        f"no space is left on the disk{where}; free some space, then resume with --resume_from_checkpoint true"
                    )
                    _exit(2)
                if type(error).__name__ == "OutOfMemoryError":  # torch's; torch may not have been imported
                    _say_error(f"the GPU's memory is full ({' '.join(str(error).split())[:160]}); {LESS_MEMORY}")
                    _exit(2)
                if not _in_group():
                    raise
                if (lost := _time_out(error)) is not None:
                    _say_error(lost)
                elif _claims_error_output():
                    print(f"{_rank_prefix()}{traceback.format_exc()}", file=sys.stderr, flush=True, end="")
                _exit(1)
            leave_process_group()
        sys.exit(code)

    return run


def _watch(launcher: int | None) -> None:
    """Ends this rank some seconds after another rank printed an error: while it waits for a GPU, SIGTERM has no effect.

    If the process `launcher` started this one, and ends before it, this one receives SIGTERM.
    """
    mark = _error_mark()
    while mark is not None or launcher is not None:
        time.sleep(WATCH_SECONDS)
        if launcher is not None and os.getppid() != launcher:
            launcher = None
            os.kill(os.getpid(), signal.SIGTERM)
        if mark is not None and mark.exists():
            time.sleep(SHUTDOWN_GRACE_SECONDS)
            os._exit(1)


def _say(label: str, text: str) -> None:
    """Prints a line from rank 0, as `toolkit.console.say` does, but safely within a signal handler."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):  # nobody reads it any more
            os.write(1, f"{label:>11}  {text}\n".encode())


def _say_error(text: str, cause: BaseException | None = None) -> None:
    """Prints the line; the traceback of `cause`, a library's exception, goes to a file that the line names."""
    if _claims_error_output():
        if len(text) > LONGEST_ERROR:  # a name of the user's that has no end
            text = f"{text[: LONGEST_ERROR // 2]} ... {text[-LONGEST_ERROR // 4 :]}"
        print(f"error: {_rank_prefix()}{text}{_kept(cause)}", file=sys.stderr, flush=True)


def _kept(cause: BaseException | None) -> str:
    """`" (traceback: FILE)"`, a new file in the temporary folder; empty without a cause, or where no file can be written."""
    if cause is None:
        return ""
    try:
        descriptor, path = tempfile.mkstemp(prefix="footprint-error-", suffix=".txt")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.writelines(traceback.format_exception(cause))
    except OSError:
        return ""
    return f" (traceback: {path})"


def _time_out(error: Exception) -> str | None:
    """The message for a collective that timed out, with the ranks that do not answer; None if `error` is another error.

    Each rank that times out writes that to the store through which all ranks found each other. After a while, the ranks that
    have written nothing are those that hang. If the store does not answer, the rank or launcher that hosts it hangs.
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
            who = "the network (all ranks were waiting)"
    except (RuntimeError, KeyError):  # torch's own kinds are RuntimeErrors
        pass
    return (
        f"{who} did not answer within --ddp_timeout, so all ranks end; find out what blocks it, then resume with "
        "--resume_from_checkpoint true"
    )


def _rank_prefix() -> str:
    """`"rank 1: "` on rank 1 and so on; empty on rank 0."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"rank {rank}: "


def _claims_error_output() -> bool:
    """Whether this rank prints the error: the first rank on this machine that calls this does, and the others do not.

    The other ranks wait a moment for rank 0, so that it prints an error that all have. Without a folder of the launcher, each
    rank prints its error.
    """
    rank, mark = os.environ.get("RANK", "0"), _error_mark()
    if rank != "0":
        time.sleep(RANK0_HEAD_START_SECONDS)
    if mark is None:
        return True
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # the launcher has already removed its folder
        return rank == "0"
    return True


def _error_mark() -> Path | None:
    """The file that shows the other ranks on this machine that an error was printed; None without a folder of the launcher."""
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(own).parent.parent / "error_was_said" if own else None


def _in_group() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _exit(code: int) -> NoReturn:
    """Ends this process. A process group is not torn down, because that would wait for the other ranks."""
    if _in_group():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def leave_process_group() -> None:
    """Waits for the other ranks and leaves the process group. From then on no rank waits for another."""
    if _in_group():
        distributed = sys.modules["torch.distributed"]
        distributed.barrier()
        distributed.destroy_process_group()


def broadcast_from_main(decide: Callable[[], Any]) -> Any:
    """Calls `decide` on rank 0 and returns its result on every rank; a `UserError` or `NothingToDo` from it is raised on every rank."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState()
    outcome: list[Any] = [None, None]
    if state.is_main_process:
        try:
            outcome[0] = decide()
        except (UserError, NothingToDo) as error:
            if state.num_processes == 1:
                raise
            outcome[1] = type(error)(str(error))  # without its traceback and cause, which cannot be pickled
    if state.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def raise_on_all_ranks(check: Callable[[], None]) -> None:
    """Calls `check` on every rank; a `UserError` from any of them is raised on all."""
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
