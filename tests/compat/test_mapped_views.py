"""Tensors of a handle that maps its file: views made one by one, of one mapping, and refused where the file changed."""

from __future__ import annotations

import errno
import mmap
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from weightlift.compat.safetensors import SafetensorError, safe_open
from weightlift.errors import FileChangedError, InsufficientMemoryError, ReadError
from weightlift.testing import TensorSpec, tensor_bytes, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

SPECS = [TensorSpec(f"layer.{number}", "F32", (64, 256)) for number in range(8)]


class Mapped(safe_open):
    __slots__ = ()
    load_keywords = {"method": "mmap"}  # noqa: RUF012 - a class variable there


class ReadOnly(safe_open):
    __slots__ = ()
    load_keywords = {"method": "mmap", "readonly": True}  # noqa: RUF012 - a class variable there


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model.safetensors", SPECS)


def mappings_of(path: Path) -> int:
    with open("/proc/self/maps", encoding="utf-8") as maps:
        return sum(line.rstrip().endswith(str(path)) for line in maps)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists mappings")
def test_a_handle_maps_its_file_once_and_for_as_long_as_a_tensor_lives(path: Path) -> None:
    file = Mapped(path, framework="pt")
    assert mappings_of(path) == 0
    tensors = [file.get_tensor(SPECS[0].name), file.get_tensor(SPECS[0].name), file.get_slice(SPECS[3].name)[2:4]]
    assert mappings_of(path) == 1
    assert not file.reports
    del file
    assert tensors[1].numpy().tobytes() == tensor_bytes(SPECS[0])
    assert tensors[2].numpy().tobytes() == tensor_bytes(SPECS[3])[2 * 1024 : 4 * 1024]
    tensors.clear()
    assert mappings_of(path) == 0


def test_views_are_private_and_may_be_written_to(path: Path) -> None:
    tensor = Mapped(path, framework="pt").get_tensor(SPECS[1].name)
    tensor.zero_()
    assert Mapped(path, framework="pt").get_tensor(SPECS[1].name).numpy().tobytes() == tensor_bytes(SPECS[1])


def test_read_only_views_are_not_written_to(path: Path) -> None:
    array = ReadOnly(path, framework="np").get_tensor(SPECS[1].name)
    assert not array.flags.writeable
    assert ReadOnly(path, framework="pt").get_tensor(SPECS[1].name).numpy().tobytes() == tensor_bytes(SPECS[1])


def test_threads_that_come_first_together_share_the_mapping(path: Path) -> None:
    file = Mapped(path, framework="np")
    with ThreadPoolExecutor(8) as threads:
        arrays = list(threads.map(file.get_tensor, [spec.name for spec in SPECS] * 20))
    bases = {id(array.base if isinstance(array.base, mmap.mmap) else array.base.obj) for array in arrays}
    assert len(bases) == 1
    assert all(array.tobytes() == tensor_bytes(spec) for array, spec in zip(arrays, SPECS * 20, strict=True))


def test_misplaced_tensors_are_read(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "odd.safetensors", SPECS, padding=1)
    file = Mapped(path, framework="pt")
    for spec in SPECS:
        assert file.get_tensor(spec.name).numpy().tobytes() == tensor_bytes(spec)


def test_a_file_that_shrank_is_refused_before_anything_is_touched(path: Path) -> None:
    file = Mapped(path, framework="pt")
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(SafetensorError, match=f"{size:,} to {size - 1:,} bytes after it was opened"):
        file.get_tensor(SPECS[0].name)


def test_a_file_that_was_written_to_is_refused(path: Path) -> None:
    file = Mapped(path, framework="pt")
    with path.open("ab") as more:
        more.write(b"more")
    with pytest.raises(FileChangedError, match="written to after it was opened"):
        file.get_tensor(SPECS[0].name)


@pytest.mark.parametrize(("number", "expected"), [(errno.ENOMEM, InsufficientMemoryError), (errno.ENODEV, ReadError)])
def test_a_file_that_cannot_be_mapped(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: type[Exception]
) -> None:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise OSError(number, os.strerror(number))

    file = Mapped(path, framework="pt")
    monkeypatch.setattr("mmap.mmap", refuse)
    with pytest.raises(expected, match="cannot be mapped"):
        file.get_tensor(SPECS[0].name)
