"""Folders and files, to the last word and byte: what else is there, what is told apart, what is read in pieces."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from weightlift.description import FileIdentity
from weightlift.errors import CheckpointNotFoundError, FileChangedError, IndexFileError, NotACheckpointError
from weightlift.formats import describe
from weightlift.formats.files import OpenFile, open_file
from weightlift.testing import TensorSpec, write_checkpoint
from weightlift.testing.gguf_bytes import entry, gguf_file, tensor

if TYPE_CHECKING:
    from types import FrameType

SPECS = [TensorSpec("t", "F32", (2, 2))]
INDEX = "model.safetensors.index.json"


def write_empty_pytorch(path: Path) -> None:
    """A PyTorch checkpoint without a tensor."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", b"\x80\x02}.")


def test_weights_of_another_kind_are_counted_in_a_note(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model.safetensors", SPECS)
    assert describe(tmp_path).notes == ()
    for name in ("a.bin", "b.pth"):
        write_empty_pytorch(tmp_path / name)
    assert describe(tmp_path).notes == (
        "the folder also holds weight files of another kind (2 of PyTorch): safetensors was taken",
    )
    (tmp_path / "m.gguf").write_bytes(gguf_file([tensor("g")], []))
    assert describe(tmp_path).notes == (
        "the folder also holds weight files of another kind (1 of GGUF, 2 of PyTorch): safetensors was taken",
    )


def test_one_gguf_file_is_a_checkpoint_whatever_its_name(tmp_path: Path) -> None:
    for name in ("m.gguf", "M.GGUF"):
        (tmp_path / name).write_bytes(gguf_file([tensor("g")], []))
        assert describe(tmp_path).names == ["g"]
        (tmp_path / name).unlink()


def test_each_part_of_a_split_model_is_read_once(tmp_path: Path) -> None:
    for number in (0, 1, 2):
        keys = [entry("split.no", 2, number), entry("split.count", 2, 3)]
        (tmp_path / f"m-{number + 1:05}-of-00003.gguf").write_bytes(gguf_file([tensor(f"t{number}")], keys))
    read = 0

    def count(frame: FrameType, event: str, _: object) -> None:
        nonlocal read
        read += event == "call" and frame.f_code.co_name == "read_shard"

    sys.setprofile(count)
    try:
        names = describe(tmp_path / "m-00002-of-00003.gguf").names
    finally:
        sys.setprofile(None)
    assert (names, read) == (["t0", "t1", "t2"], 3)


def test_which_pytorch_file_of_a_folder_is_taken(tmp_path: Path) -> None:
    """The index before the usual name, the usual name before others, and others only if they belong together."""
    taken = []
    for name in ("other.bin", "pytorch_model.bin"):
        write_empty_pytorch(tmp_path / name)
        taken.append([shard.path.name for shard in describe(tmp_path).shards])
    assert taken == [["other.bin"], ["pytorch_model.bin"]]
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "more.bin")
    with pytest.raises(IndexFileError, match=r"2 PyTorch files: more\.bin, other\.bin\nhint: name the one to read"):
        describe(tmp_path)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text('{"weight_map": {"t": "other.bin"}}')
    with pytest.raises(IndexFileError, match=r"tensor 't' is in other\.bin, which holds 0 tensors") as caught:
        describe(tmp_path)
    assert caught.value.path == index


@pytest.mark.parametrize("count", [5, 6])
def test_five_names_are_shown_and_more_are_hinted_at(tmp_path: Path, count: int) -> None:
    names = [f"{letter}.safetensors.index.json" for letter in "abcdef"[:count]]
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(IndexFileError) as caught:
        describe(tmp_path)
    shown = ", ".join(names[:5]) + ", …" * (count > 5)
    assert caught.value.message == f"{tmp_path}: holds {count} indexes: {shown}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "not an index: Expected `object`, got `array`"),
        ("{", "not an index: Input data was truncated"),
        ('{"weight_map":1}', "not an index: Expected `object`, got `int`"),
        ('{"weight_map":{}}', "the index lists no tensor"),
        ('{"a":1}', "not an index: it has no weight_map"),
    ],
)
def test_a_file_that_is_no_index_is_pointed_at(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(IndexFileError) as caught:
        describe(tmp_path)
    assert caught.value.message == f"{tmp_path / INDEX}: {message}"
    assert caught.value.path == tmp_path / INDEX
    assert caught.value.hint == "the index is damaged or was written by a faulty tool: fetch it again"


@pytest.mark.parametrize(
    "start", ["<!doctype html>", "<HTML lang=en>", "<?xml version='1.0'?>", "<head>", "\ufeff\r\n\t <body>"]
)
def test_web_pages_are_told_by_how_they_begin(tmp_path: Path, start: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text(f"{start} You have to log in.")
    with pytest.raises(NotACheckpointError, match="a web page, not weights\nhint: the download got an error or log-in"):
        describe(path)


@pytest.mark.needs("proc")
@pytest.mark.skipif(not hasattr(os, "eventfd"), reason="needs a file of no kind")
def test_a_file_of_no_kind_is_refused() -> None:
    """What counts events has a descriptor and a name, and its status says that it is nothing known."""
    descriptor = os.eventfd(0)
    try:
        with pytest.raises(NotACheckpointError, match=r"[0-9]: not a regular file, where a checkpoint"):
            describe(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("extra", [0, 1])
def test_a_path_is_shown_whole_up_to_400_characters(extra: int) -> None:
    path = "d/" * 195 + "m" * (10 + extra)
    with pytest.raises(CheckpointNotFoundError) as caught:
        describe(path)
    shown = caught.value.message.removesuffix(": no such file or folder")
    assert shown == (path if not extra else f"{path[:266]}…{path[-100:]}")


def test_a_file_that_shrinks_under_its_reader_says_by_how_much(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(bytes(9000))
    with open_file(path) as file:
        os.truncate(path, 5000)
        with pytest.raises(FileChangedError) as caught:
            file.read(100, 8200)
    error = caught.value
    assert error.message == f"{path}: ended at byte 5,000 while its header was read, 3,300 bytes early"
    assert error.hint == "something is writing to the file: wait until it is done"
    assert (error.path, error.offset, error.length) == (path, 100, 8200)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file that the system hands out in pieces")
def test_what_the_system_hands_out_in_pieces_is_put_together() -> None:
    """The kernel gives a list of mappings a page at a time; this one is of a process that waits and does not change."""
    program = (
        "import mmap, sys\n"
        "with open(sys.executable, 'rb') as file:\n"
        "    kept = [mmap.mmap(file.fileno(), 4096, access=mmap.ACCESS_READ) for _ in range(200)]\n"
        "print(flush=True)\n"
        "input()\n"
    )
    words = [sys.executable, "-c", program]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as waiting:
        assert waiting.stdout is not None
        waiting.stdout.readline()
        path = Path(f"/proc/{waiting.pid}/maps")
        whole = path.read_bytes()
        descriptor = os.open(path, os.O_RDONLY)
        try:
            found = OpenFile(path, descriptor, FileIdentity(0, 0, len(whole), 0), b"", []).read(7, len(whole) - 7)
        finally:
            os.close(descriptor)
        waiting.communicate("\n")
    assert len(whole) > 2 * 4096
    assert found == whole[7:]
