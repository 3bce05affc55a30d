"""Loading into a module: which of its tensors get which of the checkpoint's, and what is missing or left over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from weightlift.errors import StateMismatchError, UnsupportedError, printable
from weightlift.loading import required_manifest, transfer_rows, verify_beforehand
from weightlift.selection import select_rows
from weightlift.targets.access import gpu_access
from weightlift.targets.dequantize import Dequantizer, quantised_rows
from weightlift.targets.frameworks import pick_framework
from weightlift.targets.module import ModuleTarget
from weightlift.types import Framework, LoadReport, Method
from weightlift.weighing import weigh, within

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from weightlift.description import Description
    from weightlift.options import LoadOptions
    from weightlift.targets.device import DeviceAccess

_NAMES_SHOWN = 5


class LoadIntoResult(NamedTuple):
    """What ``load_into`` did.

    Attributes:
        missing_keys: tensors of the module that the checkpoint does not have; they are unchanged.
        unexpected_keys: tensors of the checkpoint that the module does not have; they were not read.
        report: what the load did.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]
    report: LoadReport


def load_module(module: Any, description: Description, options: LoadOptions, *, strict: bool) -> LoadIntoResult:
    """Fill a torch module's parameters and persistent buffers in place.

    Args:
        module: a ``torch.nn.Module``, or a mapping from names to tensors.
        description: the checkpoint.
        options: how; ``device`` and ``framework`` follow the module.
        strict: refuse missing and unexpected names, as ``Module.load_state_dict`` does.

    Raises:
        StateMismatchError: names or shapes differ; the module is unchanged.
        IntegrityError: a tensor is not as ``verify`` says; the module is unchanged.
        UnsupportedError: the method hands out mappings, which cannot fill existing memory.
    """
    if options.method is Method.MMAP:
        raise UnsupportedError(
            'method="mmap" hands out views of the file and cannot fill existing tensors',
            hint='use method="auto", "direct" or "buffered"',
        )
    destinations: Mapping[str, Any] = module.state_dict() if hasattr(module, "state_dict") else module
    selected = select_rows(description, options.names)
    rows = [row for row in selected if description.names[row] in destinations]
    found = {description.names[row] for row in rows}
    unexpected = [description.names[row] for row in selected if description.names[row] not in destinations]
    missing = _missing(destinations, found)
    if strict and (missing or unexpected):
        raise StateMismatchError(
            f"{len(missing)} tensors of the module are not in the checkpoint{_named(missing)}, and "
            f"{len(unexpected)} of the checkpoint are not in the module{_named(unexpected)}",
            hint="pass strict=False to load what both have",
        )
    maker = pick_framework(Framework.TORCH)
    accesses, reason = _accesses(destinations[name] for name in found)
    quantised = quantised_rows(description, rows) if options.dequantize else []
    dequantizer = Dequantizer(description, quantised, maker) if quantised else None
    target = ModuleTarget(description, rows, maker, destinations, accesses, dequantizer=dequantizer)
    # The module shall be unchanged if a tensor is refused, so they are all looked at before the first is written.
    verify_beforehand(description, rows, options, required_manifest(description, rows, options))
    total = description.bytes_of(rows)
    fit = weigh(description, options, staged_bytes=total, accesses=accesses)
    _, report = transfer_rows(
        description, rows, within(fit, options), target, fit=fit, accesses=accesses, staging_reason=reason
    )
    return LoadIntoResult(missing, unexpected, report)


def _accesses(tensors: Iterable[Any]) -> tuple[list[DeviceAccess], str]:
    """The GPUs among the tensors' devices, and why some device is reached through torch's own copies."""
    names = dict.fromkeys(str(tensor.device) for tensor in tensors if tensor.device.type not in {"cpu", "meta"})
    found = [gpu_access(name, pick_framework(Framework.TORCH)) for name in names]
    reasons = [access for access in found if isinstance(access, str)]
    return [access for access in found if not isinstance(access, str)], reasons[0] if reasons else ""


def _missing(destinations: Mapping[str, Any], found: set[str]) -> list[str]:
    """Names the checkpoint lacks; a tied tensor is there if it was loaded under another of its names."""
    filled = {_storage(destinations[name]) for name in found}
    return [
        name
        for name, tensor in destinations.items()
        if name not in found and (tensor.numel() == 0 or _storage(tensor) not in filled)
    ]


def _storage(tensor: Any) -> tuple[object, ...]:
    return (str(tensor.device), tensor.data_ptr(), tuple(tensor.shape), tensor.stride())


def _named(names: Sequence[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(printable(name) for name in names[:_NAMES_SHOWN])
    return f" ({shown}{', …' if len(names) > _NAMES_SHOWN else ''})"
