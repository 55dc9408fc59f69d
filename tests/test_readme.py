"""README: its commands run, and its figures are those of the committed results."""

import itertools
import json
import re
import shlex
from pathlib import Path

import pytest
from comparison_folder import write_in_context, write_run
from conftest import ROOT, recipe, run, write_csv

from toolkit.cli import main
from toolkit.distributed.launch_files import read_launch_file

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("#")[0].strip() if line.startswith("make") else line
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.strip().splitlines()
]
SHORT = ["--max_steps", "2", "--max_train_samples", "8", "--max_eval_samples", "2", "--max_length", "64"]
SHORT += ["--max_target_length", "8", "--per_device_train_batch_size", "2"]


def test_the_generated_parts_are_what_the_committed_results_say():
    assert run("python", "benchmarks/readme.py", "--check").returncode == 0, (
        "run: make results (or benchmarks/readme.py)"
    )


def test_every_command_is_covered_here():
    assert COMMANDS[:2] == ["make demo", "make test"]
    assert [command.split()[0] for command in COMMANDS[2:]] == ["accelerate"] * 3 + ["footprint"] * 8


def test_the_file_tree_names_what_is_there():
    tree = README.split("## The house")[1]
    for path in [*(ROOT / "toolkit").glob("*.py"), *(p for p in (ROOT / "toolkit").iterdir() if p.is_dir())]:
        if not path.name.startswith("__"):
            assert path.name in tree, f"README's file tree lacks {path.name}"


@pytest.mark.slow
def test_make_setup_installs_nothing_a_second_time():
    import subprocess

    if not (ROOT / ".venv" / ".footprint").exists():
        pytest.skip("the environment was not made by make")
    done = subprocess.run(["make", "--dry-run", "setup"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "pip install" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 3, 4])
def test_each_training_command_runs_with_local_stand_ins_for_the_hub(number, data, tiny_t5, tmp_path):
    """Hub ids become folders here, everything else is what README says; two steps, on a few rows."""
    rows = [(f"Person {n} saw a cat.", f"Cat {n}.") for n in range(8)]
    renamed = write_csv(tmp_path / "articles", train=rows, validation=rows, test=rows)
    for file in renamed.iterdir():
        file.write_text(file.read_text().replace("dialogue,summary", "article,highlights"))
    stand_ins = {
        "google/flan-t5-base": [str(tiny_t5), "--random_weights"],
        "gpt2": [str(data / "models" / "stories260k")],
        "knkarthick/dialogsum": [str(data / "dialogsum")],
        "path/to/folder": [str(renamed)],
    }
    words = [word for part in shlex.split(COMMANDS[number]) for word in stand_ins.get(part, [part])]
    extra = ["--use_cpu"] if "ddp" in COMMANDS[number] else []
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
def test_predict_and_report_run_as_they_stand(capfd, tmp_path):
    for command in COMMANDS[5:7]:
        words = shlex.split(command)
        if words[1] == "report":
            assert words[2:] == ["runs/RUN_A", "runs/RUN_B"]
            words[2:] = [str(tmp_path / "RUN_A"), str(tmp_path / "RUN_B")]
        else:
            words.append("--json")
        with pytest.raises(SystemExit) as caught:
            main(words[1:])
        shown = capfd.readouterr().out
        assert not caught.value.code, shown
        if words[1] == "predict":
            assert json.loads(shown)["fits"]
            for name in ("RUN_A", "RUN_B"):
                (tmp_path / name).mkdir()
                (tmp_path / name / "memory.json").write_text(shown)
        else:
            assert "RUN_A" in shown and "RUN_B" in shown


@pytest.mark.slow
def test_make_demo_trains_and_its_result_generates(tmp_path):
    """What `make demo` launches; make's own part is the test above."""
    recipe = ("accelerate", "launch", "--config_file", "launch/single.yaml", "recipes/lora.py")
    assert " ".join(recipe) in (ROOT / "Makefile").read_text()
    done = run(*recipe, "--output_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    base, tuned = (float(re.search(rf"│ {who} +│ +([\d.]+)", done.stdout)[1]) for who in ("base", "tuned"))
    assert tuned > base + 0.1
    (tmp_path / "typed").write_text("#Person1#: Is it raining?\n")
    for number in (8, 9, 10):
        words = shlex.split(
            COMMANDS[number].replace("RUN_DIR", str(tmp_path / "run")).replace("RUN_B", str(tmp_path / "run"))
        )
        with (tmp_path / "typed").open() as typed:
            written = run(*words, stdin=typed)
        assert written.returncode == 0 and written.stdout.strip(), written.stderr
    assert (tmp_path / "run-merged" / "model.safetensors").exists()


def test_the_prediction_of_several_gpus_is_one_that_the_committed_table_holds():
    """It takes minutes, so here it is read, and its result is the one that was committed."""
    words = shlex.split(COMMANDS[7])
    given = dict(itertools.pairwise(words))
    launch = read_launch_file(given["--launch"], int(given["--num_processes"]))
    assert (words[:3], str(launch.engine)) == (["footprint", "predict", "full"], "ZeRO-3 on 4 processes")
    rows = json.loads((ROOT / "benchmarks" / "results" / "distributed_fits.json").read_text())["rows"]
    wanted = (given["--model_name_or_path"], "full", "zero3", 4)
    assert [row["fits"] for row in rows if (row["model"], row["method"], row["launch"], row["cards"]) == wanted] == [
        True
    ]


def test_the_compare_commands_plan_every_run_and_show_what_is_there(monkeypatch, tmp_path, capfd):
    """The runs themselves are tested in test_compare.py; here what they leave is written in their stead."""

    def leave_results(plan):
        assert len(plan.runs) == 12
        for one in plan.runs:
            if one.method == "in_context":
                write_in_context(one.folder)
            else:
                write_run(one.folder, one.method, one.seed, rows=60)

    monkeypatch.setattr("toolkit.compare.command.run_all", leave_results)
    for number in (11, 12):
        with pytest.raises(SystemExit) as caught:
            main([word.replace("runs/comparison", str(tmp_path / "c")) for word in shlex.split(COMMANDS[number])[1:]])
        assert not caught.value.code
        assert "Against full fine-tuning" in capfd.readouterr().out
