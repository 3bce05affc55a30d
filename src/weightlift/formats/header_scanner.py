r"""Exact reading of any safetensors header, judged as the format's reference parser judges it.

The reference parser is serde_json filling typed fields, and its verdicts on odd input follow from how it does that:

- every value is parsed in full, also of fields that are then ignored: a lone surrogate, a number too large for a
  double or nesting deeper than 127 levels refuses the header wherever it stands;
- a repeated tensor name is accepted and the last one wins; a repeated field of a tensor, or a repeated
  ``__metadata__``, is refused;
- a tensor may be written as an array ``[dtype, shape, data_offsets]`` and a data type as ``{"F32": null}``;
- dimensions and offsets are unsigned 64-bit integers: ``1.0``, ``1e3``, ``-0`` and ``true`` are not;
- keys are compared after escapes are resolved, so ``"\u0064type"`` is ``dtype``.

With strict rules all of this tolerance ends in a refusal. Nothing is built for values that are not kept, so refusing
a hostile header takes memory in proportion to what had been accepted before, never to what is nested in it.
"""

from __future__ import annotations

import re
from itertools import count
from typing import TYPE_CHECKING, Final, NoReturn

import msgspec

from weightlift.dtypes import SAFETENSORS
from weightlift.errors import FormatError, UnsupportedDtypeError, printable
from weightlift.formats import compiled
from weightlift.formats.columns import TensorColumns
from weightlift.formats.header_text import ANY_TEXT, UNKNOWN, HeaderText, names_in, pattern
from weightlift.types import HeaderRules

if TYPE_CHECKING:
    from collections.abc import KeysView, Sequence

_UINT64_MAX: Final = (1 << 64) - 1
_METADATA: Final = "__metadata__"
_FIELDS: Final = ("dtype", "shape", "data_offsets")
_CODES: Final = {name: code for code, name in enumerate(SAFETENSORS)}

_UINT: Final = rb"(?:0|[1-9][0-9]*+)"
_INTEGER = re.compile(_UINT + rb"(?![0-9.eE])")
_INTEGERS = pattern(rb"(?: (?:0|[1-9][0-9]{0,19}+) ,){1,4096}+")
_LENGTHS: Final = rb"((?:0|[1-9][0-9]{0,18})(?: , (?:0|[1-9][0-9]{0,18})){0,7}+)?+"
_RANGE: Final = rb"\[ (0|[1-9][0-9]{0,18}) , (0|[1-9][0-9]{0,18}) \]"
_TYPICAL: Final = (
    rb' (%b) : \{%%b "dtype" : "([A-Z0-9_]++)()" ,%%b "shape" : \[ %b \] ,%%b "data_offsets" : %b%%b \} ,'
    % (ANY_TEXT, _LENGTHS, _RANGE)
)
_TYPICAL_TENSOR = pattern(_TYPICAL % (b"", b"", b"", b""))
_TENSOR_WITH_MORE = pattern(_TYPICAL % (*[rb"(?: %b ,)*+" % UNKNOWN] * 3, rb"(?: , %b)*+" % UNKNOWN))
_TENSOR_AS_LIST = pattern(
    rb' (%b) : \[ (?:"([A-Z0-9_]++)"|\{ "([A-Z0-9_]++)" : null \}) , \[ %b \] , %b \] ,' % (ANY_TEXT, _LENGTHS, _RANGE)
)
_NAMES: Final = msgspec.json.Decoder(list[str])
_TEXTS: Final = msgspec.json.Decoder(dict[str, str])


def scan(header: bytes, *, path: str, rules: HeaderRules) -> tuple[TensorColumns, dict[str, str]]:
    """Read a header of any form.

    Args:
        header: the JSON text of the header, padding included.
        path: the file, for messages.
        rules: whose rules apply.

    Returns:
        The tensors with names unique, in the order in which the header first names them, with sizes and positions
        not yet checked against each other, and the free-form metadata.

    Raises:
        HeaderError: the header breaks a rule.
        UnsupportedDtypeError: a tensor has a data type that the format does not have.
    """
    return _Scanner(header, path, strict=rules is HeaderRules.STRICT).scan()


def first_repeat(known: KeysView[str], names: Sequence[str]) -> str | None:
    """The first of some names that is known or was among them before."""
    if known.isdisjoint(names) and len(set(names)) == len(names):
        return None
    seen: set[str] = set()

    def is_repeated(name: str) -> bool:
        if name in known or name in seen:
            return True
        seen.add(name)
        return False

    return next(filter(is_repeated, names))


