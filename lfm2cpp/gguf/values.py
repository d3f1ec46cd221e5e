"""GGUF metadata values: the thirteen value types, and one typed value as read from or written to a file."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any


class ValueType(IntEnum):
    """`gguf_type`: the numbers are the file format's."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


# struct's letter of every type with a fixed width; '<' (little-endian, unpadded) goes in front.
FORMATS: dict[ValueType, str] = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "B",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}
WIDTHS: dict[ValueType, int] = {t: struct.calcsize("<" + f) for t, f in FORMATS.items()}
INTEGER_TYPES = tuple(t for t, f in FORMATS.items() if f in "BbHhIiQq" and t != ValueType.BOOL)


@dataclass(frozen=True)
class Value:
    """One metadata value.

    `value` is a Python int, float, bool or str; an ARRAY is a list of Python numbers, or a list of bytes
    when its items are strings (vocabulary pieces need not be UTF-8 on their own). `item_type` is set for arrays only.
    """

    type: ValueType
    value: Any
    item_type: ValueType | None = None

    @classmethod
    def u8(cls, value: int) -> Value:
        return cls(ValueType.UINT8, int(value))

    @classmethod
    def u16(cls, value: int) -> Value:
        return cls(ValueType.UINT16, int(value))

    @classmethod
    def u32(cls, value: int) -> Value:
        return cls(ValueType.UINT32, int(value))

    @classmethod
    def i32(cls, value: int) -> Value:
        return cls(ValueType.INT32, int(value))

    @classmethod
    def u64(cls, value: int) -> Value:
        return cls(ValueType.UINT64, int(value))

    @classmethod
    def f32(cls, value: float) -> Value:
        """Rounded to float32 at once, so that a value equals itself after a trip through a file."""
        return cls(ValueType.FLOAT32, struct.unpack("<f", struct.pack("<f", value))[0])

    @classmethod
    def f64(cls, value: float) -> Value:
        return cls(ValueType.FLOAT64, float(value))

    @classmethod
    def bool_(cls, value: bool) -> Value:
        return cls(ValueType.BOOL, bool(value))

    @classmethod
    def string(cls, value: str) -> Value:
        return cls(ValueType.STRING, value)

    @classmethod
    def array(cls, item_type: ValueType, items: Iterable[Any]) -> Value:
        """An array of numbers or bools; for strings use `strings`."""
        items = items.tolist() if hasattr(items, "tolist") else list(items)
        return cls(ValueType.ARRAY, items, ValueType(item_type))

    @classmethod
    def strings(cls, items: Sequence[str | bytes]) -> Value:
        encoded = [item.encode("utf-8") if isinstance(item, str) else bytes(item) for item in items]
        return cls(ValueType.ARRAY, encoded, ValueType.STRING)

    @property
    def type_name(self) -> str:
        """`UINT32`, or `ARRAY of INT32`."""
        return self.type.name if self.item_type is None else f"ARRAY of {self.item_type.name}"


Metadata = dict[str, Value]  # insertion order is the file's order
