"""Bytes to text and back. Inside the toolkit every size is an integer number of bytes; only this module knows GiB = 2**30."""

import re

from toolkit.errors import UserError

KIB, MIB, GIB = 2**10, 2**20, 2**30
_FACTORS = {"": 1, "b": 1, "kib": KIB, "mib": MIB, "gib": GIB, "tib": 2**40}
_FACTORS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?|\d{1,3}(?:,\d{3})+)\s*([a-z]*)\s*", re.IGNORECASE)


def format_bytes(nbytes: int, signed: bool = False) -> str:
    """`1320702444` -> `"1.23 GiB"`, always with its unit; `signed` adds a plus sign to positive sizes."""
    sign = "-" if nbytes < 0 else "+" if signed and nbytes > 0 else ""
    size = abs(nbytes)
    if size >= GIB:
        return f"{sign}{size / GIB:.2f} GiB"
    if size >= MIB:
        return f"{sign}{size / MIB:.1f} MiB"
    if size >= KIB:
        return f"{sign}{size / KIB:.1f} KiB"
    return f"{sign}{size} B"


MOST_BYTES = 2.0**60  # an EiB: no machine has as much


def parse_bytes(text: str) -> int:
    """`"24GiB"`, `"24 GiB"`, `"512MiB"`, `"24GB"` (decimal: 24 x 10**9) or a bare number of bytes -> bytes.

    Raises:
        UserError: if `text` is none of these, or not above zero.
    """
    match = _SIZE.fullmatch(text)
    factor = _FACTORS.get(match[2].lower()) if match else None
    size = float(match[1].replace(",", "")) * factor if match and factor else 0.0
    if not 0 < size < MOST_BYTES:
        raise UserError(
            f"{text[:60]!r} is not a size: write a positive number with its unit, such as 24GiB, 512MiB "
            "or 24GB (decimal: 24000000000 bytes)"
        )
    return int(size)
