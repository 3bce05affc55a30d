"""What keeping files in the page cache costs is found out once per drive, and then known to other loads too."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

import weightlift as wl
from weightlift import keeping, load, trial
from weightlift.host.residency import Residency, ResidencyMap, ResidencyRun
from weightlift.keeping import Keeping, StreamKeeping, Where
from weightlift.open_ended import OpenTransfer
from weightlift.operations import Counters, ReadPath, Sink
from weightlift.pipeline import Transfer
from weightlift.plan import GRANULE_BYTES, CacheDecision, ShardFacts, Wanted
from weightlift.testing import TensorSpec, tensor_bytes, write_checkpoint
from weightlift.trial import DIRECT_BYTES, KEPT_BYTES, ROUNDS_MAX, ROUNDS_MIN
from weightlift.units import GIB, KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from weightlift import LoadReport

HERE = Where(frozenset({7}), "cpu")
ON_TRIAL = CacheDecision(keep=True, reason="it fits", on_trial=True)
MODULE = 128 * MIB


def facts(*, direct: bool = True, cached: int = 0) -> ShardFacts:
    runs = [ResidencyRun(0, cached, Residency.RESIDENT)] if cached else []
    runs.append(ResidencyRun(cached, 4 * GIB - cached, Residency.ABSENT))
    return ShardFacts("shard", 4 * GIB, direct, "", True, ResidencyMap(GRANULE_BYTES, 4 * GIB, cached, tuple(runs)))


def begin(nbytes: int, shard: ShardFacts | None = None, where: Where = HERE) -> Keeping:
    return Keeping(ON_TRIAL, [Wanted(0, 0, nbytes, Sink.DISCARD)], [shard or facts()], where)


def counted(nbytes: int, register_seconds: float = 0.0) -> Counters:
    nothing = Counters(**dict.fromkeys(Counters._fields, 0))
    return nothing._replace(landed_bytes=nbytes, register_seconds=register_seconds)


def load_module(seconds_per_gib: float, nbytes: int = MODULE, where: Where = HERE) -> Keeping:
    one = begin(nbytes, where=where)
    assert one.trial is None
    one.learn(counted(nbytes), seconds_per_gib * nbytes / GIB)
    return one


def kept_modules(seconds_per_gib: float = 3.0) -> None:
    for _ in range(GIB // MODULE):
        assert load_module(seconds_per_gib).keeps


def test_what_was_not_decided_on_trial_stays_as_it_is() -> None:
    decision = CacheDecision(keep=True, reason="cache=keep was asked for")
    one = Keeping(decision, [Wanted(0, 0, 3 * GIB, Sink.DISCARD)], [facts()], HERE)
    assert (one.trial, one.keeps, one.learn(counted(3 * GIB), 1.0)) == (None, True, decision)


def test_one_trial_serves_all_loads_of_its_kind() -> None:
    first = begin(3 * GIB)
    assert first.trial is not None
    assert not first.keeps
    # What is kept is twice as much.
    assert not first.judge(2.0, 1.0)
    assert first.judge(4.0, 1.0)
    decision = first.decision
    assert (decision.keep, first.keeps, first.missed) == (False, False, ())
    for nbytes in (3 * GIB, MODULE, KIB):
        later = begin(nbytes)
        assert (later.trial, later.keeps, later.decision) == (None, False, decision)
    for where in (Where(frozenset({7, 8}), "cpu"), Where(frozenset({7}), "cuda:0")):
        assert begin(3 * GIB, where=where).trial is not None


def test_what_a_trial_read_past_the_page_cache_is_missed_there_if_files_are_kept() -> None:
    first = begin(3 * GIB)
    assert first.trial is not None
    assert [first.judge(2.0, 1.0) for _ in range(2)] == [False, True]
    assert (first.keeps, first.missed) == (True, first.trial.direct(2))
    assert sum(part.length for part in first.rest) == 3 * GIB - 2 * (DIRECT_BYTES + KEPT_BYTES)


def test_more_rounds_are_made_where_it_is_not_clear_what_keeping_costs() -> None:
    one = begin(3 * GIB)
    assert [one.judge(2.7, 1.0) for _ in range(ROUNDS_MAX)] == [False] * (ROUNDS_MAX - 1) + [True]
    assert not one.decision.keep
    other = begin(3 * GIB, where=Where(frozenset({9}), "cpu"))
    assert [other.judge(seconds, 1.0) for seconds in (9.0, 2.8, 1.0)] == [False, False, True]
    assert other.trial is not None
    assert (other.keeps, other.missed) == (True, other.trial.direct(3))


@pytest.mark.parametrize(("kept", "direct", "keep"), [(3.0, 3.0, True), (3.0, 1.0, False), (0.2, 0.1, False)])
def test_once_modules_come_to_as_much_as_a_trial_is_worth_one_is_read_directly(
    kept: float, direct: float, *, keep: bool
) -> None:
    kept_modules(kept)
    sample = load_module(direct)
    assert not sample.keeps
    assert sample.decision.keep is keep
    assert not sample.decision.on_trial
    assert list(sample.missed) == ([Wanted(0, 0, MODULE, Sink.DISCARD)] if keep else [])
    assert begin(MODULE).keeps is begin(4 * GIB).keeps is keep


def test_a_sample_may_be_of_several_small_modules() -> None:
    kept_modules()
    for _ in range(3):
        sample = load_module(1.0, 20 * MIB)
        assert (sample.keeps, sample.decision) == (False, ON_TRIAL)
        assert sample.missed
    assert not load_module(1.0, 20 * MIB).decision.keep


def test_of_a_large_module_no_more_is_read_twice_than_the_part_of_a_trial() -> None:
    kept_modules()
    one = begin(600 * MIB)
    assert one.trial is not None
    assert [one.judge(1.0, 1.0) for _ in range(ROUNDS_MIN)][-1]
    assert sum(want.length for want in one.missed) == ROUNDS_MIN * DIRECT_BYTES
    assert begin(MODULE).decision == one.decision


@pytest.mark.parametrize(
    "one",
    [
        lambda: begin(MODULE, facts(direct=False)),
        lambda: begin(MODULE, facts(cached=64 * MIB)),
        lambda: begin(MIB),
    ],
    ids=["no direct reads", "partly cached", "too little"],
)
def test_loads_that_tell_nothing_are_no_sample(one: Callable[[], Keeping]) -> None:
    kept_modules()
    assert one().keeps


def test_loads_that_pinned_memory_on_the_way_show_nothing() -> None:
    for _ in range(2 * GIB // MODULE):
        assert begin(MODULE).learn(counted(MODULE, register_seconds=0.05), 1.0) == ON_TRIAL
    assert begin(MODULE).keeps


def test_loads_that_went_wrong_show_nothing() -> None:
    for _ in range(2 * GIB // MODULE):
        assert begin(MODULE).keeps
    assert load_module(3.0).keeps


@pytest.fixture
def small_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (trial, keeping):
        monkeypatch.setattr(module, "WORTH_BYTES", 24 * MIB)
        monkeypatch.setattr(module, "DIRECT_BYTES", 4 * MIB)
        monkeypatch.setattr(module, "KEPT_BYTES", 4 * MIB)
    monkeypatch.setattr(trial, "_PIECE_BYTES_MIN", 4 * MIB)
    monkeypatch.setattr(keeping, "SAMPLES_BYTES", 8 * MIB)


def have_trials_say(monkeypatch: pytest.MonkeyPatch, *, keep: bool) -> list[float]:
    """Decide every trial that way, after two rounds; what parts of trials took comes into the list returned."""
    took: list[float] = []
    decision = CacheDecision(keep, "so says the test")

    def cost(*seconds: float) -> float:
        took.extend(seconds)
        return 1.0

    monkeypatch.setattr(keeping, "cost_of", cost)
    monkeypatch.setattr(keeping, "judge_cost", lambda _: decision)
    monkeypatch.setattr(keeping, "judge_rounds", lambda costs, _: decision if len(costs) == ROUNDS_MIN else None)
    return took


def empty_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load_cold(path: Path, megabytes: int, engine: str) -> LoadReport:
    empty_cache(write_checkpoint(path, [TensorSpec("t", "U8", (megabytes * MIB,))]))
    report = load(path, device="null", engine=engine).report
    assert report.page_cache_before_bytes is not None
    if report.page_cache_before_bytes > MIB:
        pytest.skip("the page cache of this file system cannot be emptied")
    return report


@pytest.mark.needs("preadv", "cachestat")
@pytest.mark.usefixtures("small_trials")
@pytest.mark.parametrize("engine", ["native", "python"])
@pytest.mark.parametrize("keep", [True, False])
def test_a_trial_leaves_all_of_a_file_cached_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, *, keep: bool
) -> None:
    took = have_trials_say(monkeypatch, keep=keep)
    report = load_cold(tmp_path / "model.safetensors", 40, engine)
    assert all(seconds > 0 for seconds in took)
    assert sum(took) <= sum(report.worker_seconds.values())
    if not report.method_used["direct"]:
        pytest.skip(f"no direct reads here: {report.reason}")
    assert report.method_used["direct"] == (8 * MIB if keep else 32 * MIB)
    size = (tmp_path / "model.safetensors").stat().st_size
    after = report.page_cache_after_bytes
    assert after is not None
    # Reading ahead is the kernel's favour, of which it may leave out a little; 8 MiB were read past its cache.
    assert after > size - 4 * MIB if keep else not after


@pytest.mark.needs("preadv", "cachestat")
@pytest.mark.usefixtures("small_trials")
@pytest.mark.parametrize("engine", ["native", "python"])
@pytest.mark.parametrize("keep", [True, False])
def test_files_loaded_one_by_one_find_out_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, *, keep: bool
) -> None:
    have_trials_say(monkeypatch, keep=keep)
    reports = [load_cold(tmp_path / f"{number}.safetensors", 12, engine) for number in range(4)]
    if not reports[2].method_used["direct"]:
        pytest.skip(f"no direct reads here: {reports[2].reason}")
    direct = [report.method_used["direct"] // MIB for report in reports]
    assert direct == ([0, 0, 12, 0] if keep else [0, 0, 12, 12])
    cached = [(report.page_cache_after_bytes or 0) > 8 * MIB for report in reports]
    assert cached == [True, True, keep, keep]
    assert [report.cache_decided for report in reports] == ["keep", "keep", *["keep" if keep else "drop"] * 2]


UNIT = [Wanted(0, 0, 40 * MIB, Sink.DISCARD)]


def begin_stream(cold_bytes: int = 4 * GIB) -> StreamKeeping:
    return StreamKeeping(ON_TRIAL, cold_bytes, HERE)


def find_out(stream: StreamKeeping, kept: float, direct: float) -> None:
    """Have a stream read its first units, which take so many seconds in the last round."""
    for last in (False, True):
        for keeps, seconds in ((True, kept), (False, direct)):
            assert stream.under_way
            assert stream.take(UNIT) is keeps
            assert stream.is_full
            stream.measured(seconds if last else 1.0)
    assert not stream.under_way


@pytest.mark.parametrize(("kept", "keep"), [(1.0, True), (2.0, False)])
def test_a_stream_reads_its_first_units_both_ways(kept: float, *, keep: bool) -> None:
    stream = begin_stream()
    find_out(stream, kept, 1.0)
    assert stream.decision.keep is keep
    assert stream.missed == (UNIT * ROUNDS_MIN if keep else [])
    assert stream.take(UNIT) is keep
    assert not stream.is_full
    # It holds for whatever comes next.
    assert begin_stream().take(UNIT) is begin(MODULE).keeps is keep
    assert not begin_stream().under_way


def test_a_part_of_a_stream_may_be_of_several_units() -> None:
    stream = begin_stream()
    small = [Wanted(0, 0, 12 * MIB, Sink.DISCARD)]
    taken = []
    while stream.under_way:
        taken.append(stream.take(small))
        if stream.is_full:
            stream.measured(1.0)
    assert taken == [True, True, True, False, False] * ROUNDS_MIN


def test_a_stream_of_large_units_reads_none_of_them_twice() -> None:
    stream = begin_stream(2 * GIB)
    large = [Wanted(0, 0, 65 * MIB, Sink.DISCARD)]
    assert stream.take(large)
    stream.measured(1.0)
    assert stream.take(large)
    assert not stream.under_way
    assert (stream.decision, stream.missed) == (ON_TRIAL, [])


@pytest.mark.parametrize(
    "decision", [ON_TRIAL, CacheDecision(keep=True, reason="keep"), CacheDecision(keep=False, reason="drop")], ids=str
)
def test_streams_with_nothing_to_find_out(decision: CacheDecision) -> None:
    stream = StreamKeeping(decision, 0 if decision.on_trial else 4 * GIB, HERE)
    assert not stream.under_way
    assert stream.take(UNIT) is decision.keep


@pytest.mark.needs("preadv", "cachestat")
@pytest.mark.usefixtures("small_trials")
@pytest.mark.parametrize("engine", ["native", "python"])
@pytest.mark.parametrize("keep", [True, False])
def test_what_is_streamed_is_cached_as_a_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, *, keep: bool
) -> None:
    took = have_trials_say(monkeypatch, keep=keep)
    counters = OpenTransfer._counters

    def at_a_second_per_mib(self: OpenTransfer) -> Counters:
        found = counters(self)
        return found._replace(busy_seconds=found.landed_bytes / MIB)

    monkeypatch.setattr(keeping, "_STREAM_SHARE_MIN", 4)
    monkeypatch.setattr(OpenTransfer, "_counters", at_a_second_per_mib)
    path = tmp_path / "model.safetensors"
    specs = [TensorSpec(f"t{number}", "U8", (4 * MIB,)) for number in range(10)]
    empty_cache(write_checkpoint(path, specs))
    stream = wl.stream(path, engine=engine, framework="numpy")
    assert [name for name, tensor in stream if tensor.tobytes() == tensor_bytes(specs[int(name[1:])])] == list(
        wl.open(path)
    )
    report = stream.report
    assert report is not None
    if not report.method_used["direct"]:
        pytest.skip(f"no direct reads here: {report.reason}")
    assert took == [1 / MIB] * 2 * ROUNDS_MIN
    assert report.method_used["direct"] == (8 * MIB if keep else 32 * MIB)
    after = report.page_cache_after_bytes
    assert after is not None
    assert after > path.stat().st_size - MIB if keep else not after
    assert report.cache_decided == ("keep" if keep else "drop")


@pytest.mark.needs("preadv", "cachestat")
@pytest.mark.usefixtures("small_trials")
def test_a_stream_that_memory_got_short_for_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the trial finds: what was found out on the way counts."""
    have_trials_say(monkeypatch, keep=True)
    monkeypatch.setattr(keeping, "_STREAM_SHARE_MIN", 4)
    path = tmp_path / "model.safetensors"
    empty_cache(write_checkpoint(path, [TensorSpec(f"t{number}", "U8", (4 * MIB,)) for number in range(10)]))
    stream = wl.stream(path, framework="numpy")
    next(stream)
    stream._transfer._drop_cache()
    extents = stream._transfer._extents
    begun = len(extents)
    assert len(list(stream)) == 9
    assert ReadPath.BUFFERED not in {extent.path for extent in extents[begun:]}
    report = stream.report
    assert report is not None
    assert report.cache_decided == "drop"
    assert not report.page_cache_after_bytes


@pytest.mark.needs("preadv", "cachestat")
@pytest.mark.usefixtures("small_trials")
def test_a_load_that_memory_got_short_for_in_its_trial_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spend = Transfer._spend

    def spend_while_memory_gets_short(self: Transfer, *arguments: Any, **named: Any) -> float:
        seconds = spend(self, *arguments, **named)
        self._drop_cache()
        return seconds

    monkeypatch.setattr(Transfer, "_spend", spend_while_memory_gets_short)
    have_trials_say(monkeypatch, keep=True)
    report = load_cold(tmp_path / "model.safetensors", 40, "native")
    assert report.cache_decided == "drop"
    assert "memory got short" in report.reason
    assert not report.page_cache_after_bytes
