"""The SIMD vocabulary: the same words at every level, so that a kernel is written once.

A vector register is seen in two ways: as W float32 or int32 lanes (`f32`, `i32`), and as W/4 pieces of 16 bytes
(`bytes_`), the unit in which quantized blocks are moved. Words that work "within each piece" are what every
instruction set has, from NEON's one piece to AVX-512's four.

Generic LLVM IR wherever LLVM selects the right instruction from it; a level's own intrinsics where it does not: in
../dot.py for the products, and in a few words here.
"""

from __future__ import annotations

from .arithmetic import (
    absolute,
    add_exponent,
    bits_to_f32,
    fives,
    fma,
    from_whole,
    high_nibbles,
    i8_of_lanes,
    keep_first,
    low_nibbles,
    make_bits_by_piece,
    make_look_up,
    make_spread_bits,
    maximum,
    minimum,
    negative,
    product_to_i32,
    reciprocal,
    splat_4_bytes,
    splat_f32,
    splat_i32,
    splat_u8,
    to_f32,
    where_greater,
)
from .gather import (
    gather_f16,
    gather_i8_pairs,
    gather_pieces,
    gather_sub_block_scales,
    make_gather_f16,
    make_gather_halves,
    make_gather_nibbles,
    make_gathers,
    repeat_f16,
)
from .lanes import (
    high_halves,
    low_halves,
    make_transpose_rows,
    max_lanes,
    sum_lanes,
    sum_lanes_i32,
    sum_pieces,
    sum_pieces_i16,
    sum_pieces_small,
    transpose_4,
    transpose_square,
)
from .memory import (
    load_bf16,
    load_bytes,
    load_f16,
    load_f32,
    load_i32,
    make_prefetch_lines,
    make_store_apart,
    prefetch_again,
    prefetch_early,
    prefetch_near,
    prefetch_write,
    store_bf16,
    store_bytes,
    store_f16,
    store_f32,
    store_i8,
    store_i32,
)
from .registers import LEVEL, PIECES, W, bytes_, f32, i32
