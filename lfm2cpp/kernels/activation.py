"""Activations as int8: blocks of 32 with a float32 scale, laid out for the product that reads them.

A row of n elements is cut into blocks of 32 and groups of W blocks, the last group padded with zeros. Two layouts, both
of ACT_GROUP bytes a group and token, one behind the other, so that the first one's padding stays zero:

    one token (decode): four pairs of vectors a group. A block is a piece of one pair, widths.place_of says which: its
    first 16 elements in the pair's low vector, the others in its high one. Lane b of `sum_pieces` of the four pairs
    holds block b's sum.

    more tokens: tiles of TILE_TOKENS tokens, side by side block by block, so that a tile's product walks through memory
    with one address. Blocks in the order in which they are added up, chain by chain: those with the same b % W follow
    each other, TILE_TOKENS times 32 bytes each: token after token, or, where the product takes pairs of tokens
    (dot_tile.py), pair after pair, 8 elements of the one and of the other in turn.

Either way the tables follow, one entry a block (and token), in group order or in chain order:

    d       float32: the scale, max|x| / levels (124 to 127)
    ds      float32: d * sum of its integers, for types with a minimum
    z8      int32: -8 * sum, what Q4_0's unsigned nibbles are too large by
    z128    int32: -I8_BIAS * sum
    z32     int32, two tables: -32 * sum of the first 16 elements; of the others (Q6_K)

Source of the scheme: ggml's Q8_0, with the scale chosen by best_levels and kept in float32.
"""

from __future__ import annotations

import numpy as np

from . import widths
from .compiler import device
from .dot import I8_BIAS
from .dot_tile import HALF
from .scalar import keep_apart, load_i32, store_i32
from .scalar import load_f32 as load_scalar
from .simd import (
    W,
    absolute,
    fma,
    from_whole,
    load_f32,
    maximum,
    minimum,
    prefetch_write,
    product_to_i32,
    splat_f32,
    splat_i32,
    store_f32,
    store_i8,
    to_f32,
    transpose_square,
    where_greater,
)
from .simd import store_i32 as store_vector_i32
from .widths import (
    ACT_D,
    ACT_DS,
    ACT_GROUP,
    ACT_Z8,
    ACT_Z32_HIGH,
    ACT_Z32_LOW,
    ACT_Z128,
    LINE,
    PAIRS,
    QUANTIZE_NBYTES,
    TILE_TOKENS,
)

place_of = device(widths.place_of)
QK = 32
ROW_BYTES = 4 * QK  # of a block's float32
LEVELS = tuple(np.float32(127 - i) for i in range(4))  # numbers of levels that best_levels tries
FACTORS = tuple(np.float32(1 / float(levels) ** 2) for levels in LEVELS)  # of squared errors in scales
LEAST = np.float32(1e-35)  # below it a scale or its inverse would not be a normal float32

# Scratch of quantize_lanes, in vectors of a lane a block: 1 / d, the tables in their order, the floats as columns;
# and a copy of the blocks where they are fewer than lanes.
VECTOR = 4 * W
TABLES = VECTOR
N_TABLES = (ACT_GROUP - ACT_D) // VECTOR
COLUMNS = TABLES + N_TABLES * VECTOR
COPY = COLUMNS + QK * VECTOR
assert COPY + W * ROW_BYTES == QUANTIZE_NBYTES


