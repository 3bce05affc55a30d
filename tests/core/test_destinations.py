"""Globs of tensor names lead to devices: the first that fits counts, as the standard library matches them."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightlift.destinations import devices_of
from weightlift.errors import SelectionError
from weightlift.formats import describe
from weightlift.testing import TensorSpec, write_checkpoint

NAMES = st.text("ab.[]!*?-\n", min_size=1, max_size=4)
GLOBS = st.lists(st.sampled_from(["a", "b", "ab", ".", "*", "?", "[ab]", "[!a]", "[", "]"]), max_size=4).map("".join)


@settings(max_examples=300, deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=4, unique=True), st.lists(GLOBS, max_size=5, unique=True))
def test_the_first_glob_that_fits_counts(names: list[str], globs: list[str]) -> None:
    with TemporaryDirectory() as folder:
        specs = [TensorSpec(name, "U8", (1,)) for name in names]
        description = describe(write_checkpoint(Path(folder) / "model.safetensors", specs, sort=False))
    mapping = {glob: f"cuda:{number}" for number, glob in enumerate(globs)}
    fitting = [[glob for glob in globs if fnmatch.fnmatchcase(name, glob)] for name in description.names]
    rows = range(len(names))
    if all(fitting):
        assert devices_of(description, rows, mapping) == [mapping[first] for first, *_ in fitting]
    else:
        with pytest.raises(SelectionError, match=rf"none of the {len(globs)} globs matches it"):
            devices_of(description, rows, mapping)
