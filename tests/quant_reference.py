"""Q6_K written plainly in NumPy, one sub-block after the other: the oracle of the kernel, since gguf.quants has none.

Every operation is float32 and in ggml's order; sums run over the elements one by one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lfm2cpp.ggml import block_q6_K

F = np.float32
F32 = NDArray[np.float32]


def nearest(v: np.ndarray) -> np.ndarray:
    """To the nearest integer, ties to even."""
    return np.rint(v).astype(np.float32)


def search(x: F32) -> tuple[np.float32, np.ndarray]:
    """(scale, levels 0 .. 63) of 16 elements: the best of 19 inverse scales, errors weighted by x^2."""
    largest = x[np.argmax(np.abs(x))]
    if abs(largest) < F(1e-15):
        return F(0), np.zeros(16, np.uint8)
    best, scale, levels = F(0), F(0), None
    for shift in (0, *range(-9, 0), *range(1, 10)):
        inverse = -(F(32) + F(0.1) * F(shift)) / largest
        q = np.clip(nearest(inverse * x), F(-32), F(31))
        sum_lx = sum_l2 = F(0)
        for xi, qi in zip(x, q, strict=True):
            sum_lx += xi * xi * xi * qi
            sum_l2 += xi * xi * qi * qi
        if levels is None or (sum_l2 > 0 and sum_lx * sum_lx > best * sum_l2):
            scale = sum_lx / sum_l2 if sum_l2 else F(0)
            best, levels = scale * sum_lx, (q + F(32)).astype(np.uint8)
    return scale, levels


def quantize_q6_K(x: F32) -> bytes:
    """256 elements -> one block."""
    found = [search(part) for part in x.reshape(16, 16)]
    scales = np.array([scale for scale, _ in found], np.float32)
    levels = np.array([part for _, part in found], np.uint8)
    block = np.zeros((), block_q6_K)
    max_scale = scales[np.argmax(np.abs(scales))]
    if abs(max_scale) < F(1e-15):
        return block.tobytes()
    inverse = F(-128) / max_scale
    block["d"] = np.float16(F(1) / inverse)
    block["scales"] = np.minimum(F(127), nearest(inverse * scales)).astype(np.int8)
    for j in range(16):
        step = block["d"].astype(np.float32) * F(block["scales"][j])
        if step:
            levels[j] = np.clip(nearest(x[16 * j : 16 * j + 16] / step), F(-32), F(31)) + F(32)
    quarters = levels.reshape(2, 4, 32)  # each half of the block is four quarters
    block["ql"] = (quarters[:, :2] & 15 | quarters[:, 2:] << 4).reshape(128)
    shifts = np.array([0, 2, 4, 6], np.uint8)[None, :, None]
    block["qh"] = np.bitwise_or.reduce(quarters >> 4 << shifts, axis=1).reshape(64)
    return block.tobytes()
