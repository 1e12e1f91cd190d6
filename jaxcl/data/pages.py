"""What the pages of a Parquet file declare, read before the library that unpacks them: a small file can hold much.

A page is unpacked as a whole, to the size that its header says. Where values refer to a dictionary, or share the
beginning of the value before, a page of a few bytes can stand for as many copies of a long text as it has rows. Headers
are Thrift's compact protocol (parquet-format: README.md, parquet.thrift; thrift-compact-protocol.md).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from typing import IO, Any

from jaxcl.schema import UserError

PAGE = 2**30  # bytes of a page; DuckDB, which writes the largest ones, ends them there
PACKED = 2**26  # bytes up to which a page may unpack to any multiple of its size
RATIO = 64  # and from there on to this one
VALUES = 2**26  # of a column in a row group; those of one row are in memory together
BATCH = 2**27  # bytes that a batch of rows may take if each of them is the longest value
_HEADER = 2**16  # bytes read for one header; statistics are cut off by writers
# Fields by their numbers in parquet.thrift.
_GROUPS, _COLUMNS, _META, _PATH, _VALUES, _PACKED, _DATA, _DICTIONARY = 4, 1, 3, 3, 5, 7, 9, 11
_DELTA = 7  # DELTA_BYTE_ARRAY: values share beginnings
_DEEP = 8  # structures within each other


class Unsound(Exception):
    """A footer or a header that is none."""


def rows(name: str, columns: Sequence[str], most: int) -> int:
    """Returns how many rows of a file to read at a time, `most` or fewer.

    Args:
      name: the file.
      columns: those that are read.
      most: rows.

    Raises:
      UserError: a page, or a column, unpacks to more than one of its size should; or it has a header that is none.
    """
    longest, size, total = 1, os.path.getsize(name), 0
    with open(name, "rb") as stream:
        try:
            for group in _footer(stream, size)[_GROUPS]:
                for chunk in (column[_META] for column in group[_COLUMNS]):
                    path = b".".join(chunk[_PATH]).decode("utf-8", "replace")
                    total += max(chunk[_PACKED], 1)
                    if total > size:
                        raise UserError(f"{name}: has columns that lie over each other; replace it or leave it out")
                    if path.split(".")[0] in columns:
                        longest = max(longest, _column(stream, f"{name}: column {path!r}", chunk, size))
        except (Unsound, LookupError, TypeError, ValueError, AttributeError, struct.error) as error:
            raise UserError(f"{name}: its footer, or the header of a page, is none; replace the file") from error
    return max(1, min(most, BATCH // longest))


def _footer(stream: IO[bytes], size: int) -> dict[int, Any]:
    """Returns FileMetaData."""
    stream.seek(max(0, size - 8))
    (length,) = struct.unpack("<I4x", stream.read(8))
    if length + 8 > size:
        raise Unsound
    stream.seek(size - 8 - length)
    return _struct(stream.read(length), 0)[0]


def _column(stream: IO[bytes], where: str, chunk: dict[int, Any], size: int) -> int:
    """Returns the bytes that each value of a column may take through copies; 0 if values are stored one by one."""
    # A dictionary lies before the data; some writers say 0 where there is none.
    place = min(at for at in (chunk.get(_DICTIONARY), chunk[_DATA]) if at)
    total, end, values, longest = chunk[_VALUES], place + chunk[_PACKED], 0, 0
    if not 0 < place <= end <= size or not 0 <= total <= VALUES:
        raise UserError(f"{where} has a place or a number of values that no file has; replace it or leave it out")
    while place < end and values < total:
        stream.seek(place)
        header, length = _struct(stream.read(_HEADER), 0)
        unpacked, packed = header[2], header[3]
        data, dictionary = header.get(5) or header.get(8) or {}, header.get(7)
        count, coding = data.get(1, 0), data.get(2 if 5 in header else 4)
        if not 0 <= packed <= end - place or not 0 <= count <= VALUES or unpacked < 0:
            raise UserError(f"{where} has a page of {packed:,} bytes that it cannot hold; replace it or leave it out")
        if unpacked > PAGE or unpacked > max(PACKED, RATIO * packed):
            raise UserError(f"{where} has a page of {packed:,} bytes that unpacks to {unpacked:,}; leave it out")
        if dictionary is not None or coding == _DELTA:
            longest = max(longest, unpacked)
        place, values = place + length + packed, values + count
    return longest


def _struct(data: bytes, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """Returns the fields of a structure by number, and the place behind it."""
    if depth > _DEEP:
        raise Unsound
    found, field = {}, 0
    while data[at]:
        delta, kind = data[at] >> 4, data[at] & 15
        at += 1
        if delta:
            field += delta
        else:
            field, at = _whole(data, at)
        found[field], at = _value(data, at, kind, depth)
    return found, at + 1


def _value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    """Returns a value, None for those that nobody asks for, and the place behind it."""
    if kind in (1, 2):
        return kind == 1, at
    if kind == 3:
        return None, at + 1
    if kind in (4, 5, 6):
        return _whole(data, at)
    if kind == 7:
        return None, at + 8
    if kind == 8:
        size, at = _varint(data, at)
        return data[at : at + size], at + size
    if kind in (9, 10):
        return _list(data, at, depth)
    if kind == 12:
        return _struct(data, at, depth + 1)
    raise Unsound  # a map, which is in no structure of Parquet


def _list(data: bytes, at: int, depth: int) -> tuple[list[Any], int]:
    """Returns the items of a list, and the place behind it; an item has a byte at least."""
    size, kind = data[at] >> 4, data[at] & 15
    at += 1
    if size == 15:
        size, at = _varint(data, at)
    if size > len(data) - at:
        raise Unsound
    found = []
    for _ in range(size):
        item, at = (None, at + 1) if kind in (1, 2) else _value(data, at, kind, depth)
        found.append(item)
    return found, at


def _whole(data: bytes, at: int) -> tuple[int, int]:
    """Returns a signed number (zigzag)."""
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        value |= (data[at] & 127) << shift
        at += 1
        if not data[at - 1] & 128:
            return value, at
    raise Unsound
