"""Every knob of a load: its default, its check, and the environment variable that sets it.

This is the only place with defaults and the only reader of environment variables. An option given by the caller beats
the environment, the environment beats the default.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

from msgspec import Struct, field
from msgspec.structs import force_setattr

from weightlift.errors import BudgetError, OptionError
from weightlift.manifest import Manifest
from weightlift.recording import Recording
from weightlift.types import CachePolicy, EngineName, Framework, HeaderRules, Method, Staging
from weightlift.units import MIB, PAGE_BYTES, format_bytes, parse_bytes

if TYPE_CHECKING:
    import enum


DEFAULT_HOST_MEMORY_BYTES: Final = 128 * MIB
SMALLEST_HOST_MEMORY_BYTES: Final = 8 * MIB
WORKERS_MAX: Final = 64
CHUNK_BYTES_MIN: Final = 64 * 1024
CHUNK_BYTES_MAX: Final = 64 * MIB
DEQUANTIZE_BYTES: Final = 2 * MIB
"""Host memory that turning quantised blocks into floating point takes beside the slots."""
DEFAULT_WATCH_SECONDS: Final = 30.0
WATCH_SECONDS_MAX: Final = 86_400.0
_WATCH_HINT: Final = f"from 0 (never) to {WATCH_SECONDS_MAX:.0f} seconds"

ENVIRONMENT: Final[dict[str, str]] = {
    "WEIGHTLIFT_METHOD": "the read path: auto, mmap, direct or buffered",
    "WEIGHTLIFT_CACHE": "what happens to the page cache: auto, keep or drop",
    "WEIGHTLIFT_HOST_MEMORY": "the host-memory budget, for example 128MiB",
    "WEIGHTLIFT_ENGINE": "which engine moves the bytes: auto, native or python",
    "WEIGHTLIFT_WORKERS": "a fixed number of reading threads instead of one found while loading",
    "WEIGHTLIFT_CHUNK": "a fixed chunk size instead of one found while loading, for example 4MiB",
    "WEIGHTLIFT_WATCH": "after how many seconds without progress a load says on stderr what it waits for; 0 for never",
    "WEIGHTLIFT_ENGINE_LIBRARY": "path of another build of the native engine",
    "WEIGHTLIFT_PATCH": "1 puts weightlift under safetensors in every Python program that starts",
    "WEIGHTLIFT_UNTESTED_VERSIONS": "1 lets integrations work with framework versions they were not tried with",
    "WEIGHTLIFT_GPU_RUNTIME": "path of the CUDA or HIP runtime to use instead of the one the framework has loaded",
}
"""Every environment variable that weightlift reads, and what it sets."""

_Choice = TypeVar("_Choice", bound="enum.StrEnum")


def from_environment(name: str) -> str | None:
    """The value of one of the variables in :data:`ENVIRONMENT`; an empty one counts as unset."""
    assert name in ENVIRONMENT
    return os.environ.get(name) or None


def _choice(kind: type[_Choice], value: object, option: str) -> _Choice:
    try:
        return kind(str(value))
    except ValueError as err:
        accepted = ", ".join(repr(member.value) for member in kind)
        raise OptionError(f"{option}={value!r} is not possible", hint=f"{option} is one of {accepted}") from err


def default_host_memory() -> int:
    """The host-memory budget where none is given, which the environment may say.

    Raises:
        OptionError: what it says is no number of bytes.
        BudgetError: it is under the smallest possible budget.
    """
    return _checked_budget(from_environment("WEIGHTLIFT_HOST_MEMORY") or DEFAULT_HOST_MEMORY_BYTES)


def _default(variable: str, default: str) -> Callable[[], str]:
    return lambda: from_environment(variable) or default


class LoadOptions(Struct, frozen=True, kw_only=True):
    """How to load; every value is checked when the object is made.

    Attributes:
        method: the read path: ``auto``, ``mmap``, ``direct`` or ``buffered``.
        cache: what happens to the page cache: ``auto``, ``keep`` or ``drop``.
        host_memory: bound on slots, buffers and in-flight work, in bytes or like ``"128MiB"``; at least 8 MiB.
        staging: ``auto``, ``none``, ``pinned`` or ``pageable``; CPU destinations are filled in place.
        engine: ``auto``, ``native`` or ``python``.
        device: where tensors go: ``cpu``, ``null`` (read and discard) or a framework's device; or a mapping from globs
            of tensor names to devices, of which the first match counts; or a function of a tensor's description.
        names: globs of the tensors wanted; ``None`` for all.
        dtype: the data type to convert floating-point tensors to; ``None`` keeps what is stored.
        dequantize: turn the quantised tensors of a GGUF file into ``dtype``, by default float32, on the CPU; without it
            they arrive as raw blocks. Needs the package ``gguf``.
        framework: ``auto`` (torch if installed, else numpy), ``torch`` or ``numpy``.
        header: ``reference`` or ``strict``.
        progress: called with ``(bytes done, bytes in all)`` while the load runs; ``None`` for silence.
        readonly: with ``method="mmap"``, hand out shared read-only tensors instead of private writable ones.
        digest: compute the xxh3-128 digest of every tensor's bytes as stored.
        verify: a :class:`~weightlift.manifest.Manifest` or the path of one; refuse tensors that are not as it says.
        workers: a fixed number of reading threads; ``None`` finds it while loading.
        chunk_bytes: a fixed chunk size, a number of bytes or like ``"4MiB"``; ``None`` finds it while loading.
        watch_seconds: after how many seconds in which nothing has landed a line on the standard error stream says what
            every worker is at, and again after each doubling of the time; 0 for never.
        recording: where to record every step of the load; ``None`` records nothing.

    Raises:
        OptionError: a value is not one of those possible.
        BudgetError: ``host_memory`` is under the smallest possible budget.
    """

    method: Method = field(default_factory=_default("WEIGHTLIFT_METHOD", "auto"))  # type: ignore[assignment]
    cache: CachePolicy = field(default_factory=_default("WEIGHTLIFT_CACHE", "auto"))  # type: ignore[assignment]
    host_memory: int = field(default_factory=default_host_memory)
    staging: Staging = Staging.AUTO
    engine: EngineName = field(default_factory=_default("WEIGHTLIFT_ENGINE", "auto"))  # type: ignore[assignment]
    device: Any = "cpu"
    names: tuple[str, ...] | None = None
    dtype: Any = None
    dequantize: bool = False
    framework: Framework = Framework.AUTO
    header: HeaderRules = HeaderRules.REFERENCE
    progress: Callable[[int, int], None] | None = None
    readonly: bool = False
    digest: bool = False
    verify: Manifest | str | os.PathLike[str] | None = None
    workers: int | None = field(default_factory=lambda: from_environment("WEIGHTLIFT_WORKERS"))  # type: ignore[assignment]
    chunk_bytes: int | None = field(default_factory=lambda: from_environment("WEIGHTLIFT_CHUNK"))  # type: ignore[assignment]

    watch_seconds: float = field(default_factory=lambda: from_environment("WEIGHTLIFT_WATCH") or DEFAULT_WATCH_SECONDS)  # type: ignore[assignment]
    recording: Recording | None = None

    def __post_init__(self) -> None:
        choices: dict[str, type[enum.StrEnum]] = {
            "method": Method,
            "cache": CachePolicy,
            "staging": Staging,
            "engine": EngineName,
            "framework": Framework,
            "header": HeaderRules,
        }
        for option, kind in choices.items():
            self._set(option, _choice(kind, getattr(self, option), option))
        self._set("host_memory", _checked_budget(self.host_memory))
        self._set("names", _checked_names(self.names))
        self._set("workers", _checked_workers(self.workers))
        self._set("chunk_bytes", _checked_chunk(self.chunk_bytes))
        self._set("watch_seconds", _checked_watch(self.watch_seconds))
        if self.recording is not None and not isinstance(self.recording, Recording):
            raise OptionError(
                f"recording={self.recording!r} is not a weightlift.Recording", hint="pass weightlift.Recording()"
            )
        if self.verify is not None and not isinstance(self.verify, Manifest | str | os.PathLike):
            raise OptionError(
                f"verify={self.verify!r} is not a manifest", hint="pass a weightlift.Manifest or the path of one"
            )
        for option in ("readonly", "digest", "dequantize"):
            if not isinstance(getattr(self, option), bool):
                raise OptionError(
                    f"{option}={getattr(self, option)!r} is not True or False", hint=f"{option}=True or {option}=False"
                )
        if self.progress is not None and not callable(self.progress):
            raise OptionError(
                f"progress={self.progress!r} cannot be called", hint="pass a function of (bytes done, bytes in all)"
            )
        if self.readonly and self.method is not Method.MMAP:
            raise OptionError(
                f'readonly=True goes with method="mmap", not {self.method.value!r}',
                hint="leave readonly out: other methods return memory of the caller's own, which is writable",
            )

    @property
    def staging_memory(self) -> int:
        """What is left of ``host_memory`` for slots and threads."""
        return self.host_memory - (DEQUANTIZE_BYTES if self.dequantize else 0)

    def _set(self, option: str, value: object) -> None:
        force_setattr(self, option, value)


def _checked_budget(value: int | str) -> int:
    budget = parse_bytes(value, option="host_memory")
    if budget < SMALLEST_HOST_MEMORY_BYTES:
        raise BudgetError(
            f"host_memory is {format_bytes(budget)}, less than the smallest budget that works, "
            f"{format_bytes(SMALLEST_HOST_MEMORY_BYTES)}",
            hint=f"set host_memory={SMALLEST_HOST_MEMORY_BYTES} or more; any tensor loads within it",
            smallest_bytes=SMALLEST_HOST_MEMORY_BYTES,
        )
    return budget


def _checked_names(value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    patterns = (value,) if isinstance(value, str) else tuple(value)  # type: ignore[arg-type]
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise OptionError(
                f"names holds {pattern!r}, which is not text", hint='write it like names=["model.layers.0.*"]'
            )
    return patterns


def _checked_workers(value: object) -> int | None:
    if value is None:
        return None
    try:
        workers = int(value)  # type: ignore[call-overload]
    except (TypeError, ValueError) as err:
        raise OptionError(f"workers={value!r} is not a whole number", hint=f"from 1 to {WORKERS_MAX}") from err
    if not 1 <= workers <= WORKERS_MAX or isinstance(value, bool):
        raise OptionError(f"workers={value!r} is out of range", hint=f"from 1 to {WORKERS_MAX}")
    return int(workers)


def _checked_watch(value: object) -> float:
    try:
        seconds = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as err:
        raise OptionError(f"watch_seconds={value!r} is not a number of seconds", hint=_WATCH_HINT) from err
    if not 0 <= seconds <= WATCH_SECONDS_MAX:
        raise OptionError(f"watch_seconds={value!r} is out of range", hint=_WATCH_HINT)
    return seconds


def _checked_chunk(value: int | str | None) -> int | None:
    if value is None:
        return None
    chunk = parse_bytes(value, option="chunk_bytes")
    if not CHUNK_BYTES_MIN <= chunk <= CHUNK_BYTES_MAX or chunk % PAGE_BYTES:
        raise OptionError(
            f"chunk_bytes={chunk} is not possible",
            hint=f"a multiple of {PAGE_BYTES} bytes, from {format_bytes(CHUNK_BYTES_MIN)} "
            f"to {format_bytes(CHUNK_BYTES_MAX)}",
        )
    return chunk
