"""Standard output of commands that print one JSON object or one table, and nothing else."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


@contextmanager
def clean_stdout() -> Iterator[TextIO]:
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
