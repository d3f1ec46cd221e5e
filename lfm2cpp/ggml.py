"""GGML facts: tensor types, their blocks, and file types. Imports nothing else of the package.

Source: ggml/src/ggml-common.h and include/llama.h of llama.cpp; each block stands beside a check of its size.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

QK4_0 = QK4_1 = QK8_0 = 32
QK_K = 256


class GGMLType(IntEnum):
    """`ggml_type`: how one tensor is stored. The numbers are the file format's."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39


REMOVED_TYPES = {
    4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8",
    36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8",
}  # fmt: skip

block_q4_0 = np.dtype([
    ("d", "<f2"),              # scale
    ("qs", "u1", QK4_0 // 2),  # low nibbles: elements 0..15, high nibbles: 16..31
])  # fmt: skip
assert block_q4_0.itemsize == 18

block_q4_1 = np.dtype([
    ("d", "<f2"),              # scale
    ("m", "<f2"),              # minimum
    ("qs", "u1", QK4_1 // 2),
])  # fmt: skip
assert block_q4_1.itemsize == 20

block_q5_0 = np.dtype([
    ("d", "<f2"),              # scale
    ("qh", "<u4"),             # bit i: the fifth bit of element i
    ("qs", "u1", 16),          # low nibbles: elements 0..15, high nibbles: 16..31
])  # fmt: skip
assert block_q5_0.itemsize == 22

block_q5_1 = np.dtype([
    ("d", "<f2"),              # scale
    ("m", "<f2"),              # minimum
    ("qh", "<u4"),
    ("qs", "u1", 16),
])  # fmt: skip
assert block_q5_1.itemsize == 24

block_iq4_nl = np.dtype([
    ("d", "<f2"),              # scale
    ("qs", "u1", 16),          # nibbles: indices into IQ4_NL_VALUES
])  # fmt: skip
assert block_iq4_nl.itemsize == 18
# ggml's kvalues_iq4nl: what a number of 4 bits stands for, denser around zero
IQ4_NL_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

block_q8_0 = np.dtype([
    ("d", "<f2"),              # scale
    ("qs", "i1", QK8_0),
])  # fmt: skip
assert block_q8_0.itemsize == 34

block_q4_K = np.dtype([
    ("d", "<f2"),              # scale of the scales
    ("dmin", "<f2"),           # scale of the minima
    ("scales", "u1", 12),      # eight scales and eight minima, 6 bits each
    ("qs", "u1", QK_K // 2),   # of each 64 elements, low nibbles: the first 32, high nibbles: the others
])  # fmt: skip
assert block_q4_K.itemsize == 144

block_q5_K = np.dtype([
    ("d", "<f2"),
    ("dmin", "<f2"),
    ("scales", "u1", 12),
    ("qh", "u1", QK_K // 8),   # bit j of byte i: the fifth bit of element 32 j + i
    ("qs", "u1", QK_K // 2),
])  # fmt: skip
assert block_q5_K.itemsize == 176

block_q6_K = np.dtype([
    ("ql", "u1", QK_K // 2),       # low 4 bits
    ("qh", "u1", QK_K // 4),       # high 2 bits
    ("scales", "i1", QK_K // 16),  # one per 16 elements
    ("d", "<f2"),                  # scale of the scales
])  # fmt: skip
assert block_q6_K.itemsize == 210


@dataclass(frozen=True)
class TypeTraits:
    """Elements per block, bytes per block and, where we look inside, the block's fields."""

    block_size: int
    type_size: int
    dtype: np.dtype | None = None


TRAITS: dict[GGMLType, TypeTraits] = {
    GGMLType.F32: TypeTraits(1, 4, np.dtype("<f4")),
    GGMLType.F16: TypeTraits(1, 2, np.dtype("<f2")),
    GGMLType.BF16: TypeTraits(1, 2, np.dtype("<u2")),
    GGMLType.F64: TypeTraits(1, 8, np.dtype("<f8")),
    GGMLType.I8: TypeTraits(1, 1, np.dtype("i1")),
    GGMLType.I16: TypeTraits(1, 2, np.dtype("<i2")),
    GGMLType.I32: TypeTraits(1, 4, np.dtype("<i4")),
    GGMLType.I64: TypeTraits(1, 8, np.dtype("<i8")),
    GGMLType.Q4_0: TypeTraits(QK4_0, 18, block_q4_0),
    GGMLType.Q4_1: TypeTraits(QK4_1, 20, block_q4_1),
    GGMLType.Q5_0: TypeTraits(32, 22, block_q5_0),
    GGMLType.Q5_1: TypeTraits(32, 24, block_q5_1),
    GGMLType.Q8_0: TypeTraits(QK8_0, 34, block_q8_0),
    GGMLType.Q8_1: TypeTraits(32, 36),
    GGMLType.Q2_K: TypeTraits(QK_K, 84),
    GGMLType.Q3_K: TypeTraits(QK_K, 110),
    GGMLType.Q4_K: TypeTraits(QK_K, 144, block_q4_K),
    GGMLType.Q5_K: TypeTraits(QK_K, 176, block_q5_K),
    GGMLType.Q6_K: TypeTraits(QK_K, 210, block_q6_K),
    GGMLType.Q8_K: TypeTraits(QK_K, 292),
    GGMLType.IQ2_XXS: TypeTraits(QK_K, 66),
    GGMLType.IQ2_XS: TypeTraits(QK_K, 74),
    GGMLType.IQ3_XXS: TypeTraits(QK_K, 98),
    GGMLType.IQ1_S: TypeTraits(QK_K, 50),
    GGMLType.IQ4_NL: TypeTraits(32, 18, block_iq4_nl),
    GGMLType.IQ3_S: TypeTraits(QK_K, 110),
    GGMLType.IQ2_S: TypeTraits(QK_K, 82),
    GGMLType.IQ4_XS: TypeTraits(QK_K, 136),
    GGMLType.IQ1_M: TypeTraits(QK_K, 56),
    GGMLType.TQ1_0: TypeTraits(QK_K, 54),
    GGMLType.TQ2_0: TypeTraits(QK_K, 66),
    GGMLType.MXFP4: TypeTraits(32, 17),
}


def row_nbytes(ggml_type: GGMLType, n_per_row: int) -> int:
    """Bytes of one row of `n_per_row` elements; the row must be whole blocks (checked by the reader)."""
    traits = TRAITS[ggml_type]
    assert n_per_row % traits.block_size == 0
    return n_per_row // traits.block_size * traits.type_size


def tensor_nbytes(ggml_type: GGMLType, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of NumPy `shape` (rows last), in Python integers so that nothing wraps."""
    n_rows = 1
    for n in shape[:-1]:
        n_rows *= int(n)
    return n_rows * row_nbytes(ggml_type, int(shape[-1]))


class FileType(IntEnum):
    """`llama_ftype`, the `general.file_type` of a file: the recipe, where GGMLType is one tensor's storage."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q8_0 = 7
    Q5_0 = 8
    Q5_1 = 9
    Q2_K = 10
    Q3_K_S = 11
    Q3_K_M = 12
    Q3_K_L = 13
    Q4_K_S = 14
    Q4_K_M = 15
    Q5_K_S = 16
    Q5_K_M = 17
    Q6_K = 18
    IQ4_NL = 25
    IQ4_XS = 30
    BF16 = 32


QUANTIZATION_VERSION = 2  # general.quantization_version, GGML_QNT_VERSION
