"""Lists the seams that differ in the installed libraries: `python -m toolkit.seams`. The exit code is 1 if one differs."""

from __future__ import annotations

import sys

from toolkit.seams import SEAMS, check


def main() -> int:
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
