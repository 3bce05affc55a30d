"""The GPU runtime that a framework has brought into this process, called through ctypes: CUDA's or HIP's.

Owns the names and signatures of the runtime's functions, the search for the library and the names of its errors. Links
nothing and loads nothing on its own account: streams, events and addresses are only worth something in the copy of the
runtime that made them, so it has to be the one that the framework uses.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import threading
from array import array
from bisect import bisect_right
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias

from weightlift.errors import DeviceError, UnsupportedError
from weightlift.host import kernel

if TYPE_CHECKING:
    from collections.abc import Iterator

Kind: TypeAlias = Literal["cuda", "hip"]
"""Whose runtime it is."""


class Call(NamedTuple):
    """One function of the runtime, the same in both but for its name.

    Attributes:
        cuda: its name in CUDA's library.
        hip: its name in HIP's library.
        arguments: what it takes; everything behind a pointer, handles included, is a ``c_void_p``.
        quick: it returns at once, so that it may keep the interpreter lock.
        result: what it returns, an error code unless said otherwise.
    """

    cuda: str
    hip: str
    arguments: tuple[type[Any], ...]
    quick: bool = False
    result: type[Any] = ctypes.c_int


_INT: Final = ctypes.c_int
_POINTER: Final = ctypes.c_void_p
_SIZE: Final = ctypes.c_size_t
_FLAGS: Final = ctypes.c_uint
_TEXT: Final = ctypes.c_char_p

CALLS: Final[dict[str, Call]] = {
    "set_device": Call("cudaSetDevice", "hipSetDevice", (_INT,), quick=True),
    "copy": Call("cudaMemcpyAsync", "hipMemcpyAsync", (_POINTER, _POINTER, _SIZE, _INT, _POINTER), quick=True),
    "record": Call("cudaEventRecord", "hipEventRecord", (_POINTER, _POINTER), quick=True),
    "query": Call("cudaEventQuery", "hipEventQuery", (_POINTER,), quick=True),
    "wait": Call("cudaEventSynchronize", "hipEventSynchronize", (_POINTER,)),
    "stream_wait": Call("cudaStreamWaitEvent", "hipStreamWaitEvent", (_POINTER, _POINTER, _FLAGS), quick=True),
    "register": Call("cudaHostRegister", "hipHostRegister", (_POINTER, _SIZE, _FLAGS)),
    "last_error": Call("cudaGetLastError", "hipGetLastError", (), quick=True),
    "unregister": Call("cudaHostUnregister", "hipHostUnregister", (_POINTER,)),
    "get_device": Call("cudaGetDevice", "hipGetDevice", (_POINTER,), quick=True),
    "device_count": Call("cudaGetDeviceCount", "hipGetDeviceCount", (_POINTER,)),
    "create_stream": Call("cudaStreamCreateWithFlags", "hipStreamCreateWithFlags", (_POINTER, _FLAGS), quick=True),
    "destroy_stream": Call("cudaStreamDestroy", "hipStreamDestroy", (_POINTER,), quick=True),
    "synchronize_stream": Call("cudaStreamSynchronize", "hipStreamSynchronize", (_POINTER,)),
    "create_event": Call("cudaEventCreateWithFlags", "hipEventCreateWithFlags", (_POINTER, _FLAGS), quick=True),
    "destroy_event": Call("cudaEventDestroy", "hipEventDestroy", (_POINTER,), quick=True),
    "memory_info": Call("cudaMemGetInfo", "hipMemGetInfo", (_POINTER, _POINTER), quick=True),
    "pci_bus_id": Call("cudaDeviceGetPCIBusId", "hipDeviceGetPCIBusId", (_POINTER, _INT, _INT)),
    "runtime_version": Call("cudaRuntimeGetVersion", "hipRuntimeGetVersion", (_POINTER,)),
    "error_name": Call("cudaGetErrorName", "hipGetErrorName", (_INT,), quick=True, result=_TEXT),
    "error_string": Call("cudaGetErrorString", "hipGetErrorString", (_INT,), quick=True, result=_TEXT),
}
"""Every function used, by what it is for."""

_ENGINE_ROLES: Final = ("set_device", "copy", "record", "query", "wait", "stream_wait", "register", "last_error")
"""What the native engine is given, in the order of :meth:`weightlift.device_operations.Runtime.function_table`."""

_HOST_TO_DEVICE: Final = 1
_STREAM_NON_BLOCKING: Final = 1
_EVENT_DISABLE_TIMING: Final = 2
_REGISTER_PORTABLE: Final = 1
_BUS_ID_BYTES: Final = 32

NOT_READY: Final = 600
OUT_OF_MEMORY: Final = 2

_HINTS: Final[dict[int, str]] = {
    OUT_OF_MEMORY: "the device's memory, or the host memory that may be pinned, is used up; "
    "close what else uses the GPU, or lower host_memory",
    3: "a forked process cannot use a GPU that its parent has used; start processes with the spawn method",
    35: "the GPU's driver is missing, or older than what the framework was built for",
    46: "another process uses the GPU exclusively, or its driver is in trouble; nvidia-smi tells",
    100: "no GPU is visible: check the driver, the container's devices, CUDA_VISIBLE_DEVICES and HIP_VISIBLE_DEVICES",
    101: "devices are numbered from 0 among those that CUDA_VISIBLE_DEVICES and HIP_VISIBLE_DEVICES leave visible",
    700: "a kernel or a copy of this process failed earlier; the process cannot use the GPU any more, start a new one",
    719: "a kernel of this process failed earlier; the process cannot use the GPU any more, start a new one",
}
_OTHER_HINT: Final = "update the GPU's driver, and look at what else uses it"
"""What to do about error codes, which CUDA and HIP share where both have them."""

_LIBRARIES: Final[dict[str, tuple[str, str]]] = {"cuda": ("CUDA", "libcudart"), "hip": ("HIP", "libamdhip64")}


class GpuRuntime:
    """A CUDA or HIP runtime: a :class:`weightlift.device_operations.Runtime`, and what its owner needs besides.

    The methods of the protocol return the runtime's error code and never raise; all others raise
    :class:`~weightlift.errors.DeviceError`. Either way the runtime's last error is read away after a failure, since the
    framework would take it for its own at its next call.

    On CUDA, calls that return at once keep the interpreter lock, which a busy Python thread would otherwise give back
    only milliseconds later. A copy counts among them only out of memory that :meth:`register` has pinned; from
    pageable memory it may wait. On HIP every call releases the lock: one that hangs while holding it would stop every
    thread of the program, watchdogs included.

    Args:
        kind: whose runtime it is.
        path: the library.
        load: load it; otherwise it has to be in the process already.

    Attributes:
        kind: ``"cuda"`` or ``"hip"``.
        path: the library.
        not_ready: see :class:`weightlift.device_operations.Runtime`.

    Raises:
        UnsupportedError: the library is not there, or is another one.
    """

    not_ready = NOT_READY

    def __init__(self, kind: Kind, path: str, *, load: bool = False) -> None:
        self.kind = kind
        self.path = path
        # Without RTLD_NOLOAD (Windows) there is no way to ask for a library without loading it.
        mode = ctypes.DEFAULT_MODE if load else getattr(os, "RTLD_NOLOAD", ctypes.DEFAULT_MODE)
        try:
            waiting = ctypes.CDLL(path, mode=mode)
            quick = waiting if kind == "hip" else ctypes.PyDLL(path, mode=mode)
        except OSError as err:
            raise UnsupportedError(
                f"the {_LIBRARIES[kind][0]} runtime {path} could not be loaded: {err}",
                hint="name another one with WEIGHTLIFT_GPU_RUNTIME, or unset it to use the framework's own",
            ) from err
        self._waiting = self._bind(waiting, CALLS)
        self._quick = self._bind(quick, {role: call for role, call in CALLS.items() if call.quick})
        self._pinned: tuple[tuple[int, int], ...] = ()
        self._pinned_lock = threading.Lock()

    def _bind(self, library: ctypes.CDLL, calls: dict[str, Call]) -> dict[str, Any]:
        missing = [name for name in map(self._name, calls) if not hasattr(library, name)]
        if missing:
            title = _LIBRARIES[self.kind][0]
            raise UnsupportedError(
                f"{self.path} is no {title} runtime that can be used: it lacks {', '.join(missing)}",
                hint="install a newer one, or name another with WEIGHTLIFT_GPU_RUNTIME",
            )
        bound: dict[str, Any] = {}
        for role, call in calls.items():
            function = getattr(library, self._name(role))
            function.restype, function.argtypes = call.result, call.arguments
            bound[role] = function
        return bound

    def _name(self, role: str) -> str:
        call = CALLS[role]
        return call.cuda if self.kind == "cuda" else call.hip

    def _told(self, code: int) -> int:
        if code:
            self._quick["last_error"]()
        return code

    # The protocol that engines use.

    def set_device(self, ordinal: int) -> int:
        """See :class:`weightlift.device_operations.Runtime`. The device was used before, by :meth:`using` say."""
        return self._told(self._quick["set_device"](ordinal))

    def copy_to_device(self, destination: int, source: int, nbytes: int, stream: int) -> int:
        """See :class:`weightlift.device_operations.Runtime`."""
        copy = (self._quick if self._is_pinned(source, nbytes) else self._waiting)["copy"]
        return self._told(copy(destination, source, nbytes, _HOST_TO_DEVICE, stream))

    def record(self, event: int, stream: int) -> int:
        """See :class:`weightlift.device_operations.Runtime`."""
        return self._told(self._quick["record"](event, stream))

    def query(self, event: int) -> int:
        """See :class:`weightlift.device_operations.Runtime`."""
        return self._told(self._quick["query"](event))

    def wait(self, event: int) -> int:
        """See :class:`weightlift.device_operations.Runtime`."""
        return self._told(self._waiting["wait"](event))

    def stream_wait(self, stream: int, event: int) -> int:
        """See :class:`weightlift.device_operations.Runtime`."""
        return self._told(self._quick["stream_wait"](stream, event, 0))

    def register(self, address: int, nbytes: int) -> int:
        """See :class:`weightlift.device_operations.Runtime`."""
        code = self._told(self._waiting["register"](address, nbytes, _REGISTER_PORTABLE))
        if code == 0:
            with self._pinned_lock:
                self._pinned = tuple(sorted({*self._pinned, (address, nbytes)}))
        return code

    def function_table(self) -> array[int]:
        """See :class:`weightlift.device_operations.Runtime`."""
        addresses = (ctypes.cast(self._waiting[role], ctypes.c_void_p).value for role in _ENGINE_ROLES)
        return array("Q", (address or 0 for address in addresses))

    def _is_pinned(self, address: int, nbytes: int) -> bool:
        pinned = self._pinned
        below = bisect_right(pinned, address, key=lambda block: block[0]) - 1
        if below < 0:
            return False
        start, length = pinned[below]
        return address + nbytes <= start + length

    # What the owner of streams, events and pinned memory needs; these raise.

    def check(self, code: int, call: str) -> None:
        """Raise unless a call succeeded; for codes that the methods of the protocol returned, on any thread.

        Args:
            code: what it returned.
            call: which call it was, for the message.

        Raises:
            DeviceError: ``code`` is not 0.
        """
        if code == 0:
            return
        raise DeviceError(
            f"{call} failed: {self.error_text(code)}",
            hint=_HINTS.get(code, _OTHER_HINT),
            code=code,
            name=self._error("error_name", code),
            call=call,
        )

    def error_text(self, code: int) -> str:
        """The runtime's own name, number and description of an error, like ``cudaErrorNotReady (600): not ready``."""
        name, text = self._error("error_name", code), self._error("error_string", code)
        return f"{name} ({code})" if text in {name, ""} else f"{name} ({code}): {text}"

    def _error(self, role: str, code: int) -> str:
        text: bytes | None = self._quick[role](code)
        return (text or b"").decode("utf-8", "replace")

    def _do(self, role: str, *arguments: object, on: str = "") -> None:
        calls = self._quick if CALLS[role].quick else self._waiting
        self.check(self._told(calls[role](*arguments)), self._name(role) + on)

    def device_count(self) -> int:
        """How many devices the process sees."""
        count = ctypes.c_int()
        self._do("device_count", ctypes.byref(count))
        return count.value

    def current_device(self) -> int:
        """The calling thread's current device."""
        ordinal = ctypes.c_int()
        self.check(self._told(self._quick["get_device"](ctypes.byref(ordinal))), self._name("get_device"))
        return ordinal.value

    @contextlib.contextmanager
    def using(self, ordinal: int) -> Iterator[None]:
        """Make a device the calling thread's current one for the length of a ``with`` block.

        Nothing is called when it is the current one already: merely naming a device makes CUDA set it up, for which it
        takes hundreds of megabytes there.
        """
        before = self.current_device()
        if before == ordinal:
            yield
            return
        # The first use of a device sets it up, which takes long: not with the interpreter lock held.
        self.check(self._told(self._waiting["set_device"](ordinal)), f"{self._name('set_device')}({ordinal})")
        try:
            yield
        finally:
            self.check(self._told(self._waiting["set_device"](before)), f"{self._name('set_device')}({before})")

    def _make(self, role: str, ordinal: int, flags: int) -> int:
        handle = ctypes.c_void_p()
        with self.using(ordinal):
            self._do(role, ctypes.byref(handle), flags, on=f" on device {ordinal}")
        return handle.value or 0

    def create_stream(self, ordinal: int) -> int:
        """A stream of a device that does not wait for the device's default stream."""
        return self._make("create_stream", ordinal, _STREAM_NON_BLOCKING)

    def destroy_stream(self, stream: int) -> None:
        """Give a stream back; what is queued on it still runs."""
        self._do("destroy_stream", stream)

    def synchronize_stream(self, stream: int) -> None:
        """Wait until everything queued on a stream is done."""
        self._do("synchronize_stream", stream)

    def create_event(self, ordinal: int) -> int:
        """An event of a device that keeps no time and wakes nobody: it is asked for.

        One that could be slept for in the runtime (``BlockingSync``) raises an interrupt whenever it happens, and
        between two copies the link rests longer for it (measured on H200, ``benchmarks/gpu.py --only concurrency``).
        """
        return self._make("create_event", ordinal, _EVENT_DISABLE_TIMING)

    def destroy_event(self, event: int) -> None:
        """Give an event back."""
        self._do("destroy_event", event)

    def unregister(self, address: int) -> None:
        """Unpin what was registered at ``address``, by this object or by the native engine."""
        with self._pinned_lock:
            self._pinned = tuple(block for block in self._pinned if block[0] != address)
        self._do("unregister", address)

    def memory_info(self, ordinal: int) -> tuple[int, int]:
        """Free and total memory of a device in bytes."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        with self.using(ordinal):
            self._do("memory_info", ctypes.byref(free), ctypes.byref(total), on=f" on device {ordinal}")
        return free.value, total.value

    def pci_bus_id(self, ordinal: int) -> str:
        """Where a device sits, like ``0000:65:00.0``: the name of its folder in ``/sys/bus/pci/devices``."""
        text = ctypes.create_string_buffer(_BUS_ID_BYTES)
        self._do("pci_bus_id", text, _BUS_ID_BYTES, ordinal, on=f" of device {ordinal}")
        return text.value.decode("ascii", "replace").lower()

    def runtime_version(self) -> str:
        """The version of the library, like ``12.4`` (CUDA) or ``6.2.41134`` (HIP)."""
        number = ctypes.c_int()
        self._do("runtime_version", ctypes.byref(number))
        if self.kind == "cuda":
            return f"{number.value // 1000}.{number.value % 1000 // 10}"
        major, rest = divmod(number.value, 10_000_000)
        return f"{major}.{rest // 100_000}.{rest % 100_000}"


_runtime: Final = functools.cache(GpuRuntime)  # a failure is not kept: the framework may be imported later


_found: Final[dict[str, GpuRuntime]] = {}
"""Runtimes found among the libraries of the process: looking through thousands of mappings takes milliseconds."""


def find_runtime(kind: Kind, injected: str | None = None) -> GpuRuntime | str:
    """The GPU runtime of this process.

    The same object for the same library every time.

    Args:
        kind: whose runtime is wanted.
        injected: a library to load and use instead of the one that is looked for.

    Returns:
        The runtime, or a sentence that says why there is none.
    """
    try:
        if injected is not None:
            return _runtime(kind, injected, load=True)
        if kind not in _found:
            paths = _mapped_libraries(kind)
            if isinstance(paths, str):
                return paths
            _found[kind] = _runtime(kind, paths[0])
        return _found[kind]
    except UnsupportedError as err:
        return err.message


def _mapped_libraries(kind: Kind) -> list[str] | str:
    """The libraries of that name which the process has mapped, or a sentence that says why none can be used."""
    title, library = _LIBRARIES[kind]
    maps = kernel.read_small("/proc/self/maps")
    if maps is None:
        return f"this system does not tell which libraries a process has loaded, so no {title} runtime can be found"
    # Wheels carry copies whose names have a hash in them.
    pattern = re.compile(rf"/{library}(-[0-9a-f]+)?\.so(\.[0-9.]+)?")
    names = (line.split(maxsplit=5)[5:] for line in os.fsdecode(maps).splitlines())
    found = dict.fromkeys(name.removesuffix(" (deleted)") for fields in names for name in fields)
    paths = [path for path in found if pattern.fullmatch(path, path.rfind("/"))]
    if not paths:
        return f"no {title} runtime ({library}) is loaded in this process"
    # Copies of CUDA's runtime share the driver's streams and events; those of HIP's keep to themselves.
    if kind == "hip" and len(paths) > 1:
        return f"several {title} runtimes are loaded ({', '.join(paths)}), and which one the framework uses is unknown"
    return paths
