"""Whether the hub can be reached, so that a machine without a network is told so at once instead of after a minute of retries."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

from huggingface_hub import constants, get_session

from toolkit.seams import patched

PATIENCE = 2.5  # seconds


@cache
def hub_is_reachable() -> bool:
    """Whether the hub answers within `PATIENCE` seconds; always False in the libraries' own offline mode (HF_HUB_OFFLINE).

    It is asked in a thread, because looking up a name can take longer than the timeout of a request.
    """
    if constants.is_offline_mode():
        return False
    answered = []

    def ask() -> None:
        with suppress(Exception):  # of a proxy, a certificate, a name that does not resolve
            get_session().head(constants.ENDPOINT, timeout=PATIENCE)
            answered.append(True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return bool(answered)


@contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """While open, the libraries of the hub use only their caches if the hub cannot be reached: they do not retry."""
    if constants.is_offline_mode() or hub_is_reachable():
        yield
        return
    with patched("huggingface_hub's offline mode", True), patched("offline mode of datasets", True):
        yield