@device
def decode_offset(b):
    """For one token: offset of block b's first 16 integers; the other 16 lie 4 W bytes further."""
    pair, piece = place_of(b % W)
    return (b // W) * (32 * W) + pair * (8 * W) + piece * 16


@device
def chain_index(b, n_groups):
    """Tiles: the place of block b among the blocks of a token."""
    return (b % W) * n_groups + b // W


@device
def first_tile(act, n_groups):
    """Tiles: where they begin, behind the row for one token."""
    return act + n_groups * ACT_GROUP


@device
def tile_stride(n_groups):
    """Tiles: bytes of a tile of rows of n_groups groups."""
    return n_groups * (TILE_TOKENS * ACT_GROUP)


@device
def largest(columns):
    """Per lane: the largest magnitude of the QK float32 in its column."""
    even = absolute(load_f32(columns))
    odd = absolute(load_f32(columns + VECTOR))
    for i in range(2, QK, 2):
        even = maximum(absolute(load_f32(columns + VECTOR * i)), even)
        odd = maximum(absolute(load_f32(columns + VECTOR * (i + 1))), odd)
    return maximum(even, odd)


@device
def add_error(error, x, inverse):
    """error + the squared error of x as a whole number of scales, in scales; inverse: 1 / scale"""
    off = from_whole(x * inverse)
    return fma(off, off, error)


@device
def best_levels(columns, inverse):
    """Per lane: the number of levels, LEVELS[0] .. LEVELS[3], that makes the smallest error; inverse: 1 / max|x|

    Rounding errors differ from one scale to the next as if drawn anew; the best of four scales has 7 % less of them
    (squared) than the widest one alone, which is what ggml takes.
    """
    a, b, c, d = splat_f32(0.0), splat_f32(0.0), splat_f32(0.0), splat_f32(0.0)
    for i in range(QK):
        x = load_f32(columns + VECTOR * i)
        a = add_error(a, x, inverse * splat_f32(LEVELS[0]))
        b = add_error(b, x, inverse * splat_f32(LEVELS[1]))
        c = add_error(c, x, inverse * splat_f32(LEVELS[2]))
        d = add_error(d, x, inverse * splat_f32(LEVELS[3]))
    least, best = a * splat_f32(FACTORS[0]), splat_f32(LEVELS[0])
    least, best = better(least, best, b * splat_f32(FACTORS[1]), LEVELS[1])
    least, best = better(least, best, c * splat_f32(FACTORS[2]), LEVELS[2])
    least, best = better(least, best, d * splat_f32(FACTORS[3]), LEVELS[3])
    return best


@device
def better(least, best, error, levels):
    """(least, best) or, where its error is smaller, (error, levels)"""
    return minimum(error, least), where_greater(least, error, splat_f32(levels), best)


@device
def find_scales(room):
    """Everything but the integers, from the columns in `room`: 1 / d and the tables, zeros for less than LEAST."""
    columns = room + COLUMNS
    amax = largest(columns)
    inverse = splat_f32(1.0) / amax
    levels = best_levels(columns, inverse)
    d = where_greater(amax, splat_f32(LEAST), amax / levels, splat_f32(0.0))
    inverse = where_greater(amax, splat_f32(LEAST), inverse * levels, splat_f32(0.0))
    store_f32(room, inverse)
    low = splat_i32(0)
    high = splat_i32(0)
    for i in range(0, QK * VECTOR // 2, VECTOR):
        low = low + product_to_i32(load_f32(columns + i), inverse)
        high = high + product_to_i32(load_f32(columns + QK * VECTOR // 2 + i), inverse)
    total = low + high
    store_f32(room + table_in_room(ACT_D), d)
    store_f32(room + table_in_room(ACT_DS), d * to_f32(total))
    store_vector_i32(room + table_in_room(ACT_Z8), total * splat_i32(-8))
    store_vector_i32(room + table_in_room(ACT_Z128), total * splat_i32(-I8_BIAS))
    store_vector_i32(room + table_in_room(ACT_Z32_LOW), low * splat_i32(-32))
    store_vector_i32(room + table_in_room(ACT_Z32_HIGH), high * splat_i32(-32))


@device
def table_in_room(offset):
    return TABLES + offset - ACT_D


@device
def quantize_lanes(x, stride, count, act, n_groups, t, b, tokens, streamed, room):
    """The `count` blocks, W at most, whose float32 lie `stride` bytes apart at x, into the rows at `act`.

    They are blocks b, b + 1, ... of token t or, where tokens is 1, block b of the tokens t, t + 1, ... A block is a
    lane: what would wait long for a few numbers of one block does it for W at once. room: QUANTIZE_NBYTES of scratch.
    """
    keep_apart()
    if count < W:
        for i in range(count):
            for at in range(0, ROW_BYTES, VECTOR):
                store_f32(room + COPY + i * ROW_BYTES + at, load_f32(x + i * stride + at))
        x, stride = room + COPY, ROW_BYTES
    for i in range(0, QK, W):
        transpose_square(x + 4 * i, stride, room + COLUMNS + i * VECTOR, VECTOR)
    find_scales(room)
    for i in range(count):
        write_block(x + i * stride, act, n_groups, t + i * tokens, b + i * (1 - tokens), streamed, room + 4 * i)


@device
def first_entry(act, n_groups, t, b, streamed):
    """Where the entry of block b of token t would be if its table stood first, and the factor of a table's offset."""
    if streamed:
        return act + 4 * b, n_groups
    return tile_of(act, n_groups, t) + 4 * place_in_tile(n_groups, t, b), n_groups * TILE_TOKENS


@device
def tile_of(act, n_groups, t):
    """Tiles: the tile of token t."""
    return first_tile(act, n_groups) + t // TILE_TOKENS * tile_stride(n_groups)


@device
def place_in_tile(n_groups, t, b):
    """Tiles: how many blocks, or entries of a table, come before block b of token t in its tile."""
    return chain_index(b, n_groups) * TILE_TOKENS + t % TILE_TOKENS


@device
def write_block(x, act, n_groups, t, b, streamed, lane):
    """Integers and entries of block b of token t, whose float32 are at x; find_scales left the rest in its lane."""
    entry, table = first_entry(act, n_groups, t, b, streamed)
    if streamed:
        low_qs = act + decode_offset(b)
        high_qs = low_qs + 4 * W
        gap = 0
    else:
        place = place_in_tile(n_groups, t, b)
        low_qs, gap = tile_of(act, n_groups, t) + QK * place, 0
        if PAIRS:
            low_qs, gap = low_qs - place % 2 * (QK - 8), 8
        high_qs = low_qs + HALF
    inverse = splat_f32(load_scalar(lane))
    for i in range(0, 16, W):
        store_i8(low_qs + i + i // 8 * gap, product_to_i32(load_f32(x + 4 * i), inverse))
        store_i8(high_qs + i + i // 8 * gap, product_to_i32(load_f32(x + 64 + 4 * i), inverse))
    for offset in range(ACT_D, ACT_GROUP, VECTOR):
        store_i32(entry + table * offset, load_i32(lane + table_in_room(offset)))


@device
def ask_for_block(act, n_groups, t, b):
    """Ask for what quantize_tokens will write of a whole tile of tokens, from t on."""
    entry, table = first_entry(act, n_groups, t, b, False)
    blocks = tile_of(act, n_groups, t) + QK * place_in_tile(n_groups, t, b)
    for line in range(0, QK * TILE_TOKENS, LINE):
        prefetch_write(blocks + line)
    for offset in range(ACT_D, ACT_GROUP, VECTOR):
        prefetch_write(entry + table * offset)


@device
def quantize_blocks(x, first, last, act, n_groups, t, streamed, room):
    """Blocks first .. last - 1 of token t from the float32 at x, the first block's first."""
    for b in range(first, last, W):
        at = x + ROW_BYTES * (b - first)
        quantize_lanes(at, ROW_BYTES, min(W, last - b), act, n_groups, t, b, 0, streamed, room)


@device
def quantize_tokens(x, stride, count, act, n_groups, t, b, streamed, room):
    """Block b of tokens t .. t + count - 1, whose float32 lie `stride` bytes apart at x."""
    for i in range(0, count, W):
        quantize_lanes(x + i * stride, stride, min(W, count - i), act, n_groups, t + i, b, 1, streamed, room)


@device
def n_groups_of(n):
    """Groups of W blocks in a row of n elements."""
    return (n // QK + W - 1) // W
