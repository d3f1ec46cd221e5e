"""GGUF files: typed metadata, a strict reader, an atomic writer."""

from __future__ import annotations

from .header import TensorInfo
from .reader import GGUFFile, read_gguf
from .values import Metadata, Value, ValueType
from .writer import TensorToWrite, gguf_size, write_gguf

__all__ = [
    "GGUFFile",
    "Metadata",
    "TensorInfo",
    "TensorToWrite",
    "Value",
    "ValueType",
    "gguf_size",
    "read_gguf",
    "write_gguf",
]
