"""Reads the rows of a data set: the embedded dialogues, csv / jsonl / parquet / `sentence@label` files, or a hub id.

The result always has three splits of plain columns. Every mistake in a file is found here.
"""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
    load_from_disk,
)
from datasets.packaged_modules.csv.csv import CsvConfig
from datasets.packaged_modules.json.json import JsonConfig

from toolkit.data.files import check_encoding, kind_of, path_of, regular_file
from toolkit.data.formats import FILLED, filled
from toolkit.data.readers import as_text, holds_sentences, read_file, read_plain, read_sentences
from toolkit.embedded import make_dialogues
from toolkit.embedded.frames import Split
from toolkit.errors import UserError, did_you_mean
from toolkit.models.hub import hub_is_reachable, offline_if_unreachable
from toolkit.tasks.base import NothingToLearn

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
SPLIT_NAMES = {"train": "train", "training": "train", "validation": "validation", "valid": "validation"}
SPLIT_NAMES |= {"val": "validation", "dev": "validation", "test": "test", "testing": "test"}
READABLE = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".arrow", ".txt")
# the builders of datasets, which load_dataset takes for names of data sets
BUILDERS = [
    "csv",
    "tsv",
    "json",
    "jsonl",
    "parquet",
    "text",
    "arrow",
    "pandas",
    "xml",
    "webdataset",
    "hdf5",
    "generator",
    "sql",
    "spark",
    "lance",
    "eval",
]
BUILDERS += ["imagefolder", "audiofolder", "videofolder", "pdffolder", "niftifolder", "meshfolder"]
HELD_OUT_SHARE = 0.1  # of the train split, if a data set has no validation or test split of its own
HELD_OUT_MOST = 500
HELD_OUT_SEED = 42  # not the run's seed: runs with several seeds must be scored on the same rows to be comparable


class Splits(DatasetDict):
    """The splits train, validation and test; `classes` are the class names that the data set declares, in its order."""

    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """The splits of a data set as they were read, and remarks on how."""

    splits: dict[str, Dataset]
    remarks: list[str]


def read_source(
    name: str | None, config_name: str | None = None, encoding: str | None = None, task: str | None = None
) -> Source:
    """The splits of the embedded dialogues (no `name`), of a file or folder, or of a hub data set.

    `task` decides how a .txt file is read: as plain text for the task `text`, as lines sentence@label for others. Without it
    the file decides.

    Raises: UserError for data that cannot be read, or has no train split.
    """
    if encoding is not None:
        check_encoding(encoding)
    remarks: list[str] = []
    loaded: dict[str, Dataset]
    if name is None:
        loaded = {split: Dataset.from_list(make_dialogues(split)) for split in SPLITS}
    elif (path := path_of(name)) is not None:
        loaded, remarks = _load_local(path, encoding, task)
    elif name in BUILDERS:
        raise UserError(
            f"--dataset_name {name} is a type of file and not a data set; give the file itself, for example --dataset_name "
            f"train.{'txt' if name == 'text' else name}"
        )
    elif (
        name.startswith((".", "/", "~"))
        or "\0" in name
        or name.count("/") > 1
        or kind_of(Path(name)) in READABLE
        or len(name) > 96
    ):
        shown = name if len(name) <= 160 else f"{name[:160]}..."
        raise UserError(f"--dataset_name {shown}: no such folder or file; give an existing one or a hub id (user/name)")
    else:
        loaded, remarks = _load_hub(name, config_name)
    if "train" not in loaded:
        raise UserError(
            f"--dataset_name {name}: it has no train split (found: {', '.join(loaded) or 'no files'}); "
            "name the files train.csv, validation.csv and test.csv (or .jsonl, .parquet)"
        )
    return Source(loaded, remarks)


