"""Reads the rows of a data set: the embedded dialogues, csv / jsonl / parquet / `sentence@label` files, or a hub id.

Whatever the source, the result is three splits of plain columns, and every mistake in a file is found here.
"""

import codecs
import itertools
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, disable_progress_bars, enable_progress_bars, load_dataset
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import GatedRepoError

from toolkit.embedded import make_dialogues
from toolkit.embedded.frames import Split
from toolkit.errors import UserError, did_you_mean

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
SPLIT_NAMES = {"train": "train", "training": "train", "validation": "validation", "valid": "validation"}
SPLIT_NAMES |= {"val": "validation", "dev": "validation", "test": "test", "testing": "test"}
READERS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "sentences"}
HELD_OUT_SHARE = 0.1  # of the train split, where a data set brings no validation or test split of its own
HELD_OUT_MOST = 500
HELD_OUT_SEED = 42  # not the run's: runs of several seeds are scored on the same rows, or they could not be compared


def load_rows(name: str | None, config_name: str | None, columns: dict[str, str]) -> tuple[DatasetDict, list[str]]:
    """The splits train, validation and test with at least `columns`, and remarks for the user about how they came to be.

    `columns` maps the flag that names a column to the column. Splits that are missing are held out of train, the same
    rows in each run, and with the same share of each class where there is a `label_column`, whose values become text.

    Raises: UserError for a missing, empty or unreadable file, a missing column, or rows that are all empty.
    """
    if name is None:
        splits = DatasetDict({split: Dataset.from_list(make_dialogues(split)) for split in SPLITS})
    elif Path(name).expanduser().exists():
        splits = _load_local(Path(name).expanduser())
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"--dataset_name {name}: no such folder or file; give an existing one or a hub id (user/name)")
    else:
        splits = _load_hub(name, config_name)
    if "train" not in splits:
        raise UserError(
            f"--dataset_name {name}: it has no train split (found: {', '.join(splits) or 'no files'}); "
            "name the files train.csv, validation.csv and test.csv (or .jsonl, .parquet)"
        )
    remarks = []
    label = columns.get("label_column")
    for split in list(splits):
        if label and split != "train" and label in splits[split].column_names and not any(_told(splits[split], label)):
            del splits[split]  # as the test splits of GLUE, whose labels are kept back
            remarks.append(f"the {split} split is not used: none of its rows has a label")
            continue
        splits[split], dropped = _check_rows(splits[split], columns, f"{name or 'embedded'} ({split})")
        if dropped:
            remarks.append(f"{dropped:,} rows of {split} left out: empty {' or '.join(columns.values())}")
        if label:
            splits[split] = _labels_as_text(splits[split], label)
    for split in ("validation", "test"):
        if split not in splits:
            size = min(HELD_OUT_MOST, max(1, round(HELD_OUT_SHARE * len(splits["train"]))))
            if len(splits["train"]) < 3:
                raise UserError(
                    f"--dataset_name {name}: {len(splits['train'])} rows cannot be split; give a {split} file"
                )
            parts = _hold_out(splits["train"], size, label)
            splits["train"], splits[split] = parts["train"], parts["test"]
            remarks.append(
                f"no {split} split: {len(parts['test']):,} rows of train held out for it, the same ones for every --seed"
            )
    return DatasetDict({split: splits[split] for split in SPLITS}), remarks


def _hold_out(rows: Dataset, size: int, label: str | None) -> DatasetDict:
    """`rows` as train and test, the latter of `size` rows; of fewer where a class would lose its last row to it."""
    if label is None:
        return rows.train_test_split(test_size=size, seed=HELD_OUT_SEED)
    numbers: dict[str, list[int]] = {}
    for number, value in enumerate(rows[label]):
        numbers.setdefault(value, []).append(number)
    random = np.random.default_rng(HELD_OUT_SEED)
    drawn = {name: random.permutation(numbers[name]).tolist() for name in sorted(numbers)}
    mixed = random.permutation(len(rows)).tolist()  # so that the first N of either are a fair sample
    shares = _shares({name: len(of_class) for name, of_class in drawn.items()}, size, random)
    held = {number for name, of_class in drawn.items() for number in of_class[: shares[name]]} or {0}
    kept, out = ([number for number in mixed if (number in held) is wanted] for wanted in (False, True))
    return DatasetDict({"train": rows.select(kept), "test": rows.select(out)})


def _shares(counts: dict[str, int], size: int, random: np.random.Generator) -> dict[str, int]:
    """How many of `size` rows each class gives: in proportion to its `counts`, by largest remainder, and never its last.

    `random` draws among equal remainders, so that of many small classes not only the first ones give a row.
    """
    exact = {name: size * count / sum(counts.values()) for name, count in counts.items()}
    shares = {name: min(int(exact[name]), count - 1) for name, count in counts.items()}
    ties = dict(zip(counts, random.permutation(len(counts)).tolist(), strict=True))
    order = sorted(counts, key=lambda name: (int(exact[name]) - exact[name], ties[name]))
    while (missing := size - sum(shares.values())) > 0 and (able := [n for n in order if shares[n] < counts[n] - 1]):
        for name in able[:missing]:
            shares[name] += 1
    return shares


def _labels_as_text(rows: Dataset, label: str) -> Dataset:
    """`rows` with the names of the classes in column `label`, whether it held names, numbers or a hub's `ClassLabel`."""
    feature = rows.features[label]
    texts = [feature.int2str(v) if isinstance(feature, ClassLabel) else str(v).strip() for v in rows[label]]
    return rows.remove_columns(label).add_column(label, texts)


