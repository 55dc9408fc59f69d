"""The built package: recipes and launch files are inside it, so that `pip install` is enough."""

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

from toolkit.distributed.folders import find_launch_file, find_recipe, shipped
from toolkit.runs.launching import launch_command

SHORT = ["--max_train_samples", "32", "--max_eval_samples", "2", "--max_steps", "2", "--use_cpu"]
SHORT += ["--save_strategy", "no"]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder into which the wheel of this project was unpacked; nothing else of the repository is there."""
    folder = tmp_path_factory.mktemp("package")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        copy = folder / "source" / name
        if not name.startswith(("tests/", "benchmarks/")) and (ROOT / name).is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), "."]
    done = subprocess.run(build, cwd=folder / "source", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def footprint(site: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`footprint WORDS` of the unpacked package, in another folder."""
    code = "from toolkit.cli import main; main()"
    env = os.environ | {"PYTHONPATH": str(site)}
    return subprocess.run(
        [sys.executable, "-c", code, *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=600, check=False
    )


def test_the_package_lists_every_folder_of_the_code():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    found = {str(file.parent.relative_to(ROOT)).replace("/", ".") for file in (ROOT / "toolkit").rglob("__init__.py")}
    assert {*project["packages"]} == found | {"toolkit.recipes", "toolkit.launch", "toolkit.launch.deepspeed"}


@pytest.mark.slow
def test_the_package_has_every_recipe_launch_file_and_table(site):
    for folder, pattern in (("recipes", "*.py"), ("launch", "*.yaml"), ("launch/deepspeed", "*.json")):
        there = {path.name for path in (ROOT / folder).glob(pattern)}
        assert there and there == {path.name for path in (site / "toolkit" / folder).glob(pattern)}
    tables = {
        path.relative_to(ROOT) for end in ("json", "yaml", "jinja") for path in (ROOT / "toolkit").rglob(f"*.{end}")
    }
    assert all((site / table).is_file() for table in tables)


@pytest.mark.slow
def test_an_installed_package_trains_in_this_process(site, tmp_path):
    done = footprint(site, tmp_path, "train", "lora", *SHORT, "--output_dir", "run")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["finished"]
    assert done.stdout.startswith("  footprint  lora: loading PyTorch and transformers\n")
    assert footprint(site, tmp_path, "train", "lora", "--lora_r", "0").returncode == 2


@pytest.mark.slow
def test_an_installed_package_starts_the_launcher_with_its_own_files(site, tmp_path):
    launch = ["--launch", "ddp", "--num_processes", "2"]
    done = footprint(site, tmp_path, "train", "lora", *launch, *SHORT, "--output_dir", "run")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["processes"] == 2 and record["command"].startswith("footprint train lora --launch ddp --num_proc")
    assert f"starting accelerate launch --config_file {site}/toolkit/launch/ddp.yaml" in done.stdout
    # the recipe refuses it on both ranks, late; the launcher's exit code is passed on
    done = footprint(site, tmp_path, "train", "lora", *launch, *SHORT, "--output_dir", "run")
    assert done.returncode != 0 and "--output_dir run is not empty" in done.stderr


@pytest.mark.slow
def test_a_printed_recipe_runs(site, tmp_path):
    (tmp_path / "mine.py").write_text(footprint(site, tmp_path, "recipe", "lora").stdout)
    env = os.environ | {"PYTHONPATH": str(site)}
    words = [sys.executable, "mine.py", *SHORT, "--output_dir", "run"]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "launch").glob("*.yaml")))
def test_deepspeeds_settings_are_found_from_every_folder(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = launch_command(find_recipe("lora"), find_launch_file(name), ["--lora_r", "4"], 2)
    assert words[-3:] == [str(ROOT / "recipes" / "lora.py"), "--lora_r", "4"]
    named = re.search(r"deepspeed_config_file: launch/(.*)", (ROOT / "launch" / f"{name}.yaml").read_text())
    assert ("--deepspeed_config_file" in words) is bool(named)
    if named:
        assert Path(words[words.index("--deepspeed_config_file") + 1]) == shipped("launch") / named[1]
