"""Which folder a run writes to, that it alone writes there, and how it goes on in the folder of an earlier start.

.lock          held by rank 0 while the run writes; the system releases it when the process ends, however it ends
.claimed.*     shows the other ranks that they see the same folder; removed at once
"""

import contextlib
import os
import re
import socket
import time
import uuid
from dataclasses import fields
from pathlib import Path
from typing import IO, Any

import yaml

from toolkit.config import Config, new_output_dir
from toolkit.config.arguments import NEWEST, by_new_names
from toolkit.config.start import LOCK, check_empty, check_no_file
from toolkit.console import say
from toolkit.errors import NothingToDo, UserError
from toolkit.errors.reading import read_json, read_yaml
from toolkit.runs.preflight import Preflight
from toolkit.training.checkpoints import (
    RunFingerprint,
    best_of,
    check_resumable,
    check_trusted,
    newest_first,
    rename_later_checkpoints,
    resume_point,
)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# What a killed run leaves of a file that it was writing (`toolkit.files.atomic_write`), and the marker for other ranks.
_PART = re.compile(r"\.(claimed|[\w-]+\.(yaml|jsonl?|csv|md))\.\w+")
_held: dict[Path, IO[str]] = {}

# The flags that a resumed run cannot change, with the reason. All flags of the method belong to them. Every other flag has its
# effect from the checkpoint on; rows, seed and rows per step are checked by `check_resumable`.
_OPTIMIZER = "the checkpoint's optimizer goes on"
_SCHEDULE = "the checkpoint's schedule of the learning rate goes on"
_WEIGHTS = "the checkpoint's weights belong to it"
_CHOICE = "the evaluations before the checkpoint cannot be compared anew"
FIXED = {
    **dict.fromkeys(("learning_rate", "weight_decay", "optim", "optim_args", "optim_target_modules"), _OPTIMIZER),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon"), _OPTIMIZER),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"), _SCHEDULE),
    **dict.fromkeys(("num_train_epochs", "max_steps"), "the schedule of the learning rate was made for that length"),
    **dict.fromkeys(("model_name_or_path", "model_revision", "random_weights", "dtype"), _WEIGHTS),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"), _WEIGHTS),
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), _CHOICE),
    "task": "the checkpoint has learned that task",
    "train_sampling_strategy": "it orders the rows of the epoch that the checkpoint is in",
    "seed": "the checkpoint's random numbers go on",
    "data_seed": "it orders the rows of the epoch that the checkpoint is in",
}
ROWS = ("train_sampling_strategy", "seed", "data_seed")  # of FIXED, those that --allow_changed_data allows to change


def claim(config: Config, ready: Preflight) -> tuple[Path, str | None, Path, list[dict[str, Any]]]:
    """Makes the folder for this run, and locks it until `release` or the end of this process; only rank 0 calls it.

    Returns: the folder; the checkpoint to resume from; a marker file for the other ranks; and what resumed runs changed.

    Raises: UserError if the folder cannot be written, is not empty and not resumed, is being written by another process, or
        cannot be resumed; NothingToDo if its run is finished.
    """
    training = config.training
    path, resumes = Path(training.output_dir), training.resume_from_checkpoint is not None
    check_no_file(path)
    if resumes:
        _check_unfinished(path, config)
    made = _make(path, config)
    path = Path(training.output_dir)
    try:
        _lock(path)
        _remove_parts(path)
        checkpoint, changes = _resumed(path, config, ready) if resumes else (None, [])
        mark = path / f".claimed.{uuid.uuid4().hex}"
        mark.touch()
    except BaseException as error:
        release(path)
        if made:
            with contextlib.suppress(OSError):
                path.rmdir()
        if isinstance(error, OSError):
            raise _cannot(path, error) from None
        raise
    return path, str(checkpoint) if checkpoint else None, mark, changes


def release(path: Path) -> None:
    """Removes the lock on `path`, if this process holds it."""
    lock = _held.pop(path.absolute(), None)
    if lock is not None:
        with contextlib.suppress(OSError):
            (path / LOCK).unlink()
        lock.close()


def _make(path: Path, config: Config) -> bool:
    """Makes the folder, under the next free name if --output_dir was not given; returns whether it is new."""
    resumes = config.training.resume_from_checkpoint is not None
    while True:
        try:
            path.mkdir(parents=True)
            return True
        except FileExistsError:
            if config.chooses_folder:
                path = new_output_dir(config.method, config.model)
                config.training.output_dir = str(path)
                continue
            if not resumes and (path / LOCK).exists():
                _lock(path)  # raises an error if its run is going
                release(path)
            if not resumes:
                check_empty(path)
            return False
        except OSError as error:
            raise _cannot(path, error) from None


def _cannot(path: Path, error: OSError) -> UserError:
    return UserError(f"--output_dir {path} cannot be written ({error.strerror}); give a folder that can")


def _lock(path: Path) -> None:
    """Locks `path` for this process.

    Raises: UserError if another process holds the lock.
    """
    if fcntl is None or path.absolute() in _held:
        return
    while True:
        lock = (path / LOCK).open("a+", encoding="utf-8")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # forks, such as a data loader's, do not inherit it
        except (BlockingIOError, PermissionError):
            lock.seek(0)
            who = lock.read(200).strip() or "another process"
            lock.close()
            raise UserError(
                f"{path}: this run is being written by {who}; wait for its end, or stop it, or give another --output_dir"
            ) from None
        except OSError:  # a file system without locks
            lock.close()
            return
        try:
            if os.path.samestat(os.fstat(lock.fileno()), (path / LOCK).stat()):
                break
        except FileNotFoundError:  # its holder has just finished, and removed it
            pass
        lock.close()
    _held[path.absolute()] = lock
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%H:%M')}\n")
    lock.flush()


