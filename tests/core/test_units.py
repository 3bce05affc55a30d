"""Sizes are parsed, printed and rounded exactly."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightlift.errors import OptionError
from weightlift.units import align_down, align_up, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (0, 0),
        (134217728, 134217728),
        ("17", 17),
        ("17 B", 17),
        ("128MiB", 128 << 20),
        ("128m", 128 << 20),
        (" 2 GB ", 2_000_000_000),
        ("1.5 GiB", 3 << 29),
        ("0.5k", 512),
        ("3TiB", 3 << 40),
        ("1tb", 10**12),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_sizes_are_parsed(text: int | str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text", ["", "MiB", "-1", -2, "1 MB B", "1e6", "1,5GB", "12 XB", "nan", True, None, 1.5, "1_0"]
)
def test_what_is_no_size_is_refused_with_an_example(text: Any) -> None:
    with pytest.raises(OptionError, match="host_memory") as caught:
        parse_bytes(text, option="host_memory")
    assert "MiB" in caught.value.hint


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (10 * 1024, "10.0 KiB"),
        (1023 * 1024, "1.00 MiB"),
        (128 << 20, "128 MiB"),
        (5 << 30, "5.00 GiB"),
        (3 << 40, "3.00 TiB"),
        (2 << 50, "2048 TiB"),
        (-2048, "-2.00 KiB"),
    ],
)
def test_sizes_are_printed_with_three_digits(count: int, text: str) -> None:
    assert format_bytes(count) == text


@given(st.integers(0, 1 << 50))
def test_what_is_printed_parses_to_nearly_the_same(count: int) -> None:
    assert abs(parse_bytes(format_bytes(count)) - count) <= count * 0.006


@given(st.integers(0, 1 << 60), st.integers(1, 1 << 21))
def test_rounding_brackets_a_number(value: int, alignment: int) -> None:
    low, high = align_down(value, alignment), align_up(value, alignment)
    assert low % alignment == 0 == high % alignment
    assert low <= value <= high
    assert high - low == (0 if value % alignment == 0 else alignment)
