"""Checks the seams against the installed libraries, or lists them:

python -m toolkit.seams                   each seam that differs; the exit code is 1 if one does
python -m toolkit.seams --list            all seams, one a line: name, kind, where we use it, and why
python -m toolkit.seams --list deepspeed  those of one library
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from toolkit.seams import SEAMS, check


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the seams that differ, or with --list all of them. Returns 1 if a seam differs, otherwise 0."""
    libraries = sorted({seam.package for seam in SEAMS.values()})
    parser = argparse.ArgumentParser(prog="python -m toolkit.seams", description="Checks or lists the seams.")
    parser.add_argument(
        "--list",
        nargs="?",
        const=True,
        choices=libraries,
        metavar="LIBRARY",
        help=f"list all seams, or those of one library: {', '.join(libraries)}",
    )
    library = parser.parse_args(argv).list
    if library is None:
        return _print_differences()
    for seam in SEAMS.values():
        if library in (True, seam.package):
            print(f"{seam.name} | {seam.kind} | {', '.join(seam.places)} | {seam.reason}")
    return 0


def _print_differences() -> int:
    """Prints a line for each seam that differs: its name, the difference, what goes wrong because of it, and where."""
    found = 0
    for seam in SEAMS.values():
        difference = check(seam)
        if difference is not None:
            found += 1
            error = "without an error" if seam.silent else "with an error"
            print(f"{seam.name}: {difference}. Then, {error}: {seam.breaks}. In {', '.join(seam.places)}")
    print(f"{found} of {len(SEAMS)} seams differ")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
