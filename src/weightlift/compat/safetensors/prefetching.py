"""``safe_open.prefetch``: a file's tensors, or ranges of their rows, loading to a GPU in the background.

A range of rows is a tensor of its own as far as a load is concerned, so a plan becomes a description of what is wanted,
and the description is streamed. What has landed waits on the device, outside the host-memory budget, until it is taken.
"""

from __future__ import annotations

import threading
from array import array
from typing import TYPE_CHECKING, Any, Self

from weightlift.compat.safetensors.refusals import SafetensorError, refusing, wrong_type
from weightlift.description import Description
from weightlift.errors import UnsupportedError, printable
from weightlift.options import WORKERS_MAX, LoadOptions
from weightlift.streaming import TensorStream
from weightlift.types import Framework

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import TracebackType

    from weightlift.compat.safetensors.arguments import Device
    from weightlift.compat.safetensors.opened import OpenedFile

_UINT64_MAX = (1 << 64) - 1


def plan_prefetch(
    file: OpenedFile, plan: Mapping[str, slice | None] | None, device: Device, threads: int
) -> PrefetchLoader:
    """Judge a plan and start loading it.

    Args:
        file: the file.
        plan: the rows wanted of each tensor; ``None`` for all tensors.
        device: where to.
        threads: most reading threads.

    Raises:
        SafetensorError: the plan does not fit the file, or the device is no GPU.
        TypeError: an argument is of a wrong type.
        OverflowError: ``threads`` is negative.
    """
    if plan is not None and not isinstance(plan, dict):
        raise wrong_type("plan", plan, "dict")
    if not isinstance(threads, int):
        raise wrong_type("threads", threads, "int")
    if threads < 0:
        raise OverflowError(f"threads={threads} is negative")
    if file.framework is not Framework.TORCH:
        raise SafetensorError('prefetch is only compatible with framework="pt"')
    if device.number is None and not device.name.startswith("cuda:"):
        raise SafetensorError(f"prefetch loads to cuda devices, not {device.name}")
    wanted = _wanted(file, plan)
    place = f"cuda:{device.number}" if device.number is not None else device.name
    workers = min(threads, WORKERS_MAX) or None
    options = LoadOptions(**{**file.options, "device": place, "workers": workers})  # type: ignore[arg-type]
    try:
        with refusing():
            return PrefetchLoader(TensorStream(wanted, range(len(wanted)), options), wanted.names)
    except UnsupportedError as err:
        raise SafetensorError(f"prefetch cannot load to {place}: {err}") from err


def _wanted(file: OpenedFile, plan: dict[str, slice | None] | None) -> Description:
    """What a plan wants, as a description: tensors narrowed to ranges of rows, in file order."""
    whole = file.description
    ranges: dict[int, tuple[int, int] | None] = {}
    for name, rows in dict.fromkeys(whole.names).items() if plan is None else plan.items():
        if not isinstance(name, str):
            raise SafetensorError("a prefetch plan's keys have to be names of tensors")
        if name not in whole:
            raise SafetensorError(f"{whole.shards[0].path} does not contain tensor {printable(name)}")
        row = whole.row(name)
        ranges[row] = None if rows is None else _range(name, rows, whole.shape(row))
        file.check_tensor(row)
    if not ranges:
        raise SafetensorError("the prefetch plan selects no tensors")
    return _narrowed(whole, dict(sorted(ranges.items())))


def _range(name: str, rows: object, shape: tuple[int, ...]) -> tuple[int, int]:
    shown = printable(name)
    if not isinstance(rows, slice):
        raise SafetensorError(f"a prefetch plan's values are None or a slice, not {type(rows).__name__} as for {shown}")
    if rows.step not in {None, 1}:
        raise SafetensorError(f"a prefetch plan's slices have step 1, not {rows.step} as for {shown}")
    if not shape:
        raise SafetensorError(f"tensor {shown} has no rows to slice: it is a single number")
    size = shape[0]
    for bound in (rows.start, rows.stop):
        if bound is not None and bound > size:
            raise SafetensorError(f"the slice {rows.start}:{rows.stop} of {shown} is out of range for {size} rows")
    start, stop, _ = rows.indices(size)
    return start, max(start, stop)


def _narrowed(whole: Description, ranges: Mapping[int, tuple[int, int] | None]) -> Description:
    offsets, lengths, dims, dim_ends = array("Q"), array("Q"), array("Q"), array("I")
    for row, span in ranges.items():
        shape, offset, length = whole.shape(row), whole.offsets[row], whole.lengths[row]
        if span is not None:
            row_bytes = length // shape[0] if shape[0] else 0
            shape = (span[1] - span[0], *shape[1:])
            offset, length = offset + span[0] * row_bytes, shape[0] * row_bytes
        offsets.append(offset)
        lengths.append(length)
        dims.extend(shape)
        dim_ends.append(len(dims))
    return Description(
        shards=whole.shards,
        dtypes=whole.dtypes,
        names=[whole.names[row] for row in ranges],
        dtype_codes=array("B", (whole.dtype_codes[row] for row in ranges)),
        shard_indexes=array("I", bytes(4 * len(ranges))),
        offsets=offsets,
        lengths=lengths,
        dims=dims,
        dim_ends=dim_ends,
    )


class PrefetchLoader:
    """Tensors on their way to a device; each is handed out once, by :meth:`take` or by iterating.

    Args:
        stream: the load.
        names: the tensors it brings, in file order.
    """

    def __init__(self, stream: TensorStream, names: list[str]) -> None:
        self._names = list(names)
        self._stream = stream
        self._ready: dict[str, Any] = {}
        self._left = dict.fromkeys(names)
        self._error: BaseException | None = None
        self._closed = self._done = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="weightlift-prefetch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            with refusing(), self._stream:
                for name, tensor in self._stream:
                    with self._changed:
                        if self._closed:
                            break
                        self._ready[name] = tensor
                        self._changed.notify_all()
        except BaseException as err:  # noqa: BLE001 - handed to whoever asks for a tensor
            error = err
        with self._changed:
            self._error, self._done = error, True
            self._changed.notify_all()

    def names(self) -> list[str]:
        """The names of the tensors it hands out, in file order."""
        return list(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def take(self, name: str) -> Any:
        """One tensor, waiting until it has landed.

        Raises:
            SafetensorError: it was taken before, is not part of the plan, or the loader was closed.
        """
        with self._changed:
            self._check_open()
            if name not in self._left:
                what = "was taken already" if name in set(self._names) else "is not part of this prefetch"
                raise SafetensorError(f"tensor {printable(str(name))} {what}")
            while name not in self._ready:
                self._wait()
            del self._left[name]
            return self._ready.pop(name)

    def _check_open(self) -> None:
        if self._closed:
            raise SafetensorError("this prefetch was closed")

    def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        assert not self._done
        self._changed.wait()
        self._check_open()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Pairs of name and tensor as they land; those taken before are left out."""
        while True:
            with self._changed:
                self._check_open()
                while self._left and not self._ready:
                    self._wait()
                if not self._left:
                    return
                name = next(iter(self._ready))
                del self._left[name]
                tensor = self._ready.pop(name)
            yield name, tensor

    def close(self) -> None:
        """Stop loading and release what was not taken; tensors handed out stay."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
