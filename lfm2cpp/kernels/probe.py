"""What this machine can do at most: a stream of reads, and products on operands that stay in the first-level cache.

These are the limits that `lfm2cpp doctor` shows and that `bench --profile` compares with. Every result is stored, so
that nothing can be left out.
"""

from __future__ import annotations

from .compiler import device, kernel
from .dot import dot2_u6
from .dot_matrix import leave_matrices, matrix_words, use_matrices
from .scalar import store_f32, store_i64
from .simd import W, fma, load_bytes, load_f32, load_i32, splat_f32, splat_i32, sum_lanes, sum_lanes_i32
from .widths import PANEL_SUMS, TILE_TOKENS

VECTOR = 4 * W  # bytes of a vector
READ_STEP = 8 * VECTOR  # bytes that read_stream takes a round: its buffer must be a multiple
STEPS = 8  # of products, before the operands are used again
OPERANDS = 8 * STEPS * VECTOR  # bytes: 2 vectors of weights and 6 of activations a step
PRODUCTS = 12 * STEPS  # vector products a round; 12 sums hide the latency of one

# Of products of matrices, where the level has them: weights of two panels' blocks, then two blocks of activations.
WEIGHTS, ACTIVATIONS = 16 * VECTOR, 32 * TILE_TOKENS  # bytes of one
MATRIX_OPERANDS = 2 * (WEIGHTS + ACTIVATIONS) + 2 * PANEL_SUMS  # bytes: behind them there is room for the sums
multiply = matrix_words().dot_u4_alone


@kernel
def read_stream(source, nbytes, out):
    """Read nbytes, front to back; the sum of its int32, wrapped to 32 bits, goes to `out` as int64."""
    a = b = c = d = e = f = g = h = splat_i32(0)
    at = source
    while at < source + nbytes:
        a = a + load_i32(at)
        b = b + load_i32(at + VECTOR)
        c = c + load_i32(at + 2 * VECTOR)
        d = d + load_i32(at + 3 * VECTOR)
        e = e + load_i32(at + 4 * VECTOR)
        f = f + load_i32(at + 5 * VECTOR)
        g = g + load_i32(at + 6 * VECTOR)
        h = h + load_i32(at + 7 * VECTOR)
        at += READ_STEP
    store_i64(out, sum_lanes_i32(((a + b) + (c + d)) + ((e + f) + (g + h))))


@device
def four_dots(s, t, u, v, a, b):
    """Both weights by both activations, in two sums: by twos, which some CPUs add up in 16 bits."""
    return dot2_u6(s, u, a, v, b), dot2_u6(t, v, a, u, b)


@device
def step_dots(r, s, t, x, y, z, at):
    """The products of a step, in six sums."""
    u, v = load_bytes(at), load_bytes(at + VECTOR)
    r, x = four_dots(r, x, u, v, load_bytes(at + 2 * VECTOR), load_bytes(at + 3 * VECTOR))
    s, y = four_dots(s, y, u, v, load_bytes(at + 4 * VECTOR), load_bytes(at + 5 * VECTOR))
    t, z = four_dots(t, z, u, v, load_bytes(at + 6 * VECTOR), load_bytes(at + 7 * VECTOR))
    return r, s, t, x, y, z


@kernel
def dot_stream(operands, rounds, out):
    """PRODUCTS * 4 W products of bytes a round (weights 0..63); the sum, wrapped, goes to `out`."""
    r0 = s0 = t0 = x0 = y0 = z0 = r1 = s1 = t1 = x1 = y1 = z1 = splat_i32(0)
    for i in range(rounds * STEPS // 2):
        # The operands change from step to step, or a compiler could multiply once and add the same product ever again.
        at = operands + i % (STEPS // 2) * (16 * VECTOR)
        r0, s0, t0, x0, y0, z0 = step_dots(r0, s0, t0, x0, y0, z0, at)
        r1, s1, t1, x1, y1, z1 = step_dots(r1, s1, t1, x1, y1, z1, at + 8 * VECTOR)
    even, odd = (r0 + s0) + (t0 + x0) + (y0 + z0), (r1 + s1) + (t1 + x1) + (y1 + z1)
    store_i64(out, sum_lanes_i32(even + odd))


@kernel
def matrix_stream(operands, rounds, out):
    """Two products of 2 W rows by TILE_TOKENS tokens, 32 columns each, a round; where their sums are goes to `out`.

    They are stored every time, as those of quantized blocks are, each of which has a scale of its own. For levels with
    matrices only.
    """
    use_matrices()
    a = operands + 2 * WEIGHTS
    sums = a + 2 * ACTIVATIONS
    for _ in range(rounds):
        multiply(operands, a, 0, sums)
        multiply(operands + WEIGHTS, a + ACTIVATIONS, 0, sums + PANEL_SUMS)
    leave_matrices()
    store_i64(out, sums)


@device
def fma_pair(s, t, u, v, x):
    return fma(u, x, s), fma(v, x, t)


@kernel
def fma_stream(operands, rounds, out):
    """PRODUCTS * W multiply-adds in float32 a round; the sum of all goes to `out`."""
    s0 = s1 = s2 = s3 = s4 = s5 = t0 = t1 = t2 = t3 = t4 = t5 = splat_f32(0.0)
    for i in range(rounds * STEPS):
        at = operands + i % STEPS * (8 * VECTOR)
        u, v = load_f32(at), load_f32(at + VECTOR)
        s0, t0 = fma_pair(s0, t0, u, v, load_f32(at + 2 * VECTOR))
        s1, t1 = fma_pair(s1, t1, u, v, load_f32(at + 3 * VECTOR))
        s2, t2 = fma_pair(s2, t2, u, v, load_f32(at + 4 * VECTOR))
        s3, t3 = fma_pair(s3, t3, u, v, load_f32(at + 5 * VECTOR))
        s4, t4 = fma_pair(s4, t4, u, v, load_f32(at + 6 * VECTOR))
        s5, t5 = fma_pair(s5, t5, u, v, load_f32(at + 7 * VECTOR))
    s = ((s0 + s1) + (s2 + s3)) + (s4 + s5)
    t = ((t0 + t1) + (t2 + t3)) + (t4 + t5)
    store_f32(out, sum_lanes(s + t))
