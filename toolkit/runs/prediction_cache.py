"""Predictions that were made before, kept on this machine: a second one of the same run takes a second.

One file each in `footprint/predictions` of the user's cache folder ($XDG_CACHE_HOME, else ~/.cache); $FOOTPRINT_CACHE names another
folder, and nothing is kept if it is empty. A file's name is a hash of all that the ledger depends on: what was asked, the model's
files, this code, the versions of the libraries, and the environment that PyTorch's allocator reads. So no file is ever out of date,
and any may be deleted at any time. `footprint cache --clear` deletes all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.errors import UserError
from toolkit.files import atomic_write
from toolkit.memory.environment import version_of
from toolkit.models import catalogue
from toolkit.models.hub import hub_id

if TYPE_CHECKING:
    from toolkit.memory.ledger import Ledger

PACKAGE = Path(__file__).parents[1]
LIBRARIES = (
    *("torch", "transformers", "peft", "accelerate", "bitsandbytes", "deepspeed", "tokenizers", "datasets"),
    *("flash-attn", "flash-attn-3", "liger-kernel", "torchao", "kernels"),  # without them stand-ins run
)
FOLDERS = ("model_name_or_path", "tokenizer_name")  # flags that can name a folder whose files a prediction reads
ENVIRONMENT = ("PYTORCH_", "CUBLAS_", "HF_")  # beginnings of variables


def cached(asked: Mapping[str, Any], words: Sequence[str], make: Callable[[], Ledger]) -> Ledger:
    """What `make()` returns for what was `asked`, with the flags `words`; from a file if there is one."""
    folder, key = cache_folder(), None
    if folder is not None:
        with suppress(OSError, ValueError):  # a flag's value cannot be a path
            key = _key(asked, words)
    if folder is None or key is None:
        return make()
    from toolkit.memory.ledger import Ledger

    file = folder / f"{key}.json"
    if file.is_file():
        with suppress(UserError, OSError):  # it is damaged
            return Ledger.load(file)
    ledger = make()
    with suppress(OSError):  # no permission, or a full disk
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(file, ledger.to_text())
    return ledger


def cache_folder() -> Path | None:
    """The folder of the kept predictions; None if none are kept."""
    chosen = os.environ.get("FOOTPRINT_CACHE")
    if chosen is not None:
        return Path(chosen) / "predictions" if chosen else None
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "footprint" / "predictions"


def size() -> tuple[int, int]:
    """The number of kept predictions, and their bytes."""
    folder = cache_folder()
    files = [] if folder is None else list(folder.glob("*.json"))
    return len(files), sum(file.stat().st_size for file in files)


def clear() -> None:
    """Deletes all kept predictions."""
    folder = cache_folder()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _key(asked: Mapping[str, Any], words: Sequence[str]) -> str | None:
    """SHA-256 over all that the ledger depends on; None if that is more than can be named here.

    It is more for this machine's own card, for data that is read, for flags in a file, and for a model that comes from the hub.
    """
    given = dict(flag_values(words))
    name = given.get("model_name_or_path")
    on_hub = name is not None and not Path(name).exists() and catalogue.find(hub_id(name)) is None
    if asked["gpu"] is None and asked["gpu_memory"] is None:
        return None
    if on_hub or "dataset_name" in given or any(word.endswith((".yaml", ".yml")) for word in words):
        return None
    launch = asked["launch"]
    if launch is not None and (Path(launch).suffix or os.sep in str(launch)):
        return None
    read = [path.resolve() for flag, value in given.items() if (path := Path(value)).is_file() or flag in FOLDERS]
    files = [file for file in PACKAGE.rglob("*.*") if file.suffix != ".pyc"] + list(
        (PACKAGE.parent / "launch").glob("*")
    )
    for path in read:
        files += path.glob("*") if path.is_dir() else [path]
    return hashlib.sha256(
        json.dumps(
            [
                {name: str(value) for name, value in asked.items()},
                list(words),
                [sys.version, *map(version_of, LIBRARIES)],
                sorted(item for item in os.environ.items() if item[0].startswith(ENVIRONMENT)),
                [_state(file) for file in sorted(files)],
            ]
        ).encode()
    ).hexdigest()


def flag_values(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """`["--max_length", "8", "--bf16=true"]` -> `("max_length", "8")`, `("bf16", "true")`."""
    for word, following in zip(words, [*words[1:], ""], strict=False):
        if word.startswith("--"):
            flag, equals, value = word.removeprefix("--").partition("=")
            yield flag.replace("-", "_"), value if equals else following


def _state(file: Path) -> tuple[str, int, int] | None:
    """A file's path, its size and when it was written, in nanoseconds; None if it is not there."""
    try:
        status = file.stat()
    except OSError:
        return None
    return str(file), status.st_size, status.st_mtime_ns
