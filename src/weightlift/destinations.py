"""Where each tensor goes: devices resolved from the options, and targets made for them."""

from __future__ import annotations

import fnmatch
import functools
import math
import re
from typing import TYPE_CHECKING, Any

from weightlift.errors import OptionError, SelectionError, UnsupportedError, printable
from weightlift.targets.access import gpu_access
from weightlift.targets.composite import CompositeTarget
from weightlift.targets.dequantize import Dequantizer, quantised_rows
from weightlift.targets.device import DeviceAccess, DeviceTarget
from weightlift.targets.frameworks import pick_framework
from weightlift.targets.host import ConvertingTarget, HostTarget, converts
from weightlift.types import Framework, Staging

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from weightlift.description import Description
    from weightlift.options import LoadOptions
    from weightlift.targets.base import Target
    from weightlift.targets.frameworks import TensorMaker


def device_name(device: Any) -> str:
    """The name of one device, given as such or as an object that has one.

    Raises:
        OptionError: it is neither.
    """
    if not isinstance(device, str) and not hasattr(device, "type"):
        raise OptionError(
            f"device={device!r} is not a device",
            hint='pass a device such as "cpu", "null" or torch.device("cuda:0"), a mapping from globs of names to '
            "devices, or a function of a tensor's description",
        )
    return str(device)


def devices_of(description: Description, rows: Sequence[int], device: Any) -> list[str] | str:
    """The device's name for each row, or one name for all of them.

    Args:
        description: the checkpoint.
        rows: the selected rows.
        device: one device, a mapping from globs of tensor names to devices, of which the first match counts, or a
            function of a :class:`~weightlift.description.TensorInfo`.

    Raises:
        SelectionError: no glob matches a tensor.
        OptionError: what was given or returned is not a device.
    """
    if callable(device) and not hasattr(device, "type"):
        names = [device_name(device(description.tensor(row))) for row in rows]
    elif isinstance(device, dict):
        names = _by_glob(description, rows, device)
    else:
        return device_name(device)
    if "null" in names:
        raise OptionError(
            'device="null" goes for all tensors or none',
            hint="leave tensors out with names=… instead of discarding them",
        )
    return names


def _by_glob(description: Description, rows: Sequence[int], mapping: Mapping[str, Any]) -> list[str]:
    devices, rules = [device_name(device) for device in mapping.values()], _rules(tuple(mapping))
    names = []
    for row in rows:
        name = description.names[row]
        found = next((number for number, (part, match) in enumerate(rules) if part in name and match(name)), None)
        if found is None:
            raise SelectionError(
                f"no device was given for tensor {printable(name)}: none of the {len(devices)} globs matches it",
                hint='add a rule for the rest at the end, such as {"*": "cpu"}',
            )
        names.append(devices[found])
    return names


@functools.lru_cache(maxsize=16)
def _rules(globs: tuple[str, ...]) -> list[tuple[str, Callable[[str], re.Match[str] | None]]]:
    """For each glob a part that names must have, looked for first since that is quicker, and the match itself."""
    return [(_longest_part(glob), re.compile(fnmatch.translate(glob)).match) for glob in globs]


def _longest_part(glob: str) -> str:
    """The longest part of a glob that stands for itself."""
    return "" if "[" in glob else max(re.split(r"[*?]", glob), key=len)


