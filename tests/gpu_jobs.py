"""Jobs for the pool in `test_gpu_benchmark`: they end in every possible way."""

import os
import signal
import time
from pathlib import Path


def fine(value: int, log: str | None = None) -> dict:
    if log is not None:
        with Path(log).open("a") as stream:
            stream.write(f"{value}\n")
    return {"value": value}


def hangs() -> dict:
    print("so far so good", flush=True)
    time.sleep(600)
    return {}


def breaks() -> dict:
    raise ValueError("a reason that must not be lost")


def dies() -> dict:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def needs_room(others: str) -> dict:
    """Runs out of memory as long as another item is on the card."""
    Path(others, f"{os.getpid()}.tried").touch()
    if len(list(Path(others).glob("*.tried"))) < 2:
        time.sleep(0.5)
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return {}


def never_fits() -> dict:
    raise RuntimeError("CUDA out of memory. Tried to allocate 2000.00 GiB")


def stays(seconds: float) -> dict:
    time.sleep(seconds)
    return {}
