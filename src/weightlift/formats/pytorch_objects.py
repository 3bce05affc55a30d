"""What the pickle of a PyTorch checkpoint may hold: inert records for tensors and storages, and plain values.

Owns the names that are allowed and what they stand for, and the flattening of nested values into names. Imports no
torch: a name is only ever compared.
"""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from weightlift.dtypes import PYTORCH
from weightlift.errors import printable
from weightlift.formats.pickle_reader import Ordered, PickleError, checked_key

if TYPE_CHECKING:
    from collections.abc import Callable

LONE_TENSOR: Final = "tensor"
"""The name of a tensor that is the whole checkpoint."""

_DEPTH_MAX: Final = 64
_VALUES_MAX: Final = 2 << 20
_SHARED_VALUES_MAX: Final = 1 << 16
_SHARED_CHARACTERS_MAX: Final = 8 << 20
_CHARACTERS_PER_BYTE: Final = 16
"""A value that is referred to in several places has a name in each: a few bytes of pickle may name it without end."""

_STORAGES: Final = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
_UNTYPED: Final = ("torch.storage.UntypedStorage", "torch.UntypedStorage")


class StorageRecord(NamedTuple):
    """A storage: the archive's entry that holds it.

    Attributes:
        key: the entry's name.
        dtype: torch's name of its data type; for an untyped one ``uint8``.
        nbytes: its size.
    """

    key: str
    dtype: str
    nbytes: int


