"""Data files: how they are read, and which mistakes are one-line errors."""

import csv
import io
import json
from types import SimpleNamespace

import pytest
from conftest import write_csv

from toolkit.data.rows import _load_hub, load_rows, read_source
from toolkit.errors import UserError
from toolkit.files import csv_text, read_csv
from toolkit.runs.finished_run import FinishedRun

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


def test_missing_splits_are_held_out_of_train_and_reported(tmp_path):
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


def read(tmp_path, name, content, columns=COLUMNS):
    """The cells of `columns` in a file with this content, without held-out rows, and the remarks."""
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}{name}").write_bytes(content.encode() if isinstance(content, str) else content)
    splits, remarks = load_rows(str(tmp_path), None, columns)
    return [tuple(row[column] for column in columns.values()) for row in splits["train"]], remarks


ODD = [
    *(
        "001",
        "1.10",
        "TRUE",
        "true",
        "NA",
        "null",
        "None",
        "nan",
        "2024-01-02",
        "12345678901234567890",
        "1e5",
        "-0",
        "+1",
    ),
    *(
        "a\u2028b",
        "a\u0085b",
        "a\x0bb",
        "a\x0cb",
        "a\x1cb",
        "a\x00b",
        "\u00a0a",
        "\ufeffa",
        "e\u0301",
        "\U0001f600",
        "a,b",
        "a;b",
    ),
    *(" a ", "a  b", "{text}", "{labels}", "\\N", "\\t", "'a'", "#a", "=1+1", "a\\"),
]
QUOTED = ['say "a"', '"a" said', '"a"', '""', '"', '5"', "a\nb", "a\r\nb", "a\rb", "a\n\nb", "a\tb", "x" * 200_000]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "all quoted", "old line ends", "with a mark"])
def test_cells_are_read_unchanged(kind, tmp_path):
    texts = [text for text in [*ODD, *QUOTED] if text.strip()]
    rows = [(text, f"{text}{number}") for number, text in enumerate(texts)]
    suffix, stream = ".csv", io.StringIO(newline="")
    if kind in ("jsonl", "json"):
        suffix, objects = f".{kind}", [dict(zip(COLUMNS.values(), row, strict=True)) for row in rows]
        stream.write("\n".join(map(json.dumps, objects)) if kind == "jsonl" else json.dumps(objects, indent=1))
    else:
        suffix = ".tsv" if kind == "tsv" else ".csv"
        quoting = csv.QUOTE_ALL if kind == "all quoted" else csv.QUOTE_MINIMAL
        end = "\n" if kind == "old line ends" else "\r\n"
        table = csv.writer(stream, delimiter="\t" if kind == "tsv" else ",", quoting=quoting, lineterminator=end)
        table.writerows([[*COLUMNS.values()], *rows])
    mark = "\ufeff" if kind == "with a mark" else ""
    found, _ = read(tmp_path, suffix, mark + stream.getvalue())
    assert found == rows


def test_quotation_marks_in_tsv_are_text_unless_a_csv_writer_put_them(tmp_path):
    marks = ['"a', 'a"', '"a" b', 'a "b"', '"a"', '"', '""', "a b"]
    lines = ["dialogue\tsummary", *(f"{mark}\t{mark}{n}" for n, mark in enumerate(marks))]
    found, remarks = read(tmp_path, ".tsv", "\n".join(lines))
    assert found == [(mark, f"{mark}{n}") for n, mark in enumerate(marks)]
    assert "train.tsv: quotation marks around or in a cell are part of its text" in remarks
    found, remarks = read(tmp_path, ".tsv", 'dialogue\tsummary\n"a ""b"""\t"c"\n"a\tb"\td\n')
    assert found == [('a "b"', "c"), ("a\tb", "d")]
    assert "train.tsv: quotation marks around a cell are not part of its text" in remarks
    assert read(tmp_path, ".tsv", '"dialogue"\t"summary"\n"a"\t"b"\n')[0] == [("a", "b")]


