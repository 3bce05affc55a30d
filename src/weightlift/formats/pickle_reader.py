"""Reading a pickle without running it: a small interpreter of the opcodes that checkpoints use.

Owns the opcodes. It imports nothing and calls nothing but the three functions it is given, which turn names, calls and
references into inert values and refuse what they do not know. The opcodes are those that ``torch.load`` with
``weights_only=True`` takes (protocol 2, see the module ``pickletools`` for their meaning). Memory is bounded by the
pickle's length and the number of values.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, ClassVar, Final

from weightlift.errors import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

STEPS_MAX: Final = 8 << 20
"""Most opcodes that are carried out: enough for some 250,000 tensors, in a few hundred MiB at worst."""

_STOP: Final = ord(".")
_NEWEST_PROTOCOL: Final = 2
_MARKS_MAX: Final = 1000
_UINT16: Final = struct.Struct("<H")
_INT32: Final = struct.Struct("<i")
_UINT32: Final = struct.Struct("<I")
_FLOAT64: Final = struct.Struct(">d")


class PickleError(Exception):
    """What a pickle holds that is not read, or that is wrong with it."""


class Ordered(dict[Any, Any]):
    """A dictionary that was pickled as an object of its own, so that attributes may follow; those are left out."""


def checked_key(key: Any) -> Any:
    """A key of a dictionary, once it is known to be quickly hashed.

    Raises:
        PickleError: it is a container: one of containers within containers takes for ever to hash.
    """
    if type(key) not in (str, int, float, bool, bytes, type(None)):
        raise PickleError(f"a dictionary with a {type(key).__name__} for a key")
    return key


class PickleReader:
    """Reads one pickle.

    Args:
        data: the pickle.
        look_up: what stands for a global, given its dotted name.
        call: the result of calling a global's stand-in with arguments.
        resolve: what stands for a persistent reference.

    All three raise :class:`PickleError` for what they do not know.
    """

    def __init__(
        self,
        data: bytes,
        *,
        look_up: Callable[[str], Any],
        call: Callable[[Any, tuple[Any, ...]], Any],
        resolve: Callable[[Any], Any],
    ) -> None:
        self._data = data
        self._at = 0
        self._look_up, self._call, self._resolve = look_up, call, resolve
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def read(self) -> Any:
        """The object that was pickled.

        Raises:
            PickleError: there is something in it that is not read, or it is damaged.
        """
        data, handlers = self._data, self._handlers
        steps = 0
        try:
            while True:
                code = data[self._at]
                self._at += 1
                if code == _STOP:
                    return self._stack.pop()
                handler = handlers.get(code)
                if handler is None:
                    raise PickleError(f"opcode 0x{code:02x} at byte {self._at - 1:,}, which no checkpoint needs")
                handler(self)
                steps += 1
                if steps > STEPS_MAX:
                    raise PickleError(f"more than {STEPS_MAX:,} opcodes")
        except (IndexError, KeyError, struct.error) as err:
            raise PickleError(f"nothing sensible at byte {self._at:,} of {len(data):,}") from err
        except (UnicodeDecodeError, TypeError) as err:
            raise PickleError(f"nothing sensible at byte {self._at:,}: {printable(str(err))}") from err

    def _take(self, length: int) -> bytes:
        end = self._at + length
        if end > len(self._data):
            raise PickleError(f"{length:,} bytes at byte {self._at:,}, beyond its end at {len(self._data):,}")
        part = self._data[self._at : end]
        self._at = end
        return part

    def _number(self, form: struct.Struct) -> Any:
        self._at += form.size
        return form.unpack_from(self._data, self._at - form.size)[0]

    def _line(self) -> str:
        end = self._data.find(b"\n", self._at)
        if end < 0:
            raise PickleError(f"a name at byte {self._at:,} without an end")
        return self._take(end + 1 - self._at)[:-1].decode()

    def _to_mark(self) -> list[Any]:
        items = self._stack
        self._stack = self._outer.pop()
        return items

    # ---- opcodes, by their names in pickletools

    def _proto(self) -> None:
        version = self._take(1)[0]
        if version > _NEWEST_PROTOCOL:
            raise PickleError(f"pickle protocol {version}, where torch.save writes {_NEWEST_PROTOCOL}")

    def _mark(self) -> None:
        if len(self._outer) == _MARKS_MAX:
            raise PickleError(f"more than {_MARKS_MAX} values inside each other")
        self._outer.append(self._stack)
        self._stack = []

    def _none(self) -> None:
        self._stack.append(None)

    def _newtrue(self) -> None:
        self._stack.append(True)

    def _newfalse(self) -> None:
        self._stack.append(False)

    def _binint(self) -> None:
        self._stack.append(self._number(_INT32))

    def _binint1(self) -> None:
        self._stack.append(self._take(1)[0])

    def _binint2(self) -> None:
        self._stack.append(self._number(_UINT16))

    def _long1(self) -> None:
        self._stack.append(int.from_bytes(self._take(self._take(1)[0]), "little", signed=True))

    def _binfloat(self) -> None:
        self._stack.append(self._number(_FLOAT64))

    def _binunicode(self) -> None:
        self._stack.append(self._take(self._number(_UINT32)).decode("utf-8", "surrogatepass"))

    def _short_binstring(self) -> None:
        self._stack.append(self._take(self._take(1)[0]).decode("latin-1"))

    def _empty_tuple(self) -> None:
        self._stack.append(())

    def _empty_list(self) -> None:
        self._stack.append([])

    def _empty_dict(self) -> None:
        self._stack.append({})

    def _empty_set(self) -> None:
        self._stack.append([])

    def _tuple(self) -> None:
        items = self._to_mark()
        self._stack.append((*items,))

    def _tuple1(self) -> None:
        self._stack[-1:] = [(self._stack[-1],)]

    def _tuple2(self) -> None:
        self._stack[-2:] = [(self._stack[-2], self._stack[-1])]

    def _tuple3(self) -> None:
        self._stack[-3:] = [(self._stack[-3], self._stack[-2], self._stack[-1])]

    def _append(self) -> None:
        item = self._stack.pop()
        self._list().append(item)

    def _appends(self) -> None:
        items = self._to_mark()
        self._list().extend(items)

    def _list(self) -> list[Any]:
        found = self._stack[-1]
        if type(found) is not list:
            raise PickleError(f"items for {type(found).__name__}, which is no list")
        return found

    def _setitem(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._dictionary()[checked_key(key)] = value

    def _setitems(self) -> None:
        items = self._to_mark()
        if len(items) % 2:
            raise PickleError(f"a dictionary with a key and no value at byte {self._at:,}")
        self._dictionary().update(zip(map(checked_key, items[::2]), items[1::2], strict=True))

    def _dictionary(self) -> dict[Any, Any]:
        found = self._stack[-1]
        if type(found) not in (dict, Ordered):
            raise PickleError(f"items for {type(found).__name__}, which is no dictionary")
        return found  # type: ignore[no-any-return] # its type was just looked at

    def _binput(self) -> None:
        self._memo[self._take(1)[0]] = self._stack[-1]

    def _long_binput(self) -> None:
        self._memo[self._number(_UINT32)] = self._stack[-1]

    def _binget(self) -> None:
        self._stack.append(self._memo[self._take(1)[0]])

    def _long_binget(self) -> None:
        self._stack.append(self._memo[self._number(_UINT32)])

    def _global(self) -> None:
        module, name = self._line(), self._line()
        self._stack.append(self._look_up(f"{module}.{name}"))

    def _binpersid(self) -> None:
        self._stack.append(self._resolve(self._stack.pop()))

    def _reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if type(arguments) is not tuple:
            raise PickleError(f"a call at byte {self._at:,} with {type(arguments).__name__} for arguments")
        self._stack.append(self._call(function, arguments))

    def _build(self) -> None:
        self._stack.pop()
        if type(self._stack[-1]) is not Ordered:
            raise PickleError(f"attributes for {type(self._stack[-1]).__name__} at byte {self._at:,}")

    _handlers: ClassVar[Mapping[int, Callable[[PickleReader], None]]] = {
        0x80: _proto,
        ord("("): _mark,
        ord("N"): _none,
        0x88: _newtrue,
        0x89: _newfalse,
        ord("J"): _binint,
        ord("K"): _binint1,
        ord("M"): _binint2,
        0x8A: _long1,
        ord("G"): _binfloat,
        ord("X"): _binunicode,
        ord("U"): _short_binstring,
        ord(")"): _empty_tuple,
        ord("]"): _empty_list,
        ord("}"): _empty_dict,
        0x8F: _empty_set,
        ord("t"): _tuple,
        0x85: _tuple1,
        0x86: _tuple2,
        0x87: _tuple3,
        ord("a"): _append,
        ord("e"): _appends,
        ord("s"): _setitem,
        ord("u"): _setitems,
        ord("q"): _binput,
        ord("r"): _long_binput,
        ord("h"): _binget,
        ord("j"): _long_binget,
        ord("c"): _global,
        ord("Q"): _binpersid,
        ord("R"): _reduce,
        ord("b"): _build,
    }
