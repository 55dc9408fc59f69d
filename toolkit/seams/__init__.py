"""A seam is a dependency on a library's private API, or on anything else that it does not promise to keep.

This package is the registry of all of them:

    SEAMS["F.softmax"]                          what, where, why, and what goes wrong if it changes
    check(SEAMS["F.softmax"])                   what differs in the installed library, or None
    with patched("F.softmax", ours): ...        the only way to replace something in a library, restored afterwards

Each library has a file with its table. tests/test_seams.py checks each seam by name, also on the oldest and the newest versions
that pyproject.toml admits (`make stacks`), and finds private names, patches and overrides that are in no table. So an upgrade of
a library fails with a list of names. Importing this package imports no library.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from toolkit.seams import accelerate, bitsandbytes, cuda, deepspeed, other, peft, torch, trainer, transformers
from toolkit.seams.seam import Seam, applies_to_installed, check, find

__all__ = ["SEAMS", "Seam", "applies_to_installed", "check", "imported", "patched"]

TABLES = (torch, cuda, transformers, trainer, accelerate, deepspeed, peft, bitsandbytes, other)
SEAMS: dict[str, Seam] = {seam.name: seam for table in TABLES for seam in table.TABLE}


@contextmanager
def patched(name: str, replacement: Any, owner: Any = None) -> Iterator[None]:
    """While open, `replacement` replaces the target of the seam `name`. The original is restored at the end, also after an error.

    Args:
        name: of a seam of the kind "patch"; its first target is replaced.
        owner: the single object whose attribute is replaced; by default the module or class that the target names.

    Raises: LookupError if there is no such seam, or if the library no longer has the target.
    """
    seam = SEAMS.get(name)
    if seam is None or seam.kind != "patch":
        raise LookupError(f"{name!r} is no registered patch; add it to a table of toolkit.seams")
    module, path = seam.targets[0]
    parent, _, attribute = path.rpartition(".")
    owner = find(module, parent) if owner is None else owner
    if not hasattr(owner, attribute):
        raise LookupError(f"{name}: {module} has no {path} to replace")
    own = attribute in vars(owner)
    before = vars(owner)[attribute] if own else None
    setattr(owner, attribute, replacement)
    try:
        yield
    finally:
        if own:
            setattr(owner, attribute, before)
        else:  # it was inherited
            delattr(owner, attribute)


@contextmanager
def imported(name: str, stand_in: ModuleType) -> Iterator[None]:
    """While open, importing the module `name` gives `stand_in`, whether or not it is installed."""
    installed = sys.modules.get(name)
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        if installed is None:
            del sys.modules[name]
        else:
            sys.modules[name] = installed