class _Scanner(HeaderText):
    """One pass over one header."""

    def __init__(self, header: bytes, path: str, *, strict: bool) -> None:
        super().__init__(header, path)
        self.strict = strict
        self.patterns = (_TYPICAL_TENSOR,) if strict else (_TENSOR_WITH_MORE, _TENSOR_AS_LIST)
        self.library = compiled.library()
        self.batch = compiled.TensorBatch(tuple(SAFETENSORS), len(header), strict=strict) if self.library else None
        self.columns = TensorColumns()
        self.metadata: dict[str, str] | None = None
        self.metadata_seen = False
        self.row_of: dict[str, int] = {}

    def scan(self) -> tuple[TensorColumns, dict[str, str]]:
        try:
            self.header.decode("utf-8")
        except UnicodeDecodeError as err:
            raise self.error(f"the header is not UTF-8 at byte {err.start:,}: {err.reason}") from err
        self.skip_space()
        if self.peek() != b"{":
            self.refuse("the header is not a JSON object")
        if self.strict and self.position:
            self.refuse("the header does not begin with '{', as strict rules demand", at=0)
        self.members(self.top_level_member, before_each=self.pass_tensors)
        self.skip_space()
        if self.position != len(self.header):
            self.refuse("there is more text after the header's JSON object")
        if len(self.row_of) != len(self.columns):
            self.columns = self.columns.select(list(self.row_of.values()))
        return self.columns, self.metadata or {}

    # The levels of a header

    def top_level_member(self, name: str) -> None:
        if name == _METADATA:
            self.read_metadata()
        else:
            self.read_tensor(name)

    def pass_tensors(self) -> None:
        """Read tensors as long as there is nothing wrong with them and more follow."""
        library, batch = self.library, self.batch
        if library is None or batch is None:
            while any(map(self.pass_tensor, self.patterns)):
                pass
            return
        header = self.header
        while True:
            self.position = library.read_tensors(header, self.position, batch)
            if not batch.rows:
                return
            names = _NAMES.decode(b"[%b]" % b",".join([header[begin:end] for begin, end in batch.names()]))
            batch.append_to(self.columns)
            self.add_names(names)

    def pass_tensor(self, usual: re.Pattern[bytes]) -> bool:
        """Read a tensor of a form that one pattern matches at once, and say whether it was one."""
        match = usual.match(self.header, self.position)
        code = None if match is None else _CODES.get((match[2] or match[3]).decode("ascii"))
        if match is None or code is None:
            return False
        (name,) = _NAMES.decode(b"[%b]" % match[1])
        if name == _METADATA:
            return False
        dims = match[4]
        self.columns.dims.extend(map(int, dims.split(b",")) if dims else ())
        rank = dims.count(b",") + 1 if dims else 0
        self.position = match.end()
        self.add_row(name, code, rank, int(match[5]), int(match[6]))
        return True

    def add_names(self, names: list[str]) -> None:
        """Add the names of the rows after those that have one."""
        if self.strict and (name := first_repeat(self.row_of.keys(), names)) is not None:
            self.refuse(f"two tensors are called '{printable(name)}', which strict rules refuse", tensor=name)
        self.row_of.update(zip(names, count(len(self.columns)), strict=False))
        self.columns.names += names

    def add_row(self, name: str, code: int, rank: int, begin: int, end: int) -> None:
        columns = self.columns
        self.add_names([name])
        columns.dtype_codes.append(code)
        columns.ranks.append(rank)
        columns.begins.append(begin)
        columns.ends.append(end)

    def read_metadata(self) -> None:
        if self.metadata_seen:
            self.refuse("__metadata__ is given twice")
        self.metadata_seen = True
        if not self.strict and self.header.startswith(b"null", self.position):
            self.position += 4
            return
        if self.peek() != b"{":
            self.refuse("__metadata__ is not an object of texts")
        metadata: dict[str, str] = {}

        def refuse_repeat(key: str) -> NoReturn:
            self.refuse(f"__metadata__ has '{printable(key)}' twice, which strict rules refuse")

        def entry(key: str) -> None:
            if self.strict and key in metadata:
                refuse_repeat(key)
            metadata[key] = self.text(f"__metadata__ entry '{printable(key)}'")

        def entries() -> None:
            for texts in self.texts():
                if self.strict and (key := first_repeat(metadata.keys(), _NAMES.decode(names_in(texts)))) is not None:
                    refuse_repeat(key)
                metadata.update(_TEXTS.decode(texts))

        self.members(entry, before_each=entries)
        self.metadata = metadata

    def read_tensor(self, name: str) -> None:
        shown = f"tensor '{printable(name)}'"
        values: dict[str, tuple[int, int]] = {}

        def field(key: str) -> None:
            if key in values:
                self.refuse(f"{shown} has {key} twice", tensor=name)
            if key in _FIELDS:
                values[key] = self.read_field(key, name, shown)
            elif self.strict:
                self.refuse(f"{shown} has a field '{printable(key)}', which strict rules refuse", tensor=name)
            else:
                self.skip_value(depth=2)

        if self.peek() == b"{":
            self.members(field, before_each=None if self.strict else self.skip_unknown)
        elif self.peek() == b"[" and not self.strict:
            self.position += 1
            for index, key in enumerate(_FIELDS):
                if index:
                    self.expect(b",", f"before {key} of {shown}")
                self.skip_space()
                field(key)
            self.expect(b"]", f"after the three values of {shown}")
        else:
            self.refuse(f"{shown} is not an object with dtype, shape and data_offsets", tensor=name)
        if missing := [key for key in _FIELDS if key not in values]:
            self.refuse(f"{shown} has no {' and no '.join(missing)}", tensor=name)
        self.add_row(name, values["dtype"][0], values["shape"][0], *values["data_offsets"])

    def read_field(self, key: str, name: str, shown: str) -> tuple[int, int]:
        """Read one of a tensor's three fields.

        Returns:
            For ``dtype`` its code, for ``shape`` the rank (dimensions go straight into their column), for
            ``data_offsets`` begin and end; a second number is only there for the last.
        """
        if key == "dtype":
            return self.read_dtype(name, shown), 0
        if key == "shape":
            return self.read_shape(name, shown), 0
        self.open_list(key, name, shown)
        begin = self.integer(key, name, shown)
        self.expect(b",", f"between the two data_offsets of {shown}")
        end = self.integer(key, name, shown)
        self.expect(b"]", f"after the two data_offsets of {shown}")
        return begin, end

    def read_dtype(self, name: str, shown: str) -> int:
        at = self.position
        if not self.strict and self.peek() == b"{":
            self.position += 1
            dtype = self.text(f"dtype of {shown}")
            self.expect(b":", f"in dtype of {shown}")
            self.skip_space()
            if not self.header.startswith(b"null", self.position):
                self.refuse(f"dtype of {shown} is not a text", at=at, tensor=name)
            self.position += 4
            self.expect(b"}", f"after dtype of {shown}")
        else:
            dtype = self.text(f"dtype of {shown}")
        code = _CODES.get(dtype)
        if code is None:
            raise self.unknown_dtype(dtype, name, shown)
        return code

    def unknown_dtype(self, dtype: str, name: str, shown: str) -> FormatError:
        return UnsupportedDtypeError(
            f"{self.path}: {shown} has data type '{printable(dtype)}', which safetensors does not have",
            hint=f"known data types: {', '.join(SAFETENSORS)}; a newer weightlift may know more",
            path=self.path,
            tensor=name,
        )

    def open_list(self, key: str, name: str, shown: str) -> None:
        if self.peek() != b"[":
            self.refuse(f"{key} of {shown} is not a list of whole numbers", tensor=name)
        self.position += 1

    def integer(self, key: str, name: str, shown: str) -> int:
        self.skip_space()
        match = _INTEGER.match(self.header, self.position)
        if match is None:
            self.refuse(f"{key} of {shown} holds something else than whole numbers from 0", tensor=name)
        if len(match[0]) > 20 or int(match[0]) > _UINT64_MAX:
            self.refuse(f"{key} of {shown} holds a number above 64 bits", tensor=name)
        self.position = match.end()
        return int(match[0])

    def read_shape(self, name: str, shown: str) -> int:
        self.open_list("shape", name, shown)
        if self.accept(b"]"):
            return 0
        dims = self.columns.dims
        before = len(dims)
        while (run := _INTEGERS.match(self.header, self.position)) is not None:
            numbers = list(map(int, run[0][:-1].split(b",")))
            if max(numbers) > _UINT64_MAX:
                self.refuse(f"shape of {shown} holds a number above 64 bits", tensor=name)
            dims.fromlist(numbers)
            self.position = run.end()
        dims.append(self.integer("shape", name, shown))
        self.expect(b"]", f"after the shape of {shown}")
        return len(dims) - before
