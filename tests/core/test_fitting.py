"""Whether a load fits: the arithmetic on made-up facts, and what loads do with it."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace

import weightlift as wl
from weightlift import weighing
from weightlift.fitting import DeviceFit, FitReport, Verdict, explaining_device_memory, require_fit, staging_budget
from weightlift.host.memory import Headroom, Room
from weightlift.testing import TensorSpec, make_checkpoint, write_checkpoint
from weightlift.testing.cgroup import CgroupUnavailable, memory_cgroup
from weightlift.units import GIB, MIB

if TYPE_CHECKING:
    from pathlib import Path


def room(available: int, swap: int = 0) -> Headroom:
    rooms = (Room("", 0, 32 * GIB, available),)
    return Headroom(available, "machine", 32 * GIB, swap, f"{available} of the machine's are available", rooms)


FIT = FitReport(
    tensor_bytes=8 * GIB,
    mapped_bytes=0,
    staging_bytes=128 * MIB,
    budget_bytes=128 * MIB,
    requested_budget_bytes=128 * MIB,
    description_bytes=4096,
    devices=(),
    room=room(16 * GIB),
)


class TestVerdict:
    @pytest.mark.parametrize(
        ("available", "swap", "verdict", "missing", "swapped"),
        [
            (16 * GIB, 0, Verdict.FITS, 0, 0),
            (8 * GIB + 128 * MIB, 0, Verdict.FITS, 0, 0),
            (8 * GIB, 0, Verdict.LACKS, 128 * MIB, 128 * MIB),
            (8 * GIB, 128 * MIB, Verdict.SWAPS, 0, 128 * MIB),
            (4 * GIB, 1 * GIB, Verdict.LACKS, 3 * GIB + 128 * MIB, 4 * GIB + 128 * MIB),
        ],
    )
    def test_by_what_is_available(self, available: int, swap: int, verdict: str, missing: int, swapped: int) -> None:
        fit = replace(FIT, room=room(available, swap))
        assert (fit.verdict, fit.missing_bytes, fit.swapped_bytes) == (verdict, missing, swapped)

    def test_staging_alone_never_lacks_memory(self) -> None:
        fit = replace(FIT, tensor_bytes=0, room=room(1 * MIB))
        assert (fit.verdict, fit.missing_bytes) == (Verdict.FITS, 0)

    def test_unknown_memory_is_unknown(self) -> None:
        fit = replace(FIT, room=None)
        assert fit.verdict is Verdict.UNKNOWN
        assert fit.to_json()["missing_bytes"] is None
        require_fit(fit)

    def test_the_error_says_by_how_much_and_what_would_help(self) -> None:
        with pytest.raises(wl.errors.InsufficientMemoryError, match=r"need 8.12 GiB.*3.12 GiB too little") as caught:
            require_fit(replace(FIT, room=room(5 * GIB)))
        for word in ("names=", "stream", "mmap", "3.12 GiB of swap"):
            assert word in caught.value.hint
        assert "control group" not in caught.value.hint

    def test_in_a_control_group_its_limit_is_among_what_helps(self) -> None:
        group = Room("/box", 2, 6 * GIB, 5 * GIB)
        tight = Headroom(5 * GIB, "cgroup", 6 * GIB, 0, "5 GiB of /box are available", (FIT.room.rooms[0], group))  # type: ignore[union-attr]
        with pytest.raises(wl.errors.InsufficientMemoryError, match="/box") as caught:
            require_fit(replace(FIT, room=tight))
        assert "control group" in caught.value.hint
        assert [limit["control_group"] for limit in replace(FIT, room=tight).to_json()["limits"]] == [None, "/box"]


class TestDevices:
    DEVICE = DeviceFit(
        device="cuda:0", tensor_bytes=20 * GIB, free_bytes=18 * GIB, reusable_bytes=1 * GIB, total_bytes=24 * GIB
    )

    def test_reusable_memory_counts_as_free(self) -> None:
        assert self.DEVICE.missing_bytes == 1 * GIB
        assert replace(self.DEVICE, reusable_bytes=2 * GIB).missing_bytes == 0

    def test_a_misfit_is_a_warning_and_never_an_error(self) -> None:
        fit = replace(FIT, devices=(self.DEVICE,))
        require_fit(fit)
        assert fit.verdict is Verdict.FITS
        assert list(fit.warnings()) == [self.DEVICE.sentence]
        assert "1.00 GiB too little" in fit.sentence

    def test_unknown_is_no_misfit(self) -> None:
        unknown = replace(self.DEVICE, free_bytes=None, reusable_bytes=None)
        assert unknown.missing_bytes == 0
        assert "unknown" in unknown.sentence
        assert replace(FIT, devices=(unknown,)).to_json()["devices"][0]["missing_bytes"] is None

    def test_the_frameworks_error_stays_and_gets_a_note(self) -> None:
        class OutOfMemoryError(RuntimeError):
            """Named as torch's is."""

        error = OutOfMemoryError("no room")
        with pytest.raises(OutOfMemoryError) as caught, explaining_device_memory(replace(FIT, devices=(self.DEVICE,))):
            raise error
        assert caught.value is error
        assert str(error) == "no room"
        assert error.__notes__ == [self.DEVICE.sentence]

    def test_other_errors_get_none(self) -> None:
        error = ValueError("other")
        with pytest.raises(ValueError, match="other"), explaining_device_memory(replace(FIT, devices=(self.DEVICE,))):
            raise error
        assert not hasattr(error, "__notes__")


