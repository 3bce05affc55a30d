"""What is done with a hostile input, one target for each reader, and what must hold of whatever comes of it.

Each target gets any bytes and a folder of its own. It returns the error that refused them, or nothing if they were
accepted, and fails an assertion where something else than that happens: another exception, a refusal without the file's
name or a hint, a verdict other than the reference parser's, a range outside the file, code that is run.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import safetensors
from fuzz_compiled import examine_values

from weightlift.errors import EngineError, WeightliftError
from weightlift.formats import compiled, describe, header_decoder, header_scanner
from weightlift.formats.gguf_values import GGUFMetadata
from weightlift.formats.index_file import read_index, reason_to_refuse
from weightlift.formats.model_config import read_config
from weightlift.formats.safetensors import parse_header
from weightlift.manifest import read_manifest
from weightlift.reports.model_summary import summarise_model
from weightlift.types import HeaderRules

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from weightlift.description import Description
    from weightlift.formats.safetensors import Header

Answer = TypeVar("Answer")

MESSAGE_CHARACTERS_MAX: Final = 1000
TENSORS_LOOKED_AT: Final = 64
STORAGE: Final = bytes(range(64))
_FORBIDDEN: Final = frozenset(
    (
        *("exec", "compile", "marshal.loads", "pickle.find_class", "code.__new__", "import", "ctypes.dlopen"),
        *("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "subprocess.Popen"),
        *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate"),
        *("socket.connect", "socket.bind", "shutil.rmtree", "urllib.Request", "ftplib.connect"),
    )
)


class _Watch:
    """What the interpreter says is being done, for as long as somebody watches."""

    def __init__(self) -> None:
        self.watching = False
        self.seen: list[str] = []
        self.installed = False

    def __call__(self, event: str, _: tuple[Any, ...]) -> None:
        if self.watching and event in _FORBIDDEN:
            self.seen.append(event)

    @contextlib.contextmanager
    def nothing_is_run(self) -> Iterator[None]:
        """Fail if code in the block imports, evaluates or starts anything, or changes files."""
        if not self.installed:
            _read_once()
            sys.addaudithook(self)
            self.installed = True
        self.seen, self.watching = [], True
        try:
            yield
        finally:
            self.watching = False
        assert not self.seen, f"did {self.seen}"


_WATCH: Final = _Watch()


def _read_once() -> None:
    """Have imported and found what the first file of a process imports and finds."""
    header = b'{"a":["U8",[1],[0,1]]}'
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + b"x")
        describe(path)
        safetensors.safe_open(path, framework="np")


@dataclass(frozen=True)
class Target:
    """One reader under test.

    Attributes:
        name: what it is called.
        examine: tries an input in a folder.
        is_refusing: whether inputs can be refused at all.
    """

    name: str
    examine: Callable[[bytes, Path], WeightliftError | None]
    is_refusing: bool = True


def attempt(call: Callable[[], Answer], path: Path) -> tuple[Answer | None, WeightliftError | None]:
    """What a call returns or is refused with; refusals are looked at."""
    try:
        with _WATCH.nothing_is_run():
            return call(), None
    except WeightliftError as err:
        _check_refusal(err, path)
        return None, err


def _check_refusal(error: WeightliftError, path: Path) -> None:
    """A refusal blames the file, is short, harms no terminal and says what to do."""
    assert not isinstance(error, EngineError), error
    assert error.hint, error
    assert path.name in error.message, error
    assert str(error.path).startswith(str(path.parent)), error.path
    assert error.message.isprintable(), repr(error.message)
    assert len(error.message) < MESSAGE_CHARACTERS_MAX + len(str(path)), len(error.message)


# ---- safetensors

Contents = tuple[dict[str, tuple[str, tuple[int, ...], bytes]], dict[str, str]]


def _reference(path: Path, content: bytes) -> Contents | None:
    """What the reference parser reads; ``None`` if it refuses the file."""
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError):
        return None
    tensors = {name: (view["dtype"], tuple(view["shape"]), bytes(view["data"])) for name, view in _views(content)}
    return tensors, metadata


def _views(content: bytes) -> list[tuple[str, dict[str, Any]]]:
    views: list[tuple[str, dict[str, Any]]] = safetensors.deserialize(content)
    return views


def _ours(header: Header, content: bytes) -> Contents:
    columns, ends = header.columns, 0
    tensors = {}
    from weightlift.formats.safetensors import DTYPES

    for row, name in enumerate(columns.names):
        begin, ends = ends, ends + columns.ranks[row]
        first, last = (header.data_offset + column[row] for column in (columns.begins, columns.ends))
        tensors[name] = (DTYPES[columns.dtype_codes[row]].name, tuple(columns.dims[begin:ends]), content[first:last])
    return tensors, dict(header.metadata)


@contextlib.contextmanager
def _without_the_library(block_bytes: int) -> Iterator[None]:
    """Read headers without compiled functions, and cut into blocks wherever they can be."""
    library, kept = compiled.library, header_decoder.BLOCK_BYTES
    compiled.library = lambda: None  # type: ignore[assignment]
    header_decoder.BLOCK_BYTES = block_bytes  # type: ignore[misc]
    try:
        yield
    finally:
        compiled.library = library
        header_decoder.BLOCK_BYTES = kept  # type: ignore[misc]


def examine_safetensors(content: bytes, folder: Path) -> WeightliftError | None:
    """A whole file: accepted exactly if the reference parser accepts it, and read as that reads it."""
    path = folder / "model.safetensors"
    path.write_bytes(content)
    expected = _reference(path, content)
    found, error = attempt(lambda: describe(path), path)
    assert (found is None) == (expected is None), f"reference: {expected}, weightlift: {error}"
    if found is not None:
        _check_ranges(found, len(content))
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length]
    if len(content) >= 8 and 0 < length == len(header):
        _check_header(header, content, path, expected)
    return error


def _check_header(header: bytes, content: bytes, path: Path, expected: Contents | None) -> None:
    """Every way to read the header comes to the same."""

    def read(rules: HeaderRules = HeaderRules.REFERENCE) -> Contents | None:
        found, _ = attempt(lambda: parse_header(header, path=path, file_size=len(content), rules=rules), path)
        return None if found is None else _ours(found, content)

    def scan() -> None:
        header_scanner.scan(header, path=str(path), rules=HeaderRules.REFERENCE)

    assert read() == expected
    # What is decoded fast is scanned too, which has to take it.
    _, refused = attempt(scan, path)
    assert refused is None or expected is None, refused
    strict = read(HeaderRules.STRICT)
    assert strict in (None, expected)
    with _without_the_library(block_bytes=1):
        assert read() == expected
        assert read(HeaderRules.STRICT) == strict


def examine_safetensors_header(content: bytes, folder: Path) -> WeightliftError | None:
    """A header alone, behind two bytes that say how many bytes of data follow it."""
    if len(content) < 3:
        return examine_safetensors(content, folder)
    data = int.from_bytes(content[:2], "little")
    header = content[2:]
    return examine_safetensors(len(header).to_bytes(8, "little") + header + bytes(data), folder)


# ---- The other formats


def _check_ranges(description: Description, size: int) -> None:
    """Every tensor lies inside the file."""
    assert len(set(description.names)) == len(description)
    assert description.total_bytes <= size
    for row in range(min(len(description), TENSORS_LOOKED_AT)):
        info = description.tensor(row)
        assert 0 <= info.offset <= info.offset + info.nbytes <= size, info
        assert info.strides is None or len(info.strides) == len(info.shape), info


def examine_gguf(content: bytes, folder: Path) -> WeightliftError | None:
    """A whole GGUF file, by both rules; what is accepted is described to the last value."""
    path = folder / "model.gguf"
    path.write_bytes(content)
    found, error = attempt(lambda: describe(path), path)
    strict, _ = attempt(lambda: describe(path, header=HeaderRules.STRICT), path)
    if found is None:
        assert strict is None
        return error
    _check_ranges(found, len(content))
    if strict is not None:
        assert strict.names == found.names
        assert strict.offsets == found.offsets
    metadata = found.shards[0].metadata
    assert isinstance(metadata, GGUFMetadata)
    for key in metadata:
        stored = metadata.stored(key)
        assert stored is None or str(stored)
        attempt(lambda key=key: metadata[key], path)  # type: ignore[misc]
    summarise_model(found)
    return None


def examine_pytorch(content: bytes, folder: Path) -> WeightliftError | None:
    """A whole PyTorch checkpoint."""
    path = folder / "model.bin"
    path.write_bytes(content)
    found, error = attempt(lambda: describe(path), path)
    if found is not None:
        _check_ranges(found, len(content))
        summarise_model(found)
    return error


def archive_of(pickled: bytes) -> bytes:
    """A PyTorch checkpoint with this pickle and storages ``0`` and ``1`` of 64 bytes each; no checksums."""
    local, directory = bytearray(), bytearray()
    entries = {"m/data.pkl": pickled, "m/data/0": STORAGE, "m/data/1": STORAGE}
    for name, data in entries.items():
        sizes, raw = (0, len(data), len(data)), name.encode()
        directory += struct.pack(
            "<4s6H3L5H2L", b"PK\x01\x02", 0, 0, 0, 0, 0, 0, *sizes, len(raw), 0, 0, 0, 0, 0, len(local)
        )
        directory += raw
        local += struct.pack("<4s5H3L2H", b"PK\x03\x04", 0, 0, 0, 0, 0, *sizes, len(raw), 0) + raw + data
    count = len(entries)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, len(directory), len(local), 0)
    return bytes(local + directory + end)


def examine_pickle(content: bytes, folder: Path) -> WeightliftError | None:
    """The pickle of a PyTorch checkpoint."""
    return examine_pytorch(archive_of(content), folder)


def examine_index(content: bytes, folder: Path) -> WeightliftError | None:
    """An index beside two shards; what it names lies in its folder."""
    for name in "ab":
        shard = folder / f"{name}.safetensors"
        if not shard.exists():
            header = json.dumps({name: {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
            shard.write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    path = folder / "model.safetensors.index.json"
    path.write_bytes(content)
    index, _ = attempt(lambda: read_index(path), path)
    if index is not None:
        root = os.path.realpath(folder)
        for shard in index.shards:
            assert os.path.commonpath([root, os.path.realpath(shard)]) == root, shard
        with contextlib.suppress(ValueError, RecursionError):
            assert json.loads(content)["weight_map"] == index.shard_of
    found, error = attempt(lambda: describe(path), path)
    assert found is None or index is not None
    return error


def examine_manifest(content: bytes, folder: Path) -> WeightliftError | None:
    """A manifest; what is accepted names nothing outside its folder and survives being written."""
    path = folder / "manifest.json"
    path.write_bytes(content)
    manifest, error = attempt(lambda: read_manifest(path), path)
    if manifest is not None:
        assert not any(map(reason_to_refuse, manifest.files))
        assert all(entry.file in manifest.files for entry in manifest.tensors.values())
        path.write_bytes(manifest.to_bytes())
        assert read_manifest(path) == manifest
    return error


def examine_config(content: bytes, folder: Path) -> WeightliftError | None:
    """A ``config.json``, which is never a reason to fail."""
    path = folder / "model.safetensors"
    if not path.exists():
        header = b'{"a.q_proj.qweight":{"dtype":"I32","shape":[2],"data_offsets":[0,8]}}'
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    (folder / "config.json").write_bytes(content)
    with _WATCH.nothing_is_run():
        read_config(folder)
        summarise_model(describe(path))
    return None


TARGETS: Final = {
    target.name: target
    for target in (
        Target("safetensors", examine_safetensors),
        Target("safetensors-header", examine_safetensors_header),
        Target("gguf", examine_gguf),
        Target("pytorch", examine_pytorch),
        Target("pickle", examine_pickle),
        Target("index", examine_index),
        Target("manifest", examine_manifest),
        Target("config", examine_config, is_refusing=False),
        Target("values", examine_values),
    )
}