def test_quotation_marks_in_csv_that_wrap_no_cell_are_text_or_refused(tmp_path):
    found, remarks = read(tmp_path, ".csv", 'dialogue,summary\n"a,b\n"c" d,e\nf,g\n')
    assert found == [('"a', "b"), ('"c" d', "e"), ("f", "g")] and "are part of its text" in remarks[0]
    (tmp_path / "train.csv").write_text('dialogue,summary\n"a, b",c\n"d" e,f\n')
    assert "train.csv: line 3: " in refusal(tmp_path) and "write each quotation mark in it twice" in refusal(tmp_path)
    (tmp_path / "train.csv").write_text("dialogue,summary\na,b\nc, d,e\n")
    assert (
        "train.csv: line 3 has 3 cells, and the header 2; put quotation marks around a cell that has a comma"
        in refusal(tmp_path)
    )
    (tmp_path / "train.csv").write_text("dialogue,summary\na\nb,c\n")
    assert "line 2 has 1 cells, and the header 2" in refusal(tmp_path)
    (tmp_path / "train.csv").write_text("dialogue,summary,summary\na,b,c\n")
    assert "its header has the column 'summary' twice" in refusal(tmp_path)


def test_values_in_json_keep_the_files_own_spelling(tmp_path):
    values = ["1", "1.10", "1e3", "-0.0", "12345678901234567890", "true", "false", '"x"']
    lines = [
        f'{{"dialogue": {value}, "summary": "s", "other": [1.10, {{"a": null}}]}}'
        for value in [*values, "null", "NaN", "-Infinity"]
    ]
    found, remarks = read(tmp_path, ".jsonl", "\r\n".join(lines))
    assert [text for text, _ in found] == [value.strip('"') for value in values]
    assert remarks == [
        f"3 rows of {split} left out: empty dialogue or summary" for split in ("train", "validation", "test")
    ]
    assert read(tmp_path, ".json", f"[{','.join(lines)}]")[0] == found if (tmp_path / "train.jsonl").unlink() else True


def test_numbers_in_parquet_are_text(tmp_path):
    from datasets import Dataset, Features, Value

    for kind, values, texts in (
        ("int64", [1, None, 10], ["1", "10"]),
        ("float32", [0.1, float("nan"), 5.0], ["0.1", "5.0"]),
        ("float64", [1.1, None, 1e20], ["1.1", "1e+20"]),
        ("bool", [True, None, False], ["true", "false"]),
    ):
        rows = Dataset.from_dict(
            {"dialogue": values, "summary": ["a", "b", "c"]},
            features=Features({"dialogue": Value(kind), "summary": Value("string")}),
        )
        for split in ("train", "validation", "test"):
            rows.to_parquet(tmp_path / f"{split}.parquet")
        splits, _ = load_rows(str(tmp_path), None, COLUMNS)
        assert splits["test"]["dialogue"][:] == texts


def test_columns_may_change_their_type_and_differ_between_files(tmp_path):
    (tmp_path / "train-1.csv").write_text("dialogue,summary,id\n1,a,7\n")
    (tmp_path / "train-2.csv").write_text("summary,dialogue\nb,x\n")
    (tmp_path / "validation.csv").write_text("dialogue,summary,more\n1.5,a,\n")
    (tmp_path / "test.csv").write_text("dialogue,summary\nTRUE,a\n")
    splits, remarks = load_rows(str(tmp_path), None, COLUMNS)
    assert splits["train"]["id"][:] == ["7", None]
    assert splits["train"]["dialogue"][:] == ["1", "x"] and splits["train"]["summary"][:] == ["a", "b"]
    assert splits["validation"]["dialogue"][:] == ["1.5"] and splits["test"]["dialogue"][:] == ["TRUE"]
    assert remarks == ["train is 2 files: train-1.csv, train-2.csv"]