class Destinations:
    """The devices, framework and data type of one load.

    Args:
        description: the checkpoint.
        rows: the selected rows, in file order.
        options: the caller's options.

    Attributes:
        device: the devices' names, for the report.
        in_host_memory: every tensor goes to the CPU's memory.
        has_host_memory: one of the devices is the CPU.
        discards: nothing is kept.
        accesses: the GPUs that are reached through their runtime.
        dequantizer: what makes numbers of quantised tensors; ``None`` where none has to.
        staging_reason: for the report, how tensors reach devices and why; empty without devices.

    Raises:
        OptionError: a device is not one.
        SelectionError: a tensor has no device.
        UnsupportedError: staging or framework do not go with the device.
        MissingExtraError: the framework is not installed.
    """

    def __init__(self, description: Description, rows: Sequence[int], options: LoadOptions) -> None:
        self._description = description
        self._options = options
        named = devices_of(description, rows, options.device)
        self._device_of = None if isinstance(named, str) else dict(zip(rows, named, strict=True))
        self._names = [named] if isinstance(named, str) else list(dict.fromkeys(named))
        self.device = ", ".join(self._names) or "cpu"
        self.discards = self._names == ["null"]
        self.has_host_memory = "cpu" in self._names
        self.in_host_memory = self._names == ["cpu"] or not self._names
        self._check_staging()
        self.accesses: list[DeviceAccess] = []
        self.staging_reason = ""
        self._index_of: dict[str, int] = {}
        self._quantised = quantised_rows(description, rows) if options.dequantize and not self.discards else []
        # Made here, so that what is missing is said before anything is read.
        self.dequantizer = (
            Dequantizer(description, self._quantised, self.maker, self.dtype) if self._quantised else None
        )
        if not self.discards:
            self._open_devices()

    @functools.cached_property
    def maker(self) -> TensorMaker:
        """Whose tensors are made; devices other than the CPU need torch."""
        requested = self._options.framework
        others = [name for name in self._names if name != "cpu"]
        if others and requested is Framework.NUMPY:
            raise UnsupportedError(f"numpy has no device {others[0]}", hint='use framework="torch"')
        return pick_framework(Framework.TORCH if others else requested)

    @functools.cached_property
    def dtype(self) -> Any:
        """The framework's data type to convert to, or ``None``."""
        return None if self._options.dtype is None else self.maker.resolve_dtype(self._options.dtype)

    def _check_staging(self) -> None:
        if (self.in_host_memory or self.discards) and self._options.staging not in {Staging.AUTO, Staging.NONE}:
            raise UnsupportedError(
                f"staging={self._options.staging.value} has no meaning for device={self.device}: "
                "its memory is filled in place",
                hint="leave staging out",
            )

    def _open_devices(self) -> None:
        for name in self._names:
            if name == "cpu":
                self.maker.check_device(name)
                continue
            access = gpu_access(name, self.maker)
            if isinstance(access, str):
                self.staging_reason = access
                continue
            if access.device not in {known.device for known in self.accesses}:
                self.accesses.append(access)
            self._index_of[name] = [known.device for known in self.accesses].index(access.device)

    def target(self, rows: Sequence[int]) -> Target:
        """A target for some of the rows, in file order."""
        by_device: dict[str, list[int]] = {}
        if self._device_of is None:
            parts = self._parts(self._names[0], rows)
        else:
            for row in rows:
                by_device.setdefault(self._device_of[row], []).append(row)
            parts = [part for name, some in by_device.items() for part in self._parts(name, some)]
        if len(parts) == 1:
            return parts[0][0]
        return CompositeTarget(parts) if parts else HostTarget(self._description, rows, self.maker)

    def device_bytes(self, rows: Sequence[int]) -> dict[str, int]:
        """What the tensors take on each device that is not the CPU, by its name, converted where that is wanted."""
        totals: dict[str, int] = {}
        if self._device_of is None and self._options.dtype is None and self.dequantizer is None:
            totals[self._names[0]] = self._description.bytes_of(rows)
        else:
            for row in rows:
                name = self._names[0] if self._device_of is None else self._device_of[row]
                totals[name] = totals.get(name, 0) + self._bytes_of(row)
        canonical = {name: self.accesses[index].device for name, index in self._index_of.items()}
        found: dict[str, int] = {}
        for name, nbytes in totals.items():
            if name not in {"cpu", "null"}:
                found[canonical.get(name, name)] = found.get(canonical.get(name, name), 0) + nbytes
        return found

    def _bytes_of(self, row: int) -> int:
        dtype, nbytes = self._description.dtype(row), self._description.lengths[row]
        if self.dequantizer is not None and row in self.dequantizer.rows:
            return math.prod(self._description.shape(row)) * int(self.dequantizer.dtype.itemsize)
        if not converts(dtype, self.dtype, self.maker):
            return nbytes
        return nbytes // dtype.block_bytes * int(getattr(self.dtype, "itemsize", dtype.block_bytes))

    def _parts(self, name: str, rows: Sequence[int]) -> list[tuple[Target, Sequence[int]]]:
        description, maker = self._description, self.maker
        index = self._index_of.get(name)
        if index is None and name != "cpu":
            return [(self._converting(rows, name), rows)]

        def plain(some: Sequence[int]) -> Target:
            if index is None:
                return HostTarget(description, some, maker)
            return DeviceTarget(description, some, maker, self.accesses[index], index)

        changed = self._changed(rows)
        if not changed:
            return [(plain(rows), rows)]
        known = set(changed)
        kept = [row for row in rows if row not in known]
        parts: list[tuple[Target, Sequence[int]]] = [(self._converting(changed, name), changed)]
        return [*parts, (plain(kept), kept)] if kept else parts

    def _changed(self, rows: Sequence[int]) -> list[int]:
        """The rows that do not arrive as they are stored."""
        if self.dtype is None and not self.dequantizer:
            return []
        quantised = self.dequantizer.rows if self.dequantizer else ()
        dtype_of = self._description.dtype
        return [row for row in rows if row in quantised or converts(dtype_of(row), self.dtype, self.maker)]

    def _converting(self, rows: Sequence[int], device: str) -> ConvertingTarget:
        return ConvertingTarget(
            self._description, rows, self.maker, dtype=self.dtype, device=device, dequantizer=self.dequantizer
        )