class TensorRecord(NamedTuple):
    """A tensor: a view of a storage.

    Attributes:
        storage: the storage.
        dtype: torch's name of the data type.
        offset: its first element.
        shape: its dimensions.
        strides: elements between neighbours, per dimension.
    """

    storage: StorageRecord
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie one after the other, the last dimension innermost."""
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and step != expected:
                return False
            expected *= size
        return True


class _Global(NamedTuple):
    """A name out of the pickle that may be called or named."""

    name: str


def look_up(name: str) -> Any:
    """What stands for a global.

    Raises:
        PickleError: it is none that checkpoints of weights need.
    """
    module, _, last = name.rpartition(".")
    if module == "torch" and last in PYTORCH:
        return f"torch.{last}"
    if name in _CALLS or (module in {"torch", "torch.storage"} and last in _STORAGES) or name in _UNTYPED:
        return _Global(name)
    if name in _NAMED:
        return _Global(name)
    raise PickleError(f"{printable(name)}, which is not among the names that weights need")


def resolve(reference: Any) -> StorageRecord:
    """The storage that a persistent reference stands for.

    Raises:
        PickleError: it is a reference to something else.
    """
    if type(reference) is not tuple or len(reference) != 5 or reference[0] != "storage":
        raise PickleError(f"a reference to something else than a storage: {printable(reprlib.repr(reference))}")
    _, kind, key, _, count = reference
    if not isinstance(kind, _Global) or type(key) is not str or not _is_count(count):
        raise PickleError(f"a storage that is none: {printable(reprlib.repr(reference))}")
    dtype = "uint8" if kind.name in _UNTYPED else _STORAGES.get(kind.name.rpartition(".")[2])
    if dtype is None:
        raise PickleError(f"a storage of type {printable(kind.name)}")
    return StorageRecord(key, dtype, count * PYTORCH[dtype].block_bytes)


def call(function: Any, arguments: tuple[Any, ...]) -> Any:
    """What calling a global gives: an inert record or a plain value.

    Raises:
        PickleError: the global is not one to call, or not with these arguments.
    """
    known = _CALLS.get(function.name) if isinstance(function, _Global) else None
    if known is None:
        what = function.name if isinstance(function, _Global) else type(function).__name__
        raise PickleError(f"a call of {printable(what)}")
    try:
        return known(*arguments)
    except (TypeError, ValueError, UnicodeError) as err:
        raise PickleError(f"a call of {printable(function.name)} with arguments that do not fit it") from err


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _counts(value: Any) -> tuple[int, ...]:
    if type(value) is not tuple or not all(map(_is_count, value)):
        raise PickleError(f"a tensor with {printable(reprlib.repr(value))} for sizes or strides")
    return value


# The arguments are those that torch.save writes, in its order.
def _tensor_v2(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    _requires_grad: Any = None,
    _hooks: Any = None,
    meta: Any = None,
) -> TensorRecord:
    dtype = storage.dtype if isinstance(storage, StorageRecord) else ""
    return _tensor_v3(storage, offset, shape, strides, None, None, f"torch.{dtype}", meta)


def _tensor_v3(  # noqa: PLR0917
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    _requires_grad: Any,
    _hooks: Any,
    dtype: Any,
    meta: Any = None,
) -> TensorRecord:
    kind = dtype.removeprefix("torch.") if isinstance(dtype, str) else ""
    if not isinstance(storage, StorageRecord) or not _is_count(offset) or kind not in PYTORCH:
        raise PickleError("a tensor without a storage, a position or a known data type")
    if isinstance(meta, dict) and any(meta.values()):
        raise PickleError(f"a tensor with properties ({printable(', '.join(map(str, meta)))}), which would be lost")
    sizes, steps = _counts(shape), _counts(strides)
    if len(sizes) != len(steps):
        raise PickleError(f"a tensor of {len(sizes)} dimensions with {len(steps)} strides")
    return TensorRecord(storage, kind, offset, sizes, steps)


def _parameter(data: Any, *_: Any) -> TensorRecord:
    if not isinstance(data, TensorRecord):
        raise PickleError("a parameter without a tensor")
    return data


def _from_type(rebuild: Any, _kind: Any, arguments: Any, _state: Any) -> Any:
    if type(arguments) is not tuple:
        raise PickleError("a tensor with attributes, and without arguments")
    return call(rebuild, arguments)


def _ordered(pairs: Any = ()) -> Ordered:
    found = Ordered()
    for key, value in pairs.items() if isinstance(pairs, dict) else pairs:
        found[checked_key(key)] = value
    return found


def _encoded(text: Any, encoding: Any = "utf-8") -> bytes:
    if type(text) is not str or encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise PickleError("bytes in an unknown encoding")
    return text.encode(encoding)


def _device(kind: Any, *index: Any) -> str:
    if type(kind) is not str or not all(map(_is_count, index)):
        raise PickleError("a device that is none")
    return ":".join((kind, *map(str, index)))


def _layout(name: Any) -> str:
    if type(name) is not str:
        raise PickleError("a layout that is none")
    return name


def _bytes(data: Any = b"") -> bytes:
    return data if isinstance(data, bytes) else bytes(_counts(tuple(data)))


# Names that stand for types of tensors, as arguments of _rebuild_from_type_v2.
_NAMED: Final = frozenset(("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"))
_CALLS: Final[dict[str, Callable[..., Any]]] = {
    "torch._utils._rebuild_tensor": _tensor_v2,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "collections.OrderedDict": _ordered,
    "collections.Counter": _ordered,
    "torch.Size": lambda sizes: _counts(tuple(sizes)),
    "torch.device": _device,
    "torch.serialization._get_layout": _layout,
    "_codecs.encode": _encoded,
    "builtins.bytearray": _bytes,
    "__builtin__.bytearray": _bytes,
    "builtins.set": lambda items=(): list(items),
    "__builtin__.set": lambda items=(): list(items),
    "builtins.complex": complex,
    "__builtin__.complex": complex,
}


def flatten(value: Any, pickle_bytes: int) -> tuple[dict[str, TensorRecord], dict[str, Any]]:
    """Tensors by name, and everything else by name.

    Names are the keys and positions on the way to a value, joined by dots. A list without tensors or containers in it
    is one value.

    Args:
        value: what was pickled.
        pickle_bytes: how long the pickle is; it bounds how many names there may be and how long they are together.

    Raises:
        PickleError: two values have the same name; a key is neither text nor a number; or the nesting is too deep, too
            wide or without end.
    """
    if isinstance(value, TensorRecord):
        return {LONE_TENSOR: value}, {}
    if not _is_container(value):
        raise PickleError(f"one {type(value).__name__} and no tensors")
    found = _Flattening(pickle_bytes)
    found.visit(value, "", 0)
    return found.tensors, found.values


def _is_container(value: Any) -> bool:
    if isinstance(value, dict):
        return True
    return type(value) in (list, tuple) and any(
        isinstance(item, (dict, list, tuple)) or type(item) is StorageRecord for item in value
    )


class _Flattening:
    """Collects what is found on the way through nested values."""

    def __init__(self, pickle_bytes: int) -> None:
        self.tensors: dict[str, TensorRecord] = {}
        self.values: dict[str, Any] = {}
        self._values_left = self._values_max = min(_VALUES_MAX, _SHARED_VALUES_MAX + pickle_bytes)
        self._characters_left = self._characters_max = _SHARED_CHARACTERS_MAX + _CHARACTERS_PER_BYTE * pickle_bytes

    def _count(self, characters: int) -> None:
        self._values_left -= 1
        self._characters_left -= characters
        if self._values_left < 0:
            raise PickleError(f"more than {self._values_max:,} values, counting each place where one is referred to")
        if self._characters_left < 0:
            raise PickleError(f"values whose names take more than {self._characters_max:,} characters together")

    def visit(self, container: Any, prefix: str, depth: int) -> None:
        """Take up everything in a container."""
        if depth > _DEPTH_MAX:
            raise PickleError(f"values nested more than {_DEPTH_MAX} deep, or in themselves")
        items = container.items() if isinstance(container, dict) else enumerate(container)
        for key, value in items:
            if type(key) not in (str, int):
                raise PickleError(
                    f"a dictionary with {printable(reprlib.repr(key))} for a key, neither text nor a number"
                )
            self._count(len(prefix) + (len(key) if isinstance(key, str) else 1))
            name = f"{prefix}.{key}" if prefix else str(key)
            if type(value) is StorageRecord:
                raise PickleError(f"a storage without a tensor at '{printable(name)}'")
            if not isinstance(value, TensorRecord) and _is_container(value):
                self.visit(value, name, depth + 1)
                continue
            if name in self.tensors or name in self.values:
                raise PickleError(
                    f"two values that are both called '{printable(name)}' once their nesting is written out"
                )
            if isinstance(value, TensorRecord):
                self.tensors[name] = value
            else:
                self.values[name] = value.name if isinstance(value, _Global) else value
