"""Encoders of the 32-element block types: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.

Kernels over addresses: `src` float32 elements, `dst` blocks. At `bad` they leave -1, or the index of the first block
that holds NaN or infinity or whose scale or minimum does not fit a half. The arithmetic is ggml's (quantize_row_*_ref
of llama.cpp), operation for operation in float32, so that the bytes are the same.
"""

from __future__ import annotations

import numpy as np

from lfm2cpp.kernels.compiler import device, kernel
from lfm2cpp.kernels.scalar import load_f32, store_i16, store_i32, store_i64

from .vectors import (
    INFINITY,
    MAGNITUDE,
    as_float,
    bits,
    f16_of_f32,
    first_true,
    high_half,
    largest,
    lesser,
    load_f32x32,
    low_byte,
    low_half,
    mask_bits,
    select,
    smallest,
    store,
    truncated,
)

SIGN = -0x80000000
HALF_EXPONENT = 0x7C00  # all set in a half that is infinite or NaN
# 0.5 less one bit, as bits: adding 0.5 itself would carry 0.49999997 up to 1.
ALMOST_HALF = 0x3EFFFFFF


@device
def inverse(d):
    """(1 / d, 1), but (0, 1) for zero and (0, 0) for a subnormal d whose inverse would be infinite.

    The second is a factor for the rounding offset: what ggml multiplies by infinity ends as level 0 everywhere.
    """
    if d == np.float32(0):
        return np.float32(0), np.float32(1)
    id = np.float32(1) / d
    if bits(id) & MAGNITUDE == INFINITY:
        return np.float32(0), np.float32(0)
    return id, np.float32(1)


@device
def finite_half(h):
    return h & HALF_EXPONENT != HALF_EXPONENT


@device
def store_nibbles(dst, levels):
    """Low four bits of 32 levels: element j in the low half of byte j, element j + 16 in the high half."""
    q = low_byte(levels)
    store(dst, (low_half(q) & 15) | (high_half(q) << 4))


@device
def signed_levels(src, n_max):
    """(scale as a half's bits or -1, levels): the largest element becomes level 0, zero becomes level n_max."""
    x = load_f32x32(src)
    magnitude = bits(x) & MAGNITUDE
    top = largest(magnitude)
    # A block of zeros has the scale -0, whatever their signs.
    extreme = load_f32(src + 4 * first_true(magnitude == top)) if top > 0 else np.float32(0)
    d = extreme / np.float32(-n_max)
    h = f16_of_f32(d)
    id, keep = inverse(d)
    # Of a block that is refused, nothing may be converted: the value need not fit an integer.
    if top >= INFINITY or not finite_half(h):
        return np.int64(-1), bits(x)
    offset = (np.float32(n_max) + np.float32(0.5)) * keep
    return h, lesser(truncated(x * id + offset), 2 * n_max - 1)


@device
def affine_levels(src, n_levels):
    """(scale, minimum as halves' bits or -1, levels): the smallest element becomes 0, the largest n_levels - 1."""
    x = load_f32x32(src)
    word = bits(x)
    in_order = word ^ select(word < 0, MAGNITUDE, 0)  # integers that compare as the floats do
    low, high = smallest(in_order), largest(in_order)
    if largest(word & MAGNITUDE) >= INFINITY:
        return np.int64(-1), np.int64(-1), word
    # Which of +0 and -0 is the minimum shows in its half: ggml takes the first it meets.
    low_x = load_f32(src + 4 * first_true(x == as_float(np.int32(low ^ ((low >> 31) & MAGNITUDE)))))
    high_x = load_f32(src + 4 * first_true(x == as_float(np.int32(high ^ ((high >> 31) & MAGNITUDE)))))
    d = (high_x - low_x) / np.float32(n_levels - 1)
    h, m = f16_of_f32(d), f16_of_f32(low_x)
    if not finite_half(h) or not finite_half(m):
        return np.int64(-1), np.int64(-1), word
    return h, m, lesser(truncated((x - low_x) * inverse(d)[0] + np.float32(0.5)), n_levels - 1)


# A block of each type from its scale, its minimum (both as halves' bits) and its levels


@device
def store_q4_0(out, d, levels):
    store_i16(out, d)
    store_nibbles(out + 2, levels)


@device
def store_q5_0(out, d, levels):
    """The fifth bits are in a word of their own."""
    store_i16(out, d)
    store_i32(out + 2, mask_bits(levels > 15))
    store_nibbles(out + 6, levels)


@device
def store_q4_1(out, d, m, levels):
    store_i16(out, d)
    store_i16(out + 2, m)
    store_nibbles(out + 4, levels)


@device
def store_q5_1(out, d, m, levels):
    """The fifth bits are in a word of their own."""
    store_i16(out, d)
    store_i16(out + 2, m)
    store_i32(out + 4, mask_bits(levels > 15))
    store_nibbles(out + 8, levels)


@kernel
def quantize_blocks_q8_0(src, dst, n_blocks, bad):
    """d = max |x| / 127; q = x / d, rounded half away from zero"""
    for ib in range(n_blocks):
        x, out = load_f32x32(src + 128 * ib), dst + 34 * ib
        top = largest(bits(x) & MAGNITUDE)
        d = as_float(top) / np.float32(127)
        h = f16_of_f32(d)
        if top >= INFINITY or not finite_half(h):
            store_i64(bad, ib)
            return
        v = x * inverse(d)[0]
        store_i16(out, h)
        store(out + 2, low_byte(truncated(v + as_float((bits(v) & SIGN) | ALMOST_HALF))))
    store_i64(bad, -1)


@kernel
def quantize_blocks_q4_0(src, dst, n_blocks, bad):
    """d = x_max / -8, |x_max| being the largest; q = x / d + 8"""
    for ib in range(n_blocks):
        out = dst + 18 * ib
        d, levels = signed_levels(src + 128 * ib, 8)
        if d < 0:
            store_i64(bad, ib)
            return
        store_q4_0(out, d, levels)
    store_i64(bad, -1)


@kernel
def quantize_blocks_q5_0(src, dst, n_blocks, bad):
    """d = x_max / -16; q = x / d + 16"""
    for ib in range(n_blocks):
        out = dst + 22 * ib
        d, levels = signed_levels(src + 128 * ib, 16)
        if d < 0:
            store_i64(bad, ib)
            return
        store_q5_0(out, d, levels)
    store_i64(bad, -1)


@kernel
def quantize_blocks_q4_1(src, dst, n_blocks, bad):
    """d = (max - min) / 15, m = min; q = (x - m) / d"""
    for ib in range(n_blocks):
        out = dst + 20 * ib
        d, m, levels = affine_levels(src + 128 * ib, 16)
        if d < 0:
            store_i64(bad, ib)
            return
        store_q4_1(out, d, m, levels)
    store_i64(bad, -1)


@kernel
def quantize_blocks_q5_1(src, dst, n_blocks, bad):
    """d = (max - min) / 31, m = min; q = (x - m) / d"""
    for ib in range(n_blocks):
        out = dst + 24 * ib
        d, m, levels = affine_levels(src + 128 * ib, 32)
        if d < 0:
            store_i64(bad, ib)
            return
        store_q5_1(out, d, m, levels)
    store_i64(bad, -1)
