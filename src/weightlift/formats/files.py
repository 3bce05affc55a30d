"""Opening checkpoint files and reading their headers, and telling other kinds of files apart.

Owns the file descriptors that are open while headers are read, and turns what the operating system says into typed
errors. Knows of formats only their first bytes, and those of common mistakes. Never blocks on a pipe and never reads
data that nobody asked for.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from weightlift.description import FileIdentity
from weightlift.errors import AccessError, CheckpointNotFoundError, FileChangedError, NotACheckpointError, ReadError
from weightlift.errors import printable as _printable
from weightlift.host import kernel, residency
from weightlift.units import PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from weightlift.errors import WeightliftError

HEAD_BYTES: Final = PAGE_BYTES
"""One page, which is what reading less would bring into the page cache too; many a small file's header fits into it."""

GGUF_MAGIC: Final = b"GGUF"
ZIP_MAGIC: Final = b"PK\x03\x04"
"""Before each file in a zip archive, and so at its begin."""

_OPEN_FLAGS: Final = (
    os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
)
_PLAIN_SUFFIX: Final = ".safetensors"
_SPECIAL_FILES: Final[tuple[tuple[Callable[[int], bool], str], ...]] = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class OpenFile(Struct):
    """A regular file open for reading, valid inside the ``with`` block of :func:`open_file`.

    Attributes:
        path: the file as it was named.
        descriptor: its file descriptor.
        identity: size, inode and modification time when it was opened.
        head: its first bytes, at most ``HEAD_BYTES``.
        brought_in: offset and length of what reading has brought into the page cache.
        kept: the descriptor is no longer closed at the end of the block.
    """

    path: Path
    descriptor: int
    identity: FileIdentity
    head: bytes
    brought_in: list[tuple[int, int]]
    kept: bool = False

    def keep(self) -> int:
        """The descriptor, which is the caller's to close from now on."""
        self.kept = True
        return self.descriptor

    def read(self, offset: int, length: int) -> bytes:
        """Read exactly ``length`` bytes from ``offset``; the range must lie within ``identity.size_bytes``.

        Raises:
            FileChangedError: the file became shorter since it was opened.
            ReadError: the operating system failed the read.
        """
        if offset + length <= len(self.head):
            return self.head[offset : offset + length]
        return _read_exactly(self.path, self.descriptor, offset, length, self.brought_in)


@contextmanager
def open_file(path: Path) -> Iterator[OpenFile]:
    """Open a regular file for reading; unless it is kept, the descriptor is closed at the end of the ``with`` block.

    Raises:
        CheckpointNotFoundError: nothing is at the path.
        AccessError: the user may not read it.
        NotACheckpointError: it is a folder, pipe, socket or device.
        ReadError: the operating system refused for another reason.
    """
    # Opening a device can have effects and opening a pipe can wait, so look first, unless no device is called
    # that. The file is looked at again once it is open, since it may have been exchanged in between.
    name = os.fspath(path)
    if not name.endswith(_PLAIN_SUFFIX):
        _require_regular(path, file_status(path).st_mode)
    try:
        descriptor = kernel.open_quickly(name, _OPEN_FLAGS)
    except ValueError as err:
        raise _impossible(path, err) from err
    except OSError as err:
        _require_regular(path, file_status(path).st_mode)
        raise access_failure(path, err) from err
    file: OpenFile | None = None
    try:
        status, mode = kernel.file_status_and_mode(descriptor)
        _require_regular(path, mode)
        brought_in: list[tuple[int, int]] = []
        head = _read_exactly(path, descriptor, 0, min(HEAD_BYTES, status.size_bytes), brought_in)
        file = OpenFile(path, descriptor, FileIdentity(*status), head, brought_in)
        yield file
    finally:
        if file is None or not file.kept:
            kernel.close_quickly(descriptor)


def file_status(path: Path) -> os.stat_result:
    """The status of the file behind ``path``, links followed.

    Raises:
        CheckpointNotFoundError: nothing is at the path, or it is a link to nothing.
        AccessError: a folder on the way may not be entered.
        ReadError: the operating system refused for another reason.
    """
    try:
        return path.stat()
    except ValueError as err:
        raise _impossible(path, err) from err
    except OSError as err:
        raise access_failure(path, err) from err


def _impossible(path: Path, err: ValueError) -> CheckpointNotFoundError:
    return CheckpointNotFoundError(f"{shown_path(path)}: not a possible path: {err}", hint="check the path", path=path)


def access_failure(path: Path, err: OSError) -> WeightliftError:
    """The typed error that stands for the operating system's answer to opening, listing or looking at ``path``."""
    shown = shown_path(path)
    if err.errno in (errno.EACCES, errno.EPERM):
        return AccessError(
            f"{shown}: permission denied",
            hint="read permission is needed for the file and for every folder on the way to it: see `namei -l` and "
            "`ls -l`, or run as a user who may read it",
            path=path,
        )
    if err.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
        return _not_found(path, err)
    failure = ReadError(
        f"{shown}: {os.strerror(err.errno) if err.errno else err}",
        hint="the storage or its file system reports a failure: see the kernel log (`dmesg`)",
        path=path,
    )
    failure.errno = err.errno
    return failure


