"""Which files make a checkpoint: folders, indexes, links, and what is refused about them."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from weightlift.errors import (
    AccessError,
    CheckpointNotFoundError,
    FileChangedError,
    HeaderError,
    IndexFileError,
    NotACheckpointError,
    TruncatedFileError,
)
from weightlift.formats import describe
from weightlift.formats.files import open_file
from weightlift.formats.safetensors import read_shard
from weightlift.testing import TensorSpec, write_checkpoint
from weightlift.types import HeaderRules

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

SPECS = [TensorSpec(f"t{n}", "F32", (n + 1, 2)) for n in range(6)]
NAMES = [spec.name for spec in SPECS]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", SPECS, shards=3)


def rewrite(folder: Path, **changes: object) -> None:
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"].update(changes)
    (folder / INDEX).write_text(json.dumps(content))


def shard_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def test_index_found_named_or_absent_gives_the_same(sharded: Path) -> None:
    by_folder = describe(sharded)
    assert sorted(by_folder.names) == NAMES
    assert [shard.path.name for shard in by_folder.shards] == shard_names(sharded)
    assert describe(str(sharded / INDEX)).names == by_folder.names
    (sharded / INDEX).unlink()
    assert describe(sharded).names == by_folder.names


def test_an_index_of_another_name_is_found_if_alone(sharded: Path) -> None:
    (sharded / INDEX).rename(sharded / "consolidated.safetensors.index.json")
    write_checkpoint(sharded / "extra.safetensors", [TensorSpec("extra", "U8", (1,))])
    assert sorted(describe(sharded).names) == NAMES


def test_hidden_files_are_left_out(sharded: Path) -> None:
    (sharded / f"._{shard_names(sharded)[0]}").write_bytes(b"\0\5\x16\7")
    (sharded / f"._{INDEX}").write_bytes(b"\0\5\x16\7")
    assert sorted(describe(sharded).names) == NAMES
    (sharded / INDEX).unlink()
    assert sorted(describe(sharded).names) == NAMES


def test_several_indexes(sharded: Path) -> None:
    (sharded / "other.safetensors.index.json").write_text('{"weight_map":{"x":"y"}}')
    assert sorted(describe(sharded).names) == NAMES
    (sharded / INDEX).rename(sharded / "third.safetensors.index.json")
    with pytest.raises(IndexFileError, match=r"2 indexes: other.*third.*\nhint: name the one"):
        describe(sharded)


def test_shards_without_index_that_repeat_a_tensor(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    write_checkpoint(sharded / "z.safetensors", [SPECS[0]])
    with pytest.raises(IndexFileError, match=r"z\.safetensors: holds tensor 't0', and so does model-00001"):
        describe(sharded)


def test_an_index_decides_between_two_copies(sharded: Path) -> None:
    write_checkpoint(sharded / "z.safetensors", [SPECS[0], TensorSpec("unlisted", "U8", (1,))])
    rewrite(sharded, t0="z.safetensors")
    description = describe(sharded)
    assert sorted(description.names) == [*NAMES, "unlisted"]
    assert description.tensor(description.row("t0")).path.name == "z.safetensors"


def test_unlisted_tensor_in_two_shards(sharded: Path) -> None:
    content = json.loads((sharded / INDEX).read_text())
    first = content["weight_map"].pop("t0")
    write_checkpoint(sharded / "z.safetensors", [SPECS[0], TensorSpec("listed", "U8", (1,))])
    content["weight_map"] |= {"listed": "z.safetensors"}
    (sharded / INDEX).write_text(json.dumps(content))
    with pytest.raises(IndexFileError, match=f"z.safetensors: holds tensor 't0', and so does {first}"):
        describe(sharded)


def test_listed_tensor_that_the_shard_does_not_hold(sharded: Path) -> None:
    rewrite(sharded, ghost=shard_names(sharded)[1])
    with pytest.raises(IndexFileError, match="tensor 'ghost' is in model-00002") as caught:
        describe(sharded)
    assert caught.value.tensor == "ghost"


def test_missing_shards(sharded: Path) -> None:
    first, second, _ = shard_names(sharded)
    (sharded / second).unlink()
    with pytest.raises(
        IndexFileError, match=rf"its shard {second} is missing; 2 of 3 shards are there .*\nhint: resume"
    ):
        describe(sharded)
    (sharded / first).unlink()
    with pytest.raises(IndexFileError, match=f"{first} and 1 more is missing; 1 of 3"):
        describe(sharded)


def test_a_broken_shard_is_named(sharded: Path) -> None:
    path = sharded / shard_names(sharded)[1]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TruncatedFileError, match="model-00002-of-00003"):
        describe(sharded)


@pytest.mark.parametrize(
    ("shard", "reason"),
    [
        ("../other.safetensors", "leads out"),
        ("sub/../../x.safetensors", "leads out"),
        ("..", "leads out"),
        ("/etc/passwd", "absolute"),
        ("C:\\x.safetensors", "backslash"),
        ("C:x.safetensors", "absolute"),
        ("a\\..\\..\\x.safetensors", "backslash"),
        ("a\0.safetensors", "NUL"),
        ("", "empty"),
        (".", "a folder"),
    ],
)
def test_shard_names_that_an_index_must_not_have(sharded: Path, shard: str, reason: str) -> None:
    rewrite(sharded, evil=shard)
    with pytest.raises(IndexFileError, match=reason) as caught:
        describe(sharded)
    assert caught.value.tensor == "evil"


def test_shards_in_sub_folders_and_other_spellings(sharded: Path) -> None:
    first = shard_names(sharded)[0]
    (sharded / "sub").mkdir()
    write_checkpoint(sharded / "sub" / "x.safetensors", [TensorSpec("x", "U8", (1,))])
    rewrite(sharded, x="sub/x.safetensors", t0=f"./{first}")
    assert sorted(describe(sharded).names) == [*NAMES, "x"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "not an index"),
        ("{", "not an index"),
        ('{"a":1}', "no weight_map"),
        ('{"weight_map":{}}', "lists no tensor"),
        ('{"weight_map":{"a":1}}', "not an index"),
        ('{"weight_map":null}', "not an index"),
        ("", "empty"),
        ("version https://git-lfs.github.com/spec/v1", "git-lfs pointer"),
    ],
)
def test_files_that_are_no_index(sharded: Path, content: str, words: str) -> None:
    (sharded / INDEX).write_text(content)
    with pytest.raises((IndexFileError, NotACheckpointError), match=words):
        describe(sharded)


def cached(tmp_path: Path, revisions: tuple[str, ...] = ("abc123",), main: str | None = "abc123") -> Path:
    """A Hugging Face cache entry: files in ``blobs``, links to them in ``snapshots/<revision>``."""
    entry = tmp_path / "models--org--name"
    blobs = entry / "blobs"
    blobs.mkdir(parents=True)
    source = write_checkpoint(tmp_path / "source", SPECS, shards=2)
    for number, file in enumerate(sorted(source.iterdir())):
        (blobs / f"{number:064x}").write_bytes(file.read_bytes())
    for revision in revisions:
        snapshot = entry / "snapshots" / revision
        snapshot.mkdir(parents=True)
        for number, file in enumerate(sorted(source.iterdir())):
            (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
    if main is not None:
        (entry / "refs").mkdir()
        (entry / "refs" / "main").write_text(f"{main}\n")
    return entry


def test_cache_entry(tmp_path: Path) -> None:
    entry = cached(tmp_path, ("abc123", "def456"))
    snapshot = entry / "snapshots" / "abc123"
    description = describe(entry)
    assert sorted(description.names) == NAMES
    assert {shard.path.parent for shard in description.shards} == {snapshot}
    assert describe(snapshot).names == description.names
    assert describe(snapshot / INDEX).names == description.names
    (one,) = describe(snapshot / shard_names(snapshot)[0]).shards
    assert one.identity.inode == one.path.resolve().stat().st_ino
    describe(one.path.resolve())


def test_cache_entry_without_main(tmp_path: Path) -> None:
    entry = cached(tmp_path, main=None)
    assert sorted(describe(entry).names) == NAMES


@pytest.mark.parametrize("main", [None, "../..", "0" * 4000])
def test_cache_entry_with_several_snapshots_and_no_usable_main(tmp_path: Path, main: str | None) -> None:
    entry = cached(tmp_path, ("abc123", "def456"), main=main)
    with pytest.raises(CheckpointNotFoundError, match=r"2 snapshots.*\nhint: .*abc123, def456"):
        describe(entry)


def test_cache_entry_whose_blob_is_gone(tmp_path: Path) -> None:
    entry = cached(tmp_path)
    shard = next((entry / "snapshots" / "abc123").glob("*.safetensors"))
    shard.resolve().unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"link to .*blobs.* does not exist"):
        describe(shard)
    with pytest.raises(IndexFileError, match="1 of 2 shards are there"):
        describe(entry)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ((), "the folder is empty"),
        (("training_args.bin", "optimizer.pt"), r"another kind: 1 \.bin \(PyTorch\), 1 \.pt \(PyTorch\)"),
        (("model.h5", "model.onnx"), r"1 \.h5 \(HDF5\), 1 \.onnx"),
        (("config.json", "README"), r"2 entries \(.*\.json"),
        (("models--a--b",), "a cache"),
    ],
)
def test_folder_without_checkpoint(tmp_path: Path, files: tuple[str, ...], words: str) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointNotFoundError, match=f"no safetensors, GGUF or PyTorch file.*\nhint: .*{words}"):
        describe(tmp_path)


def test_nothing_at_the_path(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to("circle")
    for name in ("missing", "file/below", "nul\0", "x" * 300, "circle"):
        with pytest.raises(CheckpointNotFoundError) as caught:
            describe(tmp_path / name)
        assert caught.value.hint


def test_special_files_are_refused_without_waiting(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    with pytest.raises(NotACheckpointError, match="a pipe"):
        describe(pipe)
    with pytest.raises(NotACheckpointError, match="a device"):
        describe("/dev/null")
    with socket.socket(socket.AF_UNIX) as endpoint:
        try:
            endpoint.bind(str(tmp_path / "s"))
        except OSError:
            pytest.skip("the path of the temporary folder is too long for a socket")
        with pytest.raises(NotACheckpointError, match="a socket"):
            describe(tmp_path / "s")


def test_a_file_that_shrinks_while_its_header_is_read(tmp_path: Path) -> None:
    # More than what is read of any file to see what it is.
    path = write_checkpoint(tmp_path / "x.safetensors", [TensorSpec(f"tensor.{n}", "U8", (1,)) for n in range(200)])
    with open_file(path) as file:
        os.truncate(path, 100)
        with pytest.raises(FileChangedError, match="ended at byte 100 while its header was read"):
            read_shard(file, HeaderRules.REFERENCE)


def test_a_folder_named_like_a_shard(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(NotACheckpointError, match=r"model\.safetensors: a folder"):
        describe(tmp_path)


CACHED = "models--org--name"


@pytest.mark.parametrize(
    ("closed", "described"),
    [
        ("model", "model"),
        ("model/model-00001-of-00003.safetensors", "model"),
        ("model/model-00002-of-00003.safetensors", "model/model-00002-of-00003.safetensors"),
        (f"{CACHED}/refs/main", CACHED),
        (f"{CACHED}/snapshots", CACHED),
    ],
)
def test_what_may_not_be_read_is_named(
    sharded: Path,
    tmp_path: Path,
    ordinary_user: Callable[[], AbstractContextManager[None]],
    closed: str,
    described: str,
) -> None:
    cached(tmp_path)
    describe(described)
    mode = Path(closed).stat().st_mode
    Path(closed).chmod(0)
    try:
        with ordinary_user(), pytest.raises(AccessError, match=r"permission denied\nhint: read permission") as caught:
            describe(described)
    finally:
        Path(closed).chmod(mode)
    assert str(caught.value.path) == closed
    assert isinstance(caught.value, PermissionError)


def test_cache_entry_without_a_snapshot(tmp_path: Path) -> None:
    entry = cached(tmp_path, ())
    (entry / "snapshots").mkdir()
    with pytest.raises(CheckpointNotFoundError, match="a cache entry without a snapshot\nhint: download the model"):
        describe(entry)


def test_strict_rules_reach_the_shards(sharded: Path) -> None:
    path = sharded / shard_names(sharded)[2]
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    path.write_bytes((length + 1).to_bytes(8, "little") + b" " + raw[8:])
    describe(sharded)
    with pytest.raises(HeaderError, match="model-00003"):
        describe(sharded, header=HeaderRules.STRICT)
