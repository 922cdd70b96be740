"""Columns of many rows as binary arrays, packed here: the driver would ask each element what it is, at ten times the cost.

The format is that of PostgreSQL's `array_send`: dimensions, null flag, element type; length and lower bound; then each
element as its length and its bytes, a null as length -1. All of it big-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from psycopg import adapt, pq

BOOL, BYTEA, INT8, INT4, TEXT = 16, 17, 20, 23, 25
_ARRAY_OF = {BOOL: 1000, BYTEA: 1001, INT8: 1016, INT4: 1007, TEXT: 1009}

_NULL = b"\xff\xff\xff\xff"
_header = struct.Struct(">iiIii").pack
_length = struct.Struct(">i").pack
_int4 = struct.Struct(">ii").pack
_int8 = struct.Struct(">iq").pack
_INTS = [_int4(4, n) for n in range(4096)]
_LENGTHS = [_length(n) for n in range(4096)]
_CACHE_MAX = 20_000
_CACHED_TEXT_MAX = 100


class Packed:
    """A finished array: what a parameter of one of the array types below holds."""

    __slots__ = ("data",)

    def __init__(self, element: int, count: int, body: bytes) -> None:
        self.data = (_header(1, 1, element, count, 1) if count else _header(0, 0, element, 0, 0)[:12]) + body


class Texts(Packed):
    """text[]"""


class Ints(Packed):
    """int4[]"""


class BigInts(Packed):
    """int8[]"""


class Bools(Packed):
    """bool[]"""


class Blobs(Packed):
    """bytea[]"""


class _Elements(dict[str | None, bytes]):
    """Text → its element. The same few words, names and keys come again and again."""

    def __missing__(self, text: str | None) -> bytes:
        if text is None:
            element = _NULL
        else:
            data = text.encode()
            if b"\0" in data:
                raise UnicodeEncodeError(
                    "utf-8", text, text.index("\0"), text.index("\0") + 1, "NUL is not allowed in text"
                )
            element = _length(len(data)) + data
            if len(data) > _CACHED_TEXT_MAX:
                return element
        if len(self) >= _CACHE_MAX:
            self.clear()
        self[text] = element
        return element


_elements = _Elements()
_element = _elements.__getitem__


def texts(values: Sequence[str | None]) -> Texts:
    return Texts(TEXT, len(values), b"".join(map(_element, values)))


def ints(values: Sequence[int | None]) -> Ints:
    """Raises struct.error for a number that is too large."""
    parts = [_NULL if value is None else _INTS[value] if 0 <= value < 4096 else _int4(4, value) for value in values]
    return Ints(INT4, len(values), b"".join(parts))


def bigints(values: Sequence[int | None]) -> BigInts:
    """Raises struct.error for a number that is too large."""
    return BigInts(INT8, len(values), b"".join([_NULL if value is None else _int8(8, value) for value in values]))


def bools(values: Sequence[bool | None]) -> Bools:
    return Bools(BOOL, len(values), b"".join([_BOOLS[value] for value in values]))


def blobs(values: Sequence[bytes | None]) -> Blobs:
    parts: list[bytes] = []
    for value in values:
        if value is None:
            parts.append(_NULL)
        else:
            size = len(value)
            parts.append(_LENGTHS[size] if size < 4096 else _length(size))
            parts.append(value)
    return Blobs(BYTEA, len(values), b"".join(parts))


_BOOLS = {None: _NULL, False: _length(1) + b"\0", True: _length(1) + b"\1"}
NO_TEXTS, NO_BIGINTS, NO_INTS, NO_BOOLS, NO_BLOBS = texts([]), bigints([]), ints([]), bools([]), blobs([])
"""Beside longer ones in `unnest`, all nulls."""


def _dumper(element: int) -> type[adapt.Dumper]:
    class PackedDumper(adapt.Dumper):
        format = pq.Format.BINARY
        oid = _ARRAY_OF[element]

        def dump(self, obj: Packed) -> bytes:
            return obj.data

    return PackedDumper


def register(adapters: adapt.AdaptersMap) -> None:
    """Teach a connection these arrays."""
    for kind, element in ((Texts, TEXT), (Ints, INT4), (BigInts, INT8), (Bools, BOOL), (Blobs, BYTEA)):
        adapters.register_dumper(kind, _dumper(element))