def _not_found(path: Path, err: OSError) -> CheckpointNotFoundError:
    shown = shown_path(path)
    if err.errno == errno.ELOOP:
        return CheckpointNotFoundError(f"{shown}: symbolic links lead in a circle", hint="remove the link", path=path)
    if os.path.islink(path):
        target = _printable(os.readlink(path), 400)
        return CheckpointNotFoundError(
            f"{shown}: a symbolic link to {target}, which does not exist",
            hint="download the file again: the file that the link stands for was moved or deleted",
            path=path,
        )
    return CheckpointNotFoundError(f"{shown}: no such file or folder", hint="check the path", path=path)


def _require_regular(path: Path, mode: int) -> None:
    if stat.S_ISREG(mode):
        return
    kind = next((name for is_kind, name in _SPECIAL_FILES if is_kind(mode)), "not a regular file")
    raise NotACheckpointError(
        f"{shown_path(path)}: {kind}, where a checkpoint file is expected",
        hint="weights are read at many positions at once, so they have to be in a regular file",
        path=path,
    )


def _read_exactly(path: Path, descriptor: int, offset: int, length: int, brought_in: list[tuple[int, int]]) -> bytes:
    absent = residency.absent_in(descriptor, offset, length)
    if absent == []:
        cached = kernel.read_cached(descriptor, offset, length)
        if cached is not None and len(cached) == length:
            return cached
    brought_in += absent or []
    kernel.read_ahead_nothing(descriptor)
    parts: list[bytes] = []
    missing = length
    try:
        os.lseek(descriptor, offset, os.SEEK_SET)
        while missing:
            part = os.read(descriptor, missing)
            if not part:
                raise FileChangedError(
                    f"{shown_path(path)}: ended at byte {offset + length - missing:,} while its header was read, "
                    f"{missing:,} bytes early",
                    hint="something is writing to the file: wait until it is done",
                    path=path,
                    offset=offset,
                    length=length,
                )
            parts.append(part)
            missing -= len(part)
    except OSError as err:
        raise access_failure(path, err) from err
    return parts[0] if len(parts) == 1 else b"".join(parts)


def shown_path(path: Path) -> str:
    """A path as messages print it."""
    return _printable(str(path), 400)


def is_gguf(head: bytes) -> bool:
    """Whether a file that begins so is of llama.cpp's format."""
    return head.startswith(GGUF_MAGIC)


def is_zip(head: bytes) -> bool:
    """Whether a file that begins so is a zip archive, as PyTorch's checkpoints are.

    A safetensors header of 64 MiB may begin with the same four bytes; it goes on with four zeros and a brace.
    """
    return head.startswith(ZIP_MAGIC) and not head[4:].startswith((b"\0\0\0\0{", b"\0\0\0\0 "))


# What people point a loader at by mistake, recognised by first bytes: (test, what it is, what to do).
_Kind = tuple["Callable[[bytes], bool]", str, str]


def _starts(*prefixes: bytes) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(prefixes)


def _is_web_page(head: bytes) -> bool:
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:64].lower()
    return start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body"))


_CONVERT: Final = "convert it to safetensors first, in a sandbox if you do not trust it: loading it can run code"
_SAVE_AGAIN: Final = (
    "load it with torch.load(…, weights_only=True) and save it again with torch.save, which writes the zip format"
)
_OTHER_KINDS: Final[tuple[_Kind, ...]] = (
    (lambda head: not head, "the file is empty", "the download did not begin, or the disk was full: fetch it again"),
    (
        _starts(b"version https://git-lfs"),
        "a git-lfs pointer file, not the weights it stands for",
        "run `git lfs install && git lfs pull` in its repository, or download the file itself",
    ),
    (_is_web_page, "a web page, not weights", "the download got an error or log-in page: fetch the file again"),
    (_starts(b"PK\x05\x06"), "an empty zip archive", "the download or conversion failed: fetch the file again"),
    (
        _starts(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"),
        "a PyTorch checkpoint of the format used before 2020, whose tensors cannot be found without running a pickle",
        _SAVE_AGAIN,
    ),
    (
        lambda head: head[257:262] == b"ustar" or head.startswith((b"sys_info\0", b"pickle\0", b"storages\0")),
        "a tar archive, PyTorch's format of 2016",
        _SAVE_AGAIN,
    ),
    (
        _starts(b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
        "a Python pickle, in which tensors cannot be found without running it",
        _CONVERT,
    ),
    (_starts(b"\x89HDF\r\n\x1a\n"), "an HDF5 file, not safetensors", "convert it to safetensors first"),
    (_starts(b"\x1f\x8b", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"), "a compressed file", "decompress it first"),
    (_starts(b"\x93NUMPY"), "a NumPy array file", "convert it to safetensors first"),
    (_starts(b'{"', b"{\n", b"{ ", b"{\r"), "a JSON text, not weights", "name the model's folder or a weight file"),
    (lambda head: not head.strip(b"\0"), "nothing but zeros at its beginning", "the download is incomplete: resume it"),
)


def recognise_other_kind(path: Path, head: bytes) -> NotACheckpointError | None:
    """What a file is, going by its first bytes, if it is one of the things named by mistake.

    To be asked only about files that cannot be a checkpoint: eight bytes of a valid header length may look like
    anything.
    """
    for is_kind, what, hint in _OTHER_KINDS:
        if is_kind(head):
            return NotACheckpointError(f"{shown_path(path)}: {what}", hint=hint, path=path)
    return None
