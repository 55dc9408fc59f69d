"""Writes toolkit/memory/error_distribution.json: how far measured GPU memory was from its prediction, in every committed run.

`--check` only compares.

    python benchmarks/error_distribution.py

Each figure is measured / predicted - 1 in percent, above zero where a run took more than predicted. It is of what runs out: of the
process where it was measured, otherwise of reserved memory, for the same batches. `toolkit/memory/risk.py` reads the file.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PATH = ROOT / "toolkit" / "memory" / "error_distribution.json"
WHAT = (
    "measured / predicted - 1 of what runs out on a GPU, in percent; written by python benchmarks/error_distribution.py"
)

Run = tuple[str, str, str, float, float]  # method, architecture, attention ("": not said), measured and predicted size


def kind(method: str, quantized: bool) -> str:
    """The method of a committed row as `toolkit.memory.risk` groups methods."""
    return "quantized" if quantized else "full" if method == "full" else "adapter"


def runs() -> Iterator[Run]:
    """Every committed run that was measured on a GPU and predicted."""
    from toolkit.memory.cuda.cards import find_card

    for row in _read("t4_accuracy.json")["rows"]:  # LoRA, as in fitcheck-llm
        method = kind("lora", row["quantization"] != "none")
        yield method, "Turing", row["attention"], row["measured_mib"]["process"], row["predicted_mib"]["process"]
    for row in _read("t4_session.json")["rows"]:  # NF4 only
        sizes = row["measured_mib"]["peak_reserved"], row["predicted_mib"]["peak_reserved"]
        yield "quantized", "Turing", row["attention"], *sizes
    for row in _read("third_party.json")["rows"]:
        method, figure = kind(row["method"], row["quantization"] != "none"), row["decides"]
        sizes = row["measured_bytes"][figure], row["predicted_bytes"][figure]
        yield method, find_card(row["card"]).architecture, "", *sizes
    for path in sorted((RESULTS / "gpu").glob("*.json")):
        result = _read(f"gpu/{path.name}")
        for row in result.get("rows", ()):
            if row["part"] == "memory" and "predicted" in row:
                sizes = row["peak"]["reserved_bytes"], row["predicted"]["peak"]["reserved_bytes"]
                method = kind(row["method"], row["method"] == "qlora")
                yield method, find_card(result["card"]["name"]).architecture, row["attention"], *sizes


def text() -> str:
    """The whole file: one line for each group, its errors in ascending order."""
    groups = defaultdict(list)
    for *group, measured, predicted in runs():
        groups[tuple(group)].append(round(100 * (measured / predicted - 1), 3))
    lines = [
        json.dumps({"group": [part for part in group if part], "excess_percent": sorted(found)})
        for group, found in sorted(groups.items())
    ]
    return json.dumps({"what": WHAT})[:-1] + ',\n "groups": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"


def main() -> int:
    """Writes the file. With `--check` it only says whether it differs from the results, and then returns 1."""
    sys.path.insert(0, str(ROOT))
    new = text()
    if "--check" not in sys.argv:
        PATH.write_text(new, encoding="utf-8")
    elif not PATH.exists() or PATH.read_text(encoding="utf-8") != new:
        print(f"{PATH.relative_to(ROOT)} differs from the results: run python benchmarks/error_distribution.py")
        return 1
    return 0


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
