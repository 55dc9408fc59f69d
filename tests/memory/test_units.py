"""Sizes become text in binary units, and are read back."""

import pytest

from toolkit.errors import UserError
from toolkit.units import GIB, MIB, format_bytes, parse_bytes


def test_sizes_are_shown_in_binary_units():
    assert format_bytes(1_320_702_444) == "1.23 GiB"
    assert format_bytes(12_897_485) == "12.3 MiB"
    assert format_bytes(1536) == "1.5 KiB"
    assert format_bytes(7) == "7 B"
    assert format_bytes(-3 * GIB) == "-3.00 GiB"
    assert format_bytes(3 * GIB, signed=True) == "+3.00 GiB"
    assert format_bytes(0, signed=True) == "0 B"


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("24GiB", 24 * GIB),
        ("24 gib", 24 * GIB),
        ("0.5GiB", 512 * MIB),
        ("24GB", 24 * 10**9),
        ("4096", 4096),
        ("24,000MB", 24 * 10**9),
        ("1TB", 10**12),
    ],
)
def test_sizes_are_read_with_or_without_a_unit(text, nbytes):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "24G", "-1GiB", "0", "24 potatoes", "1e3", "9" * 400, "2,4GiB"])
def test_a_text_that_is_no_size_is_refused_with_the_valid_forms(text):
    with pytest.raises(UserError, match="24GiB"):
        parse_bytes(text)
