"""The READMEs: their commands run, links and names are right, and figures match the committed results."""

import itertools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from comparison_folder import write_in_context, write_run
from conftest import ROOT, recipe, run, write_csv

from toolkit.cli import main
from toolkit.config import parse_config
from toolkit.config.arguments import OVERRIDDEN
from toolkit.distributed.launch_files import read_launch_file
from toolkit.methods import METHODS
from toolkit.runs import first_difference

sys.path.insert(0, str(ROOT / "benchmarks"))
import readme  # a script of benchmarks/, which is not a package

TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in readme.READMES}
LINKED = [*readme.READMES, ".github/CONTRIBUTING.md", "toolkit/cli/README.md", "toolkit/embedded/model/README.md"]
SHORT = ["--max_steps", "2", "--max_train_samples", "8", "--max_eval_samples", "2", "--max_length", "64"]
SHORT += ["--max_target_length", "8", "--per_device_train_batch_size", "2"]

# The beginning of each command in a bash block -> the test in this file that runs it, or checks what it would do.
COVERED = {
    "README.md": {
        "make demo": "test_make_demo_trains_and_its_result_generates",
        "make test": "test_make_test_runs_every_test",
        "accelerate launch recipes/lora.py": "test_each_training_command_runs_with_local_replacements_for_the_hub",
        "accelerate launch recipes/qlora.py": "test_each_training_command_runs_with_local_replacements_for_the_hub",
        "accelerate launch recipes/full.py": "test_each_training_command_runs_with_local_replacements_for_the_hub",
        "accelerate launch --config_file": "test_each_training_command_runs_with_local_replacements_for_the_hub",
        "footprint predict lora --model": "test_predict_and_report_run_unchanged",
        "footprint predict lora --gpu": "test_predict_and_report_run_unchanged",
        "footprint report": "test_predict_and_report_run_unchanged",
    },
    "recipes/README.md": {
        "python recipes/lora.py --help": "test_the_help_of_a_recipe_lists_the_flags_of_its_method",
        'footprint generate RUN_DIR "': "test_make_demo_trains_and_its_result_generates",
        "footprint generate RUN_DIR RUN_B": "test_make_demo_trains_and_its_result_generates",
        "footprint merge": "test_make_demo_trains_and_its_result_generates",
        "footprint evaluate": "test_make_demo_trains_and_its_result_generates",
        "footprint compare --methods": "test_the_compare_commands_plan_every_run_and_show_finished_ones",
        "footprint compare --show": "test_the_compare_commands_plan_every_run_and_show_finished_ones",
    },
    "launch/README.md": {
        "footprint predict full": "test_the_prediction_of_several_gpus_is_in_the_committed_table",
    },
    "benchmarks/README.md": {
        "python benchmarks/readme.py": "test_the_generated_parts_match_the_committed_results",
    },
    "toolkit/README.md": {},
    "toolkit/memory/README.md": {
        "footprint report": "test_predict_and_report_run_unchanged",
        "python -m toolkit.runs.first_difference": "test_the_command_for_a_wrong_prediction_runs_unchanged",
    },
}


