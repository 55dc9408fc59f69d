"""Data files as text: which files are read, how they are compressed and encoded."""

import bz2
import codecs
import gzip
import importlib
import lzma
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from toolkit.errors import UserError
from toolkit.errors.reading import stands_for_another

MOST_UNPACKED = 1 << 30  # bytes; what is larger must not be compressed more than MOST_RATIO times
MOST_RATIO = 100
BOMS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def _zstd(file: Path) -> Any:
    for name in ("compression.zstd", "backports.zstd", "zstandard"):  # the first is part of Python 3.14
        try:
            return importlib.import_module(name).open(file, "rb")
        except ImportError:
            continue
    raise UserError(
        f"{file}: reading .zst needs zstandard: pip install zstandard, or unpack it first: zstd -d {file.name}"
    )


PACKED: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstd}


def path_of(name: str) -> Path | None:
    """The path that `name` is, or None if nothing is there: `Path.exists` without errors for names that cannot be paths.

    A link that leads nowhere counts as a path.
    """
    try:
        path = Path(name).expanduser()
        return path if os.path.lexists(path) else None
    except (OSError, ValueError, RuntimeError):
        return None


def regular_file(file: Path) -> None:
    """Raises UserError if `file` is not a readable file: a folder, a device, a pipe, or a link that leads nowhere."""
    try:
        mode = file.stat().st_mode
        if stat.S_ISREG(mode):
            file.open("rb").close()
            return
    except OSError as error:
        what = f"a link to {os.readlink(file)}" if file.is_symlink() else "a file"  # noqa: PTH115 - may be a loop
        raise UserError(f"{file}: {what} that cannot be read ({error.strerror}); give a file with rows") from None
    kinds = {
        stat.S_ISDIR: "a folder",
        stat.S_ISFIFO: "a named pipe",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
    }
    what = next((name for is_kind, name in kinds.items() if is_kind(mode)), "a socket")
    raise UserError(f"{file}: it is {what}; give a file with rows")


def kind_of(file: Path) -> str:
    """The type of a data file by its name, without compression: `.jsonl` for rows.jsonl.gz."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    packed = suffixes and suffixes[-1] in PACKED
    return suffixes[-2] if packed and len(suffixes) > 1 else suffixes[-1] if suffixes else ""


def empty(file: Path) -> UserError:
    """The error for a file that holds nothing."""
    return UserError(f"{file}: the file is empty; give one with rows")


def content_of(file: Path) -> bytes:
    """The bytes of a file, unpacked if its name says that it is compressed or its first bytes are gzip's.

    Raises: UserError for an empty or damaged file, and for one that unpacks to far more than its size.
    """
    regular_file(file)
    size = file.stat().st_size
    if size == 0:
        raise empty(file)
    with file.open("rb") as stream:
        opener = gzip.open if stream.read(2) == b"\x1f\x8b" else PACKED.get(file.suffix.lower())
    if opener is None:
        return file.read_bytes()
    most = max(MOST_UNPACKED, MOST_RATIO * size)
    try:
        with opener(file) as stream:
            content: bytes = stream.read(most + 1)
    except UserError:
        raise
    except Exception as error:  # each of the four libraries has errors of its own
        raise UserError(
            f"{file}: cannot be unpacked ({' '.join(str(error).split())[:160]}); give a whole file"
        ) from None
    if len(content) > most:
        raise UserError(f"{file}: it unpacks to more than {most:,} bytes, {MOST_RATIO} times its size; unpack it first")
    if not content:
        raise empty(file)
    return content


BINARY = {b"\x89PNG\r\n": "an image", b"\xff\xd8\xff": "an image", b"GIF89a": "an image", b"%PDF-1.": "a PDF file"}
BINARY |= {
    b"PK\x03\x04": "an Excel or zip file",
    b"PAR1": "a Parquet file",
    b"SQLite format 3\0": "a database",
    b"\x7fELF": "a program",
}


def check_begin(file: Path, begin: bytes) -> None:
    """Raises UserError if a data file's first bytes are those of something else: a web page, a Git LFS pointer, an image."""
    if other := stands_for_another(begin):
        raise UserError(f"{file}: {'; '.join(other)}")
    for mark, what in BINARY.items():
        if begin.startswith(mark) and not (mark == b"PAR1" and kind_of(file) == ".parquet"):
            raise UserError(f"{file}: it is {what}, whatever its name says; export its rows as CSV or JSON lines")


def decoded(file: Path, encoding: str | None = None) -> str:
    """The text of a file in `encoding` (default: UTF-8, with or without a byte order mark).

    Raises: UserError, with the line, for text that is not in that encoding.
    """
    content = content_of(file)
    check_begin(file, content[:200])
    if encoding is None:
        for mark, name in BOMS.items():
            if content.startswith(mark):
                raise UserError(f"{file}: not UTF-8 but {name.upper()}; add --encoding {name}")
    try:
        text = content.decode(encoding or "utf-8-sig")
    except (UnicodeDecodeError, UnicodeError) as error:
        at = getattr(error, "start", 0)
        where = f"line {content[:at].count(10) + 1}, byte 0x{content[at]:02x}"
        if encoding is not None:
            raise UserError(f"{file}: not in --encoding {encoding} ({where}); give another, such as latin-1") from None
        raise UserError(
            f"{file}: not UTF-8 ({where}); name its encoding, for example --encoding latin-1 or --encoding cp1252"
        ) from None
    return text.removeprefix("\ufeff") if encoding else text


def mark_of(file: Path) -> bool:
    """Whether a file begins with the byte order mark of UTF-16 or UTF-32."""
    with file.open("rb") as stream:
        return stream.read(4).startswith(tuple(BOMS))


def check_encoding(encoding: str) -> None:
    """Raises UserError for a name that is no encoding of text."""
    try:
        "a".encode(encoding)
    except (LookupError, ValueError, TypeError):
        raise UserError(
            f"--encoding {encoding} is no encoding that Python knows; give utf-8, utf-16, latin-1, cp1252, shift_jis ..."
        ) from None
