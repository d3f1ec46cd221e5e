"""Products of whole matrices, for AMX: W rows of a panel by TILE_TOKENS tokens with one instruction.

Its registers hold matrices, up to 16 rows of 64 bytes. One takes the activations, a token's columns of a block in each
row, as activation.py lays them out; one the weights, 4 columns of W rows of weights in each row, as a panel holds them;
and one their int32 sums, a token in each row. Those are stored and read as vectors: nothing else can be done with them.

Weights and activations are signed here, so a panel holds what block_columns gives less the type's OFFSET, which must
fit int8.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .scalar import I8, I64, pointer
from .simd.registers import I8_VECTOR, I32_VECTOR, bytes_, load_at
from .tile import BLOCK, VECTOR, IntegerWords
from .vector import call_llvm, constant, pack, unpack, vector_op
from .widths import MATRICES, PANEL_SUMS, TILE_TOKENS

int64 = types.int64
PANEL_STEP = 2 * VECTOR  # from a vector of W rows to the next one
ROW = 64  # bytes of a register's row, at most
HALF_SUMS = TILE_TOKENS * ROW  # bytes of the sums of half a panel's rows
assert not MATRICES or (VECTOR == ROW and TILE_TOKENS <= 16 and 2 * HALF_SUMS == PANEL_SUMS)
# Which register holds what, 32 columns or 16 of the operands; the first two are for sums.
ACT_32, ACT_16, WEIGHTS_32, WEIGHTS_16 = 2, 3, 4, 5
HEIGHTS = (TILE_TOKENS, TILE_TOKENS, TILE_TOKENS, TILE_TOKENS, 32 // 4, 16 // 4)  # rows of each of them
ROW_BYTES = (ROW, ROW, 32, 16, ROW, ROW)
# Palette 1, no row to start at; for 16 registers, of which there are 8.
CONFIGURATION = struct.pack("<BB14x16H16B", 1, 0, *ROW_BYTES, *[0] * 10, *HEIGHTS, *[0] * 10)


@vector_op(types.void)
def use_matrices(builder):
    """Before the products of a thread: the registers' shapes. Foreign code may lose them, so it calls none meanwhile"""
    if MATRICES:
        kind = ir.ArrayType(I8, len(CONFIGURATION))
        place = cgutils.alloca_once_value(builder, ir.Constant(kind, bytearray(CONFIGURATION)))
        call_llvm(builder, "llvm.x86.ldtilecfg", ir.VoidType(), builder.bitcast(place, I8.as_pointer()))


@vector_op(types.void)
def leave_matrices(builder):
    """After them: there is nothing to save of the registers any more"""
    if MATRICES:
        call_llvm(builder, "llvm.x86.tilerelease", ir.VoidType())


def make_panel_columns(offset: int) -> Any:
    """panel_columns(columns): eight vectors from block_columns as a panel holds them"""
    eight = types.UniTuple(bytes_, 8)

    @vector_op(eight, eight)
    def panel_columns(builder, columns):
        if MATRICES and offset:
            taken_off = constant(I8_VECTOR, offset)
            columns = pack(builder, [builder.sub(vector, taken_off) for vector in unpack(builder, columns)])
        return columns

    return panel_columns


@dataclass(frozen=True)
class Product:
    """Which registers it takes, and where in a block of a panel the weights begin."""

    activations: int
    weights: int
    first: int  # vector of W rows


WHOLE = Product(ACT_32, WEIGHTS_32, first=0)
LOW, HIGH = Product(ACT_16, WEIGHTS_16, first=0), Product(ACT_16, WEIGHTS_16, first=4)


def _call(builder: ir.IRBuilder, name: str, *operands: int | ir.Value) -> None:
    values = [ir.Constant(I8, operand) if isinstance(operand, int) else operand for operand in operands]
    call_llvm(builder, f"llvm.x86.{name}", ir.VoidType(), *values)


def _multiply(builder: ir.IRBuilder, product: Product, q: ir.Value, a: ir.Value, room: ir.Value) -> ir.Value:
    """Both halves of a panel's rows; their sums go to `room`, the one's before the other's."""
    _call(builder, "tileloadd64", product.activations, pointer(builder, a, I8), ir.Constant(I64, BLOCK))
    for half in range(2):
        weights = builder.add(q, ir.Constant(I64, product.first * PANEL_STEP + half * VECTOR))
        sums = builder.add(room, ir.Constant(I64, half * HALF_SUMS))
        _call(builder, "tileloadd64", product.weights, pointer(builder, weights, I8), ir.Constant(I64, PANEL_STEP))
        _call(builder, "tilezero", half)
        _call(builder, "tdpbssd", half, product.activations, product.weights)
        _call(builder, "tilestored64", half, pointer(builder, sums, I8), ir.Constant(I64, ROW))
    return room


def _word(product: Product) -> Any:
    @vector_op(int64, int64, int64, int64, int64)
    def dot(builder, q, a, _, room):
        return _multiply(builder, product, q, a, room)

    return dot


def _word_with_start(product: Product) -> Any:
    """The same for words that are given what unsigned weights are too large by: these are not."""

    @vector_op(int64, int64, int64, int64, int64, int64)
    def dot(builder, _, q, a, __, room):
        return _multiply(builder, product, q, a, room)

    return dot


def matrix_words() -> IntegerWords:
    """The words of a tile of a panel. Its integers are an address; what sum_of takes is that of half of the rows."""
    whole = _word_with_start(WHOLE)
    return IntegerWords(
        kind=int64,
        dot_u4=whole,
        dot_u4_alone=_word(WHOLE),
        dot_u5_alone=_word(WHOLE),
        dot_i8=whole,
        dot_u6_low=_word_with_start(LOW),
        dot_u6_high=_word_with_start(HIGH),
        sum_of=lambda builder, sums, t: load_at(builder, sums, t * ROW, I32_VECTOR),
    )
