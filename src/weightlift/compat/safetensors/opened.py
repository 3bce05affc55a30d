"""One open file behind a handle and its slices: where its tensors are, and how their bytes are read.

Small tensors and parts are read at once, in the caller's thread: setting up a load costs more than they do. Larger ones
go through a load of their own, and tensors asked for one after the other in file order are streamed ahead. A file stays
open as long as the handle or one of its slices is in use. Everything here may be called from several threads.
"""

from __future__ import annotations

import functools
import json
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from weightlift.buffers import LeaseArena
from weightlift.compat.safetensors import tensors
from weightlift.compat.safetensors.indexing import simple_view, strict_view, torch_view
from weightlift.compat.safetensors.mapping import MappedFile
from weightlift.compat.safetensors.ranges import View, pieces
from weightlift.compat.safetensors.refusals import refusing
from weightlift.compat.safetensors.sequence import Sequence
from weightlift.errors import InsufficientMemoryError, ReadError, TruncatedFileError
from weightlift.formats.columns import join
from weightlift.formats.files import open_file
from weightlift.formats.safetensors import DTYPES, LENGTH_BYTES, read_shard
from weightlift.host import kernel
from weightlift.loading import load_rows
from weightlift.options import LoadOptions, default_host_memory
from weightlift.standing import PartLoads
from weightlift.types import Framework, HeaderRules, LoadReport, Method

if TYPE_CHECKING:
    from collections.abc import Sequence as Rows

    from weightlift.compat.safetensors.arguments import Device
    from weightlift.description import Description
    from weightlift.keywords import LoadKeywords

SMALL_BYTES: Final = 16 << 20
"""Up to this size a tensor for the CPU is read in the caller's thread."""

SMALL_DEVICE_BYTES: Final = 4 << 20
"""The same for a device, to which the framework then copies it out of pageable memory."""

_AHEAD_SHARE: Final = 4
"""Of the budget, for memory that is cleared before a tensor is read into it."""

_FLAGS: Final = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_seeking = threading.Lock()


