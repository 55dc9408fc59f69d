"""Data files: what is read, and what is refused in one line."""

import csv
import json
from types import SimpleNamespace

import pytest
from conftest import write_csv

from toolkit.errors import UserError
from toolkit.files import csv_text, read_csv
from toolkit.finished_run import FinishedRun
from toolkit.tasks.rows import load_rows

COLUMNS = {"text_column": "dialogue", "summary_column": "summary"}
ROWS = [(f"text {n}", f"summary {n}") for n in range(40)]


def refusal(name) -> str:
    with pytest.raises(UserError) as caught:
        load_rows(str(name), None, COLUMNS)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_csv_jsonl_and_parquet_give_the_same_rows(tmp_path):
    import pandas

    frame = pandas.DataFrame(ROWS, columns=list(COLUMNS.values()))
    texts = []
    for kind in ("csv", "jsonl", "parquet"):
        folder = tmp_path / kind
        folder.mkdir()
        for split in ("train", "validation", "test"):
            if kind == "csv":
                frame.to_csv(folder / f"{split}.csv", index=False)
            elif kind == "jsonl":
                frame.to_json(folder / f"{split}.jsonl", orient="records", lines=True)
            else:
                frame.to_parquet(folder / f"{split}.parquet")
        splits, remarks = load_rows(str(folder), None, COLUMNS)
        assert remarks == []
        texts.append([splits[s][c] for s in splits for c in COLUMNS.values()])
    assert list(texts[0][0]) == [text for text, _ in ROWS]
    assert [list(t) for t in texts[0]] == [list(t) for t in texts[1]] == [list(t) for t in texts[2]]


def test_missing_splits_are_held_out_of_train_and_said(tmp_path):
    splits, remarks = load_rows(str(write_csv(tmp_path / "d", train=ROWS)), None, COLUMNS)
    sizes = {split: len(rows) for split, rows in splits.items()}
    assert sizes == {"train": 32, "validation": 4, "test": 4}
    assert not set(splits["train"]["dialogue"]) & {*splits["validation"]["dialogue"], *splits["test"]["dialogue"]}
    assert remarks[0] == "no validation split: 4 rows of train held out for it, the same ones for every --seed"
    assert len(remarks) == 2


def test_rows_without_a_summary_are_left_out_and_counted(tmp_path):
    folder = write_csv(tmp_path / "d", train=[*ROWS, ("text", " ")], validation=ROWS, test=ROWS)
    splits, remarks = load_rows(str(folder), None, COLUMNS)
    assert len(splits["train"]) == len(ROWS)
    assert remarks == ["1 rows of train left out: empty dialogue or summary"]


def test_text_that_looks_like_a_missing_value_stays_text(tmp_path):
    folder = write_csv(tmp_path / "d", train=[("None", "NA"), *ROWS], validation=ROWS, test=ROWS)
    splits, _ = load_rows(str(folder), None, COLUMNS)
    assert splits["train"][0] == {"dialogue": "None", "summary": "NA"}


def test_answers_to_texts_of_any_length_are_read_back(tmp_path):
    csv.field_size_limit(131_072)  # as it is in a new process
    long = 'a "word",\n' * 40_000
    (tmp_path / "completions.csv").write_text(csv_text(["text", "reference"], [(long, "short")]), encoding="utf-8")
    assert read_csv(tmp_path / "completions.csv") == {"text": [long], "reference": ["short"]}
    assert FinishedRun.sample(SimpleNamespace(path=tmp_path), 9) == [(long, "short")]


@pytest.mark.parametrize("held", ["", "text,reference\nonly a text\n", 'text,reference\n"cut short', "\0"])
def test_completions_that_are_no_table_are_refused(held, tmp_path):
    (tmp_path / "completions.csv").write_text(held, encoding="utf-8")
    with pytest.raises(UserError, match=r"no readable completions\.csv"):
        FinishedRun.sample(SimpleNamespace(path=tmp_path), 9)


def test_a_missing_folder(tmp_path):
    assert "no such folder or file" in refusal(tmp_path / "nowhere")


def test_a_folder_without_data(tmp_path):
    assert "no data file there" in refusal(tmp_path)


def test_a_folder_without_a_train_split(tmp_path):
    assert "it has no train split (found: test)" in refusal(write_csv(tmp_path / "d", test=ROWS))


def test_an_empty_file(tmp_path):
    (tmp_path / "train.csv").touch()
    assert "the file is empty" in refusal(tmp_path)


def test_a_file_with_a_header_alone(tmp_path):
    assert "a header but no row" in refusal(write_csv(tmp_path / "d", train=[]))


def test_a_missing_column_lists_those_that_exist(tmp_path):
    (tmp_path / "train.csv").write_text("dialog,summary\na,b\n")
    message = refusal(tmp_path)
    assert "no column 'dialogue' (did you mean dialog?); it has dialog, summary" in message


def test_rows_that_are_all_empty(tmp_path):
    (tmp_path / "train.csv").write_text("dialogue,summary\na,\nb,\n")
    assert "in each of its 2 rows dialogue or summary is empty" in refusal(tmp_path)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_file_that_is_not_utf8_names_its_line(tmp_path, suffix):
    lines = {"csv": "dialogue,summary\nà,b\nok,café\n", "jsonl": '{"dialogue": "a"}\n\n{"summary": "café"}\n'}[suffix]
    (tmp_path / f"train.{suffix}").write_bytes(lines.replace("à", "a").encode("latin-1"))
    assert "not UTF-8 (line 3, byte 0xe9)" in refusal(tmp_path)


def test_broken_json_is_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"dialogue": "a", "summary": "b"}) + "\n{broken\n")
    assert "cannot be read" in refusal(tmp_path)


def test_a_hub_data_set_that_cannot_be_had():
    assert "cannot be had from the hub" in refusal("nobody/nothing")
