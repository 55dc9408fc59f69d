"""Reads the rows of a data set: the embedded dialogues, csv / jsonl / parquet / `sentence@label` files, or a hub id.

The result always has three splits of plain columns. Every mistake in a file is found here.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from datasets import (
    ClassLabel,
    Dataset,
    DatasetBuilder,
    DatasetDict,
    DownloadManager,
    concatenate_datasets,
    disable_progress_bars,
    enable_progress_bars,
    load_dataset,
    load_dataset_builder,
)
from datasets.exceptions import DatasetNotFoundError
from datasets.packaged_modules.csv.csv import CsvConfig
from datasets.packaged_modules.json.json import JsonConfig
from huggingface_hub.errors import GatedRepoError

from toolkit.data.readers import as_text, read_file, read_sentences
from toolkit.embedded import make_dialogues
from toolkit.embedded.frames import Split
from toolkit.errors import UserError, did_you_mean

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
SPLIT_NAMES = {"train": "train", "training": "train", "validation": "validation", "valid": "validation"}
SPLIT_NAMES |= {"val": "validation", "dev": "validation", "test": "test", "testing": "test"}
READABLE = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt")
HELD_OUT_SHARE = 0.1  # of the train split, if a data set has no validation or test split of its own
HELD_OUT_MOST = 500
HELD_OUT_SEED = 42  # not the run's seed: runs with several seeds must be scored on the same rows to be comparable


class Splits(DatasetDict):
    """The splits train, validation and test; `classes` are the class names that the data set declares, in its order."""

    classes: tuple[str, ...] = ()


def load_rows(
    name: str | None, config_name: str | None, columns: dict[str, str], optional: Collection[str] = ()
) -> tuple[Splits, list[str]]:
    """The splits train, validation and test with at least `columns`, and remarks for the user on how they were made.

    `columns` maps flags to column names; the columns of the flags in `optional` may be missing. Values are text, except
    lists and objects. A missing split is held out of train: the same rows in each run, with the same share of each class
    if there is a `label_column`.

    Raises: UserError for a missing, empty or unreadable file, a missing column, or rows that are all empty.
    """
    remarks: list[str] = []
    loaded: dict[str, Dataset]
    if name is None:
        loaded = {split: Dataset.from_list(make_dialogues(split)) for split in SPLITS}
    elif Path(name).expanduser().exists():
        loaded, remarks = _load_local(Path(name).expanduser())
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"--dataset_name {name}: no such folder or file; give an existing one or a hub id (user/name)")
    else:
        loaded, remarks = _load_hub(name, config_name)
    if "train" not in loaded:
        raise UserError(
            f"--dataset_name {name}: it has no train split (found: {', '.join(loaded) or 'no files'}); "
            "name the files train.csv, validation.csv and test.csv (or .jsonl, .parquet)"
        )
    needed = {flag: column for flag, column in columns.items() if flag not in optional}
    label = columns.get("label_column")
    declared = loaded["train"].features.get(label)
    splits: dict[str, Dataset] = {}
    for split in (split for split in SPLITS if split in loaded):
        rows = loaded[split]
        for column in {*columns.values()} & {*rows.column_names}:
            rows = as_text(rows, column)
        if label and split != "train" and label in rows.column_names and not any(_filled(rows, label)):
            remarks.append(f"the {split} split is not used: none of its rows has a label")
            continue  # GLUE, for example, does not publish the labels of its test splits
        rows, dropped = _check_rows(rows, needed, f"{name or 'embedded'} ({split})")
        if dropped:
            remarks.append(f"{dropped:,} rows of {split} left out: empty {' or '.join(needed.values())}")
        splits[split] = _stripped(rows, label) if label else rows
    text = next((column for flag, column in needed.items() if flag != "label_column"), None)
    for split in ("validation", "test"):
        if split not in splits:
            size = min(HELD_OUT_MOST, max(1, round(HELD_OUT_SHARE * len(splits["train"]))))
            if len(splits["train"]) < 3:
                raise UserError(
                    f"--dataset_name {name}: {len(splits['train'])} rows cannot be split; give a {split} file"
                )
            splits["train"], splits[split] = _hold_out(splits["train"], size, text, label)
            remarks.append(
                f"no {split} split: {len(splits[split]):,} rows of train held out for it, the same ones for every --seed"
            )
    found = Splits({split: splits[split] for split in SPLITS})
    if isinstance(declared, ClassLabel):
        found.classes = tuple(name.strip() for name in declared.names)
    return found, remarks


def _stripped(rows: Dataset, label: str) -> Dataset:
    """`rows` without blanks around the class names in column `label`; raises UserError for lists and objects."""
    if other := next((value for value in rows[label] if not isinstance(value, str)), None):
        raise UserError(
            f"column {label} has {str(other)[:60]!r}, which is no class name; name another column with --label_column"
        )
    names = [value.strip() for value in rows[label]]
    with _no_progress_bars():
        return rows.remove_columns(label).add_column(label, names)


def _hold_out(rows: Dataset, size: int, text: str | None, label: str | None) -> tuple[Dataset, Dataset]:
    """Splits `rows` into train and test; test has `size` rows, or fewer if a class would lose its last train row.

    Rows with the same `text` stay together, in the split of the first of them, unless test would then be empty or train
    would lose a class.
    """
    if label is None:
        numbers = Dataset.from_dict({"number": range(len(rows))}).train_test_split(test_size=size, seed=HELD_OUT_SEED)
        mixed, held = [*numbers["train"]["number"], *numbers["test"]["number"]], {*numbers["test"]["number"]}
    else:
        mixed, held = _draw_classes(rows[label], size, spared=1)
        held = held or {0}
    if text is not None:
        first: dict[str, int] = {}
        of_text = [first.setdefault(str(value), number) for number, value in enumerate(rows[text])]
        together = {number for number in mixed if of_text[number] in held}
        classes = rows[label] if label else [""] * len(rows)
        if together and {classes[n] for n in mixed} == {classes[n] for n in mixed if n not in together}:
            held = together
    kept, out = ([number for number in mixed if (number in held) is wanted] for wanted in (False, True))
    return rows.select(kept), rows.select(out)


def _draw_classes(labels: Sequence[str], size: int, spared: int) -> tuple[list[int], set[int]]:
    """All row numbers, shuffled, and a set of `size` row numbers with the same share of each class.

    The last `spared` rows of each class are not drawn.
    """
    numbers: dict[str, list[int]] = {}
    for number, value in enumerate(labels):
        numbers.setdefault(value, []).append(number)
    random = np.random.default_rng(HELD_OUT_SEED)
    drawn = {name: random.permutation(numbers[name]).tolist() for name in sorted(numbers)}
    mixed = random.permutation(len(labels)).tolist()  # so that the first N rows of either split are a fair sample
    shares = _shares({name: len(of_class) for name, of_class in drawn.items()}, size, random, spared)
    return mixed, {number for name, of_class in drawn.items() for number in of_class[: shares[name]]}


def sample_of_classes(rows: Dataset, label: str, size: int) -> Dataset:
    """A sample of `size` of `rows` with the same share of each class, in their order; the same rows in each run."""
    _, drawn = _draw_classes(rows[label], size, spared=0)
    return rows.select(sorted(drawn))


def _shares(counts: dict[str, int], size: int, random: np.random.Generator, spared: int) -> dict[str, int]:
    """How many of `size` rows to draw from each class: in proportion to `counts`, by largest remainder.

    The last `spared` rows of a class are not drawn. `random` decides between equal remainders, so that among many small
    classes not always the first ones are drawn.
    """
    exact = {name: size * count / sum(counts.values()) for name, count in counts.items()}
    shares = {name: min(int(exact[name]), count - spared) for name, count in counts.items()}
    ties = dict(zip(counts, random.permutation(len(counts)).tolist(), strict=True))
    order = sorted(counts, key=lambda name: (int(exact[name]) - exact[name], ties[name]))
    while (missing := size - sum(shares.values())) > 0 and (
        able := [n for n in order if shares[n] < counts[n] - spared]
    ):
        for name in able[:missing]:
            shares[name] += 1
    return shares


def _load_local(path: Path) -> tuple[dict[str, Dataset], list[str]]:
    """The splits of a file or folder, and remarks on how they were read."""
    files: dict[str, list[Path]] = {}
    here = [path] if path.is_file() else path.iterdir()
    found = sorted(file for file in here if file.suffix in READABLE)
    if sentences := [file for file in found if file.suffix == ".txt" and (path.is_file() or "Sentences" in file.stem)]:
        if len(sentences) > 1:
            names = ", ".join(file.name for file in sentences)
            raise UserError(f"--dataset_name {path}: several files hold the same sentences ({names}); name one of them")
        return {"train": read_sentences(sentences[0])}, []
    found = [file for file in found if file.suffix != ".txt"]
    if not found:
        raise UserError(f"--dataset_name {path}: no data file there; valid types are {', '.join(READABLE)}")
    for file in found:
        split = "train" if path.is_file() else SPLIT_NAMES.get(file.stem.split("-")[0].split("_")[0].lower())
        if split:
            files.setdefault(split, []).append(file)
    if not files:
        names = ", ".join(file.name for file in found)
        raise UserError(
            f"--dataset_name {path}: no file there is named after a split (found {names}); name one train.csv"
        )
    read = [file for group in files.values() for file in group]
    kinds = {file.suffix for file in read}
    if len(kinds) > 1:
        raise UserError(f"--dataset_name {path}: files of several kinds ({', '.join(sorted(kinds))}); use one kind")
    with _no_progress_bars():
        splits, remarks = _read_splits(
            {split: [(file, file.suffix) for file in group] for split, group in files.items()}
        )
    if others := [file.name for file in found if file not in read]:
        remarks.append(f"not read, because their names name no split: {', '.join(others)}")
    return splits, remarks


def _read_splits(files: dict[str, list[tuple[Path, str]]]) -> tuple[dict[str, Dataset], list[str]]:
    """The rows of each split, and remarks on how they were read; `files` has (path, suffix) pairs for each split."""
    splits: dict[str, Dataset] = {}
    remarks: list[str] = []
    for split, group in files.items():
        parts = []
        for file, suffix in group:
            rows, more = read_file(file, suffix)
            parts.append(rows)
            remarks += more
        splits[split] = _joined(parts)
        if len(group) > 1:
            remarks.append(f"{split} is {len(group)} files: {', '.join(file.name for file, _ in group)}")
    return splits, remarks


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _joined(parts: list[Dataset]) -> Dataset:
    """The rows of several files, with the columns that all files have."""
    if len(parts) == 1:
        return parts[0]
    shared = [name for name in parts[0].column_names if all(name in part.column_names for part in parts)]
    parts = [part.select_columns(shared) for part in parts]
    for name in shared:
        if any(part.features[name] != parts[0].features[name] for part in parts):
            parts = [as_text(part, name) for part in parts]
    return concatenate_datasets(parts)


def _load_hub(name: str, config_name: str | None) -> tuple[dict[str, Dataset], list[str]]:
    """The splits of a hub data set, and remarks on how they were read; text files are read like local files."""
    try:
        builder = load_dataset_builder(name, config_name)
        if files := _text_files(builder):
            fetched = DownloadManager().download(files)
            with _no_progress_bars():
                return _read_splits(
                    {
                        split: [
                            (Path(there), Path(url).suffix) for there, url in zip(fetched[split], urls, strict=True)
                        ]
                        for split, urls in files.items()
                    }
                )
        loaded = load_dataset(name, config_name)
    except (DatasetNotFoundError, GatedRepoError, ConnectionError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--dataset_name {name}: no such folder, and it cannot be loaded from the hub ({reason}); check the spelling "
            "of user/name, log in with `hf auth login` if it is gated, or give a local folder"
        ) from None
    return {SPLIT_NAMES[split]: rows for split, rows in loaded.items() if split in SPLIT_NAMES}, []


def _text_files(builder: DatasetBuilder) -> dict[str, list[str]]:
    """The csv, tsv and json files of a data set that configures nothing but their location; otherwise none."""
    config = builder.config
    if builder.info.features is not None or not config.data_files or not isinstance(config, CsvConfig | JsonConfig):
        return {}
    files = {SPLIT_NAMES[split]: [*urls] for split, urls in config.data_files.items() if split in SPLIT_NAMES}
    suffixes = {Path(url).suffix for urls in files.values() for url in urls}
    if len(suffixes) != 1 or not suffixes <= {".csv", ".tsv", ".jsonl", ".json"}:
        return {}
    plain = {"data_files": config.data_files, "name": config.name, "version": config.version}
    plain |= {"sep": "\t" if suffixes == {".tsv"} else ","} if isinstance(config, CsvConfig) else {}
    return files if replace(type(config)(), **plain) == replace(config, data_dir=None, description=None) else {}


def _check_rows(rows: Dataset, columns: dict[str, str], where: str) -> tuple[Dataset, int]:
    """The rows in which none of `columns` is empty, and how many rows were left out."""
    for flag, column in columns.items():
        if column not in rows.column_names:
            raise UserError(
                f"{where}: no column {column!r}{did_you_mean(column, rows.column_names)}; it has "
                f"{', '.join(rows.column_names)}; name yours with --{flag}"
            )
    if len(rows) == 0:
        raise UserError(f"{where}: there is a header but no row")
    full = [all(row) for row in zip(*(_filled(rows, column) for column in columns.values()), strict=True)]
    if not any(full):
        raise UserError(
            f"{where}: {' or '.join(columns.values())} is empty in each of its {len(rows):,} rows; fill them in"
        )
    if all(full):
        return rows, 0
    return rows.select([i for i, ok in enumerate(full) if ok]), full.count(False)


def _filled(rows: Dataset, column: str) -> list[bool]:
    """For each row, whether `column` holds something other than blanks."""
    return [value is not None and bool(str(value).strip()) for value in rows[column]]
