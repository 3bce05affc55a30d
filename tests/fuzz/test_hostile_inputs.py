"""Every kept, listed and generated hostile input is refused with a typed error, or read as the reference parser does.

What has to hold of an answer is asserted by the targets themselves, see ``fuzz_targets.py``; ``make fuzz`` tries them
with inputs without number.
"""

from __future__ import annotations

import gc
import os
import tracemalloc
from functools import cache
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("safetensors", reason="the reference parser is not installed")
pytest.importorskip("numpy", reason="the reference parser opens files with numpy")

import fuzz_seeds
import fuzz_targets

from weightlift.formats import describe

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fuzz_targets import Target

GENERATED = 150
SEED = 20261124
HOSTILE_MIN = 500
CORPUS_BYTES_MAX = 300_000
FIXED_BYTES = 16 << 20

TARGETS = [
    pytest.param(target, id=target.name, marks=pytest.mark.native if target.name == "values" else ())
    for target in fuzz_targets.TARGETS.values()
]
RULED = [target for target in fuzz_targets.TARGETS.values() if fuzz_seeds.rule_files(target.name)]


@cache
def inputs(name: str) -> tuple[bytes, ...]:
    """All inputs of a target that this suite tries, each once."""
    found = [*fuzz_seeds.kept(name), *fuzz_seeds.rule_files(name), *fuzz_seeds.seeds(name)]
    return tuple(dict.fromkeys([*found, *fuzz_seeds.generated(name, GENERATED, SEED)]))


@pytest.mark.parametrize("target", TARGETS)
def test_answers_hold_and_memory_stays_in_bounds(target: Target, tmp_path: Path) -> None:
    target.examine(b"", tmp_path)
    # What earlier tests left may hold descriptors until it is collected.
    gc.collect()
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    tracemalloc.start()
    try:
        for content in inputs(target.name):
            tracemalloc.reset_peak()
            start = tracemalloc.get_traced_memory()[0]
            target.examine(content, tmp_path)
            growth = tracemalloc.get_traced_memory()[1] - start
            assert growth < FIXED_BYTES + 32 * len(content), f"{growth:,} bytes for {content[:200]!r}"
    finally:
        tracemalloc.stop()
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after == before, "a descriptor was left open"


@pytest.mark.parametrize("target", RULED, ids=lambda target: target.name)
def test_what_breaks_a_rule_is_refused(target: Target, tmp_path: Path) -> None:
    for content in fuzz_seeds.rule_files(target.name):
        assert target.examine(content, tmp_path) is not None, content[:200]


def test_hostile_inputs_are_many(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    counts = {}
    for target in fuzz_targets.TARGETS.values():
        if target.is_refusing and target.name != "values":
            refused = [content for content in inputs(target.name) if target.examine(content, tmp_path) is not None]
            counts[target.name] = len(set(refused))
            record_property(f"hostile inputs: {target.name}", counts[target.name])
    assert sum(counts.values()) >= HOSTILE_MIN
    assert min(counts.values()) >= HOSTILE_MIN // 20


@pytest.mark.parametrize("key", [b"l", b"l" * 50_000], ids=["many names", "long names"])
def test_names_of_shared_values_stay_in_bounds(tmp_path: Path, key: bytes) -> None:
    """Dictionaries each of which holds the one before twice: few bytes of pickle, 2^22 names."""
    text = b"X" + len(key).to_bytes(4, "little") + key
    levels = (b"}(h\xffh%ch\xfeh%cuq%c" % (level, level, level + 1) for level in range(22))
    pickled = b"\x80\x02%bq\xffX\1\0\0\0rq\xfe}(h\xffNuq\0%b." % (text, b"".join(levels))
    tracemalloc.start()
    try:
        error = fuzz_targets.examine_pickle(pickled, tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "counting each place" in str(error) or "names take more than" in str(error)
    assert peak < 48 << 20


def test_the_kept_corpus_is_small_and_for_known_targets() -> None:
    names = {path.name for path in fuzz_seeds.CORPUS.iterdir()}
    assert names == set(fuzz_targets.TARGETS)
    sizes = [path.stat().st_size for path in fuzz_seeds.CORPUS.rglob("*") if path.is_file()]
    assert sum(sizes) < CORPUS_BYTES_MAX


def test_an_oracle_that_sees_a_wrong_answer_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The targets can fail: here weightlift accepts whatever the reference parser refuses, and the other way round."""
    good, bad = fuzz_seeds.good_files("safetensors")[0], fuzz_seeds.rule_files("safetensors")[40]
    path = tmp_path / "good.safetensors"
    path.write_bytes(good)
    description = describe(path)
    with monkeypatch.context() as patch:
        patch.setattr(fuzz_targets, "describe", lambda *_, **__: description)
        with pytest.raises(AssertionError, match="reference: None"):
            fuzz_targets.examine_safetensors(bad, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(fuzz_targets, "describe", lambda *_, **__: eval("1 + 1"))  # noqa: S307 - to be noticed
        with pytest.raises(AssertionError, match="did"):
            fuzz_targets.examine_pytorch(good, tmp_path)
