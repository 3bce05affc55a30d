"""Files that weightlift writes: there whole or not at all, and private until they are.

Owns writing beside the place where a file is to be, putting it there in one step, and the error where that fails. Knows
nothing of what is written.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from typing import TYPE_CHECKING, Any, Final

from weightlift.errors import WriteError, printable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import IO, Self

PREFIX: Final = ".weightlift-"
"""How the names of unfinished files begin."""

_ESCAPED: Final = "backslashreplace"
_PATH_CHARACTERS_MAX: Final = 400
_HINTS: Final = {
    errno.ENOSPC: "the disk is full: free some space, or name a file on another disk",
    errno.EDQUOT: "the quota is used up: free some space, or name a file on another disk",
    errno.EROFS: "the file system may only be read: name a file on another one",
    errno.EACCES: "write permission is needed for the folder: see `ls -ld`, or name a file somewhere else",
    errno.EPERM: "write permission is needed for the folder: see `ls -ld`, or name a file somewhere else",
    errno.ENOENT: "make the folder first, or name a file in one that is there",
    errno.ENOTDIR: "make the folder first, or name a file in one that is there",
    errno.EISDIR: "name a file, not a folder",
    errno.EFBIG: "the file is larger than the file system or a limit (`ulimit -f`) allows: name a file on another disk",
}
_OTHER_HINT: Final = "the storage or its file system reports a failure: see the kernel log (`dmesg`)"


def write_failure(path: str | os.PathLike[str], err: OSError) -> WriteError:
    """The typed error that stands for the operating system's answer to writing a file."""
    reason = os.strerror(err.errno) if err.errno else str(err)
    failure = WriteError(
        f"{printable(os.fspath(path), _PATH_CHARACTERS_MAX)}: could not be written: {reason}",
        hint=_HINTS.get(err.errno or 0, _OTHER_HINT),
        path=path,
    )
    failure.errno = err.errno
    return failure


@contextlib.contextmanager
def write_failures(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what the operating system says in a ``with`` block that writes a file into the typed error.

    A broken pipe is left as it is: who read from it has seen enough.

    Raises:
        WriteError: there was an ``OSError``.
    """
    try:
        yield
    except (WriteError, BrokenPipeError):
        raise
    except OSError as err:
        raise write_failure(path, err) from err


class NewFile:
    """A file that is at its place once it is written, and never in part.

    Until then it lies in the same folder under another name, readable by its owner only. A file that is there already
    stays as it is until then, and for good if anything goes wrong; its permissions are kept. Links are followed. What
    is no regular file, such as a pipe or a terminal, is written to as it is.

    At the end of its ``with`` block, a file that was not written is gone.

    Args:
        path: the file.
        binary: it takes bytes; otherwise text, in UTF-8, in which what cannot be encoded is escaped.

    Raises:
        WriteError: it cannot be written there.
    """

    def __init__(self, path: str | os.PathLike[str], *, binary: bool = False) -> None:
        self._path = path
        form: dict[str, Any] = {"mode": "wb"} if binary else {"mode": "w", "encoding": "utf-8", "errors": _ESCAPED}
        with write_failures(path):
            self._permissions = _permissions(path)
            self._place, self._unfinished = os.path.realpath(path), ""
            if self._permissions is None:
                self._file: IO[Any] = open(path, **form)  # noqa: SIM115 - closed in __exit__
            else:
                descriptor, self._unfinished = tempfile.mkstemp(prefix=PREFIX, dir=os.path.dirname(self._place))
                self._file = open(descriptor, **form)  # noqa: SIM115 - closed in __exit__

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # What is still to be flushed belongs to a file that failed, and fails again.
        with contextlib.suppress(OSError):
            self._file.close()
        if self._unfinished:
            with contextlib.suppress(OSError):
                os.unlink(self._unfinished)

    @contextlib.contextmanager
    def writing(self) -> Iterator[IO[Any]]:
        """The stream to write to; at the end of the ``with`` block the file is put at its place.

        Raises:
            WriteError: what is written does not fit, or the file cannot be put at its place.
        """
        with write_failures(self._path):
            yield self._file
            self._file.flush()
            if self._permissions is not None:
                os.fsync(self._file.fileno())
                os.chmod(self._unfinished, self._permissions)
                os.replace(self._unfinished, self._place)
                self._unfinished = ""


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str], *, binary: bool = False) -> Iterator[IO[Any]]:
    """The stream of a :class:`NewFile` of which nothing is to be known before it is written.

    Raises:
        WriteError: it cannot be written.
    """
    with NewFile(path, binary=binary) as new, new.writing() as stream:
        yield stream


def _permissions(path: str | os.PathLike[str]) -> int | None:
    """Those of the file that is there, or of a new one; ``None`` for what cannot be replaced by a file.

    Raises:
        OSError: it is a folder, or the folder it is to lie in cannot be looked into.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        # The mask can only be read by setting it; one that is stricter for a moment does no harm.
        mask = os.umask(0o077)
        os.umask(mask)
        return 0o666 & ~mask
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    return stat.S_IMODE(mode) if stat.S_ISREG(mode) else None
