"""A GPU runtime without a GPU, for tests of everything that copies to devices.

:func:`build` compiles a small library that exports the runtime functions weightlift calls, under CUDA's and under HIP's
names; :class:`FakeGpu` opens it and holds its controls. Device memory is host memory, and work is really
asynchronous: a thread of its own carries out what is queued, choosing at random which stream goes on next. A copy
reads its source when it is carried out, not when it is queued, so a slot reused too early shows as wrong bytes.

::

    library = build(folder)
    with FakeGpu(library, "cuda", seed=3) as gpu:
        target = gpu.allocate(0, 4096)
        stream = gpu.runtime.create_stream(0)
        gpu.pause()
        gpu.runtime.copy_to_device(target, source, 4096, stream)  # has not happened yet
        gpu.resume()
        gpu.runtime.synchronize_stream(stream)
        gpu.runtime.destroy_stream(stream)
        gpu.free(target)

Leaving the block fails if streams, events, registrations, allocations or queued copies are left. Nothing in here waits
a fixed time: :meth:`FakeGpu.settle` returns once nothing more can happen by itself.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from weightlift.host.gpu import OUT_OF_MEMORY, GpuRuntime

if TYPE_CHECKING:
    from types import TracebackType

    from weightlift.host.gpu import Kind

SOURCE: Final = Path(__file__).with_name("fake_gpu.c")
FOREVER: Final = 2**64 - 1
"""As a number of failures: all from then on."""

UNWRITTEN: Final = 0xCD
"""What fresh device memory holds."""

_FLAGS: Final = ("-std=c11", "-O2", "-fPIC", "-pthread", "-shared", "-fvisibility=hidden")
_NANOSECONDS: Final = 10**9
_PATIENCE_SECONDS: Final = 60


class FakeGpuUnavailable(Exception):  # noqa: N818 - a state of the machine that tests skip on, not a failure
    """The library cannot be built on this machine; the message says why."""


def build(folder: Path) -> Path:
    """Compile the fake runtime with ``$CC``, or else ``cc``.

    Args:
        folder: where to put the library; it exists.

    Returns:
        The library.

    Raises:
        FakeGpuUnavailable: there is no C compiler, or the system is Windows.
        RuntimeError: the compiler fails; its own messages are in the error.
    """
    if sys.platform == "win32":
        raise FakeGpuUnavailable("the fake GPU runtime needs POSIX threads, this is Windows")
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    if shutil.which(compiler[0]) is None:
        raise FakeGpuUnavailable(f"the fake GPU runtime needs a C compiler, and there is no {compiler[0]!r} ($CC)")
    library = folder / "libweightlift_fake_gpu.so"
    libraries = ["-ldl"] if sys.platform == "linux" else []  # part of the C library itself only since glibc 2.34
    command = [*compiler, *_FLAGS, "-o", str(library), str(SOURCE), *libraries]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - the user's compiler
    if finished.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{finished.stderr}")
    return library


class _Counters(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            *("streams", "events", "registrations", "allocations", "queued_operations"),
            *("registered_bytes", "registered_bytes_peak"),
            *("copies", "unregistered_copies", "stray_copies", "journal_entries"),
        )
    )


class _JournalEntry(ctypes.Structure):
    _fields_ = (("device", ctypes.c_uint64), ("stream", ctypes.c_uint64), ("bytes", ctypes.c_uint64))


class FakeCounters(NamedTuple):
    """What exists in the fake now, and what was done so far.

    Attributes:
        streams: streams not destroyed.
        events: events not destroyed.
        registrations: registered ranges of host memory.
        allocations: pieces of device memory.
        queued_operations: copies and fills not carried out yet.
        registered_bytes: bytes registered now.
        registered_bytes_peak: most bytes registered at one time.
        copies: copies queued.
        unregistered_copies: those whose source was not registered when they were queued.
        stray_copies: copies and fills whose destination was given back, or whose source was unregistered, before they
            were carried out. On a real device they would write over other data; here nothing is written.
    """

    streams: int
    events: int
    registrations: int
    allocations: int
    queued_operations: int
    registered_bytes: int
    registered_bytes_peak: int
    copies: int
    unregistered_copies: int
    stray_copies: int


class Executed(NamedTuple):
    """A copy or fill that was carried out: on which device and stream, and its bytes."""

    device: int
    stream: int
    nbytes: int


_LEAKS: Final = ("streams", "events", "registrations", "allocations", "queued_operations", "stray_copies")

_INT: Final = ctypes.c_int
_WORD: Final = ctypes.c_uint64
_POINTER: Final = ctypes.c_void_p
_SIZE: Final = ctypes.c_size_t
_CONTROLS: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "open": (_INT, (_INT, _WORD, _WORD, _WORD, _WORD, _INT)),
    "close": (None, ()),
    "function": (_INT, (ctypes.c_char_p,)),
    "fail": (None, (_INT, _WORD, _WORD, _INT)),
    "hang": (None, (_INT, _INT)),
    "calls": (_WORD, (_INT, _INT)),
    "wait_for_calls": (_INT, (_INT, _WORD, ctypes.c_uint32, _WORD)),
    "sees_interpreter": (_INT, ()),
    "pause": (None, (_INT,)),
    "hold": (_INT, (_POINTER, _INT)),
    "settle": (None, ()),
    "fill": (_INT, (_POINTER, _POINTER, _INT, _SIZE)),
    "adopt": (_INT, (_INT, _POINTER, _SIZE)),
    "allocate": (_INT, (_INT, _SIZE, _INT, _POINTER)),
    "free": (_INT, (_POINTER,)),
    "read_counters": (None, (_POINTER,)),
    "read_journal": (None, (_POINTER, _WORD)),
    "copied_bytes": (_WORD, (_INT,)),
    "flags": (_INT, (_POINTER,)),
}


class FakeGpu:
    """A session with the fake runtime; entering the ``with`` block opens it, leaving it forgets everything.

    The state is the library's, so only one session of a library can be open at a time. Functions of the runtime are
    named like ``"MemcpyAsync"``, with ``cuda`` or ``hip`` before it or not. Streams are handles; 0 is the default
    stream of the calling thread's current device. Wherever a call goes through :class:`~weightlift.host.gpu.GpuRuntime`
    or to the library directly, the fake treats it alike.

    Args:
        library: what :func:`build` made.
        kind: whose runtime :attr:`runtime` shall be.
        devices: how many devices there are, from 0 to 16.
        seed: decides in which order streams go on.
        delay_seconds: least and most time that passes before a copy is carried out.
        memory_bytes: memory of each device.
        strict: refuse copies to addresses outside the memory of the stream's device.
        check_leaks: fail at the end if something is left.

    Attributes:
        runtime: the library as a runtime; not the object that :func:`~weightlift.host.gpu.find_runtime` gives.
        library: the library, to be injected where code looks for a runtime itself.
    """

    def __init__(
        self,
        library: Path,
        kind: Kind = "cuda",
        *,
        devices: int = 2,
        seed: int = 0,
        delay_seconds: tuple[float, float] = (0.0, 0.0),
        memory_bytes: int = 1 << 34,
        strict: bool = True,
        check_leaks: bool = True,
    ) -> None:
        self.library = library
        self.runtime = GpuRuntime(kind, str(library), load=True)
        self._controls: dict[str, Any] = {}
        loaded = ctypes.CDLL(str(library))
        for name, (result, arguments) in _CONTROLS.items():
            function = loaded[f"fake_gpu_{name}"]
            function.restype, function.argtypes = result, arguments
            self._controls[name] = function
        self._peek = getattr(loaded, f"{kind}PeekAtLastError")
        least, most = (int(seconds * _NANOSECONDS) for seconds in delay_seconds)
        self._settings = (devices, seed, memory_bytes, least, most, int(strict))
        self._check_leaks = check_leaks

    def __enter__(self) -> Self:
        if self._controls["open"](*self._settings):
            raise RuntimeError(f"the fake GPU is in use already, or its settings make no sense: {self._settings}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        left = self.leaks()
        self._controls["close"]()
        if self._check_leaks and kind is None and left:
            raise AssertionError("left behind in the fake GPU: " + ", ".join(f"{left[name]} {name}" for name in left))

    # Time: nothing is carried out before it is let.

    def pause(self) -> None:
        """Carry nothing out any more; returns once nothing is being carried out."""
        self._controls["pause"](1)

    def resume(self) -> None:
        """Go on after :meth:`pause`."""
        self._controls["pause"](0)

    def hold(self, stream: int) -> None:
        """Carry nothing out on one stream any more, as if a long kernel ran there."""
        self._check(self._controls["hold"](stream, 1), f"there is no stream {stream:#x}")

    def release(self, stream: int) -> None:
        """Go on after :meth:`hold`."""
        self._check(self._controls["hold"](stream, 0), f"there is no stream {stream:#x}")

    def settle(self) -> None:
        """Wait until nothing more can be carried out: all is done, or waits for what is paused, held or not queued."""
        self._controls["settle"]()

    def fill(self, stream: int, address: int, value: int, nbytes: int) -> None:
        """Queue the work of a stand-in for a caller's kernel: it fills memory with a byte, when its turn comes."""
        self._check(self._controls["fill"](stream, address, value, nbytes), f"no stream {stream:#x} or foreign memory")

    def executed(self) -> list[Executed]:
        """The copies and fills carried out so far, in order; at most the first 65,536."""
        count = self._read_counters().journal_entries
        journal = (_JournalEntry * count)()
        self._controls["read_journal"](journal, count)
        return [Executed(entry.device, entry.stream, entry.bytes) for entry in journal]

    # Trouble on demand.

    def fail(self, function: str, code: int, *, after: int = 0, times: int = 1) -> None:
        """Let calls of a function fail, without doing anything.

        Args:
            function: which one.
            code: the error code they return; it is also the calling thread's last error then.
            after: how many calls succeed first.
            times: how many fail then, or :data:`FOREVER`.
        """
        self._controls["fail"](self._number(function), after, times, code)

    def hang(self, function: str) -> None:
        """Let calls of a function wait until :meth:`unhang`, or the end of the session."""
        self._controls["hang"](self._number(function), 1)

    def unhang(self, function: str) -> None:
        """Let the calls that hang in a function go on."""
        self._controls["hang"](self._number(function), 0)

    # What was done.

    def calls(self, function: str) -> int:
        """How often a function was called, failures included."""
        return int(self._controls["calls"](self._number(function), 0))

    def locked_calls(self, function: str) -> int:
        """How many of the calls were made with Python's interpreter lock held."""
        return int(self._controls["calls"](self._number(function), 1))

    def sees_interpreter_lock(self) -> bool:
        """Whether :meth:`locked_calls` can tell on this build of Python; otherwise it says 0."""
        return bool(self._controls["sees_interpreter"]())

    def wait_for_calls(self, function: str, calls: int = 0, *, hanging: int = 0) -> None:
        """Wait until a function was called that often in all, and so many calls hang in it.

        Raises:
            TimeoutError: that did not happen within a minute.
        """
        if self._controls["wait_for_calls"](self._number(function), calls, hanging, _PATIENCE_SECONDS):
            raise TimeoutError(
                f"{function} was called {self.calls(function)} times, {calls} ({hanging} hanging) awaited"
            )

    def counters(self) -> FakeCounters:
        """What exists now and was done so far."""
        found = self._read_counters()
        return FakeCounters(*(getattr(found, name) for name in FakeCounters._fields))

    def copied_bytes(self, device: int) -> int:
        """Bytes that copies have brought to a device."""
        return int(self._controls["copied_bytes"](device))

    def flags(self, handle: int) -> int | None:
        """The flags that a stream, an event, or the registration around an address was made with."""
        flags = int(self._controls["flags"](handle))
        return None if flags < 0 else flags

    def last_error(self) -> int:
        """The calling thread's last error, which stays: what a framework's next check would trip over."""
        return int(self._peek())

    def leaks(self) -> dict[str, int]:
        """What exists now and should not at the end of a session, by the names of :class:`FakeCounters`."""
        counters = self.counters()._asdict()
        return {name: counters[name] for name in _LEAKS if counters[name]}

    # Device memory.

    def allocate(self, device: int, nbytes: int) -> int:
        """Memory of a device, filled with :data:`UNWRITTEN`; returns its address.

        Raises:
            MemoryError: the device has not that much left.
        """
        address = ctypes.c_void_p()
        code = self._controls["allocate"](device, nbytes, UNWRITTEN, ctypes.byref(address))
        if code:
            raise MemoryError(f"{nbytes} bytes on device {device}: {self.runtime.error_text(code)}")
        return address.value or 0

    def adopt(self, device: int, address: int, nbytes: int) -> None:
        """Let host memory of the caller's pose as memory of a device until :meth:`free`, which leaves it alone.

        Raises:
            MemoryError: the device has not that much left.
            ValueError: there is no such device, or the memory is a device's already.
        """
        code = self._controls["adopt"](device, address, nbytes)
        if code:
            kind = MemoryError if code == OUT_OF_MEMORY else ValueError
            raise kind(f"{nbytes} bytes at {address:#x} for device {device}: {self.runtime.error_text(code)}")

    def free(self, address: int) -> None:
        """Give device memory back. Nothing is waited for: work still queued on it becomes stray."""
        self._check(self._controls["free"](address), f"there is no device memory that begins at {address:#x}")

    def _read_counters(self) -> _Counters:
        found = _Counters()
        self._controls["read_counters"](ctypes.byref(found))
        return found

    def _number(self, function: str) -> int:
        number = int(self._controls["function"](function.removeprefix("cuda").removeprefix("hip").encode()))
        self._check(number < 0, f"{function} is none of the functions of the fake GPU runtime")
        return number

    @staticmethod
    def _check(failed: object, message: str) -> None:
        if failed:
            raise ValueError(message)
