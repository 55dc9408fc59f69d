"""Shared by the tests: the data folder next to the project, tiny models with a real tokenizer, and recipe processes."""

import contextlib
import datetime
import gc
import io
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two ranks on two cores
# the key that signs checkpoints is not this user's own
os.environ["XDG_CONFIG_HOME"] = os.environ.get("FOOTPRINT_TEST_CONFIG") or tempfile.mkdtemp()
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that needs a hub is a mistake
os.environ["FOOTPRINT_CACHE"] = ""  # a test of predictions makes them

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # as in the background of a shell; processes of tests would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

import transformers  # noqa: F401 - its log handler must not keep the streams of the first test that imports it

pytest.register_assert_rewrite("ledgers")
ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("FOOTPRINT_TEST_DATA", ROOT.parent / "shared" / "data"))
BIN = Path(sys.executable).parent
# `make test` runs this many cases of each sweep (or as its mark says), others each day; `make matrix` runs all
SAMPLE = 3


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--matrix", action="store_true", help="run every case of the sweeps marked matrix, not today's sample"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--matrix"):
        return
    left_out = {item for item in items if item.get_closest_marker("long")}
    sweeps: dict[str, list[pytest.Item]] = {}
    sizes: dict[str, int] = {}
    for item in items:
        if mark := item.get_closest_marker("matrix"):
            name = item.nodeid.split("[")[0]
            sweeps.setdefault(name, []).append(item)
            sizes[name] = mark.kwargs.get("sample", SAMPLE)
    day = datetime.date.today().toordinal()
    for name, cases in sweeps.items():
        random.Random(0).shuffle(cases)  # so that each day's sample is mixed
        days = -(-len(cases) // sizes[name])
        left_out |= {case for number, case in enumerate(cases) if number % days != day % days}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish() -> None:
    """Excludes all imported objects from garbage collection, which accelerate's `free_memory` would run in every test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder with real data sets and tokenizers; their licenses do not allow to include them in the project."""
    if not DATA.is_dir():
        pytest.skip(f"no test data in {DATA}; name its folder with FOOTPRINT_TEST_DATA")
    return DATA


@pytest.fixture(scope="session")
def tiny_t5(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config of a tiny T5 and the real t5-small tokenizer, without weights."""
    from transformers import AutoTokenizer, T5Config

    folder = tmp_path_factory.mktemp("tiny_t5")
    AutoTokenizer.from_pretrained(data / "tokenizers" / "t5-small").save_pretrained(folder)
    config = T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=32128, decoder_start_token_id=0
    )
    config.save_pretrained(folder)
    return folder


def write_csv(folder: Path, **splits: list[tuple[str, str]]) -> Path:
    """Writes a data set folder with one csv file for each split; rows are (dialogue, summary)."""
    import csv

    folder.mkdir(exist_ok=True)
    for split, rows in splits.items():
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([("dialogue", "summary"), *rows])
    return folder


@pytest.fixture(scope="session")
def small_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with a few short rows in each split."""
    rows = [(f"#Person1#: I saw {n} cats.\n#Person2#: Really, {n}?", f"Person1 saw {n} cats.") for n in range(2, 26)]
    return write_csv(tmp_path_factory.mktemp("small") / "csv", train=rows[:16], validation=rows[16:20], test=rows[20:])


def run(
    *command: str | Path, timeout: float = 600, stdin: IO[str] | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command of the project's environment from the repository root; the caller checks the exit code."""
    program, *rest = map(str, command)
    if program == "accelerate" and rest[0] == "launch" and "--main_process_port" not in rest:
        with socket.socket() as probe:  # two tests may launch at the same time
            probe.bind(("127.0.0.1", 0))
            rest[1:1] = ["--main_process_port", str(probe.getsockname()[1])]
    return subprocess.run(
        [str(BIN / program), *rest],
        cwd=ROOT,
        env={**os.environ, **env},
        stdin=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def recipe(name: str, *argv: str | Path) -> SimpleNamespace:
    """Runs a recipe in this process, which saves the time for imports; same result as `run`."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = [f"recipes/{name}.py", *map(str, argv)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as caught:
            runpy.run_path(str(ROOT / "recipes" / f"{name}.py"), run_name="__main__")
    finally:
        sys.argv = before
    return SimpleNamespace(returncode=caught.value.code or 0, stdout=out.getvalue(), stderr=err.getvalue())
