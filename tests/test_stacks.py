"""The last `make stacks` tested the oldest and the newest versions that pyproject.toml admits."""

import json
import sys

import pytest
from conftest import ROOT
from packaging.version import Version

sys.path.insert(0, str(ROOT / "benchmarks"))
import stacks

TRIED = json.loads(stacks.RESULT.read_text(encoding="utf-8"))["stacks"]
FINE = {"passed": 9, "failed": 0, "skipped": 1, "recipe": True}


@pytest.mark.parametrize("requirement", stacks.requirements(), ids=lambda requirement: requirement.name)
def test_each_lower_bound_was_tested_and_the_newest_tested_version_is_admitted(requirement):
    (bound,) = (one.version for one in requirement.specifier if one.operator == ">=")
    oldest, newest = (Version(TRIED[stack]["versions"][requirement.name]) for stack in ("oldest", "newest"))
    assert Version(oldest.public) == Version(bound), "run: make stacks"  # public: without the build, as in 2.13.0+cpu
    assert requirement.specifier.contains(newest.public), "run: make stacks"


@pytest.mark.parametrize(
    ("oldest", "newest", "code"),
    [({}, {}, 0), ({"failed": 1}, {}, 1), ({}, {"failed": 1}, 1), ({}, {"recipe": False}, 1)],
)
def test_it_returns_1_if_a_test_or_the_recipe_failed_in_either(oldest, newest, code, monkeypatch, tmp_path, capsys):
    results = {"oldest": FINE | oldest, "newest": FINE | newest}
    monkeypatch.setattr(stacks, "install", lambda stack: tmp_path / stack)
    monkeypatch.setattr(stacks, "versions", lambda folder: TRIED[folder.name]["versions"])
    monkeypatch.setattr(stacks, "tried", lambda folder: results[folder.name])
    monkeypatch.setattr(stacks, "RESULT", tmp_path / "stacks.json")
    assert stacks.main() == code
    assert capsys.readouterr().out.count("torch") == 1
    written = json.loads((tmp_path / "stacks.json").read_text())["stacks"]
    assert {name: stack["failed"] for name, stack in written.items()} == {n: r["failed"] for n, r in results.items()}