def load_rows(
    name: str | None,
    config_name: str | None,
    columns: dict[str, str],
    optional: Collection[str] = (),
    source: Source | None = None,
    template: str | None = None,
    kind_of_row: Callable[[dict[str, Any]], str] | None = None,
) -> tuple[Splits, list[str]]:
    """The splits train, validation and test with at least `columns`, and remarks for the user on how they were made.

    `columns` maps flags to column names; the columns of the flags in `optional` may be missing. Values are text, except
    lists and objects. A missing split is held out of train: the same rows in each run, with the same share of each class
    if there is a `label_column`. A `template` that names columns adds the column `FILLED`. `kind_of_row` gives, for the values
    of a row by flag, the text by which rows are held out together; rows for which it raises `NothingToLearn` are left out.

    Raises: UserError for a missing, empty or unreadable file, a missing column, or rows that are all empty.
    """
    source = source or read_source(name, config_name)
    loaded, remarks = source.splits, [*source.remarks]
    needed = {flag: column for flag, column in columns.items() if flag not in optional}
    label = columns.get("label_column")
    declared = loaded["train"].features.get(label)
    splits: dict[str, Dataset] = {}
    keys: dict[str, list[str]] = {}
    for split in (split for split in SPLITS if split in loaded):
        rows = loaded[split]
        where = f"{name or 'embedded'} ({split})"
        if template is not None:
            with _no_progress_bars():
                rows = rows.add_column(FILLED, filled(rows, template, split))
        for column in {*columns.values()} & {*rows.column_names}:
            rows = as_text(rows, column)
        if label and split != "train" and label in rows.column_names and not any(_filled(rows, label)):
            remarks.append(f"the {split} split is not used: none of its rows has a label")
            continue  # GLUE, for example, does not publish the labels of its test splits
        rows, dropped = _check_rows(rows, needed, where)
        if dropped:
            remarks.append(f"{dropped:,} rows of {split} left out: empty {' or '.join(needed.values())}")
        rows = _stripped(rows, label) if label else rows
        if kind_of_row is not None:
            rows, keys[split], left_out = _learnable(rows, columns, kind_of_row, split)
            remarks += left_out
        splits[split] = rows
    text = next((column for flag, column in needed.items() if flag != "label_column"), None)
    of_train = keys.get("train") or ([str(value) for value in splits["train"][text]] if text else None)
    for split in ("validation", "test"):
        if split not in splits:
            count = len(splits["train"])
            size = min(HELD_OUT_MOST, max(1, round(HELD_OUT_SHARE * count)))
            lacking = [other for other in ("validation", "test") if other not in splits]
            if count <= len(lacking):
                missing = " and ".join(lacking)
                raise UserError(
                    f"--dataset_name {name}: {count} usable row{'s' * (count > 1)} cannot be split, because train, validation and "
                    f"test need at least one each; give at least 3 rows, or a folder with files named {missing}"
                )
            kept, out = _hold_out(splits["train"], size, of_train, label)
            splits["train"], splits[split] = splits["train"].select(kept), splits["train"].select(out)
            of_train = [of_train[number] for number in kept] if of_train else None
            remarks.append(
                f"no {split} split: {len(splits[split]):,} rows of train held out for it, the same ones for every --seed"
            )
    found = Splits({split: splits[split] for split in SPLITS})
    if isinstance(declared, ClassLabel):
        found.classes = tuple(name.strip() for name in declared.names)
    return found, remarks


def _learnable(
    rows: Dataset, columns: dict[str, str], kind_of_row: Callable[[dict[str, Any]], str], split: str
) -> tuple[Dataset, list[str], list[str]]:
    """`rows` without those that have nothing to learn, the key of each, and remarks on how many were left out."""
    there = {flag: column for flag, column in columns.items() if column in rows.column_names}
    kept, keys, reasons = [], [], []
    for number, values in enumerate(zip(*(rows[column][:] for column in there.values()), strict=True)):
        try:
            keys.append(kind_of_row(dict(zip(there, values, strict=True))))
            kept.append(number)
        except NothingToLearn as error:
            reasons.append(f"row {number + 1:,} of {split}: {error}")
        except UserError as error:
            raise UserError(f"row {number + 1:,} of {split}: {error}") from None
    if not kept:
        raise UserError(reasons[0])
    if not reasons:
        return rows, keys, []
    return rows.select(kept), keys, [f"{len(reasons):,} rows of {split} left out: nothing to learn ({reasons[0]})"]


def _stripped(rows: Dataset, label: str) -> Dataset:
    """`rows` without blanks around the class names in column `label`; raises UserError for lists and objects."""
    if other := next((value for value in rows[label] if not isinstance(value, str)), None):
        raise UserError(
            f"column {label} has {str(other)[:60]!r}, which is no class name; name another column with --label_column"
        )
    names = [value.strip() for value in rows[label]]
    with _no_progress_bars():
        return rows.remove_columns(label).add_column(label, names)


