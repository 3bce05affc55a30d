"""Reports say in a sentence why a file was read the way it was."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from weightlift.host.residency import Residency, ResidencyMap, ResidencyRun
from weightlift.operations import Counters, ShardUse
from weightlift.plan import ShardFacts
from weightlift.summary import bottleneck, file_reason, used_by_method
from weightlift.types import Method
from weightlift.units import MIB

SIZE = 100 * MIB


def facts(cached: int | None, *, direct: bool = True) -> ShardFacts:
    if cached is None:
        residency = None
    else:
        runs = [ResidencyRun(0, cached, Residency.RESIDENT), ResidencyRun(cached, SIZE - cached, Residency.ABSENT)]
        residency = ResidencyMap(MIB, SIZE, cached, tuple(run for run in runs if run.length))
    return ShardFacts("shard", SIZE, direct, "tmpfs takes none", True, residency)


def use(direct: int = 0, buffered: int = 0, mapped: int = 0, refused: int = 0, number: int = 0) -> ShardUse:
    return ShardUse(direct, buffered, mapped, refused, number)


@pytest.mark.parametrize(
    ("method", "known", "used", "keep", "words"),
    [
        (Method.DIRECT, facts(0), use(SIZE), False, ["method=direct was asked for"]),
        (Method.DIRECT, facts(0, direct=False), use(0, SIZE), False, ["page cache", "tmpfs takes none"]),
        (Method.DIRECT, facts(0), use(5, 1234567, 0, 1234567, errno.EINVAL), False, ["refused", "EINVAL", "1,234,567"]),
        (Method.AUTO, facts(0), use(5, 7, 0, 7), False, ["refused", "short read", "7 bytes"]),
        (Method.AUTO, facts(50 * MIB), use(50, 50), False, ["50% of the file", "rest was read directly"]),
        (Method.AUTO, facts(0), use(SIZE), False, ["was not in the page cache", "read directly"]),
        (Method.AUTO, facts(None), use(SIZE), False, ["unknown", "read directly"]),
        (Method.AUTO, facts(SIZE), use(0, SIZE), True, ["already"]),
        (Method.AUTO, facts(25 * MIB), use(0, SIZE), True, ["25% of the file", "stays for the next load"]),
        (Method.AUTO, facts(0), use(0, SIZE), True, ["read through the page cache, where it stays"]),
        (Method.AUTO, facts(0), use(MIB, SIZE), True, ["stays for the next load", "except 1.00 MiB read directly"]),
        (Method.AUTO, facts(0), use(SIZE), True, ["read directly to compare", "stays for the next load"]),
        (Method.AUTO, facts(None, direct=False), use(0, SIZE), False, ["without leaving", "tmpfs takes none"]),
        (Method.MMAP, facts(None), use(0, 0, SIZE), False, ["method=mmap was asked for"]),
    ],
)
def test_the_reason_fits_what_happened(
    method: Method, known: ShardFacts, used: ShardUse, keep: bool, words: list[str]
) -> None:
    reason = file_reason(method, known, used, keep=keep)
    for word in words:
        assert word in reason


def test_bytes_by_method() -> None:
    assert used_by_method(use(1, 2, 3)) == {"direct": 1, "buffered": 2, "mmap": 3}


@pytest.mark.parametrize(
    ("times", "name"),
    [
        ({}, "none"),
        ({"storage_seconds": 5.0, "copy_seconds": 1.0}, "storage"),
        ({"cache_seconds": 5.0}, "memory copy"),
        (
            {"storage_seconds": 2.0, "cache_seconds": 1.0, "populate_seconds": 1.0, "copy_seconds": 0.5},
            "memory copy",
        ),
        ({"slot_wait_seconds": 3.0, "storage_seconds": 2.0}, "processor"),
        ({"device_seconds": 1.0, "storage_seconds": 4.0}, "link"),
        ({"device_seconds": 1.0, "storage_seconds": 19.0}, "storage"),
    ],
)
def test_the_bottleneck_is_where_the_time_went(times: dict[str, Any], name: str) -> None:
    counters = Counters(**dict.fromkeys(Counters._fields, 0))._replace(**times)
    assert bottleneck(counters) == name


def test_slots_that_a_framework_copies_from_wait_for_the_link() -> None:
    counters = Counters(**dict.fromkeys(Counters._fields, 0))._replace(storage_seconds=1.0, slot_wait_seconds=2.0)
    assert bottleneck(counters, handed_over="link") == "link"


@pytest.mark.parametrize(("consumer", "waiting", "name"), [(5.0, 1.0, "consumer"), (1.0, 5.0, "storage")])
def test_a_stream_is_held_up_by_whoever_takes_longer(consumer: float, waiting: float, name: str) -> None:
    counters = Counters(**dict.fromkeys(Counters._fields, 0))._replace(storage_seconds=1.0)
    assert bottleneck(counters, consumer_seconds=consumer, waiting_seconds=waiting) == name
