"""Runs a recipe and kills this process at its NUMBER-th file operation in --output_dir (0: never; COUNT gets their number).

If NUMBER is negative, the disk is full from that operation on: nothing can be created.

python tests/killed.py NUMBER COUNT recipes/lora.py --output_dir DIR --use_cpu
"""

import errno
import os
import runpy
import signal
import sys
from pathlib import Path

EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "shutil.move")
number, count, *sys.argv = sys.argv[1:]
folder = str(Path(sys.argv[sys.argv.index("--output_dir") + 1]).absolute())
seen = 0


def watch(event: str, args: tuple) -> None:
    global seen
    if event in EVENTS and os.environ.get("RANK", "0") == "0" and str(args[0]).startswith(folder):
        seen += 1
        if seen == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
        creates = event == "os.mkdir" or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR))
        if int(number) < 0 and seen >= -int(number) and creates:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), args[0])


if __name__ == "__main__":
    sys.addaudithook(watch)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        if os.environ.get("RANK", "0") == "0":
            Path(count).write_text(str(seen))
