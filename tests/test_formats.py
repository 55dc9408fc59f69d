"""The formats in which people bring data: each is recognized without flags, and trains on the right tokens."""

import bz2
import gzip
import json
import lzma
import os
import time
from pathlib import Path

import pytest
from conftest import recipe, write_csv
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from transformers import AutoConfig, AutoTokenizer

from toolkit.cli import main
from toolkit.data.loading import DataArguments, load_data
from toolkit.data.rows import read_source
from toolkit.errors import UserError
from toolkit.models import hub
from toolkit.tasks import chat_templates

CHATML = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
N = 20
ASKED = [f"Is {n} even?" for n in range(N)]
SAID = ["Yes." if n % 2 == 0 else "No." for n in range(N)]
ALPACA = [{"instruction": "Is it even?", "input": str(n), "output": f"{said} {n}"} for n, said in enumerate(SAID)]
BARE = [{"instruction": asked, "input": "", "output": said} for asked, said in zip(ASKED, SAID, strict=True)]
SHAREGPT = [
    {"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]}
    for asked, said in zip(ASKED, SAID, strict=True)
]
OPENAI = [
    {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
    for asked, said in zip(ASKED, SAID, strict=True)
]
IN_ALPACA = "### Instruction:\nIs it even?\n\n### Input:\n{n}\n\n### Response: {said} {n}</s>"
IN_CHAT = "<|user|>{asked}</s> <|assistant|>{said}</s>"


def lines(rows) -> str:
    return "\n".join(map(json.dumps, rows))


def pairs(one: str, other: str, first=ASKED, second=SAID) -> list[dict[str, str]]:
    return [{one: text, other: answer} for text, answer in zip(first, second, strict=True)]


def table(delimiter: str, one: str, other: str) -> str:
    return "\n".join(delimiter.join(row) for row in [(one, other), *zip(ASKED, SAID, strict=True)])


FORMATS = {  # name: file, content, task, what is said, the tokens of a row
    "alpaca list": ("a.json", json.dumps(ALPACA, indent=1), "summarization", "Alpaca rows: instruction, input -> output", IN_ALPACA),
    "alpaca lines": ("a.jsonl", lines(ALPACA), "summarization", "Alpaca rows: instruction, input -> output", IN_ALPACA),
    "alpaca without inputs": ("a.jsonl", lines(BARE), "summarization", "Alpaca rows", "### Instruction:\n{asked}\n\n### Response: {said}</s>"),
    "sharegpt": ("a.json", json.dumps(SHAREGPT), "chat", "ShareGPT conversations: conversations", IN_CHAT),
    "openai": ("a.jsonl", lines(OPENAI), "chat", "conversations: messages", IN_CHAT),
    "prompts": ("a.jsonl", lines(pairs("prompt", "completion")), "summarization", "prompt -> completion", "<s> {asked} {said}</s>"),
    "prompts of messages": (
        "a.jsonl",
        lines([{"prompt": r["messages"][:1], "completion": r["messages"][1:]} for r in OPENAI]),
        "chat",
        "prompt -> completion",
        IN_CHAT,
    ),
    "questions": ("a.jsonl", lines(pairs("question", "answer")), "summarization", "question -> answer", "<s> {asked} {said}</s>"),
    "queries": ("a.jsonl", lines(pairs("Query", "Response")), "summarization", "Query -> Response", "<s> {asked} {said}</s>"),
    "documents": ("a.jsonl", lines(pairs("document", "summary")), "summarization", "document -> summary", "Summarize the following text.\n\n{asked}\n\nSummary: {said}"),
    "labels": ("a.csv", table(",", "review", "sentiment"), "classification", "review -> sentiment", "{asked}\n\nLabel: {said}"),
    "plain lines": ("a.txt", "\n".join(ASKED), "text", "plain text", "<s> {asked}</s>"),
    "plain paragraphs": ("a.txt", "\n\n".join(f"{text}\n{text}" for text in ASKED), "text", "plain text", "<s> {asked}\n{asked}</s>"),
    "sentences": ("a.txt", "\n".join(f"{one}@{two}" for one, two in zip(ASKED, SAID, strict=True)), "classification", "sentence -> label", "{asked}\n\nLabel: {said}"),
    "texts": ("a.jsonl", lines([{"text": asked} for asked in ASKED]), "text", "plain text: text", "<s> {asked}</s>"),
    "wrapped": ("a.json", json.dumps({"version": 1, "data": ALPACA}), "summarization", "Alpaca rows", IN_ALPACA),
    "table of pandas": ("a.json", json.dumps({"schema": {"fields": [{"name": "output"}]}, "data": ALPACA}), "summarization", "Alpaca rows", IN_ALPACA),
    "columns": ("a.json", json.dumps({name: [row[name] for row in ALPACA] for name in ALPACA[0]}), "summarization", "Alpaca rows", IN_ALPACA),
    "pandas": ("a.json", json.dumps({name: {n: row[name] for n, row in enumerate(ALPACA)} for name in ALPACA[0]}), "summarization", "Alpaca rows", IN_ALPACA),
    "semicolons": ("a.csv", table(";", "question", "answer"), "summarization", "question -> answer", "<s> {asked} {said}</s>"),
    "tabs": ("a.csv", table("\t", "question", "answer"), "summarization", "question -> answer", "<s> {asked} {said}</s>"),
    "a mark and old line ends": ("a.csv", "\ufeff" + table(";", "question", "answer").replace("\n", "\r\n"), "summarization", "question -> answer", "<s> {asked} {said}</s>"),
    "gzip": ("a.jsonl.gz", gzip.compress(lines(ALPACA).encode()), "summarization", "Alpaca rows", IN_ALPACA),
    "gzip of csv": ("A.CSV.gz", gzip.compress(table(",", "question", "answer").encode()), "summarization", "question -> answer", "<s> {asked} {said}</s>"),
    "bzip2": ("a.json.bz2", bz2.compress(json.dumps(ALPACA).encode()), "summarization", "Alpaca rows", IN_ALPACA),
    "xz": ("a.jsonl.xz", lzma.compress(lines(ALPACA).encode()), "summarization", "Alpaca rows", IN_ALPACA),
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(data):
    """The config of a tiny Llama, and a function that gives its tokenizer with a chat template."""
    folder = data / "models" / "stories260k"

    def tokenizer(template: str | None = CHATML):
        made = AutoTokenizer.from_pretrained(folder)
        made.chat_template = template
        return made

    return AutoConfig.from_pretrained(folder), tokenizer


def write(folder: Path, name: str, content: str | bytes) -> str:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder / name)


def load(llama, name, template: str | None = CHATML, **flags):
    arguments = DataArguments(dataset_name=str(name), **flags)
    arguments.check({"dataset_name": str(name), **flags})
    return load_data(arguments, llama[0], llama[1](template)), arguments


def refused(llama, name, template: str | None = CHATML, **flags) -> str:
    with pytest.raises(UserError) as caught:
        load(llama, name, template, **flags)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def written(loaded) -> set[str]:
    tokenizer = loaded.tokenizer
    return {tokenizer.decode(row["input_ids"]) for split in (loaded.train, loaded.validation) for row in split}


def check(loaded, arguments, task, said, expected):
    assert arguments.task == loaded.task.name == task
    (line,) = [remark for remark in loaded.remarks if remark.startswith("reads ")]
    assert said in line and f"(--task {task})" in line and len(line) < 120
    texts = written(loaded)
    assert len(texts) > 12
    wanted = [expected.format(n=n, asked=ASKED[n], said=SAID[n]) for n in range(N)]
    assert all(any(text.endswith(one) or one in text for one in wanted) for text in texts)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_recognized_without_flags(name, llama, tmp_path):
    file, content, task, said, expected = FORMATS[name]
    check(*load(llama, write(tmp_path, file, content)), task, said, expected)


@pytest.mark.parametrize(
    "kind", ["folder of datasets", "splits of datasets", "parquet", "arrow", "one file in a folder", "data"]
)
def test_a_file_or_folder_of_datasets_is_read(kind, llama, tmp_path):
    rows, name = Dataset.from_list(ALPACA), tmp_path / "d"
    name.mkdir()
    if kind == "parquet":
        rows.to_parquet(name := tmp_path / "rows.parquet")
    elif kind in ("one file in a folder", "data"):
        (name / "data").mkdir()
        write(name / ("data" if kind == "data" else ""), "my-rows.json", json.dumps(ALPACA))
    else:
        (DatasetDict(train=rows) if kind == "splits of datasets" else rows).save_to_disk(name)
        name = next(name.glob("*.arrow")) if kind == "arrow" else name
    check(*load(llama, name), "summarization", "Alpaca rows", IN_ALPACA)


def test_a_folder_of_plain_texts_is_read(llama, tmp_path):
    for number in range(4):
        write(tmp_path, f"book{number}.txt", "\n\n".join(ASKED[number * 5 : number * 5 + 5]))
    check(*load(llama, tmp_path), "text", "plain text", "<s> {asked}</s>")


def test_an_encoding_is_named_where_utf_8_fails(llama, tmp_path):
    text = "question,answer\n" + "\n".join(f"café {n}?,thé {n}" for n in range(N))
    for encoding in ("latin-1", "cp1252", "utf-16"):
        loaded, _ = load(llama, write(tmp_path, "a.csv", text.encode(encoding)), encoding=encoding)
        assert "<s> café 3? thé 3</s>" in written(loaded)
    name = write(tmp_path, "a.csv", text.encode("latin-1"))
    assert "not UTF-8 (line 2, byte 0xe9); name its encoding, for example --encoding latin-1" in refused(llama, name)
    assert "--encoding klingon is no encoding" in refused(llama, name, encoding="klingon")
    assert "not in --encoding ascii (line 2" in refused(llama, name, encoding="ascii")


def test_flags_come_before_what_is_recognized(llama, tmp_path):
    name = write(tmp_path, "a.jsonl", lines(ALPACA))
    loaded, arguments = load(llama, name, prompt_template="Q: {instruction} {input}", summary_column="input")
    assert arguments.task == "summarization" and "<s> Q: Is it even? 3 3</s>" in written(loaded)
    loaded, _ = load(llama, name, task="chat")
    assert "<|user|>Is it even?\n\n3</s> <|assistant|>No. 3</s>" in written(loaded)
    loaded, _ = load(llama, name, task="text", text_column="output")
    assert "<s> No. 3</s>" in written(loaded)
    loaded, _ = load(llama, name, text_column="input", summary_column="output")
    assert "<s> 3 No. 3</s>" in written(loaded)
    loaded, _ = load(llama, name, task="summarization", text_column="input", summary_column="output")
    assert "<s> Summarize the following conversation.\n\n3\n\nSummary: No. 3</s>" in written(loaded)


def test_a_flag_that_the_recognized_task_does_not_have_is_refused(llama, tmp_path):
    name = write(tmp_path, "a.txt", "\n".join(ASKED))
    message = refused(llama, name, max_target_length=8)
    assert "--max_target_length has no effect with --task text, which the columns of" in message
    assert "no column 'answr' (did you mean answer?)" in refused(
        llama,
        write(tmp_path, "a.jsonl", lines(pairs("question", "answer"))),
        summary_column="answr",
        text_column="question",
    )


def test_a_prompt_may_name_any_column(llama, tmp_path):
    rows = [{"title": f"T{n}", "body": f"B{n}" if n % 2 else "", "kind": "ab"[n % 2]} for n in range(N)]
    name, prompt = write(tmp_path, "a.jsonl", lines(rows)), "Of {labels}:\n\n# {title}\n\nIt says: {body}\n\nKind:"
    loaded, _ = load(llama, name, task="classification", prompt_template=prompt, label_column="kind")
    texts = written(loaded)
    assert "<s> Of a, b:\n\n# T1\n\nIt says: B1\n\nKind: b</s>" in texts
    assert "<s> Of a, b:\n\n# T0\n\nKind: a</s>" in texts  # a paragraph whose columns are empty is left out
    assert loaded.prompt_tokenizer.template == "Of a, b:\n\n# {text}\n\nKind:"
    message = refused(llama, name, task="classification", prompt_template="{titel} {body}", label_column="kind")
    assert "has {titel}, and there is no such column (did you mean title?)" in message
    assert "names no column" in refused(llama, name, task="classification", prompt_template="{x}", label_column="kind")
    assert "no {text}" in refused(llama, name, task="classification", prompt_template="hello", label_column="kind")


def test_only_the_columns_of_a_prompt_are_truncated(llama, tmp_path):
    rows = [{"instruction": "Count. " * 200, "input": f"{n}", "output": "One."} for n in range(N)]
    loaded, _ = load(llama, write(tmp_path, "a.jsonl", lines(rows)), max_length=160, max_target_length=16)
    row = loaded.tokenizer.decode(loaded.train[0]["input_ids"])
    assert row.startswith("<s> Below is an instruction") and row.endswith("\n\n### Response: One.</s>")
    assert loaded.truncation["train"].rows == len(loaded.train) > 0


@pytest.mark.parametrize(
    ("row", "how"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "--text_column prompt --summary_column chosen"),
        ({"chosen": OPENAI[0]["messages"], "rejected": OPENAI[1]["messages"]}, "--task chat --messages_column chosen"),
        (
            {"prompt": OPENAI[0]["messages"][:1], "chosen": OPENAI[0]["messages"][1:], "rejected": OPENAI[1]["messages"][1:]},
            "--task chat --response_column chosen --prompt_column prompt",
        ),
        ({"chosen": "a b", "rejected": "b"}, "--task text --text_column chosen"),
        ({"prompt": "p", "completion": "a", "label": True}, "keep the rows with label true"),
        ({"question": "p", "response_a": "a", "response_b": "b", "winner": "a"}, "--summary_column response_a"),
    ],
)  # fmt: skip
def test_preferences_are_refused_with_what_can_be_learned_of_them(row, how, llama, tmp_path):
    name = write(tmp_path, "a.jsonl", lines([row] * N))
    message = refused(llama, name)
    assert "the data hold preferences" in message and how in message
    words = how.split(" --")
    if how.startswith("--"):
        flags = dict(word.removeprefix("--").split() for word in words)
        assert len(load(llama, name, **flags)[0].train) >= 16


def test_a_message_without_content_leaves_out_its_row_alone(llama, tmp_path):
    wrong = {"messages": [{"role": "user", "content": None}, OPENAI[0]["messages"][1]]}
    loaded, _ = load(llama, write(tmp_path, "a.jsonl", lines([wrong, *OPENAI[1:]])))
    assert any("a message of the role user has no content" in remark for remark in loaded.remarks)


def test_rows_with_nothing_to_learn_are_counted(llama, tmp_path):
    asks = [{"messages": [{"role": "user", "content": "Well?"}]}, {"messages": []}]
    loaded, _ = load(llama, write(tmp_path, "a.jsonl", lines(OPENAI + asks)))
    assert len(loaded.train) + len(loaded.validation) + len(loaded.test) == N
    assert any(remark.startswith("2 rows of train left out: ") for remark in loaded.remarks), loaded.remarks
    long = [{"messages": [{"role": "user", "content": "Well? " * 99}, {"role": "assistant", "content": "So."}]}]
    loaded, _ = load(llama, write(tmp_path, "a.jsonl", lines(OPENAI + long * 3)), max_length=64, max_target_length=16)
    assert any("left out: no label within --max_length 64" in remark for remark in loaded.remarks), loaded.remarks
    message = refused(llama, write(tmp_path, "a.jsonl", lines(asks * 9)))
    assert "row 1 of train: its conversation has no turn of the role assistant" in message


def test_a_role_that_few_templates_know_is_counted(llama, tmp_path):
    wrong = {"messages": [{"role": "usr", "content": ASKED[0]}, OPENAI[0]["messages"][1]]}
    loaded, _ = load(llama, write(tmp_path, "a.jsonl", lines([wrong, *OPENAI[1:]])))
    (remark,) = [one for one in loaded.remarks if "role" in one]
    assert remark.startswith("1 turn in ") and remark.endswith(
        "has the role 'usr', which few chat templates know (did you mean user?)"
    )


@pytest.mark.parametrize("form", ["chat", "alpaca", "text", "labels"])
def test_duplicates_are_held_out_together(form, llama, tmp_path):
    made = {
        "chat": lambda n, k: {"messages": [{"role": "user", "content": n}, {"role": "assistant", "content": k}]},
        "alpaca": lambda n, k: {"instruction": n, "input": "", "output": k},
        "text": lambda n, k: {"text": n},
        "labels": lambda n, k: {"text": n, "label": "ab"[int(n) % 2]},
    }[form]
    rows = [made(str(n), answer) for n in range(50) for answer in ("one", "two")]
    loaded, _ = load(llama, write(tmp_path, "a.jsonl", lines(rows)))
    texts = {split: {loaded.task.shown(text) for text, _ in loaded.pairs(split)} for split in loaded.rows}
    assert not texts["train"] & texts["validation"] and not (texts["train"] | texts["validation"]) & texts["test"]
    assert sum(map(len, loaded.rows.values())) == 100


def test_a_part_of_a_sorted_file_is_a_sample_of_it(llama, tmp_path):
    rows = [{"question": f"{word} {n}", "answer": word} for word in ("red", "green", "blue") for n in range(100)]
    flags = {"max_train_samples": 60}
    loaded, _ = load(llama, write(tmp_path, "a.jsonl", lines(rows)), **flags)
    drawn = [answer for _, answer in loaded.pairs("train")]
    assert len(drawn) == 60 and min(map(drawn.count, ("red", "green", "blue"))) >= 10
    again, _ = load(llama, tmp_path / "a.jsonl", **flags)
    assert again.train_fingerprint == loaded.train_fingerprint


def test_chat_templates_by_name_and_from_a_file(llama, tmp_path):
    name = write(tmp_path, "a.jsonl", lines(OPENAI))
    assert "add --chat_template chatml (or alpaca, or a file)" in refused(llama, name, None)
    loaded, _ = load(llama, name, None, chat_template="chatml")
    assert "chatml: the tokenizer has no <|im_end|>, so </s> ends each turn" in loaded.remarks
    assert "<|im_start|>user\nIs 3 even?</s> \n<|im_start|>assistant\nNo.</s> \n" in written(loaded)
    assert loaded.prompt_tokenizer.end_tokens() == [loaded.tokenizer.eos_token_id]
    loaded, _ = load(llama, name, None, chat_template="alpaca")
    assert "### Instruction:\nIs 3 even?\n\n### Response:\nNo.</s> \n\n" in written(loaded)
    file = write(tmp_path, "mine.jinja", "\n" + CHATML)
    loaded, _ = load(llama, name, chat_template=file)
    assert f"--chat_template {file} replaces the tokenizer's own chat template" in loaded.remarks
    assert "has a chat template of its own" in refused(llama, name, chat_template="chatml")
    assert "--chat_template has no effect with --task text" in refused(llama, name, task="text", chat_template="chatml")
    tokenizer = llama[1](None)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    assert chat_templates.set_chat_template(tokenizer, "chatml") == []
    assert tokenizer.apply_chat_template(OPENAI[0]["messages"], tokenize=False).endswith("Yes.<|im_end|>\n")


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}", "does not end"),
        ("{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}", "needs more than 2 GiB"),
        ("{{ messages[0].content * 100000000000 }}", "needs more than 2 GiB"),
        ("{% include '/etc/passwd' %}", "refuses a conversation"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "refuses a conversation"),
        ("{{ 1 / 0 }}", "refuses a conversation"),
        ("{{ messages }", "no Jinja template"),
    ],
)  # fmt: skip
def test_a_chat_template_that_takes_all_is_refused(template, why, llama, tmp_path, monkeypatch):
    monkeypatch.setattr(chat_templates, "SECONDS", 1.0 if why == "does not end" else 20.0)
    name, file = write(tmp_path, "a.jsonl", lines(OPENAI)), write(tmp_path, "t.jinja", "{# messages #}" + template)
    begin = time.monotonic()
    assert why in refused(llama, name, None, task="chat", chat_template=file)
    assert time.monotonic() - begin < 30
    if why != "no Jinja template":  # the same template in a tokenizer from elsewhere
        assert why in refused(llama, name, "{# messages #}" + template, task="chat")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "is not a file|is empty"),
        ("hello", "does not use `messages`"),
        ("{{ messages }}" + " " * (1 << 20), "larger than"),
        (b"\xff\xfe\xff{{ messages }}", "cannot be read"),
    ],
)
def test_a_file_that_holds_no_chat_template_is_refused(content, why, llama, tmp_path):
    name = write(tmp_path, "a.jsonl", lines(OPENAI))
    file = write(tmp_path, "t.jinja", content)
    message = refused(llama, name, None, task="chat", chat_template=file)
    assert message.startswith(f"--chat_template {file}: ") and (why in message or not content)
    assert "no such file; give one, or chatml or alpaca" in refused(llama, name, None, chat_template="nope")
    for odd in (str(tmp_path), "/dev/zero", "a" * 300):
        assert refused(llama, name, None, chat_template=odd).startswith("--chat_template ")