def test_rows_of_a_file_with_other_columns_are_left_out_and_counted(tmp_path):
    for name, columns in (("train-1", "question,answer"), ("train-2", "query,answer"), ("test", "question,answer")):
        (tmp_path / f"{name}.csv").write_text(f"{columns}\n" + "a,b\n" * 5)
    _, remarks = load_rows(str(tmp_path), None, {"text_column": "question", "summary_column": "answer"})
    assert "5 rows of train left out: empty question or answer" in remarks


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.csv", b"<!DOCTYPE html>\n<html>\n<p>a</p>\n", "a web page"),
        ("a.txt", b"\xef\xbb\xbf\n<HTML>\n", "a web page"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "git lfs pull"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "git lfs pull"),
        ("a.csv", b"\x89PNG\r\n\x1a\n" + bytes(99), "an image"),
        ("a.csv", b"PK\x03\x04" + bytes(99), "an Excel or zip file"),
    ],
)
def test_what_is_no_data_file_whatever_its_name_says_is_refused(name, content, what, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=what):
        read_source(str(tmp_path / name))


def test_the_first_line_of_excel_names_the_delimiter(tmp_path):
    (tmp_path / "a.csv").write_text("sep=;\r\nquestion;answer\r\n" + "1,5;b\r\n" * 5)
    assert read_source(str(tmp_path / "a.csv")).splits["train"][0] == {"question": "1,5", "answer": "b"}


def test_only_a_line_feed_ends_a_line_of_sentences(tmp_path):
    odd = [f"a{mark}b {n}" for n, mark in enumerate("\u0085\u2028\x0b\x0c\x1c\r@")]
    (tmp_path / "rows.txt").write_bytes("".join(f"{text} @ up\r\n" for text in odd).encode("utf-8-sig"))
    splits, _ = load_rows(str(tmp_path / "rows.txt"), None, {"text_column": "sentence", "label_column": "label"})
    rows = [row for split in splits.values() for row in split]
    assert sorted(row["sentence"] for row in rows) == sorted(f"{text} " for text in odd)
    assert {row["label"] for row in rows} == {"up"}


@pytest.mark.parametrize("name", ["train.csv", "train.jsonl", "rows_Sentences.txt"])
def test_utf_16_is_refused(name, tmp_path):
    (tmp_path / name).write_text("a@up\n", encoding="utf-16")
    assert "not UTF-8 but UTF-16; add --encoding utf-16" in refusal(tmp_path)


def test_every_cell_of_dialogsum_matches_the_csv_module(data):
    splits, remarks = load_rows(str(data / "dialogsum"), None, COLUMNS)
    assert remarks == []
    for split, rows in splits.items():
        with (data / "dialogsum" / f"{split}.csv").open(newline="", encoding="utf-8") as stream:
            expected = list(csv.DictReader(stream))
        assert len(rows) == len(expected) == {"train": 12_460, "validation": 500, "test": 1_500}[split]
        assert all(rows[column][:] == [row[column] for row in expected] for column in expected[0])


def test_as_many_rows_as_there_are_splits_are_enough(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"dialogue": f"d{n}", "summary": f"s{n}"}) for n in range(3)))
    splits, _ = load_rows(str(path), None, COLUMNS)
    assert [len(splits[split]) for split in ("train", "validation", "test")] == [1, 1, 1]


def test_rows_with_the_same_text_stay_in_one_split(tmp_path):
    rows = [(f"text {n % 40}", f"summary {n}") for n in range(120)]
    splits, _ = load_rows(str(write_csv(tmp_path / "d", train=rows)), None, COLUMNS)
    assert sum(map(len, splits.values())) == 120
    texts = {split: {*of_split["dialogue"]} for split, of_split in splits.items()}
    assert not texts["train"] & texts["validation"] and not (texts["train"] | texts["validation"]) & texts["test"]
    assert all(6 <= len(splits[split]) <= 24 for split in ("validation", "test"))


