"""Complete checkpoints, written atomically, and what a run must share with the checkpoint that it resumes from.

    checkpoint-N/manifest.json   size in bytes and SHA-256 of every other file, and the run that wrote them, signed with this user's
                                 key (`toolkit.training.signatures`), because loading a checkpoint may run code that is hidden in it
    .saving/                     what is being written; resuming removes what a killed run left here
    damaged-checkpoint-N         on resuming, its files did not match its manifest
    abandoned-checkpoint-N       later than the checkpoint that the run was resumed from

After writing, the files are flushed to disk and read once more for the hashes; resuming reads them once more as well.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException

from toolkit.config.arguments import NEWEST, TrainArguments
from toolkit.console import say
from toolkit.distributed.deepspeed import NOT_READ_BACK
from toolkit.distributed.engine import Engine, EngineKind
from toolkit.errors import UserError
from toolkit.training.signatures import is_signed, key_file, signature
from toolkit.units import format_bytes

MANIFEST = "manifest.json"
TEMPORARY = ".saving"
_NAME = re.compile(r"checkpoint-(\d+)")
_SAID_OF_WRITING = (
    *("PytorchStreamWriter", "inline_container", "(os error "),
    *(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)),
)


@dataclass(frozen=True)
class RunFingerprint:
    """The properties of a run that a checkpoint records, because a run that resumes from it must share them."""

    engine: str
    processes: int
    whole_state: bool  # with the optimizer state, which resuming needs
    rows_a_step: int
    seed: int
    data: str  # SHA-256 over the train split as token ids, in order
    state_on_disk: bool = False  # ZeRO-Infinity keeps the optimizer state on a disk

    @classmethod
    def of(cls, engine: Engine, training: TrainArguments, train_fingerprint: str) -> "RunFingerprint":
        """The fingerprint of a run with these settings; `train_fingerprint` is the SHA-256 of its train split."""
        batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
        return cls(
            str(engine.kind),
            engine.processes,
            not training.save_only_model,
            batch * engine.processes // engine.sequence_parallel_size,
            training.seed if training.data_seed is None else training.data_seed,
            train_fingerprint,
            engine.optimizer_state == "nvme",
        )


@contextmanager
def atomic_folder(final: Path, fingerprint: RunFingerprint, is_main: bool, wait: Callable[[], None]) -> Iterator[Path]:
    """Gives a temporary folder to write the checkpoint `final` into; at the end of the block it is renamed to `final`.

    Every rank calls this and may write; `wait` is a barrier. Rank 0 adds the manifest before it renames the folder. So a
    folder named checkpoint-N is always complete, whenever the processes are killed.

    Raises: UserError if a file cannot be written; the temporary folder is removed first.
    """
    temporary = final.parent / TEMPORARY / final.name
    with readable_write_errors(final.name, final.parent):
        try:
            _make(temporary)
            yield temporary
            wait()
            if is_main:
                _write_manifest(temporary, fingerprint)
                shutil.rmtree(final, ignore_errors=True)  # exists if the run was resumed from an earlier checkpoint
                temporary.rename(final)
                _to_disk(final.parent)
        except BaseException:
            shutil.rmtree(temporary.parent, ignore_errors=True)
            raise
    wait()
    shutil.rmtree(temporary.parent, ignore_errors=True)


@contextmanager
def whole_files(folder: Path, is_main: bool, wait: Callable[[], None]) -> Iterator[Path]:
    """Gives a temporary folder for files that belong into `folder`; at the end of the block rank 0 moves them there.

    Every rank calls this and may write; `wait` is a barrier. So `folder` never holds a part of a file.

    Raises: UserError if a file cannot be written; the temporary folder is removed first.
    """
    temporary = folder / TEMPORARY / "final"
    with readable_write_errors("the trained weights", folder):
        try:
            _make(temporary)
            yield temporary
            wait()
            if is_main:
                for path in sorted(temporary.iterdir()):
                    if path.is_dir():
                        shutil.rmtree(folder / path.name, ignore_errors=True)
                    path.replace(folder / path.name)
        finally:
            if is_main:
                shutil.rmtree(temporary.parent, ignore_errors=True)
        wait()


def _make(temporary: Path) -> None:
    """Makes a folder below TEMPORARY, but not the run's folder: if that was renamed, it must not be made again."""
    temporary.parent.mkdir(exist_ok=True)
    temporary.mkdir(exist_ok=True)


@contextmanager
def readable_write_errors(what: str, output_dir: Path) -> Iterator[None]:
    """Turns write errors of any library within the block into a `UserError`."""
    try:
        yield
    except BaseException as error:
        if not is_write_failure(error):
            raise
        raise UserError(_cannot_write(what, output_dir, error)) from error