def commands(file: str) -> list[str]:
    """The lines of the bash blocks of a README; without the comments behind make's."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", TEXTS[file], re.DOTALL | re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line.split("#")[0].strip() if line.startswith("make") else line for line in lines if line]


def command(file: str, start: str) -> str:
    """The one command of `file` that begins with `start`."""
    (found,) = [one for one in commands(file) if one.startswith(start)]
    return found


# ---- the generated parts


def test_the_generated_parts_match_the_committed_results():
    words = command("benchmarks/README.md", "python benchmarks/readme.py").split()
    done = run(*words, "--check")
    assert done.returncode == 0, f"{done.stdout}run: make results (or benchmarks/readme.py)"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<!-- demo -->\n<!-- end demo -->\n", "no README has a place for .*methods"),
        ("<!-- a wish -->\n<!-- end a wish -->\n", "X.md: the marker <!-- a wish --> belongs to no part"),
        ("<!-- demo -->\n", "X.md: <!-- demo --> is not closed"),
        ("<!-- end demo -->\n", "X.md: <!-- end demo --> stands where no part is open"),
        ("<!-- demo -->\n<!-- methods -->\n", "X.md: <!-- methods --> stands where <!-- end demo --> is missing"),
    ],
)
def test_a_part_without_a_place_and_a_marker_without_a_part_are_errors(text, expected):
    with pytest.raises(SystemExit, match=expected):
        readme.rewritten({"X.md": text})


def test_a_part_is_written_into_every_file_that_has_its_markers():
    old = {
        name: re.sub(r"(<!-- methods -->\n).*?(<!-- end methods -->)", r"\1stale\n\2", text, flags=re.DOTALL)
        for name, text in TEXTS.items()
    }
    assert old != TEXTS
    old["X.md"] = "before\n<!-- methods --><!-- end methods -->\nafter\n"
    new = readme.rewritten(old)
    assert new.pop("X.md") == f"before\n<!-- methods -->\n{readme.methods()}\n<!-- end methods -->\nafter\n"
    assert new == TEXTS


def test_every_committed_result_is_listed_with_its_command_and_its_date():
    results = ROOT / "benchmarks" / "results"
    files = [*results.glob("*"), *(results / "gpu").glob("*")]
    names = [path.relative_to(results).as_posix() for path in files if path.is_file()]
    assert len(names) >= 13
    for name in names:
        assert re.search(
            rf"^\| `{re.escape(name)}` \| .+ \| `.+` \| \d{{4}}-\d\d-\d\d.* \|$",
            TEXTS["benchmarks/README.md"],
            re.MULTILINE,
        ), name


def test_a_result_without_a_description_is_an_error(monkeypatch, tmp_path):
    (tmp_path / "new.json").write_text('{"date": "2026-11-27"}')
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    with pytest.raises(SystemExit, match=r"benchmarks/results/new\.json is not described"):
        readme.results()


# ---- the content of the pages


def test_the_first_page_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 200


def test_every_readme_is_checked_here():
    folders = [ROOT, *(ROOT / name for name in ("recipes", "launch", "benchmarks", "toolkit", "tests", ".github"))]
    found = {path for folder in folders for path in (folder.glob("*.md") if folder == ROOT else folder.rglob("*.md"))}
    assert {path.relative_to(ROOT).as_posix() for path in found} == set(LINKED), "add the page to LINKED"


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", LINKED)
def test_links_lead_to_existing_files_and_headings(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    assert links or "embedded" in file
    for link in links:
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / file).parent / path).resolve() if path else ROOT / file
        assert target.exists(), f"{file} links to {link}"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{file} links to {link}"


@pytest.mark.parametrize("file", LINKED)
def test_named_files_and_tests_exist(file):
    """Paths between backticks: from the repository's root, or from the page's own folder."""
    text = (ROOT / file).read_text(encoding="utf-8")
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`([\w./-]+)`", text):
        if re.fullmatch(r"test_\w+", name):
            assert f"def {name}(" in tests, f"{file} names {name}"
        elif re.search(r"\.(py|yaml)$|/$", name) and "NAME" not in name and not name.startswith("benchmarks/results/"):
            assert (ROOT / name).exists() or (ROOT / file).parent.joinpath(name).exists(), f"{file} names {name}"


def test_named_flags_exist(capsys):
    known = {option for action in launch_command_parser()._actions for option in action.option_strings}
    known |= {f"--{name}" for name in OVERRIDDEN}  # not in the help, because they are refused
    for method in METHODS.values():
        with pytest.raises(SystemExit):
            parse_config(method, ["--help", "all"])
        known |= set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    for path in [
        ROOT / "tests" / "conftest.py",
        *(ROOT / "toolkit").rglob("*.py"),
        *(ROOT / "benchmarks").rglob("*.py"),
    ]:
        known |= set(re.findall(r'"(--[\w-]+)"', path.read_text(encoding="utf-8")))
    for file in LINKED:
        text = readme.MARKER.sub("", (ROOT / file).read_text(encoding="utf-8"))
        unknown = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) - known
        assert not unknown - ({"--output_dir", "--threads"} if "embedded" in file else set()), f"{file} names {unknown}"


def test_the_file_tree_matches_the_files():
    tree = re.search(r"## Files\n\n```\n(.*?)```", TEXTS["toolkit/README.md"], re.DOTALL)[1]
    named, folders = set(), []
    for line in tree.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 4, line.split()[0]
        folders[depth:] = [name.rstrip("/")]
        named.add("/".join(folders))
    assert len(named) == len(tree.splitlines())
    toolkit = ROOT / "toolkit"
    there = {
        path for path in toolkit.rglob("*") if path.suffix in (".py", ".jinja", ".yaml") and path.name != "__init__.py"
    }
    there |= {path.parent for path in there} | {toolkit, toolkit / "__init__.py", toolkit / "embedded" / "model"}
    assert named == {path.relative_to(ROOT).as_posix() for path in there}


def test_every_launch_file_has_a_row():
    rows = re.search(r"## Which file\n(.*?)\n## ", TEXTS["launch/README.md"], re.DOTALL)[1]
    listed = [
        name
        for row in rows.splitlines()
        if row.startswith("| `")
        for name in re.findall(r"`(\w+\.yaml)`", row.split("|")[1])
    ]
    assert sorted(listed) == sorted(path.name for path in (ROOT / "launch").glob("*.yaml"))


# ---- the commands


@pytest.mark.parametrize("file", readme.READMES)
def test_every_command_is_covered_by_a_test(file):
    covered = COVERED[file]
    assert sorted(commands(file)) == sorted(command(file, start) for start in covered)
    for test in covered.values():
        assert callable(globals()[test]), test


@pytest.mark.slow
def test_the_example_for_notebooks_runs_and_its_run_fits():
    (example,) = re.findall(r"```python\n(.*?)```", TEXTS["README.md"], re.DOTALL)
    done = run("python", "-c", f"{example}\nassert ledger.fits and ledger.needed_bytes > 2**30\n")
    assert done.returncode == 0, done.stderr


def test_make_test_runs_every_test():
    done = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "test"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    *_, last = done.stdout.splitlines()
    assert "-m pytest" in last and "slow" not in last
    assert "ruff check" in done.stdout and "mypy" in done.stdout


def test_the_help_of_a_recipe_lists_the_flags_of_its_method():
    python, script, flag = command("recipes/README.md", "python").split()
    done = recipe(Path(script).stem, flag)
    assert python == "python" and done.returncode == 0
    assert "--lora_r" in done.stdout and "--learning_rate" in done.stdout


@pytest.mark.slow
def test_make_setup_installs_nothing_the_second_time():
    if not (ROOT / ".venv" / ".footprint").exists():
        pytest.skip("the environment was not made by make")
    done = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "setup"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "pip install" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("start", [start for start in COVERED["README.md"] if start.startswith("accelerate")])
def test_each_training_command_runs_with_local_replacements_for_the_hub(start, data, tiny_t5, tmp_path):
    """Hub ids become folders here, everything else is as in the README; two steps on a few rows."""
    rows = [(f"Person {n} saw a cat.", f"Cat {n}.") for n in range(8)]
    renamed = write_csv(tmp_path / "articles", train=rows, validation=rows, test=rows)
    for file in renamed.iterdir():
        file.write_text(file.read_text().replace("dialogue,summary", "article,highlights"))
    chats = tmp_path / "chats.jsonl"
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": cat}] for text, cat in rows]
    chats.write_text("\n".join(json.dumps({"messages": one}) for one in turns))
    stand_ins = {
        "google/flan-t5-base": [str(tiny_t5), "--random_weights"],
        "gpt2": [str(data / "models" / "stories260k")],
        "knkarthick/dialogsum": [str(data / "dialogsum")],
        "path/to/folder": [str(renamed)],
        "meta-llama/Llama-3.1-8B-Instruct": [str(data / "models" / "stories260k"), "--chat_template", "chatml"],
        "path/to/chats.jsonl": [str(chats)],
    }
    shown = command("README.md", start)
    words = [word for part in shlex.split(shown) for word in stand_ins.get(part, [part])]
    extra = ["--use_cpu"] if "ddp" in shown else []
    flags = [*SHORT, *extra, "--output_dir", tmp_path / "run"]
    if extra:
        done = run(*words, *flags)
    else:  # `accelerate launch recipes/X.py` without a configuration is one process: this one will do
        name = Path(words[2]).stem
        assert words[:2] == ["accelerate", "launch"]
        done = recipe(name, *words[3:], *flags)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "completions.csv").exists()
    if extra:
        assert "2 x 1 accumulated x 2 processes" in done.stdout and done.stdout.count("Scores on") == 1


@pytest.mark.slow
def test_predict_and_report_run_unchanged(capfd, tmp_path):
    def shown(words: list[str]) -> str:
        with pytest.raises(SystemExit) as caught:
            main(words[1:])
        out = capfd.readouterr().out
        assert not caught.value.code, out
        return out

    ledger = shown([*shlex.split(command("README.md", "footprint predict lora --model")), "--json"])
    assert json.loads(ledger)["fits"]
    difference = " ".join(shown(shlex.split(command("README.md", "footprint predict lora --gpu"))).split())
    assert re.match(r"B needs .* GiB less than A: .* on RTX 4090\. Both fit into ", difference)
    assert "weights that do not train" in difference and "the weights are 4-bit" in difference
    for name in ("RUN_A", "RUN_B", "RUN_DIR"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "memory.json").write_text(ledger)
    (tmp_path / "RUN_DIR" / "predicted_memory.json").write_text(ledger)
    report = command("README.md", "footprint report")
    assert report.split()[2:] == ["runs/RUN_A", "runs/RUN_B"]
    table = shown(report.replace("runs/", f"{tmp_path}/").split())
    assert "RUN_A" in table and "RUN_B" in table
    beside = shown(
        command("toolkit/memory/README.md", "footprint report").replace("RUN_DIR", f"{tmp_path}/RUN_DIR").split()
    )
    assert "predicted_memory" in beside and "RUN_DIR" in beside


@pytest.mark.slow
def test_the_command_for_a_wrong_prediction_runs_unchanged(capfd, tmp_path):
    settings = {
        "use_cpu": True,
        "max_train_samples": 16,
        "max_eval_samples": 2,
        "max_length": 64,
        "num_train_epochs": 1,
    }
    (tmp_path / "config.yaml").write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))
    words = command("toolkit/memory/README.md", "python -m").replace("RUN_DIR", str(tmp_path)).split()
    assert words[:3] == ["python", "-m", first_difference.__name__]
    with pytest.raises(SystemExit) as caught:
        first_difference.main(words[3:])
    out = capfd.readouterr().out
    assert caught.value.code == 0 and "events of 2 steps are predicted as they were measured" in out


@pytest.mark.slow
def test_make_demo_trains_and_its_result_generates(tmp_path):
    """Runs what `make demo` launches; the test above covers make itself."""
    launch = ("accelerate", "launch", "--config_file", "launch/single.yaml", "recipes/lora.py")
    assert " ".join(launch) in (ROOT / "Makefile").read_text()
    done = run(*launch, "--output_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    base, tuned = (float(re.search(rf"│ {who} +│ +([\d.]+)", done.stdout)[1]) for who in ("base", "tuned"))
    assert tuned > base + 0.1
    (tmp_path / "typed").write_text("#Person1#: Is it raining?\n")
    for start in ('footprint generate RUN_DIR "', "footprint generate RUN_DIR RUN_B", "footprint merge"):
        words = shlex.split(re.sub("RUN_DIR|RUN_B", str(tmp_path / "run"), command("recipes/README.md", start)))
        with (tmp_path / "typed").open() as typed:
            written = run(*words, stdin=typed)
        assert written.returncode == 0 and written.stdout.strip(), written.stderr
    assert (tmp_path / "run-merged" / "model.safetensors").exists()
    (tmp_path / "other.jsonl").write_text('{"dialogue": "#Person1#: Hi.", "summary": "They greet."}\n')
    words = command("recipes/README.md", "footprint evaluate").replace("RUN_DIR", str(tmp_path / "run"))
    written = run(*shlex.split(words.replace("other.jsonl", str(tmp_path / "other.jsonl"))))
    assert written.returncode == 0 and "ROUGE-L" in written.stdout, written.stderr


def test_the_prediction_of_several_gpus_is_in_the_committed_table():
    """The prediction takes minutes, so this test only checks that its result is in the committed table."""
    words = shlex.split(command("launch/README.md", "footprint predict full"))
    given = dict(itertools.pairwise(words))
    launch = read_launch_file(given["--launch"], int(given["--num_processes"]))
    assert (words[:3], str(launch.engine)) == (["footprint", "predict", "full"], "ZeRO-3 on 4 processes")
    rows = json.loads((ROOT / "benchmarks" / "results" / "distributed_fits.json").read_text())["rows"]
    wanted = (given["--model_name_or_path"], "full", "zero3", 4)
    assert [row["fits"] for row in rows if (row["model"], row["method"], row["launch"], row["cards"]) == wanted] == [
        True
    ]


def test_the_compare_commands_plan_every_run_and_show_finished_ones(monkeypatch, tmp_path, capfd):
    """test_compare.py tests the runs themselves; here synthetic run folders replace them."""

    def leave_results(plan):
        assert len(plan.runs) == 12
        for one in plan.runs:
            if one.method == "in_context":
                write_in_context(one.folder)
            else:
                write_run(one.folder, one.method, one.seed, rows=60)

    monkeypatch.setattr("toolkit.compare.command.run_all", leave_results)
    for start in ("footprint compare --methods", "footprint compare --show"):
        words = shlex.split(command("recipes/README.md", start))[1:]
        with pytest.raises(SystemExit) as caught:
            main([word.replace("runs/comparison", str(tmp_path / "c")) for word in words])
        assert not caught.value.code
        assert "Against full fine-tuning" in capfd.readouterr().out
