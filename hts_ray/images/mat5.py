"""MATLAB v5 files as HICO's anno.mat is one: numbers, texts, cells and structs.

scipy's reader trusts a file's sizes, and a damaged file can end the process with a segmentation
fault. Here every size is checked against the bytes that are there before it is used, and a
compressed variable is unpacked only if it is asked for and within reason.

Source: MathWorks, "MAT-File Format", level 5.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

HEADER_BYTES = 128
MAX_BYTES = 1 << 30  # of one variable: HICO's classes over 200,000 images
_MAX_DEPTH = 8  # of cells and structs in each other

_MATRIX, _COMPRESSED = 14, 15
_STORED = {
    1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8",
}  # fmt: skip
_TEXT = {1: "latin-1", 2: "latin-1", 16: "utf-8"}
_WIDE_TEXT = {4: "utf-16", 17: "utf-16", 18: "utf-32"}
_CELL, _STRUCT, _CHAR = 1, 2, 4
_NUMBERS = {
    6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8",
}  # fmt: skip
_OTHERS = {3: "an object", 5: "a sparse matrix", 16: "a function", 17: "an opaque object"}


class Mat5Error(ValueError):
    """A file that is damaged, or holds what HICO's annotations do not consist of."""


def read_mat5(data: bytes, names: Collection[str]) -> dict[str, Any]:
    """Return the variables of these names; a file may lack some.

    Numeric matrices come as arrays of their class's type in MATLAB's shape; a text as str; cells,
    structs (as dictionaries) and the rows of a text matrix in arrays of objects. Raises Mat5Error.
    """
    order = {b"IM": "<", b"MI": ">"}.get(data[126:HEADER_BYTES], "")
    if not order:
        raise Mat5Error("no MATLAB v5 header")
    found: dict[str, Any] = {}
    for kind, body in _Elements(memoryview(data)[HEADER_BYTES:], order, padded=False):
        if kind not in (_MATRIX, _COMPRESSED):
            raise Mat5Error(f"an element of type {kind} where a variable belongs")
        content = body if kind == _MATRIX else _unpacked(body, order, names)
        if content is None or not len(content):
            continue
        matrix = _Matrix(content, order)
        if matrix.name in found:
            raise Mat5Error(f"the variable {matrix.name} stands there twice")
        if matrix.name in names:
            found[matrix.name] = matrix.value(0)
    return found


def _unpacked(body: memoryview, order: str, names: Collection[str]) -> memoryview | None:
    """Return the contents of a compressed matrix, or None for one that nobody asked for."""
    stream = zlib.decompressobj()
    try:
        head = stream.decompress(body, 512)
        if len(head) < 8:
            raise Mat5Error("a compressed variable without a head")
        kind, size = struct.unpack(f"{order}II", head[:8])
        if kind != _MATRIX:
            raise Mat5Error(f"a compressed element of type {kind} where a variable belongs")
        if _Matrix(memoryview(head)[8:], order).name not in names:
            return None
        if size > MAX_BYTES:
            raise Mat5Error(f"a variable of {size} bytes: more than {MAX_BYTES}")
        # One byte more than there should be, and never 0, which would mean without a limit.
        rest = stream.decompress(stream.unconsumed_tail, max(1, size + 9 - len(head)))
        if len(head) + len(rest) != size + 8:
            raise Mat5Error(f"a variable of {size} bytes has {len(head) + len(rest) - 8}")
    except zlib.error as error:
        raise Mat5Error(str(error)) from error
    if not stream.eof:  # the end carries the checksum
        raise Mat5Error("a compressed variable without its end")
    return memoryview(head + rest)[8:]


class _Elements:
    """The tagged elements of a block of bytes, one after the other."""

    def __init__(self, data: memoryview, order: str, *, padded: bool = True) -> None:
        self._data, self._order, self._padded = data, order, padded
        self._place = 0

    def __iter__(self) -> Iterator[tuple[int, memoryview]]:
        while self._place < len(self._data):
            yield self.take()

    def take(self) -> tuple[int, memoryview]:
        """Return type and bytes of the next element."""
        start = self._place
        tag = self._data[start : start + 8]
        if len(tag) < 8:
            raise Mat5Error("the file ends inside an element's head")
        kind, size = struct.unpack(f"{self._order}II", tag)
        if kind >> 16:  # up to four bytes stand in the tag itself
            kind, size = kind & 0xFFFF, kind >> 16
            if size > 4:
                raise Mat5Error(f"a short element of {size} bytes")
            self._place = start + 8
            return kind, tag[4 : 4 + size]
        body = self._data[start + 8 : start + 8 + size]
        if len(body) < size:
            raise Mat5Error(f"an element of {size} bytes, of which {len(body)} are there")
        unpadded = kind == _COMPRESSED or not self._padded
        self._place = start + 8 + size + (0 if unpadded else -size % 8)
        return kind, body

    def numbers(self, *kinds: int) -> npt.NDArray[Any]:
        """Return the numbers of the next element, which must be of one of these types."""
        kind, body = self.take()
        if kind not in kinds:
            raise Mat5Error(f"an element of type {kind} where numbers belong")
        dtype: np.dtype[Any] = np.dtype(f"{self._order}{_STORED[kind]}")
        if len(body) % dtype.itemsize:
            raise Mat5Error(f"{len(body)} bytes for numbers of {dtype.itemsize}")
        return np.frombuffer(body, dtype)


