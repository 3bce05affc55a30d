"""What weightlift writes, onto a disk that is really full: a typed error, no half file, and what was there stays."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import weightlift as wl
from weightlift.cli.main import main
from weightlift.errors import WriteError
from weightlift.health.self_test import run_self_test
from weightlift.manifest import FileEntry, Manifest, read_manifest, write_manifest
from weightlift.testing import TensorSpec, write_checkpoint
from weightlift.writing import NewFile, whole_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SMALL = Manifest(files={"m": FileEntry(1, "0" * 64)}, tensors={})
LARGE = Manifest(files={f"file-{number}": FileEntry(1, "0" * 64) for number in range(2000)}, tensors={})


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs Linux, root and the command mount")
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "weightlift", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this machine may not mount: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path) -> None:
    """Leave no byte free."""
    with open(disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert os.statvfs(disk).f_bavail == 0


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model.safetensors", [TensorSpec("x", "F32", (1000, 300))])


def refused(error: WriteError, path: Path) -> None:
    assert (error.errno, error.path) == (errno.ENOSPC, path)
    assert "disk is full" in error.hint
    assert path.name in error.message


def test_a_manifest_that_does_not_fit(disk: Path) -> None:
    path = disk / "manifest.json"
    write_manifest(SMALL, path)
    with pytest.raises(WriteError) as caught:
        write_manifest(LARGE, path)
    refused(caught.value, path)
    assert os.listdir(disk) == ["manifest.json"]
    assert read_manifest(path) == SMALL
    fill(disk)
    with pytest.raises(WriteError) as caught:
        write_manifest(SMALL, disk / "other.json")
    refused(caught.value, disk / "other.json")
    assert sorted(os.listdir(disk)) == ["filler", "manifest.json"]


@pytest.mark.parametrize("option", ["--report", "--trace"])
@pytest.mark.parametrize("old", [False, True])
def test_the_files_of_a_load(
    disk: Path, model: Path, capsys: pytest.CaptureFixture[str], option: str, old: bool
) -> None:
    target = disk / "page.html"
    if old:
        target.write_text("of another load")
    fill(disk)
    assert main(["load", str(model), "--device", "null", option, str(target), "--json"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["type"], error["path"]) == ("WriteError", str(target))
    assert "disk is full" in error["hint"]
    assert sorted(os.listdir(disk)) == ["filler", *["page.html"] * old]
    assert not old or target.read_text() == "of another load"


def test_a_trace_that_does_not_fit_does_not_hide_why_a_load_failed(
    disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(disk)
    assert main(["load", str(tmp_path / "nothing"), "--trace", str(disk / "trace.json")]) == 1
    said = capsys.readouterr().err
    assert "error:" in said
    assert "no such file or folder" in said
    assert "note:" in said
    assert "trace.json: could not be written: No space left" in said
    assert os.listdir(disk) == ["filler"]


def test_the_report_of_a_self_test(
    disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = {"ok": True, "seconds": 0.0, "said": "x" * 100_000}
    monkeypatch.setattr("weightlift.health.self_test.run_self_test", lambda *_: {"schema": 1, "steps": {"facts": step}})
    output = disk / "report.json"
    assert main(["doctor", "--self-test", "--folder", str(tmp_path), "--output", str(output), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"]["type"] == "WriteError"
    assert os.listdir(disk) == []


def test_the_checkpoint_of_a_self_test(disk: Path) -> None:
    with pytest.raises(WriteError) as caught:
        run_self_test("cuda:0", disk, lambda *_: pytest.fail("a step was run"))
    assert caught.value.errno == errno.ENOSPC
    assert str(caught.value.path).startswith(str(disk))
    assert os.listdir(disk) == []


def test_places_that_cannot_be_written_at_all(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    for place, number in ((tmp_path / "folder", errno.EISDIR), (tmp_path / "no" / "file", errno.ENOENT)):
        with pytest.raises(WriteError, match="could not be written") as caught:
            write_manifest(SMALL, place)
        assert (caught.value.errno, caught.value.path, bool(caught.value.hint)) == (number, place, True)
    with pytest.raises(WriteError) as caught:
        NewFile(tmp_path / "file" / "below")
    assert caught.value.errno == errno.ENOTDIR
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, OSError])
def test_whatever_breaks_off_leaves_what_was_there(tmp_path: Path, failure: type[BaseException]) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")

    def break_off() -> None:
        with whole_file(path) as file:
            file.write("new")
            raise failure

    with pytest.raises((failure, WriteError)):
        break_off()
    assert (os.listdir(tmp_path), path.read_text()) == (["page.html"], "old")


def test_unfinished_files_are_private_and_finished_ones_are_as_others_expect(tmp_path: Path) -> None:
    path, link = tmp_path / "page.html", tmp_path / "link.html"
    link.symlink_to(path)
    mask = os.umask(0o027)
    try:
        for place, mode in ((path, 0o640), (link, 0o604)):
            with whole_file(place) as file:
                file.write("\ud800 new")
                (unfinished,) = set(os.listdir(tmp_path)) - {"page.html", "link.html"}
                assert (tmp_path / unfinished).stat().st_mode & 0o777 == 0o600
            assert path.stat().st_mode & 0o777 == mode
            path.chmod(0o604)
    finally:
        os.umask(mask)
    assert (link.is_symlink(), path.read_text(), sorted(os.listdir(tmp_path))) == (
        True,
        "\\ud800 new",
        ["link.html", "page.html"],
    )


def test_what_is_no_file_is_written_to_and_stays(tmp_path: Path, model: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_manifest(SMALL, pipe)
        assert os.read(reader, 1 << 16) == SMALL.to_bytes()
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    assert main(["load", str(model), "--device", "null", "--json", "--trace", os.devnull]) == 0
    assert not os.path.isfile(os.devnull)


def test_a_reader_of_a_pipe_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        with pytest.raises(BrokenPipeError), whole_file(f"/proc/self/fd/{writer}") as file:
            file.write("x" * 100)
    finally:
        os.close(writer)


def test_a_load_reads_from_a_full_disk(disk: Path) -> None:
    path = write_checkpoint(disk / "model.safetensors", [TensorSpec("x", "U8", (1000,))])
    fill(disk)
    assert len(wl.load(path, framework="numpy")) == 1
