"""``safe_open``: a safetensors file opened lazily, with every method that the library's own handle has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Final, Self

from weightlift.compat.safetensors.arguments import (
    parse_backend,
    parse_device,
    parse_framework,
    parse_path,
)
from weightlift.compat.safetensors.opened import OpenedFile
from weightlift.compat.safetensors.prefetching import PrefetchLoader, plan_prefetch
from weightlift.compat.safetensors.refusals import SafetensorError, library_safe_open, wrong_type
from weightlift.compat.safetensors.slices import PySafeSlice, TensorMeta
from weightlift.errors import printable
from weightlift.types import Framework

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping
    from types import TracebackType

    from weightlift.keywords import LoadKeywords

_UNSUPPORTED: Final = "numpy arrays stay in host memory: use device='cpu'"


class safe_open:  # noqa: N801 - the library's own name
    """Opens a file and hands its tensors out when asked; a context manager.

    What it hands out is the caller's: private, writable memory (with ``method="mmap"``, views of the file).

    Args:
        filename: the file.
        framework: ``pt`` or ``np``; files for other frameworks are opened by the library itself.
        device: where tensors go: a name such as ``cuda:0``, or a number.
        backend: ``mmap`` or ``pread``: whose rules slices follow. The bytes are read the same way.

    Raises:
        SafetensorError: the file, or an argument, is not as it has to be.
        OSError: the file is not there, or cannot be read.
    """

    __slots__ = ("_file", "_keys")

    load_keywords: ClassVar[LoadKeywords] = {}
    """How files are loaded, for subclasses to set; see :class:`~weightlift.options.LoadOptions`."""

    def __new__(  # noqa: D102 - documented on the class
        cls, filename: str | os.PathLike[str], framework: str, device: str | int | None = None, *, backend: str = "mmap"
    ) -> Self:
        path = parse_path(filename)
        wanted = parse_framework(framework)
        strict = parse_backend(backend)
        if wanted is None:
            handle: Self = library_safe_open()(path, framework, device, backend=backend)
            return handle
        place = parse_device(device)
        if wanted is Framework.NUMPY and place.name != "cpu":
            raise SafetensorError(f"device {place.name} is not supported for framework numpy: {_UNSUPPORTED}")
        self = super().__new__(cls)
        self._file = OpenedFile(path, wanted, place, strict=strict, keywords=cls.load_keywords)
        self._keys = None
        return self

    _file: OpenedFile | None
    _keys: list[str] | None

    def _opened(self) -> OpenedFile:
        file = self._file
        if file is None:
            raise SafetensorError("this handle was closed: open the file again")
        return file

    def _row(self, name: str) -> tuple[OpenedFile, int]:
        if not isinstance(name, str):
            raise wrong_type("name", name, "str")
        file = self._file or self._opened()
        if name in file.description:
            return file, file.description.row(name)
        raise SafetensorError(
            f"{file.description.shards[0].path} does not contain tensor {printable(name)}: "
            f"it holds {len(file.description):,} others"
        )

    def keys(self) -> list[str]:
        """The tensors' names in alphabetical order."""
        file = self._opened()
        if self._keys is None:
            self._keys = sorted(file.description.names)
        return self._keys.copy()

    def offset_keys(self) -> list[str]:
        """The tensors' names in the order in which they lie in the file."""
        return list(self._opened().description.names)

    def metadata(self) -> dict[str, str] | None:
        """The header's free-form entries, or ``None`` if it has none."""
        file = self._opened()
        metadata = dict(file.description.shards[0].metadata)
        return metadata if metadata or file.has_metadata() else None

    def get_tensor(self, name: str) -> Any:
        """A whole tensor."""
        file, row = self._row(name)
        return file.tensor(row)

    def get_tensors(self) -> dict[str, Any]:
        """Every tensor by name, in the order in which they lie in the file."""
        return self._opened().all_tensors()

    def get_slice(self, name: str) -> PySafeSlice:
        """A tensor whose bytes are read when it is indexed, and only those that the index needs."""
        file, row = self._row(name)
        return PySafeSlice(file, row)

    def get_tensor_meta(self, name: str) -> TensorMeta:
        """A tensor's entry in the header."""
        file, row = self._row(name)
        description = file.description
        begin = description.offsets[row] - description.shards[0].data_offset
        return TensorMeta(
            description.dtype(row).name, list(description.shape(row)), (begin, begin + description.lengths[row])
        )

    def prefetch(
        self,
        plan: Mapping[str, slice | None] | None = None,
        *,
        device: str | int | None = None,
        threads: int = 8,
    ) -> PrefetchLoader:
        """Start loading tensors to a CUDA or ROCm device in the background.

        Args:
            plan: the tensors wanted, each whole (``None``) or a range of its first dimension; without it, all.
            device: where to; the handle's own device if left out.
            threads: most reading threads.

        Raises:
            SafetensorError: the plan does not fit the file, or the device is no GPU.
        """
        file = self._opened()
        return plan_prefetch(file, plan, parse_device(device) if device is not None else file.device, threads)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.stop_reading_ahead()

    @property
    def reports(self) -> list[Any]:
        """Reports of the loads made so far, one for each that was large enough to be one."""
        return list(self._opened().reports)