class TestBudget:
    @pytest.mark.parametrize(
        ("available", "tensors", "staged", "budget"),
        [
            (GIB, 0, GIB, 128 * MIB),
            (128 * MIB, 0, GIB, 128 * MIB),
            (100 * MIB, 0, GIB, 50 * MIB),
            (100 * MIB, 0, 64 * MIB, 128 * MIB),
            (10 * MIB, 0, GIB, 8 * MIB),
            (0, 0, GIB, 8 * MIB),
            (GIB, GIB - 40 * MIB, GIB, 20 * MIB),
            (GIB, 2 * GIB, GIB, 128 * MIB),
        ],
    )
    def test_it_is_cut_to_what_is_left(self, available: int, tensors: int, staged: int, budget: int) -> None:
        assert staging_budget(128 * MIB, tensors, staged, room(available)) == budget

    def test_a_load_where_memory_is_short_stages_less_and_says_so(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, _ = make_checkpoint(tmp_path / "model.safetensors", shape=(4096, 1024), count=12)
        monkeypatch.setattr(weighing, "headroom", lambda: room(40 * MIB))
        report = wl.load(path, device="null").report
        assert report.host_memory.budget_bytes == 20 * MIB
        assert report.host_memory.staging_bytes <= 20 * MIB
        assert "20.0 MiB instead of the 128 MiB" in report.fit
        # What a person fixes stays as it was fixed.
        assert wl.load(path, device="null", workers=2).report.host_memory.budget_bytes == 128 * MIB


class TestLoads:
    def test_every_kind_of_load_says_whether_it_fits(self, tmp_path: Path) -> None:
        path, specs = make_checkpoint(tmp_path / "model.safetensors", shape=(512, 512), count=4)
        nbytes = sum(spec.nbytes for spec in specs)
        state = wl.load(path, framework="torch")
        assert "2.00 MiB of tensors" in state.report.fit
        assert "mapped" in wl.load(path, method="mmap", framework="numpy").report.fit
        assert "staging" in wl.load(path, device="null").report.fit
        assert "staging" in wl.load_into(dict(state), path).report.fit
        with wl.stream(path, framework="numpy") as tensors:
            assert len(list(tensors)) == len(specs)
            assert tensors.report is not None
            assert "staging" in tensors.report.fit
        assert wl.fit(path).tensor_bytes >= nbytes

    def test_a_fit_report_allocates_and_reads_nothing(self, tmp_path: Path) -> None:
        specs = [TensorSpec(f"layer.{number}", "F32", (1 << 20, 1 << 14)) for number in range(4)]
        giant = write_checkpoint(tmp_path / "giant.safetensors", specs, sparse=True)
        fit = wl.fit(giant, framework="numpy")
        assert fit.tensor_bytes >= 256 * GIB
        assert fit.staging_bytes == 0
        mapped = wl.fit(giant, method="mmap")
        assert (mapped.tensor_bytes, mapped.mapped_bytes, mapped.missing_bytes) == (0, 256 * GIB, 0)
        assert wl.fit(giant, device="null").staging_bytes <= 128 * MIB

    def test_what_would_become_of_the_page_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path, _ = make_checkpoint(tmp_path / "model", shape=(1024, 1024), count=4, shards=2)
        fit = wl.fit(path, framework="numpy", cache="drop", names="tensor_000")
        assert fit.cache is not None
        (shard,) = path.glob("*-00001-of-*.safetensors")
        assert (fit.cache.keep, fit.cache.file_bytes) == (False, shard.stat().st_size)
        assert "cache=drop was asked for" in fit.cache.reason
        before = fit.cache.cached_bytes
        again = wl.fit(path, framework="numpy", cache="drop", names="tensor_000").cache
        assert again is not None
        assert again.cached_bytes == before, "looking must not read"
        monkeypatch.setattr(weighing, "headroom", lambda: room(9 * MIB))
        with shard.open("r+b") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        crowded = wl.fit(path, framework="numpy").cache
        assert crowded is not None
        if crowded.cached_bytes is None or crowded.cached_bytes == crowded.file_bytes:
            pytest.skip("the file system keeps pages it is asked to drop, or will not tell")
        assert not crowded.keep
        assert "would crowd free memory" in crowded.reason

    def test_what_is_staged_is_counted(self, tmp_path: Path) -> None:
        # An unpadded header shifts all data, so that direct reads cannot bring it to its place.
        path = write_checkpoint(tmp_path / "model.safetensors", [TensorSpec("a", "F64", (40_000,))], padding=1)
        fit = wl.fit(path, framework="numpy")
        assert 320_000 <= fit.staging_bytes <= 128 * MIB
        assert wl.fit(path, framework="numpy", dtype="float32").tensor_bytes == 160_000

    def test_what_does_not_fit_is_refused_before_anything_is_reserved(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, _ = make_checkpoint(tmp_path / "model.safetensors", shape=(1024, 1024), count=4)
        monkeypatch.setattr(weighing, "headroom", lambda: room(1 * MIB, 2 * MIB))
        with pytest.raises(wl.errors.InsufficientMemoryError, match=r"5.00 MiB too little"):
            wl.load(path, framework="numpy")
        assert wl.load(path, method="mmap", framework="numpy").report.nbytes == 8 * MIB

    @pytest.mark.root
    def test_in_a_real_control_group(self, tmp_path: Path) -> None:
        path = write_checkpoint(tmp_path / "big.safetensors", [TensorSpec("t", "U8", (256 * MIB,))], sparse=True)
        try:
            with memory_cgroup(200 * MIB) as group:
                words = ["-m", "weightlift", "load", str(path), "--framework", "numpy"]
                done = subprocess.run(
                    group.command([sys.executable, *words]), capture_output=True, text=True, check=False
                )
                dry = subprocess.run(
                    group.command([sys.executable, *words, "--dry-run"]), capture_output=True, text=True, check=False
                )
                killed = group.oom_kills()
        except CgroupUnavailable as err:
            pytest.skip(str(err))
        assert (done.returncode, dry.returncode, killed) == (4, 4, 0), done.stderr + dry.stderr
        assert "control group" in done.stderr
        assert "too little" in done.stderr
        assert "control group" in dry.stdout
