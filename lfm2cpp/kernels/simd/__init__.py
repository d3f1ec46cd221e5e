"""The SIMD vocabulary: the same words at every level, so that a kernel is written once.

A vector register is seen in two ways: as W float32 or int32 lanes (`f32`, `i32`), and as W/4 pieces of 16 bytes
(`bytes_`), the unit in which quantized blocks are moved. Words that work "within each piece" are what every
instruction set has, from NEON's one piece to AVX-512's four.

Generic LLVM IR wherever LLVM selects the right instruction from it; a level's own intrinsics only in ../dot.py.
"""

from __future__ import annotations

from .arithmetic import (
    absolute as absolute,
)
from .arithmetic import (
    add_exponent as add_exponent,
)
from .arithmetic import (
    bits_to_f32 as bits_to_f32,
)
from .arithmetic import (
    fma as fma,
)
from .arithmetic import (
    high_nibbles as high_nibbles,
)
from .arithmetic import (
    keep_first as keep_first,
)
from .arithmetic import (
    low_nibbles as low_nibbles,
)
from .arithmetic import (
    maximum as maximum,
)
from .arithmetic import (
    minimum as minimum,
)
from .arithmetic import (
    round_to_i32 as round_to_i32,
)
from .arithmetic import (
    round_to_whole as round_to_whole,
)
from .arithmetic import (
    splat_4_bytes as splat_4_bytes,
)
from .arithmetic import (
    splat_f32 as splat_f32,
)
from .arithmetic import (
    splat_i32 as splat_i32,
)
from .arithmetic import (
    splat_u8 as splat_u8,
)
from .arithmetic import (
    to_f32 as to_f32,
)
from .gather import (
    gather_f16 as gather_f16,
)
from .gather import (
    gather_i8_pairs as gather_i8_pairs,
)
from .gather import (
    gather_pieces as gather_pieces,
)
from .gather import (
    gather_pieces_2 as gather_pieces_2,
)
from .gather import (
    make_gather_f16 as make_gather_f16,
)
from .gather import (
    repeat_f16 as repeat_f16,
)
from .lanes import (
    max_lanes as max_lanes,
)
from .lanes import (
    sum_lanes as sum_lanes,
)
from .lanes import (
    sum_lanes_4 as sum_lanes_4,
)
from .lanes import (
    sum_lanes_i32 as sum_lanes_i32,
)
from .lanes import (
    sum_pieces as sum_pieces,
)
from .lanes import (
    sum_pieces_small as sum_pieces_small,
)
from .lanes import (
    transpose_4 as transpose_4,
)
from .lanes import (
    transpose_square as transpose_square,
)
from .memory import (
    load_bf16 as load_bf16,
)
from .memory import (
    load_bytes as load_bytes,
)
from .memory import (
    load_f16 as load_f16,
)
from .memory import (
    load_f32 as load_f32,
)
from .memory import (
    load_i8_as_f32 as load_i8_as_f32,
)
from .memory import (
    load_i32 as load_i32,
)
from .memory import (
    prefetch_far as prefetch_far,
)
from .memory import (
    store_bytes as store_bytes,
)
from .memory import (
    store_f16 as store_f16,
)
from .memory import (
    store_f32 as store_f32,
)
from .memory import (
    store_i8 as store_i8,
)
from .memory import (
    store_i32 as store_i32,
)
from .registers import (
    LEVEL as LEVEL,
)
from .registers import (
    PIECES as PIECES,
)
from .registers import (
    W as W,
)
from .registers import (
    bytes_ as bytes_,
)
from .registers import (
    f32 as f32,
)
from .registers import (
    i32 as i32,
)
