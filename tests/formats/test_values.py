"""The compiled way past ignored values stops where the other one stops; repeated under sanitizers."""

from __future__ import annotations

import _ctypes
import random
from typing import TYPE_CHECKING

import pytest

from weightlift.engines.native import library_path
from weightlift.errors import HeaderError
from weightlift.formats import compiled
from weightlift.formats.compiled import Values
from weightlift.formats.header_text import HeaderText

if TYPE_CHECKING:
    from pathlib import Path

PIECES = [
    *(
        "[",
        "]",
        "{",
        "}",
        ",",
        ":",
        " ",
        "\n",
        '"',
        "\\",
        '"a"',
        '"a":',
        '"dtype":',
        '"shape":1,',
        '"x":1,',
        "1",
        "-",
        ".",
    ),
    *("0", "e", "E+", "1e308", "1e309", "18446744073709551615", "9" * 400, "null", "true", "false", "nul", "\x1f", "é"),
    *(r'"\ud83d\ude00"', r'"\ud83d"', r'"\udc00"', r"\u00", r'"\n"', r'"\x"', "[[", "]]", '{"":', "\0", "0.1e-5"),
]


@pytest.fixture(scope="module")
def values() -> Values:
    """The library that is under test, which a sanitizer may have been built into."""
    return Values(library_path())


def random_text(rng: random.Random) -> bytes:
    kind = rng.random()
    if kind < 0.2:
        return rng.choice(["[", '{"":', "[1,", '{"a":{},"b":']).encode() * rng.randrange(140)
    return "".join(rng.choice(PIECES) for _ in range(rng.randrange(12))).encode()


@pytest.mark.native
@pytest.mark.parametrize("seed", range(8))
def test_both_ways_agree_on_any_text(values: Values, seed: int) -> None:
    rng = random.Random(seed)
    refused = 0
    for _ in range(3000):
        text, depth = random_text(rng), rng.choice([0, 2, 2, 120, 126, 127])
        here = HeaderText(text, "x")
        end, reason = values.skip_value(text, 0, depth)
        assert end <= len(text)
        try:
            here.skip_value_here(depth)
        except HeaderError:
            assert reason, text
            refused += 1
        else:
            assert (end, reason) == (here.position, 0), text
    assert 100 < refused < 2900


@pytest.mark.native
@pytest.mark.parametrize("seed", range(4))
def test_unknown_members_end_at_a_member(values: Values, seed: int) -> None:
    rng = random.Random(seed)
    passed = 0
    for _ in range(3000):
        start = rng.choice(["", '"x":1,', '"x":[{}] , "y":"\\u0064",', '"dtype":1,', r'"\u0064type":1,'])
        text = start.encode() + random_text(rng)
        end = values.skip_unknown(text, 0, 2)
        assert end <= len(text)
        head = text[:end]
        assert not head or head.endswith(b",")
        assert b"dtype" not in head
        assert b"0064type" not in head
        passed += bool(head)
    assert passed


def test_a_library_that_is_not_there_is_done_without(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nothing"):
        Values(tmp_path / "nothing.so")
    assert compiled.library() is None or isinstance(compiled.library(), Values)


def test_a_library_without_the_functions_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look = compiled.library.__wrapped__
    monkeypatch.setattr(compiled, "__file__", str(tmp_path / "formats" / "compiled.py"))
    assert look() is None
    (tmp_path / "engines").mkdir()
    for suffix in ("so", "dylib"):
        (tmp_path / "engines" / f"libweightlift_engine.{suffix}").symlink_to(_ctypes.__file__)
    assert look() is None


@pytest.mark.native
def test_the_library_beside_the_engine_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / f"libweightlift_engine{library_path().suffix}").symlink_to(library_path())
    monkeypatch.setattr(compiled, "__file__", str(tmp_path / "formats" / "compiled.py"))
    found = compiled.library.__wrapped__()
    assert found is not None
    assert found.skip_value(b"[1] ", 0, 0) == (3, 0)