def _hold_out(rows: Dataset, size: int, keys: Sequence[str] | None, label: str | None) -> tuple[list[int], list[int]]:
    """The numbers of `rows` for train and for test; test has `size` rows, or fewer if a class would lose its last train row.

    Rows with the same one of `keys` stay together, in the split of the first of them, unless test would then be empty or
    train would lose a class.
    """
    if label is None:
        numbers = Dataset.from_dict({"number": range(len(rows))}).train_test_split(test_size=size, seed=HELD_OUT_SEED)
        mixed, held = [*numbers["train"]["number"], *numbers["test"]["number"]], {*numbers["test"]["number"]}
    else:
        mixed, held = _draw_classes(rows[label], size, spared=1)
        held = held or {0}
    if keys is not None:
        first: dict[str, int] = {}
        of_text = [first.setdefault(key, number) for number, key in enumerate(keys)]
        together = {number for number in mixed if of_text[number] in held}
        classes = rows[label] if label else [""] * len(rows)
        if together and {classes[n] for n in mixed} == {classes[n] for n in mixed if n not in together}:
            held = together
    kept, out = ([number for number in mixed if (number in held) is wanted] for wanted in (False, True))
    return kept, out


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


def sample(rows: Dataset, size: int) -> Dataset:
    """A sample of `size` of `rows` in their order, the same rows in each run: the first ones of a sorted file may be alike."""
    drawn = np.random.default_rng(HELD_OUT_SEED).permutation(len(rows))[:size]
    return rows.select(sorted(drawn.tolist()))


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


def _load_local(path: Path, encoding: str | None, task: str | None) -> tuple[dict[str, Dataset], list[str]]:
    """The splits of a file or folder, and remarks on how they were read."""
    if not path.is_dir():
        regular_file(path)
        if kind_of(path) not in READABLE:
            raise UserError(f"--dataset_name {path}: {_unreadable(path)}; valid types are {', '.join(READABLE)}")
        here = [path]
    elif any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
        return _load_saved(path)
    else:
        here = _files_in(path)
        if (path / "data").is_dir() and not any(kind_of(file) in READABLE for file in here):
            here = _files_in(path / "data")  # as in a data set that was copied from the hub
    found = [file for file in here if kind_of(file) in READABLE]
    if not found:
        other = f" ({', '.join(file.name for file in here[:5])})" if here else ""
        raise UserError(f"--dataset_name {path}: no data file there{other}; valid types are {', '.join(READABLE)}")
    texts = [file for file in found if kind_of(file) == ".txt"]
    tables = [file for file in found if file not in texts]
    sentences = [file for file in texts if "Sentences" in file.stem and task != "text"]
    if sentences or (texts and not tables):
        return _load_texts(path, sentences or texts, encoding, task)
    files, others = _by_split(path, tables)
    if not files:
        names = ", ".join(file.name for file in tables)
        raise UserError(
            f"--dataset_name {path}: no file there is named after a split (found {names}); name one train.csv"
        )
    kinds = {kind_of(file) for group in files.values() for file in group}
    if len(kinds) > 1:
        raise UserError(f"--dataset_name {path}: files of several kinds ({', '.join(sorted(kinds))}); use one kind")
    with _no_progress_bars():
        splits, remarks = _read_splits(
            {split: [(file, kind_of(file)) for file in group] for split, group in files.items()}, encoding
        )
    return splits, remarks + _unread(others)


def _files_in(folder: Path) -> list[Path]:
    try:
        return sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    except OSError as error:
        raise UserError(f"--dataset_name {folder}: cannot be read ({error.strerror}); give another folder") from None


def _unread(others: list[Path]) -> list[str]:
    """A remark on files whose names name no split."""
    names = ", ".join(file.name for file in others)
    return [f"not read, because their names name no split: {names}"] if others else []


def _unreadable(file: Path) -> str:
    how = {".zip": "unpack it first: unzip", ".tar": "unpack it first: tar -xf", ".xlsx": "save it as CSV first:"}
    hint = how.get(kind_of(file))
    return f"{hint} {file.name}" if hint else f"{file.suffix or 'a file without an ending'} is not read"


def _by_split(path: Path, found: list[Path]) -> tuple[dict[str, list[Path]], list[Path]]:
    """The files of each split, by a word in their names, and the others. The only file of a folder is its train split."""
    files: dict[str, list[Path]] = {}
    others: list[Path] = []
    for file in found:
        words = re.split(r"[^a-z]+", file.name.lower())
        split = "train" if path.is_file() else next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), None)
        if split:
            files.setdefault(split, []).append(file)
        else:
            others.append(file)
    if not files and len(found) == 1:
        return {"train": found}, []
    return files, others


