"""Recipes in forks of one process that has imported everything, so that dozens of them can be killed and resumed.

The parent imports and computes nothing, and so has one thread. A fork imports `toolkit` anew, for its modules read the rank
when they are imported.
"""

import contextlib
import os
import random
import runpy
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

ROOT = Path(__file__).parent.parent


def warm(recipe: str = "lora") -> None:
    """Imports what a recipe imports, and forgets the project's own modules."""
    import torch
    from transformers import Trainer

    torch.set_num_threads(1)
    assert Trainer
    runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"), run_name="imported")
    for name in [name for name in sys.modules if name.split(".")[0] == "toolkit"]:
        del sys.modules[name]
    names = {(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()}
    others = names - {Path("/proc/self/comm").read_text().strip(), "jemalloc_bg_thd"}  # pyarrow's allocator knows of forks
    assert not others, f"a fork would lack the threads {others}"


class Run:
    """A recipe on `processes` ranks, each a fork whose terminal is a file in `log`."""

    def __init__(self, argv: Sequence[str | Path], log: Path, processes: int = 1, script: str = "recipes/lora.py") -> None:
        log.mkdir(parents=True, exist_ok=True)
        self.logs = [log / f"rank{rank}.txt" for rank in range(processes)]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.codes: dict[int, int] = {}
        self.pids = [self._fork(list(map(str, argv)), script, rank, processes, port) for rank in range(processes)]

    def _fork(self, argv: list[str], script: str, rank: int, processes: int, port: int) -> int:
        if pid := os.fork():
            return pid
        code = 1
        try:
            with self.logs[rank].open("w") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
            if processes > 1:
                address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": processes, "RANK": rank}
                address |= {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": processes}
                # as a launcher gives it; what says an error says it once for all
                address |= {"TORCHELASTIC_ERROR_FILE": self.logs[0].parent / str(rank) / "error.json"}
                os.environ |= {name: str(value) for name, value in address.items()}
            sys.argv = [script, *argv]
            try:
                runpy.run_path(str(ROOT / script), run_name="__main__")
            except SystemExit as left:
                code = left.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)

    def wait(self, seconds: float = 300) -> list[int]:
        """The exit code of each rank (-9: killed); those that have not ended in time are killed, and an error."""
        end = time.monotonic() + seconds
        while len(self.codes) < len(self.pids) and time.monotonic() < end:
            self.poll()
            time.sleep(0.01)
        late = [rank for rank, pid in enumerate(self.pids) if pid not in self.codes]
        self.kill()
        assert not late, f"rank {late} still ran after {seconds} s:\n{self.text()}"
        return [self.codes[pid] for pid in self.pids]

    def poll(self) -> bool:
        """Whether some rank runs."""
        for pid in set(self.pids) - set(self.codes):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) < len(self.pids)

    def kill(self, ranks: Sequence[int] | None = None, number: int = signal.SIGKILL) -> None:
        """Sends a signal to `ranks`, or to all."""
        for rank in range(len(self.pids)) if ranks is None else ranks:
            if self.pids[rank] not in self.codes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pids[rank], number)

    def text(self) -> str:
        """What all ranks have written."""
        return "\n".join(log.read_text() for log in self.logs if log.exists())
