"""Starts (and kills) real ranks under the files of launch/, dozens of times: as forks of one process that imported everything.

On a slow machine, a new process needs most of a minute for imports, and a fork nothing. multiprocessing's fork server imports
everything (`preloaded`) and computes nothing. A fork imports `toolkit` again, because its modules read the rank.
"""

import contextlib
import ctypes
import gc
import importlib
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest.mock import patch

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from toolkit.distributed.launch_files import FOLDER, read_launch_file

ROOT = Path(__file__).parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CLONE_NEWNET = 0x40000000  # linux/sched.h
LATER = (  # modules that a recipe imports on demand
    "bitsandbytes",
    "deepspeed",
    "evaluate",
    "peft.tuners.lora.bnb",
    "rouge_score.rouge_scorer",
    "torch.distributed.algorithms.ddp_comm_hooks.default_hooks",
    "torch.distributed.fsdp",
    "transformers.models.llama.modeling_llama",
    "transformers.models.t5.modeling_t5",
    "transformers.models.t5.tokenization_t5",
)


def preload() -> None:
    """Imports what a recipe imports, then removes the project's own modules."""
    runpy.run_path(str(ROOT / "recipes" / "lora.py"), run_name="imported")
    for name in LATER:
        with contextlib.suppress(ImportError):  # not every system has them
            importlib.import_module(name)
    for name in [name for name in sys.modules if name.split(".")[0] == "toolkit"]:
        del sys.modules[name]
    assert threading.active_count() == 1, "a fork would lack all threads but one"
    gc.freeze()  # garbage collection of imported objects in a fork would copy all their memory


def enter(host: str) -> None:
    """Moves this process into the network namespace `host`, as `ip netns exec` does."""
    with Path("/run/netns", host).open() as namespace:
        libc = ctypes.CDLL(None, use_errno=True)  # os.setns is newer than Python 3.11
        if libc.setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns into {host}")


def _rank(script: str, argv: list[str], log: Path, env: dict[str, str], host: str | None) -> None:
    code: object = 1
    try:
        with log.open("w") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        if host is not None:
            enter(host)
        os.chdir(ROOT)
        os.environ |= env
        sys.argv = [script, *argv]
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as left:
            code = left.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _single() -> dict[str, str]:
    """The environment variables that accelerate's launcher sets under launch/single.yaml."""
    arguments = ["--config_file", str(FOLDER / "single.yaml"), "train.py"]
    _, env = prepare_simple_launcher_cmd_env(_validate_launch_command(launch_command_parser().parse_args(arguments))[0])
    return {name: value for name, value in env.items() if os.environ.get(name) != value}


class Run:
    """A script on `processes` ranks, with the launcher's environment; `log` gets their output.

    A single process has the environment of launch/single.yaml if `preset` says so; otherwise it runs without a launcher.
    `hosts` are the network namespaces of the ranks, if they have their own; `settings` are more environment variables.
    """

    def __init__(
        self,
        script: str,
        *argv: str | Path,
        log: Path,
        processes: int = 1,
        preset: str = "ddp",
        hosts: Sequence[str] | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        log.mkdir(parents=True, exist_ok=True)
        # from an earlier run with the same `log`: the launcher makes one folder for each run
        (log / "error_was_said").unlink(missing_ok=True)
        self.logs = [log / f"rank{rank}.txt" for rank in range(processes)]
        CONTEXT.set_forkserver_preload(["preloaded"])
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.ranks = []
        for rank, file in enumerate(self.logs):
            env: dict[str, str] = _single() if preset == "single" else {}
            if processes > 1:
                env = read_launch_file(preset, processes).of_rank(rank) | {"MASTER_PORT": str(port)}
                # the rank that prints an error leaves a mark next to this file, for the others
                (log / str(rank)).mkdir(exist_ok=True)
                env |= {"TORCHELASTIC_ERROR_FILE": str(log / str(rank) / "error.json")}
            env |= settings or {}
            arguments = (script, [str(a) for a in argv], file, env, hosts[rank] if hosts else None)
            self.ranks.append(CONTEXT.Process(target=_rank, args=arguments, daemon=True))
        with patch.dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT / "tests"), str(ROOT)])):  # of what forks
            for rank in self.ranks:
                rank.start()

    def wait(self, seconds: float = 300) -> list[int]:
        """The exit code of each rank (-9: killed). Ranks that still run after the time limit are killed, which is an error."""
        end = time.monotonic() + seconds
        for rank in self.ranks:
            rank.join(max(0.0, end - time.monotonic()))
        late = [number for number, rank in enumerate(self.ranks) if rank.is_alive()]
        self.signal(signal.SIGKILL)
        assert not late, f"ranks {late} still ran after {seconds} s:\n{self.text()}"
        return [rank.exitcode for rank in self.ranks]

    @property
    def runs(self) -> bool:
        """Whether any rank still runs."""
        return any(rank.is_alive() for rank in self.ranks)

    def signal(self, number: int, ranks: Sequence[int] | None = None) -> None:
        """Sends a signal to `ranks`, or to all running ones."""
        for rank in self.ranks if ranks is None else [self.ranks[number] for number in ranks]:
            if rank.is_alive():
                os.kill(rank.pid, number)

    def text(self) -> str:
        """The output of all ranks."""
        return "\n".join(log.read_text() for log in self.logs if log.exists())
