"""The one exception for a user's mistake, and how it leaves the process: one line, exit code 2, from rank 0 alone."""

import os
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import wraps


class UserError(Exception):
    """A mistake in flags, files or data: its message says what was got, what is valid and what to change, in one line."""


def did_you_mean(got: str, valid: Iterable[str]) -> str:
    """`" (did you mean --x?)"` for the valid name nearest to `got`, or an empty string where none is near."""
    near = get_close_matches(got, list(valid), n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""


def exits_cleanly(main: Callable[[], int | None]) -> Callable[[], None]:
    """Wraps an entry point: a `UserError` becomes one line on stderr and exit code 2, an interrupt becomes 130.

    Every rank that meets the mistake exits with 2; rank 0 alone says it.
    """

    @wraps(main)
    def run() -> None:
        try:
            sys.exit(main())
        except UserError as error:
            if os.environ.get("RANK", "0") == "0":
                print(f"footprint: error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)

    return run