class _Matrix:
    """A variable, cell or field: its head is read at once, its value when asked for."""

    def __init__(self, body: memoryview, order: str) -> None:
        self._elements, self._order = _Elements(body, order), order
        flags = self._elements.numbers(6)
        if len(flags) != 2:
            raise Mat5Error(f"array flags of {4 * len(flags)} bytes")
        self._kind, self._complex = int(flags[0]) & 0xFF, bool(int(flags[0]) & 0x800)
        shape = self._elements.numbers(5).tolist()
        if not 2 <= len(shape) <= 32 or min(shape) < 0:
            raise Mat5Error(f"the shape {shape[:32]}")
        self._shape, self._count = shape, math.prod(shape)
        self.name = self._elements.numbers(1, 2).tobytes().decode("latin-1")

    def value(self, depth: int) -> Any:
        """Return what `read_mat5` promises."""
        if self._kind in _NUMBERS:
            return self._numbers()
        if self._kind == _CHAR:
            return self._text()
        if self._kind not in (_CELL, _STRUCT) or depth >= _MAX_DEPTH:
            what = _OTHERS.get(self._kind, f"a matrix of class {self._kind} at depth {depth}")
            raise Mat5Error(f"{self.name or 'a variable'} holds {what}")
        fields = self._field_names() if self._kind == _STRUCT else [""]
        # Every one takes eight bytes or more, so that a short file cannot ask for many.
        values = []
        for _ in range(self._count):
            values.append({name: self._inner(depth) for name in fields})
        found = np.empty(len(values), dtype=object)
        for place, value in enumerate(values):
            found[place] = value if self._kind == _STRUCT else value[""]
        return found.reshape(self._shape, order="F")

    def _inner(self, depth: int) -> Any:
        kind, body = self._elements.take()
        if kind != _MATRIX:
            raise Mat5Error(f"an element of type {kind} where a matrix belongs")
        if not len(body):
            return np.zeros((0, 0))
        return _Matrix(body, self._order).value(depth + 1)

    def _field_names(self) -> list[str]:
        (length,) = self._elements.numbers(5).tolist() or [0]
        text = self._elements.numbers(1, 2).tobytes()
        if not 0 < length <= 1024 or len(text) % length:
            raise Mat5Error(f"field names of {length} bytes in {len(text)}")
        parts = [text[start : start + length] for start in range(0, len(text), length)]
        names = [part.split(b"\0")[0].decode("latin-1") for part in parts]
        if not names or len(set(names)) < len(names):
            raise Mat5Error(f"the fields {names[:8]}")
        return names

    def _numbers(self) -> npt.NDArray[Any]:
        parts = [self._elements.numbers(*_STORED) for _ in range(1 + self._complex)]
        for part in parts:
            if len(part) != self._count:
                raise Mat5Error(f"{len(part)} numbers for the shape {self._shape}")
        real = parts[0].astype(_NUMBERS[self._kind], copy=False)
        values = real + 1j * parts[1] if self._complex else real
        return values.reshape(self._shape, order="F")

    def _text(self) -> Any:
        kind, body = self._elements.take()
        wide = _WIDE_TEXT.get(kind)
        codec = f"{wide}-{'le' if self._order == '<' else 'be'}" if wide else _TEXT.get(kind)
        if codec is None:
            raise Mat5Error(f"an element of type {kind} where a text belongs")
        try:
            text = bytes(body).decode(codec)
        except UnicodeDecodeError as error:
            raise Mat5Error(f"a text that is no {codec}") from error
        # MATLAB counts UTF-16's units; others count letters.
        if self._count not in (len(text), len(text.encode("utf-16-le", "surrogatepass")) // 2):
            raise Mat5Error(f"a text of {len(text)} letters for the shape {self._shape}")
        if self._count == 0 or self._shape[0] == 1:
            return text
        rows = self._shape[0]
        lines = np.empty(rows, dtype=object)
        lines[:] = [text[row::rows] for row in range(rows)]
        return lines