def _load_texts(
    path: Path, found: list[Path], encoding: str | None, task: str | None
) -> tuple[dict[str, Dataset], list[str]]:
    """The splits of .txt files: lines sentence@label, or plain text."""
    plain = task == "text"
    if task is None:
        plain = not any("Sentences" in file.stem for file in found) and not all(
            holds_sentences(file, encoding) for file in found
        )
    if not plain:
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise UserError(f"--dataset_name {path}: several files hold the same sentences ({names}); name one of them")
        return {"train": read_sentences(found[0], encoding)}, []
    files, others = _by_split(path, found)
    if "train" not in files:
        files, others = {"train": found}, []
    splits, units = {}, set()
    for split, group in files.items():
        parts = [read_plain(file, encoding) for file in group]
        units |= {unit for _, unit in parts}
        splits[split] = _joined([rows for rows, _ in parts])
    remarks = [f"each {' or '.join(sorted(units))} of the {sum(map(len, files.values())):,} files is one text"]
    if len(found) == 1:
        remarks = [f"each {units.pop()} of {found[0].name} is one text"]
    return splits, remarks + _unread(others)


def _load_saved(path: Path) -> tuple[dict[str, Dataset], list[str]]:
    """The splits of a folder that `datasets` saved (`save_to_disk`)."""
    try:
        loaded = load_from_disk(str(path))
    except Exception as error:  # datasets, pyarrow and the file system raise errors of their own
        raise UserError(
            f"--dataset_name {path}: a folder saved by datasets that cannot be read ({' '.join(str(error).split())[:160]})"
        ) from None
    if isinstance(loaded, Dataset):
        return {"train": loaded}, []
    return _named_splits(loaded)


def _named_splits(loaded: dict[str, Dataset]) -> tuple[dict[str, Dataset], list[str]]:
    """The splits by our names, and a remark on those that are not used. The only split of a data set is its train split."""
    if len(loaded) == 1 and not {*loaded} & {*SPLIT_NAMES}:
        return {"train": next(iter(loaded.values()))}, [f"its only split is {next(iter(loaded))}"]
    unused = [split for split in loaded if split not in SPLIT_NAMES]
    remarks = [f"not read, because they are none of train, validation and test: {', '.join(unused)}"] if unused else []
    return {SPLIT_NAMES[split]: rows for split, rows in loaded.items() if split in SPLIT_NAMES}, remarks


def _read_splits(
    files: dict[str, list[tuple[Path, str]]], encoding: str | None = None
) -> tuple[dict[str, Dataset], list[str]]:
    """The rows of each split, and remarks on how they were read; `files` has (path, suffix) pairs for each split."""
    splits: dict[str, Dataset] = {}
    remarks: list[str] = []
    for split, group in files.items():
        parts = []
        for file, suffix in group:
            rows, more = read_file(file, suffix, encoding)
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
    """The rows of several files, with the columns of all; where a file lacks one, its cells are empty."""
    if len(parts) == 1:
        return parts[0]
    shared: dict[str, Any] = {}
    for part in parts:
        shared |= {name: feature for name, feature in part.features.items() if name not in shared}
    parts = [_with_columns(part, shared) for part in parts]
    for name in shared:
        if any(part.features[name] != parts[0].features[name] for part in parts):
            parts = [as_text(part, name) for part in parts]
    return concatenate_datasets(parts)


def _with_columns(part: Dataset, columns: dict[str, Any]) -> Dataset:
    """`part` with all `columns` (name: feature); those that it lacks are empty."""
    for name, feature in columns.items():
        if name not in part.column_names:
            part = part.add_column(name, [None] * len(part), feature=feature)
    return part.select_columns(list(columns))


def _load_hub(name: str, config_name: str | None) -> tuple[dict[str, Dataset], list[str]]:
    """The splits of a hub data set, and remarks on how they were read; text files are read like local files."""
    try:
        with offline_if_unreachable():
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
    except UserError:
        raise
    except Exception as error:  # of the hub, the network, and each type of file
        reason = " ".join(str(error).split())[:200]
        if not Path(name).is_dir() and not hub_is_reachable():
            raise UserError(
                f"--dataset_name {name}: it cannot be loaded from the hub, which cannot be reached, and it is neither a file nor a "
                "folder here nor in the local cache; go online once, or give a file or folder"
            ) from None
        raise UserError(
            f"--dataset_name {name}: no such folder, and it cannot be loaded from the hub ({reason}); check the spelling "
            "of user/name, log in with `hf auth login` if it is gated, or give a local folder"
        ) from None
    return _named_splits(loaded)


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
            there = [name for name in rows.column_names if name not in (FILLED, "")]
            other = ", or with --prompt_column and --response_column" if flag == "messages_column" else ""
            raise UserError(
                f"{where}: no column {column!r}{did_you_mean(column, there)}; it has "
                f"{', '.join(there) or 'none'}; name yours with --{flag}{other}"
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
    return [value is not None and bool(str(value).strip()) for value in rows[column][:]]
