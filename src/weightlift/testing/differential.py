"""Asking two libraries the same, and comparing what they do: results byte by byte, refusals by their class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable


class Outcome(NamedTuple):
    """What a call did.

    Attributes:
        error: the class of what it raised, or ``None``.
        value: what it returned, in a form that can be compared.
    """

    error: type[BaseException] | None
    value: object

    @property
    def refused(self) -> bool:
        """It raised something."""
        return self.error is not None


def outcome(call: Callable[[], Any]) -> Outcome:
    """What a call does; only what is no exit of the program counts as a refusal."""
    try:
        value = call()
    except Exception as err:  # noqa: BLE001 - the class is what is compared
        return Outcome(type(err), None)
    return Outcome(None, comparable(value))


def comparable(value: Any) -> object:
    """Tensors by type, shape, device and bytes; dictionaries of tensors with the order of their keys."""
    kind = type(value).__module__.partition(".")[0]
    if kind == "torch" and hasattr(value, "as_strided"):
        return ("torch", value.dtype, tuple(value.shape), str(value.device), tensor_bytes(value))
    if kind == "numpy" and hasattr(value, "flags"):
        return ("numpy", value.dtype, value.shape, value.flags.writeable, value.tobytes())
    if isinstance(value, dict) and not all(isinstance(item, str) for item in value.values()):
        # The order is part of it, except among free-form entries, where it is a hash table's.
        return [(name, comparable(item)) for name, item in value.items()]
    return value


def tensor_bytes(tensor: Any) -> bytes:
    """The bytes of a torch tensor's elements in their order, for every data type."""
    import torch

    if not tensor.numel():
        return b""
    flat = tensor.detach().cpu().contiguous().as_strided((tensor.numel(),), (1,))
    found: bytes = flat.view(torch.uint8).numpy().tobytes()
    return found