def _load_local(path: Path) -> DatasetDict:
    files: dict[str, list[str]] = {}
    here = [path] if path.is_file() else path.iterdir()
    found = sorted(file for file in here if file.suffix in READERS)
    if sentences := [file for file in found if file.suffix == ".txt" and (path.is_file() or "Sentences" in file.stem)]:
        return _load_sentences(path, sentences)
    found = [file for file in found if file.suffix != ".txt"]
    if not found:
        raise UserError(f"--dataset_name {path}: no data file there; valid are {', '.join(READERS)}")
    for file in found:
        split = "train" if path.is_file() else SPLIT_NAMES.get(file.stem.split("-")[0].split("_")[0].lower())
        if split:
            _check_file(file)
            files.setdefault(split, []).append(str(file))
    if not files:
        names = ", ".join(file.name for file in found)
        raise UserError(
            f"--dataset_name {path}: no file there is named after a split (found {names}); name one train.csv"
        )
    kinds = {Path(file).suffix for group in files.values() for file in group}
    if len(kinds) > 1:
        raise UserError(f"--dataset_name {path}: files of several kinds ({', '.join(sorted(kinds))}); use one kind")
    (kind,) = kinds
    options: dict[str, Any] = {"sep": "\t"} if kind == ".tsv" else {}
    if READERS[kind] == "csv":
        options |= {"keep_default_na": False}  # a summary that reads "None" or "NA" is text
    disable_progress_bars()
    try:
        return load_dataset(READERS[kind], data_files=files, **options)
    except Exception as error:  # the readers raise their own kinds: pandas', pyarrow's, datasets'
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:200]
        raise UserError(f"--dataset_name {path}: a {kind} file cannot be read ({reason})") from None
    finally:
        enable_progress_bars()


def _load_sentences(path: Path, files: list[Path]) -> DatasetDict:
    """The rows `sentence`, `label` of a file of financial_phrasebank (Malo et al. 2014): lines `sentence@label`.

    Read as UTF-8, or as Latin-1 (which the published files are in) where that fails.
    """
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise UserError(
            f"--dataset_name {path}: several files of sentences ({names}), which hold the same ones; name one of them"
        )
    (file,) = files
    content = file.read_bytes()
    try:
        lines = content.decode("utf-8").splitlines()
    except UnicodeDecodeError:
        lines = content.decode("latin-1").split("\n")  # splitlines would split at Latin-1's control characters too
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            sentence, separator, label = line.strip().rpartition("@")
            if not separator:
                raise UserError(
                    f"{file}: line {number} has no @label at its end; a .txt file holds lines sentence@label"
                )
            rows.append({"sentence": sentence.strip(), "label": label})
    if not rows:
        raise UserError(f"{file}: the file is empty; give one with lines sentence@label")
    return DatasetDict({"train": Dataset.from_list(rows)})


def _check_file(file: Path) -> None:
    """Raises UserError for an empty file, and for text that is not UTF-8 (which readers report without a place)."""
    if file.stat().st_size == 0:
        raise UserError(f"{file}: the file is empty; give one with a header line and rows")
    if file.suffix == ".parquet":
        return
    with file.open("rb") as stream:
        if file.suffix in (".csv", ".tsv") and not any(line.strip() for line in itertools.islice(stream, 1, None)):
            raise UserError(f"{file}: there is a header but no row; give a file with rows")
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                line += chunk[: max(0, error.start)].count(b"\n")
                raise UserError(
                    f"{file}: not UTF-8 (line {line}, byte 0x{error.object[error.start]:02x}); "
                    f"convert it first: iconv -f latin1 -t utf-8 {file.name}"
                ) from None
            line += chunk.count(b"\n")


def _load_hub(name: str, config_name: str | None) -> DatasetDict:
    try:
        loaded = load_dataset(name, config_name)
    except (DatasetNotFoundError, GatedRepoError, ConnectionError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--dataset_name {name}: no such folder, and it cannot be had from the hub ({reason}); check the spelling "
            "of user/name, log in with `hf auth login` if it is gated, or give a local folder"
        ) from None
    return DatasetDict({SPLIT_NAMES[split]: rows for split, rows in loaded.items() if split in SPLIT_NAMES})


def _check_rows(rows: Dataset, columns: dict[str, str], where: str) -> tuple[Dataset, int]:
    """The rows in which every one of `columns` holds text, and how many were left out."""
    for flag, column in columns.items():
        if column not in rows.column_names:
            raise UserError(
                f"{where}: no column {column!r}{did_you_mean(column, rows.column_names)}; it has "
                f"{', '.join(rows.column_names)}; name yours with --{flag}"
            )
    if len(rows) == 0:
        raise UserError(f"{where}: there is a header but no row")
    full = [all(row) for row in zip(*(_told(rows, column) for column in columns.values()), strict=True)]
    if not any(full):
        raise UserError(
            f"{where}: in each of its {len(rows):,} rows {' or '.join(columns.values())} is empty; fill them in"
        )
    if all(full):
        return rows, 0
    return rows.select([i for i, ok in enumerate(full) if ok]), full.count(False)


def _told(rows: Dataset, column: str) -> list[bool]:
    """Whether each row has something in `column`: not nothing, nor blanks, nor the number -1 for a class that is kept back."""
    missing = -1 if isinstance(rows.features[column], ClassLabel) else None
    return [value not in (None, missing) and bool(str(value).strip()) for value in rows[column]]
