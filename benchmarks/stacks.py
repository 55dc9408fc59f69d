"""Runs the fast tests and one recipe with the oldest and the newest versions that pyproject.toml admits.

    python benchmarks/stacks.py

uv reads the versions from pyproject.toml and installs them in .venv-oldest and .venv-newest. uv's environment variables work:
UV_TORCH_BACKEND=cpu takes PyTorch's small CPU build, auto the build for this machine's GPU.
"""

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import distributions
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
RESULT = Path(__file__).parent / "results" / "stacks.json"
RESOLUTIONS = {"oldest": "lowest-direct", "newest": "highest"}  # uv's names
# test_stacks.py is left out: it compares the last result with pyproject.toml.
TESTS = ("pytest", "-q", "-n", "2", "--dist", "worksteal", "-m", "not slow", "--ignore", "tests/test_stacks.py")
RECIPE = ("accelerate.commands.launch", "--config_file", "launch/single.yaml", "recipes/lora.py", "--max_steps", "20")


def requirements() -> list[Requirement]:
    """The requirements in pyproject.toml for this platform."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = map(Requirement, project["dependencies"])
    return [one for one in found if one.marker is None or one.marker.evaluate()]


def install(stack: str) -> Path:
    """Makes or updates the environment of `stack` from pyproject.toml, and returns its folder."""
    folder = ROOT / f".venv-{stack}"
    pinned, python = folder / "requirements.txt", folder / "bin" / "python"
    if not python.exists():
        _uv("venv", "--python", sys.executable, folder)
    options = ("--extra", "test", "--resolution", RESOLUTIONS[stack], "--python", python, "--upgrade")
    _uv("pip", "compile", "pyproject.toml", *options, "--no-header", "--output-file", pinned)
    # Packages that are built here, such as DeepSpeed, must be built with the same versions.
    _uv("pip", "sync", pinned, "--build-constraints", pinned, "--python", python)
    _uv("pip", "install", "--no-deps", "--editable", ".", "--python", python)
    return folder


def _uv(*words: Any) -> None:
    subprocess.run([sys.executable, "-m", "uv", "--quiet", *map(str, words)], cwd=ROOT, check=True)


def versions(folder: Path) -> dict[str, str]:
    """The installed version of each requirement, by its name in pyproject.toml."""
    (packages,) = folder.glob("lib/python*/site-packages")
    there = {canonicalize_name(one.name): one.version for one in distributions(path=[str(packages)])}
    return {one.name: there[canonicalize_name(one.name)] for one in requirements()}


def tried(folder: Path) -> dict[str, Any]:
    """How many fast tests passed and failed in an environment, and whether the recipe finished and wrote its answers."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as temporary:
        report, output = Path(temporary) / "report.xml", Path(temporary) / "run"
        python = (folder / "bin" / "python", "-m")
        subprocess.run([*python, *TESTS, f"--junitxml={report}"], cwd=ROOT, env=env, check=False)
        suite = ElementTree.parse(report).getroot()[0].attrib
        failed, skipped = int(suite["failures"]) + int(suite["errors"]), int(suite["skipped"])
        ended = subprocess.run([*python, *RECIPE, "--output_dir", output], cwd=ROOT, env=env, check=False)
        scored = ended.returncode == 0 and (output / "completions.csv").is_file()
    return {"passed": int(suite["tests"]) - failed - skipped, "failed": failed, "skipped": skipped, "recipe": scored}


def show(stacks: dict[str, dict[str, Any]]) -> None:
    """Prints a column for each stack: its versions, then its results."""
    table = Table(title="Versions that pyproject.toml admits")
    table.add_column("")
    for name in stacks:
        table.add_column(name)
    for name in ("python", *(one.name for one in requirements())):
        table.add_row(name, *({"python": stack["python"], **stack["versions"]}[name] for stack in stacks.values()))
    table.add_section()
    for name in ("passed", "failed", "skipped"):
        table.add_row(f"fast tests {name}", *(str(stack[name]) for stack in stacks.values()))
    table.add_row("recipes/lora.py", *("ran" if stack["recipe"] else "failed" for stack in stacks.values()))
    Console().print(table)


def main() -> int:
    stacks = {}
    for name in RESOLUTIONS:
        folder = install(name)
        stacks[name] = {"python": platform.python_version(), "versions": versions(folder), **tried(folder)}
    show(stacks)
    result = {"date": str(datetime.date.today()), "command": "make stacks", "stacks": stacks}
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(any(stack["failed"] or not stack["recipe"] for stack in stacks.values()))


if __name__ == "__main__":
    sys.exit(main())
