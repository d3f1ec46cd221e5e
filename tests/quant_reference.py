"""What searches for scales written plainly in NumPy, a block after the other: an oracle, as gguf.quants has none.

The K-quants, and with importances (`qw`, one an element) the legacy types, too. Every operation is float32 and in ggml's order; sums run over the elements one by one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lfm2cpp.ggml import IQ4_NL_VALUES, block_iq4_nl, block_q4_K, block_q5_K, block_q6_K

F = np.float32
F32 = NDArray[np.float32]


def nearest(v: np.ndarray) -> np.ndarray:
    """To the nearest integer, ties to even."""
    return np.rint(v).astype(np.float32)


def search(x: F32, w: F32, n_max: int = 32) -> tuple[np.float32, np.ndarray]:
    """(scale, levels 0 .. 2 n_max - 1) of some elements: the best of 19 inverse scales, errors weighted by w."""
    largest = x[np.argmax(np.abs(x))]
    if abs(largest) < F(1e-15):
        return F(0), np.zeros(len(x), np.uint8)
    best, scale, levels = F(0), F(0), None
    for shift in (0, *range(-9, 0), *range(1, 10)):
        inverse = -(F(n_max) + F(0.1) * F(shift)) / largest
        q = np.clip(nearest(inverse * x), F(-n_max), F(n_max - 1))
        sum_lx, sum_l2 = in_order(w * x * q), in_order(w * q * q)
        if levels is None or (sum_l2 > 0 and sum_lx * sum_lx > best * sum_l2):
            scale = sum_lx / sum_l2 if sum_l2 else F(0)
            best, levels = scale * sum_lx, (q + F(n_max)).astype(np.uint8)
    return scale, levels


def quantize_q6_K(x: F32, qw: F32 | None = None) -> bytes:
    """256 elements -> one block."""
    w = x * x if qw is None else qw
    found = [search(part, weights) for part, weights in zip(x.reshape(16, 16), w.reshape(16, 16), strict=True)]
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


def in_order(v: F32, *, from_first: bool = False) -> np.float32:
    """The sum, an element after the other, from zero on, or from the first element on: of what is all -0 that is -0."""
    return np.cumsum(v if from_first else np.append(F(0), v), dtype=np.float32)[-1]


def nearest_int(v: np.ndarray) -> np.ndarray:
    """ggml's nearest_int, whose bits mean something else where v is 2^22 or more, infinite or NaN."""
    return ((v + F(12582912)).view(np.int32) & 0x7FFFFF) - 0x400000


