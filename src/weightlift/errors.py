"""Every error weightlift raises on purpose, split by whose fault it is.

::

    WeightliftError
    ├── FormatError (ValueError)              the file's contents are wrong
    │   ├── HeaderError                       a header that breaks a rule of its format
    │   ├── TruncatedFileError (EOFError)     the file ends before its header says it does
    │   ├── NotACheckpointError               another kind of file: a git-lfs pointer, a web page, an archive
    │   ├── IndexFileError                    an index that names what is not there or not allowed
    │   ├── ManifestError                     a manifest that is damaged or names what is not allowed
    │   └── UnsupportedDtypeError             a data type that the format or the framework does not have
    ├── CheckpointNotFoundError (FileNotFoundError)
    ├── AccessError (PermissionError)         the file exists and may not be read
    ├── ReadError (OSError)                   the storage failed while reading
    ├── WriteError (OSError)                  a report, trace or manifest could not be written
    ├── IntegrityError (ValueError)           contents differ from those that a manifest vouches for
    ├── FileChangedError                      replaced, truncated or written to after it was opened
    ├── OptionError (ValueError)              a value the caller passed is not one of those possible
    ├── SelectionError (LookupError)          no tensor, or no device, for what was asked
    ├── StateMismatchError (RuntimeError)     ``load_into``: keys or shapes differ from the module's
    ├── BudgetError (MemoryError)             the plan does not fit ``host_memory``
    ├── InsufficientMemoryError (MemoryError) the tensors do not fit this machine
    ├── UnsupportedError (RuntimeError)       this platform or framework cannot do what was asked
    │   └── MissingExtraError (ImportError)   an optional package is not installed
    ├── DeviceError (RuntimeError)            a call to the GPU's runtime failed
    └── EngineError (RuntimeError)            a broken promise inside weightlift itself: please report it

The message says what was found with its numbers; ``hint`` says what to do about it. Both are part of ``str(error)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os


class WeightliftError(Exception):
    """Base of all errors raised by weightlift.

    Attributes:
        message: what was found, one sentence with its numbers.
        hint: what the reader can do about it; may be empty.
        path: the file concerned, or ``None``.
        tensor: the name of the tensor concerned, or ``None``.
        offset: position in the file in bytes, or ``None``.
        length: how many bytes were wanted at ``offset``, or ``None``.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        path: str | os.PathLike[str] | None = None,
        tensor: str | None = None,
        offset: int | None = None,
        length: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.path = path
        self.tensor = tensor
        self.offset = offset
        self.length = length

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class FormatError(WeightliftError, ValueError):
    """The contents of a file break the rules of its format."""


class HeaderError(FormatError):
    """A checkpoint's header breaks a rule of its format."""


class TruncatedFileError(FormatError, EOFError):
    """A file ends before the place where its header says data is."""


class NotACheckpointError(FormatError):
    """The file is something else than a checkpoint, most often a git-lfs pointer."""


class IndexFileError(FormatError):
    """A sharded checkpoint's index names a shard that is missing, or a path it must not name."""


class ManifestError(FormatError):
    """A manifest is damaged, of an unknown schema, or names a path it must not name."""


class UnsupportedDtypeError(FormatError):
    """A tensor's data type is unknown, or the chosen framework has none like it."""


class CheckpointNotFoundError(WeightliftError, FileNotFoundError):
    """There is no checkpoint at the path."""


class AccessError(WeightliftError, PermissionError):
    """The file exists, and this user may not read it."""


class ReadError(WeightliftError, OSError):
    """The operating system failed a read; ``errno`` holds its number."""

    errno: int | None = None


class WriteError(WeightliftError, OSError):
    """A file that weightlift was to write is not there, or is as it was before; ``errno`` holds the system's number."""

    errno: int | None = None


class IntegrityError(WeightliftError, ValueError):
    """What was read is not what the manifest vouches for.

    Attributes:
        tensors: the names of all tensors found to differ; ``tensor`` is the first of them.
    """

    tensors: tuple[str, ...] = ()


class FileChangedError(WeightliftError):
    """A shard was replaced, truncated or written to between opening and the end of the load."""


class OptionError(WeightliftError, ValueError):
    """An option has a value outside what is possible."""


class SelectionError(WeightliftError, LookupError):
    """Nothing matches what was asked for."""


class StateMismatchError(WeightliftError, RuntimeError):
    """The checkpoint's tensors and the module's parameters do not match."""


class BudgetError(WeightliftError, MemoryError):
    """The plan does not fit the host-memory budget.

    Attributes:
        smallest_bytes: the smallest budget that would work.
    """

    def __init__(self, message: str, *, hint: str = "", smallest_bytes: int = 0) -> None:
        super().__init__(message, hint=hint)
        self.smallest_bytes = smallest_bytes


class InsufficientMemoryError(WeightliftError, MemoryError):
    """The tensors asked for do not fit into the memory this machine or its cgroup has left."""


class UnsupportedError(WeightliftError, RuntimeError):
    """This platform, framework or device cannot do what was asked."""


class MissingExtraError(UnsupportedError, ImportError):  # type: ignore[misc] # both have a path, of other types
    """An optional package that the call needs is not installed."""


class DeviceError(WeightliftError, RuntimeError):
    """A call to the GPU's runtime (CUDA or HIP) failed.

    Attributes:
        code: the runtime's error code.
        name: the runtime's name for it, like ``cudaErrorNoDevice``.
        call: which call failed.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        path: str | os.PathLike[str] | None = None,
        tensor: str | None = None,
        offset: int | None = None,
        length: int | None = None,
        code: int = 0,
        name: str = "",
        call: str = "",
    ) -> None:
        super().__init__(message, hint=hint, path=path, tensor=tensor, offset=offset, length=length)
        self.code = code
        self.name = name
        self.call = call


class EngineError(WeightliftError, RuntimeError):
    """Weightlift broke a promise of its own: a defect to report, never the caller's fault."""


def printable(text: str, limit: int = 120) -> str:
    """Make text from a file fit for a message: control characters escaped, the middle of long text left out.

    Args:
        text: any text, for example a tensor name out of a header nobody has checked yet.
        limit: most characters of the result.
    """
    if len(text) <= limit and text.isprintable():
        return text
    head, tail = limit * 2 // 3, limit // 4
    shown = text if len(text) <= limit else f"{text[:head]}…{text[-tail:]}"
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in shown)
    return shown if len(shown) <= limit else f"{shown[:head]}…{shown[-tail:]}"
