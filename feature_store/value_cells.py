"""Single Python values to `Value` protos, and few of them to cells of packed rows: the path without numpy. Pure.

`SCALARS`: by type, the `Value` of one value, None where Feast's converter is asked. `CELLS`: by type, what makes the cells
of some values at once: the frequent ones inline, of the others it asks.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Any

from feature_store.row_bytes import string_head, varint

Cells = Callable[[Sequence[Any]], list[bytes]]
_MASK = 2**64 - 1


def _one_integer(tag: bytes, limit: int) -> Callable[[Any], bytes | None]:
    def encode(value: Any) -> bytes | None:
        if type(value) is float:  # a whole number with gaps, as pandas holds it
            if value != value:
                return b""
            if not value.is_integer():
                raise ValueError(f"{value} is no whole number")
            value = int(value)
        if type(value) is int and -limit <= value < limit:
            return tag + varint(value & _MASK)
        return None

    return encode


def _one_float(tag: bytes, layout: str) -> Callable[[Any], bytes | None]:
    def encode(value: Any) -> bytes | None:
        if type(value) is not float:
            return None
        if value != value:
            return b""
        try:
            return tag + struct.pack(layout, value)
        except OverflowError:  # a double beyond float32: infinite, as protobuf makes it
            return None

    return encode


def _one_text(value: Any) -> bytes | None:
    if type(value) is not str:
        return None
    data = value.encode()
    return b"\x12" + varint(len(data)) + data


def _one_bytes(value: Any) -> bytes | None:
    return b"\x0a" + varint(len(value)) + value if type(value) is bytes else None


def _one_boolean(value: Any) -> bytes | None:
    return (b"\x38\x01" if value else b"\x38\x00") if type(value) is bool else None


def _one_time(value: Any) -> bytes | None:
    if not isinstance(value, datetime) or value != value:
        return None
    whole = (value if value.tzinfo else value.replace(tzinfo=UTC)).replace(microsecond=0)
    return b"\x40" + varint(math.floor(whole.timestamp()) & _MASK)


SCALARS: dict[str, Callable[[Any], bytes | None]] = {
    "INT32": _one_integer(b"\x18", 2**31),
    "INT64": _one_integer(b"\x20", 2**63),
    "DOUBLE": _one_float(b"\x29", "<d"),
    "FLOAT": _one_float(b"\x35", "<f"),
    "STRING": _one_text,
    "BYTES": _one_bytes,
    "PDF_BYTES": _one_bytes,
    "IMAGE_BYTES": _one_bytes,
    "BOOL": _one_boolean,
    "UNIX_TIMESTAMP": _one_time,
}


# --- cells: `prefix`, a MessagePack string, and in it the `Value`. `other` makes the cell of any value -------------------


@cache
def _fourteen_bits() -> tuple[list[bytes], list[bytes]]:
    """Of each number of 14 bits its bytes in a varint: as the last ones, and as two that others follow."""
    short = [bytes([n]) for n in range(1 << 7)]
    long = [bytes((n & 127 | 128, n >> 7)) for n in range(1 << 7, 1 << 14)]
    return short + long, [bytes((n & 127 | 128, n >> 7 | 128)) for n in range(1 << 14)]


def _integer_cells(tag: bytes) -> Callable[[bytes, Callable[[Any], bytes]], Cells]:
    def bind(prefix: bytes, other: Callable[[Any], bytes]) -> Cells:
        heads = [prefix + string_head(1 + n) + tag for n in range(5)]
        last, followed = _fourteen_bits()

        def cell(v: Any) -> bytes:
            if type(v) is not int or not 0 <= v < 1 << 28:
                return other(v)
            if v < 1 << 14:
                data = last[v]
                return heads[len(data)] + data
            data = last[v >> 14]
            return heads[2 + len(data)] + followed[v & 16383] + data

        return lambda values: list(map(cell, values))

    return bind


def _float_cells(tag: bytes, layout: str) -> Callable[[bytes, Callable[[Any], bytes]], Cells]:
    pack = struct.Struct(layout).pack

    def bind(prefix: bytes, other: Callable[[Any], bytes]) -> Cells:
        head = prefix + string_head(1 + struct.calcsize(layout)) + tag
        return lambda values: [head + pack(v) if type(v) is float and v == v else other(v) for v in values]

    return bind


def _text_cells(prefix: bytes, other: Callable[[Any], bytes]) -> Cells:
    heads = text_heads(prefix, b"\x12")

    def cell(v: Any) -> bytes:
        if type(v) is str and len(v) < 128 and v.isascii():
            return heads[len(v)] + v.encode()
        return other(v)

    return lambda values: list(map(cell, values))


def text_heads(prefix: bytes, tag: bytes) -> list[bytes]:
    """What stands before a text or bytes of 0 to 127 bytes."""
    return [prefix + string_head(2 + n) + tag + bytes([n]) for n in range(128)]


CELLS: dict[str, Callable[[bytes, Callable[[Any], bytes]], Cells]] = {
    "INT32": _integer_cells(b"\x18"),
    "INT64": _integer_cells(b"\x20"),
    "DOUBLE": _float_cells(b"\x29", "<d"),
    "FLOAT": _float_cells(b"\x35", "<f"),
    "STRING": _text_cells,
}