def _write_manifest(folder: Path, fingerprint: RunFingerprint) -> None:
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        _to_disk(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    content = {"run": asdict(fingerprint), "files": files}
    manifest = folder / MANIFEST
    seals = {"sha256": _sha256_of(content), "signature": signature(_canonical(content))}
    manifest.write_text(json.dumps(content | seals, indent=1) + "\n", encoding="utf-8")
    _to_disk(manifest)


def _to_disk(path: Path) -> None:
    """Flushes `path` to disk: a file's bytes, or a folder's entries."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sha256_of(content: dict[str, Any]) -> str:
    """The SHA-256 of a manifest's content, which the manifest also records."""
    return hashlib.sha256(_canonical(content)).hexdigest()


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode()


def is_write_failure(error: BaseException) -> bool:
    """Whether any library raised `error` because it could not write a file."""
    if isinstance(error, OSError | SafetensorError | CheckpointException):
        return not isinstance(error, ConnectionError)
    # torch and the tokenizers' library have no exception of their own
    return isinstance(error, Exception) and any(said in str(error) for said in _SAID_OF_WRITING)


def _cannot_write(what: str, output_dir: Path, error: BaseException) -> str:
    if not output_dir.is_dir():
        return (
            f"{what} could not be written: {output_dir} was renamed or deleted while the run wrote to it; if you renamed it, go on "
            "there with --output_dir NEW_NAME --resume_from_checkpoint true"
        )
    free = shutil.disk_usage(output_dir).free
    kept = newest_first(output_dir)
    needed = sum(file["bytes"] for file in _manifest(kept[0])["files"].values()) if kept else 0
    reason = " ".join((str(error) or type(error).__name__).split())[:160]
    takes = f", and a checkpoint takes {format_bytes(needed)}" if needed else ""
    resume = f"then resume from {kept[0].name} with --resume_from_checkpoint true" if kept else "then start again"
    return (
        f"{what} could not be written to {output_dir} ({reason}); {format_bytes(free)} are free there{takes}: make room, or "
        f"keep fewer with --save_total_limit, {resume}"
    )


def newest_first(folder: Path) -> list[Path]:
    """The checkpoint-N folders in `folder`, the latest step first."""
    if not folder.is_dir():
        return []
    found = {
        int(match[1]): path for path in folder.iterdir() if path.is_dir() and (match := _NAME.fullmatch(path.name))
    }
    return [found[step] for step in sorted(found, reverse=True)]


def _manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest's `run`, `files` and `signature`; no files if the manifest is missing or was altered."""
    try:
        content = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        sha256, signed = content.pop("sha256"), content.pop("signature", None)
        if sha256 == _sha256_of(content):
            return content | {"signature": signed}
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        pass
    return {"files": {}}


def damage(checkpoint: Path) -> str | None:
    """The first damage found in `checkpoint`, in a few words with the file's name; None if it is complete."""
    files = _manifest(checkpoint)["files"]
    if not files:
        return f"{MANIFEST} is missing or was altered"
    for name, kept in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != kept["bytes"]:
            return f"{name} has {size:,} bytes instead of {kept['bytes']:,}"
        if _sha256(path) != kept["sha256"]:
            return f"{name} was altered: its SHA-256 is not the one that it was saved with"
    return None


def check_trusted(checkpoint: Path, trust: bool) -> None:
    """Raises UserError if a file of `checkpoint` is not of this user's own run, unless `trust` is given.

    Call it after `damage`, which compares the files with the manifest; here the manifest's signature is checked, and that no file
    was added, which a library might load instead of another.
    """
    if trust:
        return
    content = _manifest(checkpoint)
    signed = content.pop("signature", None)
    found = (path for path in checkpoint.rglob("*") if not path.is_dir() and not path.name.startswith("."))
    added = {path.relative_to(checkpoint).as_posix() for path in found} - content["files"].keys() - {MANIFEST}
    if not is_signed(_canonical(content), signed):
        why = "has no signature" if signed is None else "was not signed with your key"
        why += f" ({key_file()})"
    elif added:
        why = f"holds {min(added)}, which was added after it was written"
    else:
        return
    raise UserError(
        f"--resume_from_checkpoint: {checkpoint} {why}, and loading a checkpoint may run code that is hidden in it; if you trust all "
        "who could write there, add --trust_checkpoint"
    )


def best_of(checkpoint: Path, output_dir: Path) -> Path | None:
    """The best checkpoint that `checkpoint` records; None if it records none.

    It is found by its name in `output_dir` or beside `checkpoint`, since folders may have been renamed. Otherwise the recorded path,
    which may not exist.
    """
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    recorded = state.get("best_model_checkpoint")
    if not isinstance(recorded, str):
        return None
    places = (folder / Path(recorded).name for folder in (output_dir, checkpoint.parent))
    return next((place for place in places if place.is_dir()), Path(recorded))


def resume_point(requested: str | None, output_dir: Path) -> Path | None:
    """The checkpoint to resume from, or None to start. `requested` is the value of `--resume_from_checkpoint`.

    `true` takes the newest complete checkpoint. Newer ones that are damaged are reported and renamed, and half-written
    ones of a killed run are removed. A run that was stopped before its first checkpoint starts again. So the same command
    restarts a run whenever it was killed. The caller has checked that a run has begun in `output_dir`.

    Raises: UserError if there is no checkpoint to resume from, or it is damaged.
    """
    if requested is None:
        return None
    shutil.rmtree(output_dir / TEMPORARY, ignore_errors=True)
    if requested != NEWEST:
        if not (Path(requested) / "trainer_state.json").is_file():
            raise UserError(
                f"--resume_from_checkpoint {requested}: no checkpoint there; give the path of a checkpoint-N folder"
            )
        if wrong := damage(Path(requested)):
            raise UserError(
                f"--resume_from_checkpoint {requested}: {wrong}; give another, or `true` for the newest complete one"
            )
        return Path(requested)
    found = newest_first(output_dir)
    if not found:
        say("resuming", f"{output_dir} has no checkpoint yet, so the run starts from its beginning")
        return None
    damaged: dict[Path, str] = {}
    for checkpoint in found:
        if wrong := damage(checkpoint):
            damaged[checkpoint] = wrong
            continue
        for bad, wrong in damaged.items():
            moved = bad.with_name(f"damaged-{bad.name}")
            shutil.rmtree(moved, ignore_errors=True)
            bad.rename(moved)
            say("warning", f"{bad}: {wrong}; renamed to {moved.name}; {checkpoint.name} is used instead")
        say("resuming", f"from {checkpoint}, which is complete")
        return checkpoint
    first, wrong = next(iter(damaged.items()))
    raise UserError(
        f"--resume_from_checkpoint: no checkpoint in {output_dir} is complete ({first.name}: {wrong}); start again"
    )


def rename_later_checkpoints(checkpoint: Path, output_dir: Path) -> None:
    """Renames checkpoints later than `checkpoint`: the run now continues from `checkpoint`, and `true` must not pick them."""
    if checkpoint.resolve().parent != output_dir.resolve():
        return
    for later in newest_first(output_dir):
        if later.name == checkpoint.name:
            return
        moved = later.with_name(f"abandoned-{later.name}")
        shutil.rmtree(moved, ignore_errors=True)
        later.rename(moved)
        say("resuming", f"{later.name} renamed to {moved.name}: the run resumes from an earlier checkpoint")


def check_resumable(checkpoint: Path, now: RunFingerprint, allow_changed_data: bool) -> None:
    """Raises UserError if the run `now` cannot resume from `checkpoint`, or would silently train on other rows.

    A single process and DDP write the same files. Any number of processes can read FSDP2's. ZeRO's are shards for one number
    of processes and one stage. FSDP1's checkpoints are refused.
    """
    try:
        then = RunFingerprint(**_manifest(checkpoint)["run"])
        then_kind, now_kind = EngineKind(then.engine), EngineKind(now.engine)
    except (TypeError, ValueError):
        raise UserError(
            f"--resume_from_checkpoint: {checkpoint} was written by another version of footprint, and this version cannot read its "
            "manifest; resume with that version"
        ) from None
    if then.state_on_disk or now.state_on_disk:
        which = f"{checkpoint} was written with it" if then.state_on_disk else "this launch file puts it"
        raise UserError(
            f"--resume_from_checkpoint: {NOT_READ_BACK} ({which} on a disk); choose launch/zero3_offload.yaml for runs that must be "
            "resumed"
        )
    if not then.whole_state:
        raise UserError(
            f"--resume_from_checkpoint: {checkpoint} was saved with --save_only_model, without the optimizer state; start "
            "a new run from its weights"
        )
    if then_kind is EngineKind.FSDP1:
        raise UserError(
            f"--resume_from_checkpoint: {checkpoint} was written by FSDP1, and FSDP1's checkpoints cannot be resumed; start again "
            "with launch/fsdp2.yaml"
        )
    same = then_kind is now_kind or (then_kind.replicates_checkpoints and now_kind.replicates_checkpoints)
    if not same or (then_kind.is_zero and then.processes != now.processes):
        raise UserError(
            f"--resume_from_checkpoint: {checkpoint} was written by {then.engine} on {then.processes} processes, and cannot be "
            f"read by {now.engine} on {now.processes}: launch the run as before"
        )
    changed = []
    if then.data != now.data:
        changed.append("the training rows (or their tokens) changed")
    if then.seed != now.seed:
        changed.append(f"their order changed (--seed or --data_seed {now.seed} instead of {then.seed})")
    if then.rows_a_step != now.rows_a_step:
        changed.append(
            f"a step has {now.rows_a_step} rows instead of {then.rows_a_step} (--per_device_train_batch_size x "
            "--gradient_accumulation_steps x processes)"
        )
    if changed and not allow_changed_data:
        raise UserError(
            f"since {checkpoint} was written, {', and '.join(changed)}, so some rows would be seen twice or never; undo that, "
            "or give --allow_changed_data to resume anyway"
        )
