"""What formats make of the operating system's refusals: each is a typed error that names the file."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from weightlift.description import FileIdentity
from weightlift.errors import ReadError
from weightlift.formats import describe
from weightlift.formats.files import OpenFile
from weightlift.formats.model_config import read_config
from weightlift.testing import TensorSpec, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

SPECS = [TensorSpec("t", "F32", (4, 2))]


def test_a_configuration_that_may_not_be_read_says_nothing(
    tmp_path: Path, ordinary_user: Callable[[], AbstractContextManager[None]]
) -> None:
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert read_config(Path()) == {"a": 1}
    (tmp_path / "config.json").chmod(0)
    with ordinary_user():
        assert read_config(Path()) == {}


def test_no_descriptor_left_to_open_a_file_with(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", SPECS)
    describe(path)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(ReadError, match="Too many open files") as caught:
            describe(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert (caught.value.errno, caught.value.path) == (errno.EMFILE, path)
    assert describe(path).names == ["t"]


def test_a_read_that_fails(tmp_path: Path) -> None:
    """A folder opens for reading as a file does, and reading it fails."""
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        file = OpenFile(tmp_path, descriptor, FileIdentity(0, 0, 4096, 0), b"", [])
        with pytest.raises(ReadError, match="Is a directory") as caught:
            file.read(0, 100)
    finally:
        os.close(descriptor)
    assert (caught.value.errno, caught.value.path) == (errno.EISDIR, tmp_path)
