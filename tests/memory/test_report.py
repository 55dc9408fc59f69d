"""The report shows the figures of ledgers."""

import io
import re
from dataclasses import replace

from rich.console import Console

from toolkit.memory.ledger import CATEGORIES, Ledger, PhaseUse
from toolkit.memory.report import (
    GROUPS,
    bar,
    differences,
    format_error,
    grouped,
    print_comparison,
    print_ledger,
    print_side_by_side,
)
from toolkit.units import GIB


def ledger(weights: int, gradients: int, source: str = "predicted") -> Ledger:
    cells = {"parameters_trainable": {"": weights}, "gradients": {"": gradients}}
    uses = {"load": PhaseUse(weights, weights, {"parameters_trainable": {"": weights}})}
    uses["backward"] = PhaseUse(weights + gradients, weights + gradients, cells)
    return Ledger(source, "cpu", uses, {}, weights + gradients, {"trainable": 1, "all": 1})


def text_of(render, *args) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    render(console, *args)
    return console.export_text()


def test_every_category_is_in_exactly_one_group():
    assert sorted(c for _, parts in GROUPS.values() for c in parts) == sorted(CATEGORIES)


def test_a_ledger_is_shown_with_its_peak_and_its_phases():
    text = text_of(print_ledger, ledger(2 * GIB, GIB))
    assert "peak 3.00 GiB allocated, in the backward" in text
    assert "parameters: trainable" in text
    assert "1.00 GiB" in text


def test_a_comparison_of_predicted_and_measured_shows_the_error():
    text = text_of(print_comparison, ledger(2 * GIB, GIB), ledger(2 * GIB, 2 * GIB, "measured"))
    assert "-25.00 %" in text
    assert "exact" in text
    assert format_error(1, 0) == "not measured"
    assert format_error(44, 40) == "+4 B" and format_error(2_000_000, 2_000_900) == "-900 B"
    assert "offloaded" not in text
    on_disk = [replace(ledger(1, 1), host_bytes=5 * GIB, nvme_bytes=7 * GIB) for _ in range(2)]
    text = text_of(print_comparison, *on_disk)
    assert re.search(r"offloaded to the host +│ +5.00 GiB .* exact", text)
    assert re.search(r"offloaded to the disk +│ +7.00 GiB .* exact", text)


def test_ledgers_side_by_side_explain_their_differences():
    full, lora = ledger(2 * GIB, 2 * GIB), ledger(2 * GIB, GIB // 4)
    assert differences([("full", full), ("lora", lora)]) == ["lora against full: -1.75 GiB (gradients -1.75 GiB)"]
    assert "lora against full" in text_of(print_side_by_side, [("full", full), ("lora", lora)])


def test_the_length_of_a_bar_is_proportional_to_its_bytes():
    groups = grouped(ledger(3 * GIB, GIB).categories_at_peak)
    assert len(bar(groups, 4 * GIB, width=40)) == 40
    assert len(bar(groups, 8 * GIB, width=40)) == 20


def test_a_budget_that_is_exceeded_is_reported():
    one = replace(ledger(GIB, GIB), budget_bytes=GIB)
    assert " of 1.00 GiB" in text_of(print_ledger, one)
