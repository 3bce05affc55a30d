"""What an index means: the two sets of rules that the safetensors library has for slices.

Opened with the ``mmap`` backend, its torch slices are views of a mapping, so torch itself says what an index gives. Its
numpy slices, and those of the ``pread`` backend, follow rules of its own, which refuse more.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

from weightlift.compat.safetensors.ranges import View
from weightlift.compat.safetensors.refusals import SafetensorError

if TYPE_CHECKING:
    from collections.abc import Sequence

_INT64_MAX = (1 << 63) - 1
_UINT64_MAX = (1 << 64) - 1


def simple_view(shape: tuple[int, ...], index: Any) -> View | None:
    """What ``[...]`` and ranges of the first dimension take, or ``None``: the usual indexes, without asking torch."""
    if index is Ellipsis:
        return View(shape, tuple(_strides(shape)), 0)
    if type(index) is not slice or not shape or index.step not in {None, 1}:
        return None
    try:
        start, stop, _ = index.indices(shape[0])
    except TypeError:
        return None
    strides = _strides(shape)
    return View((max(stop - start, 0), *shape[1:]), tuple(strides), start * strides[0])


def torch_view(meta: Any, index: Any) -> View | None:
    """The elements that torch's own indexing takes, or ``None`` if it does not make a view.

    Args:
        meta: a tensor of the data type and shape in question on the ``meta`` device.
        index: any index.

    Raises:
        IndexError: and whatever else torch raises for an index that does not fit.
    """
    parts = index if isinstance(index, tuple) else (index,)
    for part in parts:
        # Lists, arrays and tensors select elements one by one; torch has to see the values to do that.
        if not (part is None or part is Ellipsis or isinstance(part, slice | int) or _is_scalar(part)):
            return None
    if sum(part is Ellipsis for part in parts) > 1:
        # Some of these are taken by tensors with contents and refused by those without.
        return None
    found = meta[index]
    if not found._is_view():  # noqa: SLF001 - torch has no public name for it
        return None
    return View(tuple(found.shape), found.stride(), found.storage_offset())


def _is_scalar(part: object) -> bool:
    return hasattr(part, "__index__") and not hasattr(part, "ndim")


class _Span:
    """One dimension of a strict index."""

    __slots__ = ("number", "start", "step", "stop")

    def __init__(self, start: int | None, stop: int | None, step: int, number: int | None = None) -> None:
        self.start, self.stop, self.step, self.number = start, stop, step, number

    def __str__(self) -> str:
        if self.number is not None:
            return str(self.number)
        start = "" if self.start is None else self.start
        stop = "" if self.stop is None else self.stop
        return f"{start}:{stop}" if self.step == 1 else f"{start}:{stop}:{self.step}"


def strict_view(shape: tuple[int, ...], index: Any) -> View:
    """The elements that an index takes by the library's own rules.

    Args:
        shape: the tensor's.
        index: whole numbers, slices with positive steps within the tensor, and one ellipsis.

    Raises:
        SafetensorError: anything else, or outside the tensor.
        OverflowError: a slice's bound is negative, or too large to be one.
        TypeError: it is no whole number.
    """
    spans = _spans(shape, index)
    shown = ", ".join(map(str, spans))
    if len(spans) > len(shape):
        raise SafetensorError(
            f"index [{shown}] has {len(spans)} parts, more than the {len(shape)} dimensions of shape {list(shape)}"
        )
    strides = _strides(shape)
    sizes, steps, offset = [], [], 0
    for position, span in enumerate(spans):
        size = shape[position]
        start, stop = (
            (span.start or 0, size if span.stop is None else span.stop)
            if span.number is None
            else (span.number, span.number + 1)
        )
        if start >= size or start > stop or stop > size:
            raise SafetensorError(
                f"index [{shown}] does not lie within shape {list(shape)}: dimension {position} has {size} entries"
            )
        offset += start * strides[position]
        if span.number is None:
            sizes.append(-(-(stop - start) // span.step))
            steps.append(span.step * strides[position])
    sizes.extend(shape[len(spans) :])
    steps.extend(strides[len(spans) :])
    return View(tuple(sizes), tuple(steps), offset)


def _strides(shape: Sequence[int]) -> list[int]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return strides[::-1]


def _spans(shape: tuple[int, ...], index: Any) -> list[_Span]:
    if isinstance(index, list):
        if index:
            raise SafetensorError("an index that is a list is not possible here: read the tensor and index it")
        return [_Span(0, 0, 1)]
    parts: list[Any] = list(index) if isinstance(index, tuple) else [index]
    ellipses = [position for position, part in enumerate(parts) if part is Ellipsis]
    if len(ellipses) > 1:
        raise SafetensorError("only one ellipsis (...) is possible in an index")
    for at in ellipses:
        parts[at : at + 1] = [slice(None)] * max(len(shape) - len(parts) + 1, 0)
    return [
        _slice(part) if isinstance(part, slice) else _number(shape, position, part)
        for position, part in enumerate(parts)
    ]


def _slice(part: slice) -> _Span:
    start, stop = _bound(part.start), _bound(part.stop)
    step = 1 if part.step is None else operator.index(part.step)
    if not -_INT64_MAX - 1 <= step <= _INT64_MAX:
        raise OverflowError(f"a slice's step of {step} is too large")
    if step < 1:
        raise SafetensorError(f"a slice's step has to be a positive whole number, not {step}")
    return _Span(start, stop, step)


def _bound(value: Any) -> int | None:
    if value is None:
        return None
    number = operator.index(value)
    if not 0 <= number <= _UINT64_MAX:
        raise OverflowError(f"a slice's bound of {number} is {'negative' if number < 0 else 'too large'}")
    return number


def _number(shape: tuple[int, ...], position: int, part: Any) -> _Span:
    try:
        number = operator.index(part)
    except (TypeError, ValueError, RuntimeError):
        number = None
    if number is None or not -_INT64_MAX - 1 <= number <= _INT64_MAX:
        raise SafetensorError(
            f"part {position} of the index is {type(part).__name__}: use a slice, a whole number or an ellipsis"
        )
    size = shape[position] if position < len(shape) else 0
    if number + size < 0:
        raise SafetensorError(f"index {number} is before the first of the {size} entries of dimension {position}")
    return _Span(None, None, 1, number + size if number < 0 else number)
