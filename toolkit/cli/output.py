"""Standard output for commands that must print nothing but one JSON object or one table."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


@contextmanager
def clean_stdout() -> Iterator[TextIO]:
    """Yields a stream to the real stdout. Meanwhile everything that libraries write to stdout, also from C, goes to stderr."""
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