def _remove_parts(path: Path) -> None:
    for part in path.iterdir():
        if _PART.fullmatch(part.name) and part.is_file():
            part.unlink()


def _is_begun(path: Path) -> bool:
    """Whether `path` is the folder of a run: it holds config.yaml or a checkpoint, or only what a killed run leaves before them."""
    if not path.is_dir():
        return False
    names = {entry.name for entry in path.iterdir()}
    own = {name for name in names if name == LOCK or _PART.fullmatch(name)}
    return "config.yaml" in names or names == own or bool(newest_first(path))


def _check_unfinished(path: Path, config: Config) -> None:
    """Raises UserError if no run has begun in `path`, and NothingToDo if it is finished."""
    requested = str(config.training.resume_from_checkpoint)
    named = Path(requested) if requested != NEWEST else None
    if named is None and not _is_begun(path):
        raise UserError(
            f"--resume_from_checkpoint: no checkpoint in {path}; give --output_dir of the run to resume, "
            "or the path of one of its checkpoint-N folders"
        )
    if not (path / "run.json").is_file() or not read_json(path / "run.json", finite=False).get("finished"):
        return
    if named is not None and [one.absolute() for one in newest_first(path)[:1]] != [named.absolute()]:
        raise UserError(
            f"--resume_from_checkpoint {named}: the run in {path} is finished, and its results would be overwritten; give a new "
            "--output_dir"
        )
    _changes(path, config, "the finished run")
    push = ""
    if config.training.push_to_hub:
        push = f"; to upload it again: hf upload {config.training.hub_model_id or path.resolve().name} {path}"
    raise NothingToDo(f"{path}: this run is already finished, and nothing was changed{push}")


def _resumed(path: Path, config: Config, ready: Preflight) -> tuple[Path | None, list[dict[str, Any]]]:
    """The checkpoint to resume from, and what the resumed starts of this run have changed."""
    training = config.training
    checkpoint = resume_point(training.resume_from_checkpoint, path)
    if checkpoint is None:
        return None, []
    check_trusted(checkpoint, training.trust_checkpoint)
    fingerprint = RunFingerprint.of(config.engine, training, ready.data.train_fingerprint)
    check_resumable(checkpoint, fingerprint, training.allow_changed_data)
    begun = checkpoint.parent
    changed = _changes(begun, config, str(checkpoint))
    if changed:
        shown = (f"--{name} {_shown(now)} instead of {_shown(then)}" for name, (then, now) in changed.items())
        say("changed", f"from {checkpoint.name} on: {', '.join(shown)}")
    if training.load_best_model_at_end and (best := best_of(checkpoint, path)) and best.is_dir():
        check_trusted(best, training.trust_checkpoint)
    rename_later_checkpoints(checkpoint, path)
    before = read_json(begun / "run.json", finite=False).get("resumed", []) if (begun / "run.json").is_file() else []
    return checkpoint, [*before, {"from": checkpoint.name, "changed": changed}]


def _changes(begun: Path, config: Config, what: str) -> dict[str, list[Any]]:
    """The flags of this run that differ from those in `begun`/config.yaml: name to [then, now].

    Raises: UserError if they include flags that a resumed run cannot change.
    """
    if not (begun / "config.yaml").is_file():
        return {}
    then, now = by_new_names(read_yaml(begun / "config.yaml")), yaml.safe_load(yaml.safe_dump(config.as_dict()))
    method = (
        read_json(begun / "run.json", finite=False).get("method")
        if (begun / "run.json").is_file()
        else config.method.name
    )
    if method != config.method.name:
        raise UserError(
            f"--resume_from_checkpoint: {what} was trained by {method}, and this is {config.method.name}; use "
            f"recipes/{method}.py, or give a new --output_dir"
        )
    defaults = _defaults(config)
    changed = {
        name: [then.get(name, defaults.get(name)), now.get(name, defaults.get(name))]
        for name in sorted(then.keys() | now.keys())
        if name in defaults and not _same(name, then.get(name, defaults[name]), now.get(name, defaults[name]))
    }
    allowed = ROWS if config.training.allow_changed_data else ()
    fixed = FIXED | {field.name: _WEIGHTS for field in fields(config.method)}
    refused = {name: values for name, values in changed.items() if name in fixed and name not in allowed}
    if refused:
        shown = (
            f"--{name} is {_shown(now)} instead of {_shown(was)} ({fixed[name]})"
            for name, (was, now) in refused.items()
        )
        raise UserError(
            f"--resume_from_checkpoint: {what} cannot go on with changed flags: {', '.join(shown)}; give them as before, or start a "
            "new run with another --output_dir"
        )
    return changed


def _defaults(config: Config) -> dict[str, Any]:
    """Every flag's default, as config.yaml would hold it; None if it holds none."""
    return {
        field.name: None
        if field.default in (None, "") or not isinstance(field.default, bool | int | float | str)
        else getattr(field.default, "value", field.default)
        for part in (config.method, config.model, config.data, config.training)
        for field in fields(part)
    }


def _same(name: str, one: Any, other: Any) -> bool:
    if name == "model_name_or_path" and isinstance(one, str) and isinstance(other, str):
        return Path(one).name == Path(other).name  # a folder may have been moved
    return (one or None) == (other or None) if isinstance(one, list | dict | str) else one == other


def _shown(value: Any) -> str:
    return "not given" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