def affine_search(
    x: F32, w: F32, n_max: int, first_shift: float, n_steps: int, step_size: float
) -> tuple[np.float32, np.float32, np.ndarray]:
    """(scale, minimum, levels) of 32 elements, x = scale * level - minimum; errors weighted by w."""
    low, high = x[np.argmin(x)], x.max()
    low = F(0) if low > 0 else low  # of zeros of both signs the first
    if low == high:
        return F(0), -low, np.zeros(32, np.int32)

    def levels_of(inverse: np.float32) -> np.ndarray:
        return np.clip(nearest_int(inverse * (x - low)), 0, n_max)

    def error_of(scale: np.float32, levels: np.ndarray, low: np.float32) -> np.float32:
        difference = scale * levels.astype(np.float32) + low - x
        return in_order(w * (difference * difference))

    inverse = F(n_max) / (high - low)
    scale, kept = F(1) / inverse, levels_of(inverse)
    best = error_of(scale, kept, low)
    sum_w, sum_x = in_order(w, from_first=True), in_order(w * x, from_first=True)
    for step in range(n_steps + 1):
        levels = levels_of((F(first_shift) + F(step_size) * F(step) + F(n_max)) / (high - low))
        q = levels.astype(np.float32)
        sum_l, sum_l2, sum_xl = in_order(w * q), in_order(w * q * q), in_order(w * q * x)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        if not determinant > 0:
            continue
        new_scale, new_low = (sum_w * sum_xl - sum_x * sum_l) / determinant, (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        if new_low > 0:
            new_scale, new_low = sum_xl / sum_l2, F(0)
        error = error_of(new_scale, levels, new_low)
        if error < best:
            best, scale, low, kept = error, new_scale, new_low, levels
    return scale, -low, kept


def six_bits(values: F32) -> tuple[np.float16, np.ndarray]:
    """(what one step is, multiples 0 .. 63 of it)"""
    top = max(F(0), *values)
    inverse = F(63) / top if top > 0 else F(0)
    return np.float16(top / F(63)), np.minimum(nearest_int(inverse * values) & 255, 63).astype(np.uint8)


def weighted_six_bits(values: F32, w: F32) -> tuple[np.float16, np.ndarray]:
    """The same with the least error weighted by w: the best of nine scales, then step by step. Steps are bytes in the
    first error and in the result, which negative values make wrap."""
    top = max(F(0), *values)
    if top < F(1e-15):
        return np.float16(0), np.zeros(8, np.uint8)

    def error_of(inverse: np.float32, steps: np.ndarray) -> np.float32:
        difference = values - F(1) / inverse * steps.astype(np.float32)
        return in_order(w * difference * difference)

    inverse = F(63) / top
    best = error_of(inverse, nearest_int(inverse * values).astype(np.uint8))
    for shift in (-4, -3, -2, -1, 1, 2, 3, 4):
        candidate = (F(0.1) * F(shift) + F(63)) / top
        error = error_of(candidate, np.minimum(nearest_int(candidate * values), 63))
        if error < best:
            best, inverse = error, candidate
    steps = np.minimum(nearest_int(inverse * values), 63)
    exact = steps.astype(np.float32)
    sum_lx, sum_l2, levels = in_order(w * values * exact), in_order(w * exact * exact), steps.astype(np.uint8)
    for _ in range(5):
        before = levels.copy()
        for j in range(8):
            level = F(levels[j])
            lx, l2 = sum_lx - w[j] * values[j] * level, sum_l2 - w[j] * level * level
            if not (lx > 0 and l2 > 0):
                continue
            new = min(nearest_int(np.array(values[j] * l2 / lx)), 63)
            lx, l2 = lx + w[j] * values[j] * F(new), l2 + w[j] * F(new) * F(new)
            if new != levels[j] and lx * lx * sum_l2 > sum_lx * sum_lx * l2:
                levels[j], sum_lx, sum_l2 = np.array(new).astype(np.uint8), lx, l2
        if (levels == before).all():
            break
    return np.float16(sum_lx / sum_l2 if sum_l2 > 0 else F(0)), levels


def quantize_sub_blocks(
    x: F32, block: np.ndarray, n_max: int, first_shift: float, n_steps: int, qw: F32 | None
) -> np.ndarray:
    """Fill what Q4_K and Q5_K have in common, but for the nibbles; levels (8, 32)."""
    parts, sums, step_size = x.reshape(8, 32), None, 0.1
    if qw is None:
        w = np.stack([np.sqrt(in_order(part * part) / F(32)) + np.abs(part) for part in parts])
    else:
        w = (qw * np.sqrt(F(2) * in_order(x * x) / F(256) + x * x)).reshape(8, 32)
        sums, first_shift, n_steps, step_size = np.array([in_order(part) for part in w]), -0.9, 36, 0.05
    found = [affine_search(parts[j], w[j], n_max, first_shift, n_steps, step_size) for j in range(8)]
    levels = np.array([part for _, _, part in found])
    found_scales, found_minima = (np.array([part[i] for part in found], np.float32) for i in range(2))
    block["d"], scales = six_bits(found_scales) if sums is None else weighted_six_bits(found_scales, sums)
    block["dmin"], minima = six_bits(found_minima) if sums is None else weighted_six_bits(found_minima, sums)
    if n_max == 31:  # ggml clamps them for this type only
        scales, minima = np.minimum(scales, 63), np.minimum(minima, 63)
    for j in range(8):
        block["scales"][j % 4] |= scales[j] >> 4 << 6 if j > 3 else scales[j]
        block["scales"][4 + j % 4] |= minima[j] >> 4 << 6 if j > 3 else minima[j]
        if j > 3:
            block["scales"][4 + j] = scales[j] & 15 | (minima[j] & 15) << 4
    first, second, low = block["scales"].reshape(3, 4)  # as they are read back
    scales = np.concatenate([first & 63, low & 15 | first >> 6 << 4])
    minima = np.concatenate([second & 63, low >> 4 | second >> 6 << 4])
    for j in range(8):
        step = block["d"].astype(np.float32) * F(scales[j])
        minimum = block["dmin"].astype(np.float32) * F(minima[j])
        if step:
            levels[j] = np.clip(nearest_int((x[32 * j : 32 * j + 32] + minimum) / step), 0, n_max)
    return levels.astype(np.uint8)


def quantize_q4_K(x: F32, qw: F32 | None = None) -> bytes:
    """256 elements -> one block."""
    block = np.zeros((), block_q4_K)
    pairs = quantize_sub_blocks(x, block, 15, -1.0, 20, qw).reshape(4, 2, 32)
    block["qs"] = (pairs[:, 0] | pairs[:, 1] << 4).reshape(128)
    return block.tobytes()


def quantize_q5_K(x: F32, qw: F32 | None = None) -> bytes:
    """256 elements -> one block."""
    block = np.zeros((), block_q5_K)
    levels = quantize_sub_blocks(x, block, 31, -0.5, 15, qw)
    pairs = (levels & 15).reshape(4, 2, 32)
    block["qs"] = (pairs[:, 0] | pairs[:, 1] << 4).reshape(128)
    block["qh"] = np.bitwise_or.reduce(levels >> 4 << np.arange(8, dtype=np.uint8)[:, None], axis=0)
    return block.tobytes()


def quantize_iq4_nl(x: F32, qw: F32 | None = None) -> bytes:
    """A row -> its blocks; of two values equally near the upper one."""
    values = np.array(IQ4_NL_VALUES, np.float32)
    middles = (values[1:] + values[:-1]) / F(2)
    out = []
    for i in range(0, len(x), 32):
        part, block = x[i : i + 32], np.zeros((), block_iq4_nl)
        w = part * part
        if qw is not None:
            w = qw[i : i + 32] * np.sqrt(in_order(part * part) * F(2 / 32) + part * part)
        largest, scale, best = part[np.argmax(np.abs(part))], F(0), None
        if abs(largest) >= F(1e-15):
            for inverse in (F(1) / (largest / F(127)), *(F(step - 127) / largest for step in range(-7, 8))):
                q = values[np.searchsorted(middles, inverse * part, side="right")]
                sum_qx, sum_q2 = in_order(w * q * part), in_order(w * q * q)
                if sum_q2 > 0 and (best is None or sum_qx * sum_qx > best * sum_q2):
                    scale = sum_qx / sum_q2
                    best = scale * sum_qx
                best = F(0) if best is None else best
        block["d"] = np.float16(scale)
        levels = np.searchsorted(middles, (F(1) / scale if scale else F(0)) * part, side="right").astype(np.uint8)
        block["qs"] = levels[:16] | levels[16:] << 4
        out.append(block.tobytes())
    return b"".join(out)


def quantize_legacy(x: F32, qw: F32, bits: int, affine: bool) -> bytes:
    """A row -> its blocks of Q4_0, Q5_0 or, affine, of Q4_1, Q5_1."""
    w = (qw * np.sqrt(in_order(x * x) / F(len(x)) + x * x)).reshape(-1, 32)
    out = []
    for part, weights in zip(x.reshape(-1, 32), w, strict=True):
        if affine:
            scale, minimum, levels = affine_search(part, weights, (1 << bits) - 1, -0.9, 36, 0.05)
            head = [np.float16(scale), np.float16(-minimum)]
        else:
            scale, levels = search(part, weights, 1 << bits - 1)
            head = [np.float16(scale)]
        levels = levels.astype(np.uint8)
        out += [half.tobytes() for half in head]
        if bits == 5:
            out.append(np.packbits(levels >> 4, bitorder="little").tobytes())
        out.append((levels[:16] & 15 | (levels[16:] & 15) << 4).tobytes())
    return b"".join(out)
