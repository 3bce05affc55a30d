"""The tokens of a header's JSON text, and passing over values that nobody wants.

Owns the rules for strings, numbers, literals and nesting, as the reference parser of safetensors headers has them;
knows nothing of tensors. Hostile headers may hold nothing but ignored values: where the library was compiled, it passes
over them (``_values.c``), and elsewhere patterns match many plain ones at once.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Final, NoReturn

from weightlift.errors import HeaderError, printable
from weightlift.formats import compiled
from weightlift.formats.number_range import exceeds_double

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WS: Final = rb"[ \t\n\r]*+"
"""The pattern of white space that may be there."""

_DEPTH_MAX: Final = 127
_TENSOR_DEPTH: Final = 2

_TOO_DEEP: Final = f"values are nested deeper than {_DEPTH_MAX} levels"
_OUT_OF_RANGE: Final = "a number is out of range"
_NO_VALUE: Final = "the header is not JSON: expected a value"
_REASONS: Final = (
    "",
    _NO_VALUE,
    _TOO_DEEP,
    _OUT_OF_RANGE,
    "the header is not JSON: expected a value, a string without control characters or lone surrogate escapes",
    "the header is not JSON: expected a name, a string",
    "the header is not JSON: expected ':' after a name",
    "the header is not JSON: expected ',' or the end of a list or an object after a value",
)
"""What the compiled library refuses, by its numbers."""

_SPACE = re.compile(WS)
# Possessive repeats: an ordinary one would keep a backtracking record for every escape in a hostile string.
_STRING = re.compile(rb'"((?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+)"')
_NUMBER = re.compile(rb"-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?+(?:[eE][+-]?[0-9]++)?+")
_LITERAL = re.compile(rb"true|false|null")
_LISTS_BEGIN = re.compile(rb"(?:\[%b){2,}+" % WS)
_LISTS_END = re.compile(rb"(?:%b\])++" % WS)

# Plain values: those of ignored fields whose form alone says that the reference parser takes them. Each pattern matches
# many of them at once, so that hostile headers full of them cost little; anything else is looked at one by one. Numbers
# have too few digits to be out of range, escapes are no surrogates, and nesting is two levels deep at the most.
# In these patterns a blank stands for white space that may be there.
_PLAIN_TEXT: Final = rb'"(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u(?![dD][89a-fA-F])[0-9a-fA-F]{4}))*+"'
ANY_TEXT: Final = (
    rb'"(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u(?![dD][89a-fA-F])[0-9a-fA-F]{4}|'
    rb'u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}))*+"'
)
"""The pattern of any text that the reference parser takes."""

_PLAIN_VALUE: Final = (
    rb"(?:%b|-?(?:0|[1-9][0-9]{0,17}+)(?:\.[0-9]{1,17}+)?+(?:[eE][+-]?[0-9]{1,2}+)?+(?![0-9.eE])|true|false|null)"
    % _PLAIN_TEXT
)


def _plain_containers(item: bytes) -> bytes:
    """A pattern for an item, or for a list or an object of items."""
    member = rb"%b : %b" % (_PLAIN_TEXT, item)
    return rb"(?:%b|\[ (?:%b(?: , %b)*+)?+ \]|\{ (?:%b(?: , %b)*+)?+ \})" % (item, item, item, member, member)


_PLAIN: Final = _plain_containers(_plain_containers(_PLAIN_VALUE))
_PLAIN_LEVELS: Final = 2
UNKNOWN: Final = rb'(?!"(?:dtype|shape|data_offsets)")"[^"\\\x00-\x1f]*+" : %b' % _PLAIN
"""The pattern of a member of a tensor of which nothing is to be known, with a blank for white space."""


def pattern(text: bytes) -> re.Pattern[bytes]:
    """Compile a pattern in which a blank stands for white space that may be there."""
    return re.compile(text.replace(b" ", WS))


_PLAIN_ITEMS = pattern(rb"(?: %b ,){1,65535}+" % _PLAIN)
_PLAIN_MEMBERS = pattern(rb"(?: %b : %b ,){1,65535}+" % (_PLAIN_TEXT, _PLAIN))
_UNKNOWN_MEMBERS = pattern(rb"(?: %b ,){1,65535}+" % UNKNOWN)
_TEXT = re.compile(ANY_TEXT)
_TEXT_MEMBERS = pattern(rb"(?: %b : %b ,){1,16384}+" % (ANY_TEXT, ANY_TEXT))


def names_in(texts: bytes) -> bytes:
    """The names of members that are texts, as a list."""
    return b"[%b]" % b",".join(_TEXT.findall(texts)[::2])


class HeaderText:
    """A header's text and how far it has been read; ``position`` is the next byte to read.

    Args:
        header: the JSON text.
        path: the file, for messages.
    """

    def __init__(self, header: bytes, path: str) -> None:
        self.header = header
        self.path = path
        self.position = 0

    # Errors

    def error(self, message: str, *, tensor: str | None = None, hint: str = "") -> HeaderError:
        """The error for this file."""
        hint = hint or "the file is damaged or was written by a faulty tool: fetch it again or convert it again"
        return HeaderError(f"{self.path}: {message}", hint=hint, path=self.path, tensor=tensor)

    def refuse(self, message: str, *, at: int | None = None, tensor: str | None = None) -> NoReturn:
        """Raise, saying what stands at a position; by default the next one to read."""
        position = self.position if at is None else at
        found = printable(self.header[position : position + 24].decode("utf-8", "replace")) or "the end of the header"
        raise self.error(f"{message} (byte {position:,} of the header: {found!r})", tensor=tensor)

    # Tokens

    def skip_space(self) -> None:
        """Go to the next byte that is not white space."""
        match = _SPACE.match(self.header, self.position)
        assert match is not None, "a pattern that may be empty always matches"
        self.position = match.end()

    def peek(self) -> bytes:
        """The next byte, empty at the end."""
        return self.header[self.position : self.position + 1]

    def accept(self, byte: bytes) -> bool:
        """Go behind a byte if it is the next one after white space, and say whether it was."""
        self.skip_space()
        if self.peek() != byte:
            return False
        self.position += 1
        return True

    def expect(self, byte: bytes, where: str) -> None:
        """Go behind a byte that has to be the next one after white space."""
        if not self.accept(byte):
            self.refuse(f"the header is not JSON: expected '{byte.decode()}' {where}")

    def text(self, what: str) -> str:
        """Read a string, resolving its escapes."""
        self.skip_space()
        match = _STRING.match(self.header, self.position)
        if match is None:
            self.refuse(f"expected {what}, a string")
        raw = match[1]
        if b"\\" not in raw:
            value = raw.decode("utf-8")
        else:
            value = str(json.loads(match[0].decode("utf-8")))
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:
                self.refuse(f"{what} has a lone surrogate escape")
        self.position = match.end()
        return value

    def members(self, member: Callable[[str], None], *, before_each: Callable[[], None] | None = None) -> None:
        """Read an object, calling ``member`` with each key; it has to read the value.

        Args:
            member: what to do with a key.
            before_each: may read as many members as it likes, each with the comma behind it, before the next is read
                here.
        """
        self.position += 1
        if self.accept(b"}"):
            return
        while True:
            if before_each is not None:
                before_each()
            key = self.text("a name")
            self.expect(b":", "after a name")
            self.skip_space()
            member(key)
            if self.accept(b"}"):
                return
            self.expect(b",", "or '}' after a value")

    def texts(self) -> Iterator[bytes]:
        """Go behind members that are texts, as long as more follow.

        Yields:
            Many members at once, as an object.
        """
        while (run := _TEXT_MEMBERS.match(self.header, self.position)) is not None:
            begin, self.position = self.position, run.end()
            yield b"{%b}" % self.header[begin : self.position - 1]

    def pass_over(self, pattern: re.Pattern[bytes]) -> None:
        """Go behind what a pattern matches, as often as it does."""
        while (run := pattern.match(self.header, self.position)) is not None:
            self.position = run.end()

    def skip_unknown(self) -> None:
        """Go behind members of a tensor that nobody knows, as long as more follow."""
        library = compiled.library()
        if library is None:
            self.pass_over(_UNKNOWN_MEMBERS)
        else:
            self.position = library.skip_unknown(self.header, self.position, _TENSOR_DEPTH)

    def skip_value(self, depth: int) -> None:
        """Read a value below ``depth`` levels of nesting, checking everything the reference parser checks."""
        library = compiled.library()
        if library is None:
            self.skip_value_here(depth)
            return
        self.position, reason = library.skip_value(self.header, self.position, depth)
        if reason:
            self.refuse(_REASONS[reason])

    def skip_value_here(self, depth: int) -> None:
        """The same without the compiled library."""
        kinds = bytearray()  # the brackets that opened what the next value is in, the innermost last
        while True:
            if self.peek() not in (b"[", b"{"):
                self.skip_plain()
            elif self.open_container(kinds, depth):
                self.begin_item(kinds, depth)
                continue
            self.close_lists(kinds)
            while kinds and self.accept(b"]" if kinds[-1:] == b"[" else b"}"):
                del kinds[-1:]
            if not kinds:
                return
            self.expect(b",", f"or '{']' if kinds[-1:] == b'[' else '}'}' after a value")
            self.begin_item(kinds, depth)

    def open_container(self, kinds: bytearray, depth: int) -> bool:
        """Enter a list or an object, or several lists at once; false if it was empty and has been left again."""
        lists = _LISTS_BEGIN.match(self.header, self.position)
        count = lists[0].count(b"[") if lists is not None else 0
        if lists is not None and depth + len(kinds) + count <= _DEPTH_MAX:
            kinds += b"[" * count
            self.position = lists.end()
        else:
            if depth + len(kinds) >= _DEPTH_MAX:
                self.refuse(_TOO_DEEP)
            kinds += self.peek()
            self.position += 1
        if self.accept(b"]" if kinds[-1:] == b"[" else b"}"):
            del kinds[-1:]
            return False
        return True

    def close_lists(self, kinds: bytearray) -> None:
        """Leave the innermost lists, as many as end here."""
        ends = _LISTS_END.match(self.header, self.position) if kinds[-1:] == b"[" else None
        if ends is not None:
            count = ends[0].count(b"]")
            if count <= len(kinds) - len(kinds.rstrip(b"[")):
                del kinds[len(kinds) - count :]
                self.position = ends.end()

    def begin_item(self, kinds: bytearray, depth: int) -> None:
        """Go to the next value that is not plain, in an object past its key, or to the last one."""
        in_list = kinds[-1:] == b"["
        if depth + len(kinds) + _PLAIN_LEVELS <= _DEPTH_MAX:
            self.pass_over(_PLAIN_ITEMS if in_list else _PLAIN_MEMBERS)
        self.skip_space()
        if not in_list:
            self.text("a name")
            self.expect(b":", "after a name")
            self.skip_space()

    def skip_plain(self) -> None:
        """Read a text, a number or a literal."""
        if self.peek() == b'"':
            self.text("a value")
        elif (literal := _LITERAL.match(self.header, self.position)) is not None:
            self.position = literal.end()
        else:
            number = _NUMBER.match(self.header, self.position)
            if number is None:
                self.refuse(_NO_VALUE)
            if exceeds_double(number[0]):
                self.refuse(_OUT_OF_RANGE)
            self.position = number.end()
