"""Signatures of what this user's runs wrote, with a key that is made when it is first needed.

The key is `~/.config/footprint/key` (or below $XDG_CONFIG_HOME): 32 random bytes that only this user can read. A signature is an
HMAC-SHA256 (RFC 2104).
"""

import contextlib
import hmac
import os
import secrets
import time
from pathlib import Path

from toolkit.console import say

KEY_BYTES = 32
WAIT_SECONDS = 1.0  # for another process that has just made the file


def key_file() -> Path:
    """Where this user's key is."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "footprint" / "key"


def signature(content: bytes) -> str | None:
    """The signature of `content` in hexadecimal; None, with a warning, if this user's key can be neither read nor made."""
    try:
        return hmac.digest(_key(makes=True), content, "sha256").hex()
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        say(
            "warning",
            f"checkpoints are not signed, so resuming needs --trust_checkpoint: no key in {key_file()} ({reason})",
        )
        return None


def is_signed(content: bytes, signed: object) -> bool:
    """Whether `signed` is the signature of `content` with this user's key."""
    try:
        expected = hmac.digest(_key(makes=False), content, "sha256").hex()
    except (OSError, RuntimeError):
        return False
    return isinstance(signed, str) and hmac.compare_digest(expected.encode(), signed.encode())


def _key(makes: bool) -> bytes:
    """The key.

    Raises: OSError if it cannot be read or made, RuntimeError if there is no home folder or the file is damaged.
    """
    path = key_file()
    if makes:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with contextlib.suppress(FileExistsError):
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                os.write(handle, secrets.token_bytes(KEY_BYTES))
            finally:
                os.close(handle)
    end = time.monotonic() + WAIT_SECONDS
    while len(key := path.read_bytes()) < KEY_BYTES:
        if time.monotonic() > end:
            raise RuntimeError("it is damaged; delete it")
        time.sleep(0.05)
    return key
