"""The encoder of IQ4_NL: 32 elements, whose 4 bits stand for IQ4_NL_VALUES.

A kernel over addresses, as in legacy.py; `importance` is the address of a row's row_blocks * 32 importances, or 0. The
arithmetic is that of ggml's quantize_row_iq4_nl_impl. Lanes of the search are blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir

from lfm2cpp.ggml import IQ4_NL_VALUES
from lfm2cpp.kernels.compiler import device, kernel
from lfm2cpp.kernels.scalar import load_f32, store_i64
from lfm2cpp.kernels.vector import constant, vector_op

from .legacy import finite_half, store_q4_0
from .search import extremes, sums_of_squares, transpose, weigh_by_importance, weigh_by_square
from .vectors import (
    INFINITY,
    MAGNITUDE,
    bits,
    f16_of_f32,
    f32x16,
    f32x32,
    i32x32,
    largest,
    load_f32x16,
    load_f32x32,
    select,
    splat_16,
    stack,
    store,
)

LOWEST = IQ4_NL_VALUES[0]
TRIES = 7  # on either side of the scale that maps the largest element to LOWEST


def _by_thresholds(builder: ir.IRBuilder, v: ir.Value, levels: tuple[int, ...], element: ir.Type, add: Callable) -> Any:
    """The level of the value nearest to v, of two equally near ones the upper, of NaN the last; levels: one for each of
    the values."""
    to = ir.VectorType(element, v.type.count)
    found = constant(to, levels[0])
    for i in range(15):
        middle = constant(v.type, (IQ4_NL_VALUES[i] + IQ4_NL_VALUES[i + 1]) / 2)  # exact, as the differences beside it
        is_above = builder.fcmp_unordered(">=", v, middle)
        found = add(found, builder.select(is_above, constant(to, levels[i + 1] - levels[i]), constant(to, 0)))
    return found


@vector_op(f32x16, f32x16)
def nearest_value(builder, v):
    """Of IQ4_NL_VALUES"""
    return _by_thresholds(builder, v, IQ4_NL_VALUES, ir.FloatType(), builder.fadd)


@vector_op(i32x32, f32x32)
def nearest_index(builder, v):
    """Of that value, 0 .. 15"""
    return _by_thresholds(builder, v, tuple(range(16)), ir.IntType(32), builder.add)


@device
def scale_search(columns, weights):
    """Scales of 16 blocks, lane by lane: of 16 candidates and the best scale of each, that of least weighted error"""
    is_zero, extreme = extremes(columns, 32)
    scale = best = splat_16(np.float32(0))
    for step in range(2 * TRIES + 2):
        if step == 0:
            inverse = np.float32(1) / (extreme / np.float32(-LOWEST))
        else:
            inverse = np.float32(step - 1 - TRIES + LOWEST) / extreme
        sum_qx = sum_q2 = splat_16(np.float32(0))
        for i in range(32):
            x, weight = load_f32x16(columns + 64 * i), load_f32x16(weights + 64 * i)
            q = nearest_value(inverse * x)
            sum_qx = sum_qx + weight * q * x
            sum_q2 = sum_q2 + weight * q * q
        better = (sum_q2 > np.float32(0)) & (sum_qx * sum_qx > best * sum_q2)
        if step == 0:
            better = sum_q2 > np.float32(0)
        scale = select(better, sum_qx / sum_q2, scale)
        best = select(better, scale * sum_qx, best)
    return select(is_zero, np.float32(0), scale)


@kernel
def quantize_blocks_iq4_nl(src, dst, n_blocks, row_blocks, importance, bad):
    """x = d * value: d by search, then the nearest values. 16 at a time; the last block fills what lanes are left."""
    columns, weights, scales = stack(2048), stack(2048), stack(64)
    for first in range(0, n_blocks, 16):
        for lane in range(16):
            ib = min(first + lane, n_blocks - 1)
            transpose(src + 128 * ib, 1, 32, columns + 4 * lane)
            if importance:
                transpose(importance + 128 * (ib % row_blocks), 1, 32, weights + 4 * lane)
        if importance:
            sigma2 = sums_of_squares(columns, 32) * np.float32(2 / 32)
            weigh_by_importance(columns, 32, weights, sigma2)
        else:
            weigh_by_square(columns, 32, weights)
        store(scales, scale_search(columns, weights))
        for ib in range(first, min(first + 16, n_blocks)):
            x, scale = load_f32x32(src + 128 * ib), load_f32(scales + 4 * (ib - first))
            d = f16_of_f32(scale)
            if largest(bits(x) & MAGNITUDE) >= INFINITY or not finite_half(d):
                store_i64(bad, ib)
                return
            inverse = np.float32(1) / scale if scale != np.float32(0) else np.float32(0)
            store_q4_0(dst + 18 * ib, d, nearest_index(inverse * x))
    store_i64(bad, -1)
