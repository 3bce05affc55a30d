"""Many lazy tensors turned into one stream: the requests come first, the bytes when the first result is wanted.

A framework that collects slices of many files and materialises them in an order of its own gets its tensors in that
order, read in large batches ahead of it and straight onto their devices. Whoever asks for a result pulls the stream, so
there is no thread besides the engine's, and what has been read but not asked for stays within the stream's window.
"""

from __future__ import annotations

import threading
from array import array
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final

from weightlift.compat.safetensors.refusals import refusing
from weightlift.description import Description
from weightlift.host.memory import headroom
from weightlift.options import LoadOptions
from weightlift.streaming import TensorStream
from weightlift.types import Framework

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from weightlift.compat.safetensors.opened import OpenedFile
    from weightlift.compat.safetensors.slices import PySafeSlice
    from weightlift.keywords import LoadKeywords
    from weightlift.types import LoadReport

_UNIT_BYTES: Final = 16 << 20


class Pending(Future):  # type: ignore[type-arg] # a Future of a tensor, of which no type is known here
    """A tensor that was asked for; asking for its result is what brings it."""

    def __init__(self, session: Session, finish: Callable[[Any], Any]) -> None:
        super().__init__()
        self._session = session
        self.finish = finish

    def result(self, timeout: float | None = None) -> Any:
        """The tensor, read now if it has not been yet."""
        if not self.done():
            self._session.pull_until(self)
        return super().result(timeout)


class _Request:
    __slots__ = ("device", "file", "pending", "row")

    def __init__(self, file: OpenedFile, row: int, device: str, pending: Pending) -> None:
        self.file, self.row, self.device, self.pending = file, row, device, pending

    @property
    def nbytes(self) -> int:
        return self.file.description.lengths[self.row]


class Session:
    """Requests for tensors, and the stream that serves them.

    Args:
        keywords: how to load, as for :class:`~weightlift.options.LoadOptions`.

    Attributes:
        report: of the stream, once its last tensor was delivered.
    """

    def __init__(self, keywords: LoadKeywords) -> None:
        self._keywords = keywords
        self._requests: list[_Request] = []
        self._lock = threading.RLock()
        self._stream: TensorStream | None = None
        self._waiting: dict[str, Pending] = {}
        self.report: LoadReport | None = None

    def request(self, part: PySafeSlice, device: str, finish: Callable[[Any], Any]) -> Pending:
        """Ask for a whole tensor.

        Args:
            part: the tensor, in its file.
            device: where it goes.
            finish: what to do to it once it is there, such as converting it.

        Returns:
            A future whose result is read on demand.
        """
        with self._lock:
            pending = Pending(self, finish)
            self._requests.append(_Request(part.file, part.row, device, pending))
            return pending

    def pull_until(self, pending: Pending) -> None:
        """Deliver tensors until one of them is there."""
        with self._lock:
            while not pending.done():
                if self._stream is None:
                    self._begin()
                else:
                    self._deliver()

    def _begin(self) -> None:
        """Start a stream over what has been asked for so far and not been delivered."""
        requests = [request for request in self._requests if not request.pending.done()]
        self._requests = []
        try:
            requests = self._map_what_does_not_fit(requests)
            if not requests:
                return
            description, rows = join_tensors([(request.file, request.row) for request in requests])
            names = [description.names[row] for row in rows]
            self._waiting = {name: request.pending for name, request in zip(names, requests, strict=True)}
            devices = {name: request.device for name, request in zip(names, requests, strict=True)}
            options = LoadOptions(
                **{**self._keywords, "device": lambda info: devices[info.name], "framework": Framework.TORCH}  # type: ignore[arg-type]
            )
            with refusing():
                units = list(_units(description, rows))
                self._stream = TensorStream(description, range(len(description)), options, units)
        except BaseException as err:
            for request in requests:
                _fail(request.pending, err)
            raise

    def _map_what_does_not_fit(self, requests: list[_Request]) -> list[_Request]:
        """Host tensors that memory has no room for become views of their files, as the library would hand them out."""
        here = [request for request in requests if request.device == "cpu"]
        room = headroom()
        nbytes = sum(request.nbytes for request in here)
        if room is None or nbytes <= room.available_bytes + room.swap_free_bytes:
            return requests
        for request in here:
            request.pending.set_result(request.pending.finish(request.file.view(request.row)))
        return [request for request in requests if request.device != "cpu"]

    def _deliver(self) -> None:
        assert self._stream is not None
        try:
            with refusing():
                name, tensor = next(self._stream)
        except StopIteration:
            self.report, self._stream = self._stream.report, None
            assert not self._waiting
            return
        except BaseException as err:
            self._give_up(err)
            raise
        pending = self._waiting.pop(name)
        try:
            finished = pending.finish(tensor)
        except Exception as err:  # noqa: BLE001 - it belongs to whoever asks for this tensor
            pending.set_exception(err)
        else:
            pending.set_result(finished)
        if not self._waiting:
            # One more step ends the stream: it checks the files and gives its memory back.
            self._deliver()

    def _give_up(self, error: BaseException) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()
        waiting, self._waiting = self._waiting, {}
        for pending in waiting.values():
            _fail(pending, error)

    def close(self) -> None:
        """Read no more; futures without a result are cancelled."""
        with self._lock:
            stream, self._stream = self._stream, None
            if stream is not None:
                stream.close()
            for pending in (*self._waiting.values(), *(request.pending for request in self._requests)):
                pending.cancel()
            self._waiting, self._requests = {}, []


def _fail(pending: Pending, error: BaseException) -> None:
    if not pending.done():
        pending.set_exception(error)


def _units(description: Description, rows: Sequence[int]) -> Iterator[Sequence[int]]:
    """Rows in the order in which they are wanted, neighbours that are small taken together."""
    unit: list[int] = []
    nbytes = 0
    for row in rows:
        length = description.lengths[row]
        if unit and nbytes + length > _UNIT_BYTES:
            yield sorted(unit)
            unit, nbytes = [], 0
        unit.append(row)
        nbytes += length
    if unit:
        yield sorted(unit)


def join_tensors(wanted: Sequence[tuple[OpenedFile, int]]) -> tuple[Description, list[int]]:
    """One description of tensors of several files, in the order of the files, and the row in it of each of them.

    Names are made unique by the number of the file where two files have the same.
    """
    files = list(dict.fromkeys(file for file, _ in wanted))
    number = {file: index for index, file in enumerate(files)}
    order = sorted(
        range(len(wanted)),
        key=lambda index: (number[wanted[index][0]], _position(wanted[index]), wanted[index][1], index),
    )
    names: dict[str, None] = {}
    codes, shards, offsets = array("B"), array("I"), array("Q")
    lengths, dims, ends = array("Q"), array("Q"), array("I")
    rows = [0] * len(wanted)
    for place, index in enumerate(order):
        file, row = wanted[index]
        description = file.description
        name = description.names[row]
        while name in names:
            name = f"{name} ({place})"
        names[name] = None
        codes.append(description.dtype_codes[row])
        shards.append(number[file])
        offsets.append(description.offsets[row])
        lengths.append(description.lengths[row])
        dims.extend(description.shape(row))
        ends.append(len(dims))
        rows[index] = place
    joined = Description(
        shards=[file.description.shards[0] for file in files],
        dtypes=files[0].description.dtypes,
        names=list(names),
        dtype_codes=codes,
        shard_indexes=shards,
        offsets=offsets,
        lengths=lengths,
        dims=dims,
        dim_ends=ends,
    )
    return joined, rows


def _position(wanted: tuple[OpenedFile, int]) -> int:
    file, row = wanted
    return file.description.offsets[row]