def test_answers_to_texts_of_any_length_can_be_read_again(tmp_path):
    csv.field_size_limit(131_072)  # the default in a new process
    long = 'a "word",\n' * 40_000
    (tmp_path / "completions.csv").write_text(csv_text(["text", "reference"], [(long, "short")]), encoding="utf-8")
    assert read_csv(tmp_path / "completions.csv") == {"text": [long], "reference": ["short"]}
    assert FinishedRun.sample(SimpleNamespace(path=tmp_path), 9) == [(long, "short")]


@pytest.mark.parametrize("held", ["", "text,reference\nonly a text\n", 'text,reference\n"cut short', "\0"])
def test_completions_that_are_not_a_table_are_refused(held, tmp_path):
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


@pytest.mark.parametrize("held", [b"\xef\xbb\xbf", b"\n\n", b"\xef\xbb\xbf\r\n"])
@pytest.mark.parametrize("name", ["train.csv", "train.tsv", "train.jsonl", "train.json"])
def test_a_file_with_only_a_byte_order_mark_or_blank_lines(name, held, tmp_path):
    (tmp_path / name).write_bytes(held)
    assert "the file " in refusal(tmp_path)


def test_a_file_with_only_a_header(tmp_path):
    assert "a header but no row" in refusal(write_csv(tmp_path / "d", train=[]))


def test_a_missing_column_lists_those_that_exist(tmp_path):
    (tmp_path / "train.csv").write_text("dialog,summary\na,b\n")
    message = refusal(tmp_path)
    assert "no column 'dialogue' (did you mean dialog?); it has dialog, summary" in message


def test_rows_that_are_all_empty(tmp_path):
    (tmp_path / "train.csv").write_text("dialogue,summary\na,\nb,\n")
    assert "dialogue or summary is empty in each of its 2 rows" in refusal(tmp_path)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_file_that_is_not_utf8_names_its_line(tmp_path, suffix):
    lines = {"csv": "dialogue,summary\nà,b\nok,café\n", "jsonl": '{"dialogue": "a"}\n\n{"summary": "café"}\n'}[suffix]
    (tmp_path / f"train.{suffix}").write_bytes(lines.replace("à", "a").encode("latin-1"))
    assert "not UTF-8 (line 3, byte 0xe9)" in refusal(tmp_path)


def test_broken_json_is_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"dialogue": "a", "summary": "b"}) + "\n{broken\n")
    assert "cannot be read" in refusal(tmp_path)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_text_files_of_the_hub_are_read_like_local_ones(kind, tmp_path):
    """The hub's library treats a folder like a hub data set."""
    between = "\t" if kind == "tsv" else ","
    line = '{"dialogue": 1.10, "summary": true}' if kind == "jsonl" else f"001{between}NA"
    head = [] if kind == "jsonl" else [between.join(COLUMNS.values())]
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.{kind}").write_text("\n".join([*head, line]))
    loaded, remarks = _load_hub(str(tmp_path), None)
    row = {"dialogue": "1.10", "summary": "true"} if kind == "jsonl" else {"dialogue": "001", "summary": "NA"}
    assert [rows[0] for rows in loaded.values()] == [row] * 3 and remarks == []


def test_the_settings_of_a_hub_data_set_are_used(tmp_path):
    (tmp_path / "train.csv").write_text("7;a\n8;b\n")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: train.csv\n  sep: ';'\n  names: [n, text]\n---\n"
    )
    loaded, _ = _load_hub(str(tmp_path), None)
    assert loaded["train"][:] == {"n": [7, 8], "text": ["a", "b"]}


def test_a_hub_data_set_that_cannot_be_loaded():
    assert "cannot be loaded from the hub" in refusal("nobody/nothing")


def test_files_that_are_not_read_are_named(tmp_path):
    write_csv(tmp_path, train=ROWS, validation=ROWS, test=ROWS, notes=ROWS)
    assert load_rows(str(tmp_path), None, COLUMNS)[1] == ["not read, because their names name no split: notes.csv"]
