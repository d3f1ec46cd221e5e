"""Activations as int8: blocks of 32 with a float32 scale, laid out for the product that reads them.

A row of n elements is cut into blocks of 32 and groups of W blocks, the last group padded with zeros. Two layouts, both
of ACT_GROUP bytes a group and token, one behind the other, so that the first one's padding stays zero:

    one token (decode): block b of a group is piece b // 4 of vector pair b % 4, its first 16 elements in the pair's low
    vector, the others in the high one. After `sum_pieces` of the four pairs, lane b holds block b's sum, in order.

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

Source of the scheme: ggml's Q8_0, with the scale chosen by scale_of and kept in float32.
"""

from __future__ import annotations

import numpy as np

from .compiler import device
from .dot import I8_BIAS
from .dot_tile import HALF
from .scalar import load_f32 as load_scalar
from .scalar import store_f32 as store_scalar
from .scalar import store_i32
from .simd import (
    W,
    absolute,
    fma,
    from_whole,
    load_f32,
    make_least_sum,
    max_lanes,
    maximum,
    prefetch_write,
    product_to_i32,
    splat_f32,
    splat_i32,
    store_i8,
    sum_lanes_i32,
)
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
    TILE_TOKENS,
)

QK = 32
CANDIDATES = 4  # numbers of levels that are tried, from 127 down
LEVELS = tuple(np.float32(127 - i) for i in range(CANDIDATES))
LEAST = np.float32(1e-35)  # below it a scale or its inverse would not be a normal float32
best_of = make_least_sum([1 / float(levels) ** 2 for levels in LEVELS])  # of errors in scales


@device
def decode_offset(b):
    """For one token: offset of block b's first 16 integers; the other 16 lie 4 W bytes further."""
    in_group = b % W
    return (b // W) * (32 * W) + (in_group % 4) * (8 * W) + (in_group // 4) * 16


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
def squared_error(x, inverse):
    """Per lane: the squared error of the 32 float32 at x as whole numbers of scales, in scales; inverse: 1 / scale"""
    error = splat_f32(0.0)
    for i in range(0, QK, W):
        off = from_whole(load_f32(x + 4 * i) * splat_f32(inverse))
        error = fma(off, off, error)
    return error


@device
def scale_of(x, amax):
    """The scale d for the 32 float32 at x, whose largest magnitude is amax, and 1 / d; zeros for less than LEAST.

    Rounding errors differ from one scale to the next as if drawn anew; the best of four scales has 7 % less of them
    (squared) than the widest one alone, which is what ggml takes.
    """
    if amax <= LEAST:
        return np.float32(0.0), np.float32(0.0)
    one = np.float32(1.0) / amax
    best = best_of(
        squared_error(x, one * LEVELS[0]),
        squared_error(x, one * LEVELS[1]),
        squared_error(x, one * LEVELS[2]),
        squared_error(x, one * LEVELS[3]),
    )
    levels = LEVELS[0] - np.float32(best)
    return amax / levels, one * levels


@device
def find_scale(x, act, n_groups, t, b, streamed):
    """First half of quantizing the 32 float32 at x as block b of token t of the rows at `act`: d; 1 / d in ds' place.

    Each half waits long for a few numbers. A loop of its own over many blocks lets them wait together.
    """
    peak = absolute(load_f32(x))
    for i in range(W, QK, W):
        peak = maximum(absolute(load_f32(x + 4 * i)), peak)
    d, inverse = scale_of(x, max_lanes(peak))
    entry, table = first_entry(act, n_groups, t, b, streamed)
    store_scalar(entry + table * ACT_D, d)
    store_scalar(entry + table * ACT_DS, inverse)


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
def write_block(x, act, n_groups, t, b, streamed):
    """The other half: the integers and the tables."""
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
    d, inverse = load_scalar(entry + table * ACT_D), splat_f32(load_scalar(entry + table * ACT_DS))
    low_sum = splat_i32(0)
    high_sum = splat_i32(0)
    for i in range(0, 16, W):
        q = product_to_i32(load_f32(x + 4 * i), inverse)
        low_sum = low_sum + q
        store_i8(low_qs + i + i // 8 * gap, q)
    for i in range(0, 16, W):
        q = product_to_i32(load_f32(x + 64 + 4 * i), inverse)
        high_sum = high_sum + q
        store_i8(high_qs + i + i // 8 * gap, q)
    write_tables(entry, table, d, sum_lanes_i32(low_sum), sum_lanes_i32(high_sum))


@device
def ask_for_block(act, n_groups, t, b):
    """Ask for what find_scale and write_block will write of a whole tile of tokens, from t on."""
    entry, table = first_entry(act, n_groups, t, b, False)
    blocks = tile_of(act, n_groups, t) + QK * place_in_tile(n_groups, t, b)
    for line in range(0, QK * TILE_TOKENS, LINE):
        prefetch_write(blocks + line)
    for offset in range(ACT_D, ACT_GROUP, ACT_DS - ACT_D):
        prefetch_write(entry + table * offset)


@device
def quantize_blocks(x, first, last, act, n_groups, t, streamed):
    """Blocks first .. last - 1 of token t from the float32 at x, the first block's first."""
    for b in range(first, last):
        find_scale(x + 4 * QK * (b - first), act, n_groups, t, b, streamed)
    for b in range(first, last):
        write_block(x + 4 * QK * (b - first), act, n_groups, t, b, streamed)


@device
def write_tables(entry, table, d, low, high):
    """What follows from a block's scale and the sums of its halves; entry and table as first_entry gives them."""
    total = low + high
    store_scalar(entry + table * ACT_DS, d * np.float32(total))
    store_i32(entry + table * ACT_Z8, -8 * total)
    store_i32(entry + table * ACT_Z128, -I8_BIAS * total)
    store_i32(entry + table * ACT_Z32_LOW, -32 * low)
    store_i32(entry + table * ACT_Z32_HIGH, -32 * high)


@device
def n_groups_of(n):
    """Groups of W blocks in a row of n elements."""
    return (n // QK + W - 1) // W
