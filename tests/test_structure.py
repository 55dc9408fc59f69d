"""The structure that toolkit/README.md draws: imports point down, no circle, and few enough arrows to keep in mind."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

ARROWS = 100  # the number of pairs of rooms in which one imports the other stays below


def name_of(file: Path) -> str:
    """`toolkit.runs.merge` for toolkit/runs/merge.py, `toolkit.runs` for its `__init__.py`."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {
    name_of(file): file
    for folder in ("toolkit", "recipes", "benchmarks")
    for file in (ROOT / folder).rglob("*.py")
    if "results" not in file.parts
}


def imported(file: Path) -> Iterator[str]:
    """The modules of ours that `file` imports, wherever in the file it does."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                if below in FILES or node.module in FILES:
                    yield below if below in FILES else node.module


IMPORTS = {name: set(imported(file)) - {name} for name, file in FILES.items()}


def room(module: str) -> str:
    """What a picture of the structure has a box for: a package or a file directly in toolkit/; recipes; benchmarks."""
    first, *rest = module.split(".")
    return rest[0] if first == "toolkit" and rest else first


ROOMS = {(room(one), room(other)) for one, others in IMPORTS.items() for other in others if room(one) != room(other)}


def test_no_module_imports_itself_by_way_of_others():
    tuple(TopologicalSorter(IMPORTS).static_order())  # raises CycleError, which names the circle
    graph: dict[str, set[str]] = {}
    for one, other in ROOMS:
        graph.setdefault(one, set()).add(other)
    tuple(TopologicalSorter(graph).static_order())


def test_the_arrows_between_rooms_stay_few():
    assert len(ROOMS) < ARROWS, sorted(ROOMS)


def test_imports_point_down_in_the_drawing_of_the_readme():
    text = (ROOT / "toolkit" / "README.md").read_text(encoding="utf-8")
    drawing = re.search(r"Imports point down:\n\n```\n(.*?)```", text, re.DOTALL)[1]
    floors = {name: number for number, line in enumerate(drawing.splitlines()) for name in line.split(", ")}
    assert floors.keys() == {room(name) for name in FILES} - {"toolkit", "benchmarks"}
    upward = {(one, other) for one, other in ROOMS if one in floors and floors[one] >= floors.get(other, -1)}
    assert not {(one, other) for one, other in upward if other in floors}, upward


@pytest.mark.parametrize("below", ["methods", "tasks", "runs", "training", "config", "data", "models"])
def test_memory_knows_nothing_of_what_is_trained(below):
    assert ("memory", below) not in ROOMS
