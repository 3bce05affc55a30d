"""Options are judged where they are made, and the environment gives way to the caller."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from weightlift.errors import BudgetError, OptionError
from weightlift.manifest import Manifest
from weightlift.options import (
    CHUNK_BYTES_MAX,
    CHUNK_BYTES_MIN,
    ENVIRONMENT,
    SMALLEST_HOST_MEMORY_BYTES,
    WORKERS_MAX,
    LoadOptions,
)
from weightlift.recording import Recording
from weightlift.types import CachePolicy, EngineName, Framework, Method
from weightlift.units import MIB, PAGE_BYTES

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)


def test_the_defaults() -> None:
    options = LoadOptions()
    assert (options.method, options.cache, options.engine) == (Method.AUTO, CachePolicy.AUTO, EngineName.AUTO)
    assert (options.host_memory, options.device, options.names) == (128 * MIB, "cpu", None)
    assert (options.workers, options.chunk_bytes, options.dtype) == (None, None, None)
    with pytest.raises(AttributeError):
        options.device = "null"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("option", "value", "accepted"),
    [
        ("method", "fastest", "'buffered'"),
        ("cache", "", "'drop'"),
        ("staging", "gpu", "'pinned'"),
        ("engine", 3, "'native'"),
        ("framework", "jax", "'numpy'"),
        ("header", None, "'strict'"),
        ("workers", 0, "from 1"),
        ("workers", WORKERS_MAX + 1, "from 1"),
        ("workers", "many", ""),
        ("workers", True, "from 1"),
        ("chunk_bytes", 65_537, "multiple"),
        ("chunk_bytes", "4KiB", "multiple"),
        ("chunk_bytes", "1TiB", "multiple"),
        ("host_memory", "lots", "MiB"),
        ("names", [3], "names="),
        ("progress", 5, "function"),
        ("readonly", 1, ""),
        ("digest", "yes", ""),
        ("dequantize", 1, "dequantize=True"),
        ("watch_seconds", "soon", "0 (never)"),
        ("watch_seconds", -0.001, "0 (never)"),
        ("watch_seconds", 86_400.001, "86400 seconds"),
        ("watch_seconds", float("nan"), "0 (never)"),
        ("recording", "trace.json", "weightlift.Recording()"),
        ("verify", 5, "weightlift.Manifest"),
    ],
)
def test_a_value_that_is_not_possible_is_named_with_what_is(option: str, value: Any, accepted: str) -> None:
    with pytest.raises(OptionError, match=option) as caught:
        LoadOptions(**{option: value})
    assert accepted in caught.value.hint


def test_the_ends_of_a_range_are_possible() -> None:
    assert [LoadOptions(workers=workers).workers for workers in (1, WORKERS_MAX)] == [1, WORKERS_MAX]
    assert [LoadOptions(watch_seconds=seconds).watch_seconds for seconds in (0, 86_400)] == [0.0, 86_400.0]
    chunks = (CHUNK_BYTES_MIN, CHUNK_BYTES_MIN + PAGE_BYTES, CHUNK_BYTES_MAX)
    assert [LoadOptions(chunk_bytes=nbytes).chunk_bytes for nbytes in chunks] == list(chunks)
    for nbytes in (CHUNK_BYTES_MIN - PAGE_BYTES, CHUNK_BYTES_MAX + PAGE_BYTES):
        with pytest.raises(OptionError, match="chunk_bytes"):
            LoadOptions(chunk_bytes=nbytes)


def test_turning_blocks_into_numbers_takes_some_of_the_budget() -> None:
    assert LoadOptions(host_memory=20 * MIB).staging_memory == 20 * MIB
    assert LoadOptions(host_memory=20 * MIB, dequantize=True).staging_memory == 18 * MIB


def test_values_of_the_right_kind_are_kept_as_they_are(tmp_path: Path) -> None:
    recording = Recording()
    options = LoadOptions(recording=recording, verify=tmp_path / "manifest.json")
    assert options.recording is recording
    assert options.verify == tmp_path / "manifest.json"
    assert LoadOptions(verify="manifest.json").verify == "manifest.json"
    manifest = Manifest(files={}, tensors={})
    assert LoadOptions(verify=manifest).verify is manifest


def test_readonly_goes_with_mappings_only() -> None:
    assert LoadOptions(method="mmap", readonly=True).readonly  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="mmap"):
        LoadOptions(method="direct", readonly=True)  # type: ignore[arg-type]


def test_a_budget_under_the_smallest_says_what_would_work() -> None:
    with pytest.raises(BudgetError) as caught:
        LoadOptions(host_memory="7MiB")  # type: ignore[arg-type]
    assert caught.value.smallest_bytes == SMALLEST_HOST_MEMORY_BYTES
    assert LoadOptions(host_memory=caught.value.smallest_bytes).host_memory == 8 * MIB


def test_one_name_may_come_without_a_list() -> None:
    assert LoadOptions(names="layer.*").names == ("layer.*",)  # type: ignore[arg-type]
    assert LoadOptions(names=[]).names == ()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("variable", "text", "option", "value"),
    [
        ("WEIGHTLIFT_METHOD", "direct", "method", Method.DIRECT),
        ("WEIGHTLIFT_CACHE", "drop", "cache", CachePolicy.DROP),
        ("WEIGHTLIFT_HOST_MEMORY", "64MiB", "host_memory", 64 * MIB),
        ("WEIGHTLIFT_ENGINE", "python", "engine", EngineName.PYTHON),
        ("WEIGHTLIFT_WORKERS", "7", "workers", 7),
        ("WEIGHTLIFT_CHUNK", "1MiB", "chunk_bytes", MIB),
    ],
)
def test_the_environment_beats_defaults(
    monkeypatch: pytest.MonkeyPatch, variable: str, text: str, option: str, value: Any
) -> None:
    monkeypatch.setenv(variable, text)
    assert getattr(LoadOptions(), option) == value
    monkeypatch.setenv(variable, "")
    assert getattr(LoadOptions(), option) != value
    monkeypatch.setenv(variable, "nonsense")
    with pytest.raises(OptionError, match="nonsense"):
        LoadOptions()


def test_the_caller_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTLIFT_METHOD", "direct")
    monkeypatch.setenv("WEIGHTLIFT_WORKERS", "7")
    options = LoadOptions(method="buffered", workers=2, framework="numpy")  # type: ignore[arg-type]
    assert (options.method, options.workers, options.framework) == (Method.BUFFERED, 2, Framework.NUMPY)
