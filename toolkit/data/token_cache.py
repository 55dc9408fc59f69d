"""Tokenized rows, kept on this machine: a run on the same texts starts without tokenizing them again.

One file for each split in `footprint` of datasets' cache ($HF_DATASETS_CACHE, else under $HF_HOME). Its name is a hash of all that
the token ids depend on: the texts, the tokenizer's files, the flags, this code, and the libraries' versions. So no file is ever out
of date, and any may be deleted at any time; one that no run used for a month is. Files appear whole, by renaming: several runs may write the same one at once.
"""

import datetime
import hashlib
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from toolkit.models import losses
from toolkit.tasks import tokenization
from toolkit.tasks.tokenization import PromptTokenizer, Truncation

UNUSED_SECONDS = 30 * 24 * 3600  # after which a file is deleted, when the next one is written
FEWEST = 1000  # rows that are kept; fewer are tokenized in a second
REST = b"footprint"  # what a file holds besides the rows, in the metadata of its schema


@dataclass
class Tokenized:
    """A split as token ids."""

    rows: Dataset  # columns input_ids, attention_mask, labels
    left_out: int  # rows without a label that counts
    supervised_tokens: int
    truncation: Truncation


def cached(
    number: int, prompt_tokenizer: PromptTokenizer, others: Sequence[Any], make: Callable[[], Tokenized]
) -> Tokenized:
    """What `make()` returns for a split of `number` rows, from a file if there is one.

    `others` is what the token ids depend on besides `prompt_tokenizer`, as values that JSON can hold.
    """
    if number < FEWEST:
        return make()
    try:
        key = _key(prompt_tokenizer, others)
    except (
        OSError,
        ValueError,
        TypeError,
        NotImplementedError,
    ):  # no room for the tokenizer's files, or it cannot be saved
        return make()
    file = Path(datasets.config.HF_DATASETS_CACHE) / "footprint" / f"{key}.parquet"
    with suppress(OSError, pa.ArrowException, ValueError, LookupError, TypeError):  # none, or a damaged one
        table = pq.read_table(file)
        file.touch()  # it was used today
        rest = json.loads(table.schema.metadata[REST])
        lost = Truncation(**rest.pop("truncation"))
        lost.unusual_roles = Counter(lost.unusual_roles)
        return Tokenized(Dataset(table), truncation=lost, **rest)
    made = make()
    rest = {name: getattr(made, name) for name in ("left_out", "supervised_tokens")} | {
        "truncation": vars(made.truncation)
    }
    table = made.rows.data.table
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), REST: json.dumps(rest)})
    with suppress(OSError):  # no permission, or a full disk
        file.parent.mkdir(parents=True, exist_ok=True)
        for old in file.parent.iterdir():
            if time.time() - old.stat().st_mtime > UNUSED_SECONDS:
                shutil.rmtree(old) if old.is_dir() else old.unlink(
                    missing_ok=True
                )  # a folder is of a run that was killed
        with tempfile.TemporaryDirectory(dir=file.parent) as place:
            pq.write_table(table, Path(place) / file.name)
            (Path(place) / file.name).replace(file)
    return made


def _key(prompt_tokenizer: PromptTokenizer, others: Sequence[Any]) -> str:
    """SHA-256 over everything that the token ids of a split depend on."""
    code = [
        *sorted(Path(tokenization.__file__).parent.glob("*.py")),
        *sorted(Path(__file__).parent.glob("*.py")),
        Path(losses.__file__),
    ]
    if "strftime_now" in str(getattr(prompt_tokenizer.tokenizer, "chat_template", "")):  # its prompts hold the date
        others = [*others, datetime.date.today().isoformat()]
    prompt_tokenizer.tokenizer("")  # a tokenizer that was used before is saved with other settings of truncation
    with tempfile.TemporaryDirectory() as name:
        prompt_tokenizer.tokenizer.save_pretrained(name)
        files = [*code, *sorted(path for path in Path(name).rglob("*") if path.is_file())]
        hashes = [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]
    flags = {
        one.name: getattr(prompt_tokenizer, one.name) for one in fields(prompt_tokenizer) if one.name != "tokenizer"
    }
    libraries = [version(library) for library in ("transformers", "tokenizers", "jinja2", "datasets")]
    kind = type(prompt_tokenizer).__name__
    return hashlib.sha256(json.dumps([kind, flags, libraries, hashes, *others]).encode()).hexdigest()
