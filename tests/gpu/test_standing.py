"""Loads of parts that stand open in between: one load of the same files to the same GPUs, and nothing left behind."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

import weightlift as wl
from weightlift import keeping, standing
from weightlift.compat.safetensors import safe_open
from weightlift.errors import FileChangedError, TruncatedFileError
from weightlift.formats import describe
from weightlift.open_ended import OpenTransfer
from weightlift.options import LoadOptions
from weightlift.plan import CacheDecision
from weightlift.standing import PartLoads
from weightlift.testing import TensorSpec, write_checkpoint
from weightlift.testing.leaks import nothing_left_behind
from weightlift.units import KIB, MIB

torch = pytest.importorskip("torch")
import safetensors.torch  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from weightlift import LoadReport
    from weightlift.description import Description
    from weightlift.testing.fake_devices import FakeDevices

    Bring = Callable[..., dict[str, Any]]

SPECS = [TensorSpec(f"{layer}.{name}", "I16", (64, 257)) for layer in range(4) for name in "abc"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model.safetensors", SPECS)


@pytest.fixture
def description(path: Path) -> Description:
    return describe(path)


@pytest.fixture
def reports() -> list[LoadReport]:
    return []


@pytest.fixture
def loads(devices: FakeDevices, reports: list[LoadReport]) -> Iterator[PartLoads]:
    parts = PartLoads(reports.append)
    yield parts
    parts.close()


@pytest.fixture
def bring(loads: PartLoads, description: Description, devices: FakeDevices) -> Bring:
    def load(layer: int, device: str = "cuda:0", **keywords: Any) -> dict[str, Any]:
        rows = [row for row, name in enumerate(description.names) if name.startswith(f"{layer}.")]
        found = dict(loads.rows(description, rows, LoadOptions(device=device, framework="torch", **keywords)))  # type: ignore[arg-type]
        devices.memories[0]._gpu.settle()
        return found

    return load


@pytest.mark.parametrize("engine", ["native", "python"])
def test_parts_of_a_file_are_one_load(
    bring: Bring, loads: PartLoads, path: Path, reports: list[Any], engine: str
) -> None:
    expected = safetensors.torch.load_file(path)
    found: dict[str, Any] = {}
    for layer in (2, 0, 1, 3):
        found |= bring(layer, engine=engine)
        assert not reports
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    loads.close()
    (report,) = reports
    assert (report.tensors, report.nbytes) == (len(SPECS), sum(tensor.nbytes for tensor in expected.values()))
    assert (report.device, report.engine, report.staging) == ("cuda:0", engine, "pinned")
    assert sum(report.method_used.values()) == report.nbytes
    loads.close()
    assert len(reports) == 1


def test_another_device_or_other_options_end_it(bring: Bring, reports: list[Any]) -> None:
    bring(0)
    bring(1, "cuda:1")
    assert [report.device for report in reports] == ["cuda:0"]
    bring(1, "cuda:1", method="buffered")
    assert [report.device for report in reports] == ["cuda:0", "cuda:1"]


def test_what_goes_to_the_cpu_in_between_is_loaded_beside_it_within_the_budget(
    bring: Bring, loads: PartLoads, reports: list[Any]
) -> None:
    bring(0)
    assert bring(1, "cpu")["1.a"].shape == (64, 257)
    bring(2)
    loads.close()
    beside, standing_load = reports
    assert (beside.device, standing_load.device) == ("cpu", "cuda:0")
    assert standing_load.tensors == 6
    budget = LoadOptions().host_memory
    assert beside.host_memory.budget_bytes + standing_load.host_memory.budget_bytes <= budget


@pytest.mark.parametrize("keywords", [{"host_memory": 16 * MIB}, {"workers": 2}])
def test_what_goes_to_the_cpu_ends_it_where_both_would_exceed_the_budget(
    bring: Bring, reports: list[Any], keywords: dict[str, Any]
) -> None:
    bring(0, **keywords)
    bring(1, "cpu", **keywords)
    assert [report.device for report in reports] == ["cuda:0", "cpu"]


def test_what_does_more_than_bring_bytes_stands_alone(bring: Bring, reports: list[Any]) -> None:
    bring(0, digest=True)
    assert [report.tensors for report in reports] == [3]


def test_a_file_that_changes_in_between_is_named_and_the_next_load_begins_anew(
    bring: Bring, path: Path, reports: list[Any]
) -> None:
    bring(0)
    os.truncate(path, path.stat().st_size - 1000)
    with pytest.raises((FileChangedError, TruncatedFileError), match=r"model\.safetensors"):
        bring(3)
    with pytest.raises((FileChangedError, TruncatedFileError), match=r"model\.safetensors"):
        bring(0)
    assert not reports


def test_a_file_that_changes_after_the_last_part_takes_nothing_away(
    bring: Bring, loads: PartLoads, path: Path, reports: list[Any]
) -> None:
    found = bring(0)
    path.write_bytes(b"something else")
    loads.close()
    assert not reports
    assert found["0.a"].shape == (64, 257)


def test_out_of_memory_is_explained_and_leaves_nothing(
    bring: Bring, devices: FakeDevices, loads: PartLoads, reports: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    bring(0)

    def refuse(*_: Any) -> Any:
        raise torch.OutOfMemoryError("full")

    with monkeypatch.context() as patch:
        patch.setattr(devices.memories[0], "allocate", refuse)
        with pytest.raises(torch.OutOfMemoryError, match="full"):
            bring(1)
    assert bring(1)["1.b"].shape == (64, 257)
    loads.close()
    assert [report.tensors for report in reports] == [3]


def test_what_is_dropped_unfinished_leaves_nothing_behind(
    description: Description, devices: FakeDevices, tmp_path: Path
) -> None:
    with nothing_left_behind(tmp_path):
        parts = PartLoads(lambda _: None)
        parts.rows(description, [0, 1], LoadOptions(device="cuda:0", framework="torch"))  # type: ignore[arg-type]
        devices.memories[0]._gpu.settle()
        del parts
        from weightlift.device_staging import release_pinned_memory

        release_pinned_memory()


@pytest.mark.needs("preadv", "cachestat")
@pytest.mark.parametrize("keep", [True, False])
def test_parts_find_out_what_keeping_costs(
    devices: FakeDevices, tmp_path: Path, reports: list[Any], monkeypatch: pytest.MonkeyPatch, *, keep: bool
) -> None:
    monkeypatch.setattr(keeping, "WORTH_BYTES", 20 * MIB)
    monkeypatch.setattr(keeping, "SAMPLES_BYTES", 8 * MIB)
    monkeypatch.setattr(keeping, "judge_cost", lambda _: CacheDecision(keep, "so says the test"))
    keeping.forget()
    # How many parts meet slots that are still to be pinned, which tells nothing of reading, is a matter of timing.
    specs = [TensorSpec(f"{layer:02}.a", "U8", (10 * MIB,)) for layer in range(16)]
    path = write_checkpoint(tmp_path / "large.safetensors", specs)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    description = describe(path)
    parts = PartLoads(reports.append)
    for row in range(16):
        parts.rows(description, [row], LoadOptions(device="cuda:0", framework="torch"))  # type: ignore[arg-type]
    parts.close()
    keeping.forget()
    report = reports[-1]
    if not report.page_cache_before_bytes < MIB or not report.method_used["direct"]:
        pytest.skip(f"the page cache cannot be emptied here, or there are no direct reads: {report.reason}")
    # Two that tell something are kept, and one is read directly for comparison.
    direct = report.method_used["direct"] // (10 * MIB)
    assert direct == 1 if keep else 1 < direct < 15
    assert report.cache_decided == ("keep" if keep else "drop")
    assert (report.page_cache_after_bytes > 156 * MIB) is keep
    assert keep or report.page_cache_after_bytes < 64 * KIB


def test_a_load_has_so_many_parts_and_no_more(
    bring: Bring, loads: PartLoads, reports: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standing, "PARTS_MAX", 3)
    for _ in range(4):
        bring(0)
    assert [report.tensors for report in reports] == [9]
    loads.close()
    assert [report.tensors for report in reports] == [9, 3]


def test_staging_is_given_back_to_whoever_needs_it(
    bring: Bring, loads: PartLoads, path: Path, devices: FakeDevices, reports: list[Any]
) -> None:
    found = bring(0)
    pinned = wl.load(path, device="cuda:1", framework="torch").report.host_memory.peak_pinned_bytes
    assert [report.device for report in reports] == ["cuda:0"]
    assert pinned
    found |= bring(1)
    assert wl.release_pinned_memory() == pinned
    assert len(reports) == 2
    assert found["1.a"].shape == (64, 257)


def test_a_program_that_is_called_back_cannot_end_what_reads(
    bring: Bring, loads: PartLoads, reports: list[Any]
) -> None:
    released, nested = list[int](), list[Any]()

    def progress(*_: int) -> None:
        released.append(wl.release_pinned_memory())
        loads.close()
        nested.append(bring(3))

    for layer in range(2):
        assert bring(layer, progress=progress)[f"{layer}.a"].shape == (64, 257)
    assert released
    assert not any(released)
    # What it loads itself meanwhile stands alone.
    assert [report.tensors for report in reports] == [3] * len(nested)
    loads.close()
    assert reports[-1].tensors == 6


def test_staging_in_use_is_kept(
    bring: Bring, loads: PartLoads, devices: FakeDevices, reports: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    bring(0)
    read, released = OpenTransfer.read_part, list[int]()

    def read_while_another_asks(*arguments: Any) -> Any:
        other = threading.Thread(target=lambda: released.append(wl.release_pinned_memory()))
        other.start()
        other.join()
        return read(*arguments)

    monkeypatch.setattr(OpenTransfer, "read_part", read_while_another_asks)
    assert bring(1)["1.a"].shape == (64, 257)
    assert (released, reports) == ([0], [])


def test_tensors_taken_from_one_handle_are_parts_of_one_load(tmp_path: Path, devices: FakeDevices) -> None:
    specs = [TensorSpec(name, "I16", (5, MIB)) for name in "abcd"]
    path = write_checkpoint(tmp_path / "large.safetensors", specs)
    expected = safetensors.torch.load_file(path)
    with safe_open(path, "pt", "cuda:0") as handle:
        found = {name: handle.get_tensor(name) for name in "badc"}
        # Whoever takes one tensor may want no other, so the first is a load of its own.
        assert [report.tensors for report in handle.reports] == [1]
        file = handle._opened()
    devices.memories[0]._gpu.settle()
    assert [report.tensors for report in file.reports] == [1, 3]
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