class OpenedFile:
    """A file whose header has been read, open for reading tensors.

    Args:
        path: the file.
        framework: whose tensors to make.
        device: where they go.
        strict: slices follow the library's own rules even for torch.
        keywords: how to load, as for :class:`~weightlift.options.LoadOptions`.

    Attributes:
        description: what is in the file.
        device: where tensors go.
        framework: whose tensors they are.
        options: how they are loaded.
        reports: of the loads that were made for this file, the latest last.

    Raises:
        SafetensorError: the file breaks a rule of the format.
        OSError: it is not there, or cannot be read.
    """

    def __init__(
        self, path: str, framework: Framework, device: Device, *, strict: bool, keywords: LoadKeywords
    ) -> None:
        self.options: LoadKeywords = {**keywords, "framework": framework}
        self._descriptor = -1
        self._given = LoadOptions(**keywords) if keywords else None  # type: ignore[arg-type]
        rules = self._given.header if self._given is not None else HeaderRules.REFERENCE
        with refusing(), open_file(Path(path)) as file:
            self.description: Description = join([read_shard(file, rules)], DTYPES)
            # The same file even if another one takes its name in the meantime.
            self._descriptor = file.keep()
        self.device = device
        self.framework = framework
        self.strict = strict or framework is Framework.NUMPY
        self.reports: list[LoadReport] = []
        self._tensors = tensors.maker(framework)
        budget = self._given.host_memory if self._given is not None else default_host_memory()
        self._arena = LeaseArena(self.description.total_bytes, tensors.buffer, ahead_bytes=budget // _AHEAD_SHARE)
        self._place: Any = None
        self._mapped = MappedFile(self.description, self._descriptor, framework)
        self._gives_views: bool | None = None
        self._parts = PartLoads(self.reports.append)
        self._brought_one = False
        self._sequence: Sequence | None = None
        if Sequence.pays_for(self.description):
            self._sequence = Sequence(self.description, self._descriptor, self.load_options, self.reports.append)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def stop_reading_ahead(self) -> None:
        """End the load that stands, and give up what is read ahead of the next request; the handle was closed."""
        self._parts.close()
        if self._sequence is not None:
            self._sequence.close()

    @property
    def on_cpu(self) -> bool:
        """Tensors stay in host memory."""
        return self.device.name == "cpu"

    @property
    def place(self) -> Any:
        """The framework's name of the device; a bare number is whatever accelerator there is."""
        if self._place is None:
            self._place = tensors.resolve_device(self.device)
        return self._place

    @property
    def mapped(self) -> bool:
        """Tensors are views of the mapped file."""
        if self._gives_views is None:
            self._gives_views = self.on_cpu and self._method() is Method.MMAP
        return self._gives_views

    def _method(self) -> Method:
        given = self.options.get("method")
        # Options read the whole environment, which takes longer than making a view of a mapping.
        return LoadOptions(**self.options).method if given is None else Method(given)  # type: ignore[arg-type]

    def has_metadata(self) -> bool:
        """Whether the header has free-form entries, were it none at all; a description does not tell, so look again."""
        length = self.description.shards[0].data_offset - LENGTH_BYTES
        return json.loads(bytes(self.read(LENGTH_BYTES, length))).get("__metadata__") is not None

    # ---- whole tensors

    def check_tensor(self, row: int) -> None:
        """Raise if the framework has no tensors like that of a row."""
        self._tensors.check(self.description.dtype(row), self.description.shape(row))

    def tensor(self, row: int) -> Any:
        """The whole tensor of a row."""
        self.check_tensor(row)
        return self._whole(row)

    def _whole(self, row: int) -> Any:
        description = self.description
        if self.mapped:
            return self._viewed(row)
        if self._sequence is not None:
            ahead = self._sequence.take(row)
            if ahead is not None:
                return ahead
        if description.lengths[row] > (SMALL_BYTES if self.on_cpu else SMALL_DEVICE_BYTES):
            return self._bring(row)
        made = self._read_whole(row)
        return made if self.on_cpu else made.to(self.place)

    def _bring(self, row: int) -> Any:
        """A large tensor; from the second one for a device on they are parts of one load."""
        name = self.description.names[row]
        if self.on_cpu or not self._brought_one:
            self._brought_one = True
            return self._load([row])[name]
        with refusing():
            return dict(self._parts.rows(self.description, [row], self.load_options()))[name]

    def _read_whole(self, row: int) -> Any:
        description = self.description
        held = self.read(description.offsets[row], description.lengths[row], kept=self.on_cpu)
        return self._tensors.over(held, description.dtype(row), description.shape(row))

    def view(self, row: int) -> Any:
        """The whole tensor of a row as a view of the mapped file."""
        self.check_tensor(row)
        return self._viewed(row)

    def _viewed(self, row: int) -> Any:
        with refusing():
            tensor = self._mapped.tensor(row, self._viewing_options)
        return self._read_whole(row) if tensor is None else tensor

    def all_tensors(self) -> dict[str, Any]:
        """Every tensor of the file, in file order."""
        description = self.description
        for row in range(len(description)):
            self.check_tensor(row)
        if self.mapped:
            return self._load(range(len(description)), self._mapping_options())
        if self.on_cpu and description.total_bytes <= SMALL_BYTES:
            return {name: self._whole(row) for row, name in enumerate(description.names)}
        return self._load(range(len(description)))

    def _load(self, rows: Rows[int], options: LoadOptions | None = None) -> dict[str, Any]:
        with refusing():
            try:
                loaded, report = load_rows(self.description, rows, options or self.load_options())
            except InsufficientMemoryError:
                if not self.on_cpu or self._method() is not Method.AUTO:
                    raise
                # More than fits, which the library would hand out as views of the file: the same here.
                loaded, report = load_rows(self.description, rows, self._mapping_options())
                self._gives_views = True
        self.reports.append(report)
        return dict(loaded)

    def load_options(self) -> LoadOptions:
        """How tensors are loaded to where they go."""
        return LoadOptions(**{**self.options, "device": self.place})

    def _viewing_options(self) -> LoadOptions:
        # Those that are there do where nothing is loaded: making others takes a good part of the first view's time.
        given = self._given
        return given if given is not None and given.method is Method.MMAP else self._mapping_options()

    def _mapping_options(self) -> LoadOptions:
        return LoadOptions(**{**self.options, "method": "mmap", "device": "cpu"})  # type: ignore[arg-type]

    # ---- parts of tensors

    def part(self, row: int, index: Any) -> Any:
        """What an index takes of the tensor of a row, read from the file without the rest of it."""
        description, tensors_ = self.description, self._tensors
        dtype, shape = description.dtype(row), description.shape(row)
        view: View | None
        if self.strict:
            within = view = strict_view(shape, index)
            tensors_.check_part(dtype, shape, within)
        else:
            tensors_.check(dtype, shape)
            view = simple_view(shape, index) if dtype.block_elements == 1 else None
            if view is None:
                view = torch_view(tensors_.meta(dtype, shape, description.lengths[row]), index)
        if view is None:
            return self._whole(row)[index]
        nbytes, contiguous = view.elements * dtype.block_bytes, view.contiguous
        if contiguous and nbytes == description.lengths[row]:
            whole = self._whole(row)
            return whole if whole.shape == view.shape else whole.reshape(view.shape)
        if self.mapped:
            return tensors_.strided(self._viewed(row), view)
        if contiguous:
            held = self.read(description.offsets[row] + view.offset * dtype.block_bytes, nbytes, kept=self.on_cpu)
            made = tensors_.over(held, dtype, view.shape)
        else:
            made = self._gather(row, view)
        return made if self.on_cpu else made.to(self.place)

    def _gather(self, row: int, view: View) -> Any:
        description = self.description
        dtype, start = description.dtype(row), description.offsets[row]
        item = dtype.block_bytes
        result = tensors.buffer(view.elements * item)
        target = memoryview(result).cast("B") if view.elements else memoryview(b"")
        scratch: Any = None
        for piece in pieces(view, item):
            if piece.whole:
                self._read_into(target[piece.place : piece.place + piece.length], start + piece.offset)
                continue
            if scratch is None or len(scratch) < piece.length:
                scratch = memoryview(tensors.buffer(piece.length)).cast("B")
            self._read_into(scratch[: piece.length], start + piece.offset)
            tensors.pick(scratch, piece, item, target)
        return self._tensors.over(result, dtype, view.shape)

    # ---- bytes

    def read(self, offset: int, length: int, *, kept: bool = False) -> Any:
        """Bytes of the file in fresh memory; ``kept`` for what the caller is likely to hold for long."""
        result = self._arena.take(length) if kept else tensors.buffer(length)
        # Nearly every read is complete at the first attempt; the way that retries and explains costs as much again.
        if length and not self._read_at_once(result, offset, length):
            self._read_into(memoryview(result).cast("B"), offset)
        return result

    @functools.cached_property
    def _to_read(self) -> int:
        """The descriptor, reads of which bring into the page cache what they ask for and no more."""
        kernel.read_ahead_nothing(self._descriptor)
        return self._descriptor

    def _read_at_once(self, target: Any, offset: int, length: int) -> bool:
        try:
            return _read_at is _preadv and _preadv(self._to_read, target, offset) == length
        except OSError:
            return False

    def _read_into(self, target: memoryview, offset: int) -> None:
        done = 0
        path = self.description.shards[0].path
        while done < len(target):
            try:
                count = _read_at(self._to_read, target[done:], offset + done)
            except OSError as err:
                failure = ReadError(
                    f"{path}: reading {len(target):,} bytes at {offset:,} failed: {os.strerror(err.errno or 0)}",
                    hint="the storage or its file system reports a failure: see the kernel log (`dmesg`)",
                    path=path,
                    offset=offset,
                    length=len(target),
                )
                failure.errno = err.errno
                raise failure from err
            if not count:
                with refusing():
                    raise TruncatedFileError(
                        f"{path}: ended at byte {offset + done:,}, before the {len(target):,} bytes at {offset:,} that "
                        f"its header describes (truncated since it was opened?)",
                        hint="check that nothing writes to the file, and fetch it again if it is incomplete",
                        path=path,
                        offset=offset,
                        length=len(target),
                    )
            done += count


def _preadv(descriptor: int, target: Any, offset: int) -> int:
    return os.preadv(descriptor, (target,), offset)


def _seek_and_read(descriptor: int, target: memoryview, offset: int) -> int:
    """For Windows, which has no positioned reads of descriptors."""
    with _seeking:
        os.lseek(descriptor, offset, os.SEEK_SET)
        data = os.read(descriptor, min(len(target), 1 << 30))
    target[: len(data)] = data
    return len(data)


_read_at = _preadv if hasattr(os, "preadv") else _seek_and_read
