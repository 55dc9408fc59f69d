"""What scripts share whose results are rows of predictions: `--show`, and the file of committed results."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def run(
    doc: str | None,
    results: Path,
    cases: Iterable[tuple],
    row: Callable[..., Row],
    show: Callable[[list[Row]], None],
    **head: Any,
) -> None:
    """Predicts `row(*case)` for each case, shows the rows and writes them after `head`; with `--show` it only shows the committed ones."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="print the committed results")
    if parser.parse_args().show:
        show(json.loads(results.read_text(encoding="utf-8"))["rows"])
        return
    from toolkit.files import atomic_write
    from toolkit.memory.environment import stack_versions

    found = [row(*case) for case in cases]
    show(found)
    atomic_write(results, json.dumps(head | {"stack": stack_versions(), "rows": found}, indent=1) + "\n")
