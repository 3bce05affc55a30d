"""Names and globs lead to rows, in file order and each once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from weightlift.errors import SelectionError
from weightlift.formats import describe
from weightlift.selection import select_rows
from weightlift.testing import TensorSpec, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from weightlift.description import Description

NAMES = ["a.0.weight", "a.1.weight", "a.10.weight", "b[0].bias", "B.weight", "naïve\n"]


@pytest.fixture
def description(tmp_path: Path) -> Description:
    specs = [TensorSpec(name, "U8", (3,)) for name in NAMES]
    return describe(write_checkpoint(tmp_path / "model.safetensors", specs, sort=False))


@pytest.mark.parametrize(
    ("patterns", "rows"),
    [
        (None, [0, 1, 2, 3, 4, 5]),
        ([], []),
        (["a.1.weight"], [1]),
        (["*.weight"], [0, 1, 2, 4]),
        (["a.?.weight"], [0, 1]),
        (["a.[1-9]*.weight"], [1, 2]),
        (["b[0].bias"], [3]),
        (["b*", "a.10.weight", "*10*"], [2, 3]),
        (["B*"], [4]),
        (["*\n"], [5]),
        (["*"], [0, 1, 2, 3, 4, 5]),
    ],
)
def test_rows(description: Description, patterns: Sequence[str] | None, rows: list[int]) -> None:
    assert list(select_rows(description, patterns)) == rows


@pytest.mark.parametrize("pattern", ["a.0.wieght", "c.*", "", "A.0.WEIGHT", "b[1].bias"])
def test_what_matches_nothing_is_an_error_that_names_neighbours(description: Description, pattern: str) -> None:
    with pytest.raises(SelectionError, match="among 6 tensors") as caught:
        select_rows(description, ["a.0.weight", pattern])
    assert pattern in caught.value.message
    assert "names look like" in caught.value.hint
    if pattern == "a.0.wieght":
        assert "a.0.weight" in caught.value.hint


def test_control_characters_do_not_reach_the_message(description: Description) -> None:
    with pytest.raises(SelectionError) as caught:
        select_rows(description, ["naïve\t"])
    assert "\n" not in caught.value.message
    assert "\t" not in caught.value.message