def special(folder: Path, kind: str) -> str:
    path = folder / "train.csv"
    if kind in ("/dev/zero", "/dev/null"):
        return kind
    if kind == "folder":
        path.mkdir()
        return str(folder)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"dangling": "nowhere", "loop": "train.csv"}.get(kind, "/dev/zero"))
    return str(path)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("/dev/zero", "it is a device"),
        ("/dev/null", "it is a device"),
        ("folder", "train.csv: it is a folder"),
        ("pipe", "it is a named pipe"),
        ("dangling", "a link to nowhere that cannot be read"),
        ("loop", "a link to train.csv that cannot be read"),
        ("link to a device", "it is a device"),
    ],
)
def test_what_is_no_file_is_refused(kind, why, llama, tmp_path):
    assert why in refused(llama, special(tmp_path, kind))
    if kind != "folder":
        assert why in refused(llama, special(tmp_path / "..", kind) if kind.startswith("/") else tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.zip", b"PK", "unpack it first: unzip a.zip"),
        ("a.jsonl.gz", b"\x1f\x8bnothing", "cannot be unpacked"),
        ("a.jsonl.xz", b"nothing", "cannot be unpacked"),
        ("a.parquet", b"PAR1", "a .parquet file cannot be read"),
        ("a.arrow", b"ARROW", "a .arrow file cannot be read"),
        ("a.json", "[" * 20_000 + "]" * 20_000, "nested too deeply"),
        ("a.json", '{"question": ' + "1" * 5_000 + "}", "cannot be read as JSON"),
        ("a.json", '{"train": [{"text": "a"}], "test": [{"text": "b"}]}', "several of its keys hold rows (train, test)"),
        ("a.json", "7", "the file has no row"),
        ("a.jsonl", lines(pairs("question", "answer")[:2]), "2 usable rows cannot be split"),
        ("a.jsonl", lines([*pairs("question", "answer"), {"question": "x" * 2_100_000, "answer": "y"}]), "has 2,100,000 characters"),
        ("a.jsonl", lines([{"question": "a", "answer": {"text": ["b"]}}] * 9), "which is not text"),
        ("a.jsonl", lines([*({**row, "input": "of it"} for row in ALPACA), {"instruction": "a", "input": {"b": 1}, "output": "c"}]), "which is not text"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_learned_is_refused(name, content, why, llama, tmp_path):
    assert why in refused(llama, write(tmp_path, name, content))


def test_a_compressed_file_that_unpacks_without_end_is_refused(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("toolkit.data.files.MOST_UNPACKED", 1 << 20)
    name = write(tmp_path, "a.csv.gz", gzip.compress(b"\0" * (4 << 20)))
    assert "unpacks to more than 1,048,576 bytes" in refused(llama, name)


def test_a_class_number_out_of_range_is_refused(llama, tmp_path):
    features = Features({"text": Value("string"), "label": Value("int64")})
    rows = Dataset.from_dict({"text": ASKED, "label": [0, 1] * 9 + [0, 7]}, features=features)
    rows = rows.with_format("arrow")
    table = rows.data.table
    named = Dataset(table, info=None)
    named = named.with_format(None)
    named._info.features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    named.to_parquet(tmp_path / "a.parquet")
    assert "has the class number 7, and the file names 2 classes (0 to 1)" in refused(llama, tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["csv", "json", "parquet", "text"])
def test_names_of_builders_are_refused_at_once(name, llama):
    assert f"--dataset_name {name} is a type of file and not a data set" in refused(llama, name)


@pytest.mark.parametrize("name", ["a" * 300, "/tmp/" + "a" * 300, "a\0b", "~nobody-here/rows.csv", "rows.csv"])
def test_names_that_can_be_no_file_are_refused(name, llama):
    assert "no such folder or file" in refused(llama, name)


@pytest.mark.parametrize("answers", ["not at all", "never"])
def test_without_a_network_a_data_set_of_the_hub_fails_at_once(answers, monkeypatch):
    class Session:
        def head(self, *args, **kwargs):
            if answers == "never":
                time.sleep(20)
            raise OSError("no route")

    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_session", Session)
    hub.hub_is_reachable.cache_clear()
    begin = time.monotonic()
    with pytest.raises(UserError, match="which cannot be reached, and it is neither a file nor a folder here"):
        read_source("nobody/nothing")
    assert time.monotonic() - begin < 3
    hub.hub_is_reachable.cache_clear()


def test_an_existing_text_column_and_summary_keep_the_usual_prompt(llama, tmp_path):
    rows = list(zip(ASKED, SAID, strict=True))
    loaded, arguments = load(llama, write_csv(tmp_path / "d", train=rows))
    assert arguments.prompt_template is None and not any(remark.startswith("reads") for remark in loaded.remarks)
    assert "<s> Summarize the following conversation.\n\nIs 3 even?\n\nSummary: No.</s>" in written(loaded)


# From the command line

SHORT = ("--max_steps", "2", "--per_device_train_batch_size", "4", "--max_length", "160", "--max_target_length", "8", "--use_cpu")  # fmt: skip


def train_on(name: str, data: Path, folder: Path) -> tuple[str, dict]:
    """What a short run of recipes/lora.py on a file of the format prints, and its run.json."""
    file, content, task, _, _ = FORMATS[name]
    flags = ["--dataset_name", write(folder, file, content), "--model_name_or_path", data / "models" / "stories260k"]
    flags += ["--chat_template", "chatml"] if task == "chat" else []
    size = [flag for flag in SHORT if task != "text" or flag not in ("--max_target_length", "8")]
    done = recipe("lora", *flags, *size, "--output_dir", folder / "run")
    assert done.returncode == 0, done.stderr
    return " ".join(done.stdout.split()), json.loads((folder / "run" / "run.json").read_text())


@pytest.mark.slow
@pytest.mark.matrix(sample=4)
@pytest.mark.parametrize("name", FORMATS)
def test_a_format_trains_and_its_run_generates(name, data, tmp_path, capsys):
    out, record = train_on(name, data, tmp_path)
    _, _, task, said, _ = FORMATS[name]
    assert said in out and record["task"] == task and record["finished"]
    assert ("(--task chat, by --chat_template)" in out) == (task == "chat")
    with pytest.raises(SystemExit) as end:
        main(["generate", str(tmp_path / "run"), ASKED[0]])
    assert not end.value.code, capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alpaca list", "sharegpt"])
def test_config_yaml_and_the_model_card_repeat_what_was_recognized(name, data, tmp_path):
    _, record = train_on(name, data, tmp_path)
    card = (tmp_path / "run" / "README.md").read_text()
    assert ("### Input:\n{input}" if name == "alpaca list" else "apply_chat_template(messages") in card
    again = recipe("lora", "--config", tmp_path / "run" / "config.yaml", "--output_dir", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    same = json.loads((tmp_path / "again" / "run.json").read_text())
    assert {key: same[key] for key in ("task", "prompt_template", "data")} == {
        key: record[key] for key in ("task", "prompt_template", "data")
    }
