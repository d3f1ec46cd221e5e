"""The SIMD vocabulary, word by word, against NumPy."""

from __future__ import annotations

from functools import cache

import gguf
import kernel_words
import numpy as np
import pytest
from kernel_calls import aligned, guarded, run, same_bits
from kernel_words import ROW
from numpy.typing import NDArray
from tiny_model import to_bf16

from lfm2cpp.kernels import level
from lfm2cpp.kernels.compiler import compile_kernel
from lfm2cpp.kernels.dot import I8_BIAS
from lfm2cpp.kernels.library import Kernel, library
from lfm2cpp.kernels.widths import W

PIECES = W // 4
# Vector and piece of each block of a group, as activation.py lays one token out.
PLACES = [divmod(b, 4) if W == 16 else (b % 4, b // 4) for b in range(W)]
HAS_FMA = level.target().has_fma


@cache
def word_kernel(name: str) -> Kernel:
    """Compiled here: the cache does not know the sources of tests."""
    name = f"kernel_words:{name}"
    assert library()._link(name, compile_kernel(name))
    return library()._loaded[name]


def say(name: str, n_results: int, **args: NDArray | int) -> NDArray[np.uint8]:
    """Run a kernel of words; (n_results, ROW) bytes."""
    out = aligned(n_results * ROW, 0xEE).reshape(n_results, ROW)
    run(word_kernel(name), out=out, **args)
    return out


def rows(*vectors: NDArray) -> NDArray[np.uint8]:
    x = np.zeros((len(vectors), ROW), np.uint8)
    for row, vector in zip(x, vectors, strict=True):
        row[: vector.nbytes] = np.ascontiguousarray(vector).view(np.uint8)
    return x


def check(row: NDArray[np.uint8], expected: NDArray) -> None:
    """A result, and that nothing was written behind it."""
    assert same_bits(row[: expected.nbytes].view(expected.dtype), expected)
    assert (row[expected.nbytes :] == 0xEE).all()


def floats(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 100, W).astype(np.float32)


def ints(seed: int) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(-(2**31), 2**31, W).astype(np.int32)


def octets(seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, 4 * W).astype(np.uint8)


def halving_sum(x: NDArray[np.float32]) -> np.float32:
    while len(x) > 1:
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return x[0]


def test_float_words() -> None:
    a, b, c = floats(0), floats(1), floats(2)
    n = np.random.default_rng(3).integers(-20, 20, W).astype(np.int32)
    found = say("float_words", 23, x=rows(a, b, c, n))
    fused = (a.astype(np.float64) * b + c).astype(np.float32) if HAS_FMA else a * b + c
    whole = np.rint(a.astype(np.float64) * b if HAS_FMA else a * b)
    kept = [np.where(np.arange(W) < k, a, np.float32(-7)) for k in (3, -5, 1000)]
    for row, expected in zip(
        found,
        [a + b, a - b, a * b, a / b, fused, np.maximum(a, b), np.minimum(a, b), np.abs(a), np.ldexp(a, n),
         n.astype(np.float32), whole.astype(np.int32), np.full(W, 1.5, np.float32), *kept],
        strict=False,
    ):  # fmt: skip
        check(row, expected)
    check(found[15], np.array([halving_sum(a)]))
    check(found[16], np.array([a.max()]))
    once = np.float32(np.float64(np.float32(3)) * np.float64(np.float32(0.1)) - np.float64(np.float32(0.3)))
    assert found[17][:4].view(np.float32)[0] == (once if HAS_FMA else np.float32(3) * np.float32(0.1) - np.float32(0.3))
    check(found[18], n.view(np.float32))
    check(found[21], np.where(a > b, b, c))
    check(found[22], -a)
    np.testing.assert_array_equal(found[19][: 4 * W].view(np.float32), a - np.rint(a))
    np.testing.assert_allclose(found[20][: 4 * W].view(np.float32), 1 / (np.abs(a.astype(np.float64)) + 1), rtol=2e-7)


def test_nan_in_maximum_and_minimum() -> None:
    """The second one where one of the two is NaN: what softmax, exp and quantizing rely on."""
    nan, a = np.full(W, np.nan, np.float32), floats(0)
    zero = np.zeros(W, np.int32)
    assert say("float_words", 23, x=rows(nan, a, a, zero))[5][: 4 * W].view(np.float32).tolist() == a.tolist()
    found = say("float_words", 23, x=rows(a, nan, a, zero))
    assert np.isnan(found[5][: 4 * W].view(np.float32)).all() and np.isnan(found[6][: 4 * W].view(np.float32)).all()
    check(found[21], a)  # neither is greater


def test_rounding_is_to_nearest_even() -> None:
    a = np.resize(np.float32([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 4194302.5]), W)
    one = np.ones(W, np.float32)
    found = say("float_words", 23, x=rows(a, one, a, np.zeros(W, np.int32)))
    check(found[10], np.rint(a).astype(np.int32))
    np.testing.assert_array_equal(found[19][: 4 * W].view(np.float32), a - np.rint(a))


def test_int_words() -> None:
    a, b, c, d = (ints(i) for i in range(4))
    small = np.random.default_rng(9).integers(-128, 128, W).astype(np.int32)
    with np.errstate(over="ignore"):
        results = [a + b, a - b, a * b, a & b, a | b, a ^ b, (a.view(np.uint32) >> 5).view(np.int32), a << 5,
                   np.full(W, -3, np.int32)]  # fmt: skip
        all_sums = sums_of_pieces(a, b, c, d)
    found = say("int_words", 14, x=rows(a, b, c, d, small))
    for row, expected in zip(found, results, strict=False):
        check(row, expected)
    check(found[9], np.array([small.sum()], np.int64))
    check(found[10], all_sums)
    check(found[11], sums_of_pieces(*((v & 0x7FFF) - 0x4000 for v in (a, b, c, d))))
    check(found[12], small.astype(np.int8))
    check(found[13], sums_of_pieces(*((v & 0xFFFF) - 0x8000 for v in (a, b, c, d))))


def sums_of_pieces(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
    """A sum a piece, in the order of the blocks that they are of."""
    sums = np.stack([v.reshape(PIECES, 4).sum(-1, dtype=np.int32) for v in (a, b, c, d)])
    return np.array([sums[place] for place in PLACES])


@pytest.mark.parametrize(("row", "bits"), [(11, 15), (13, 16)], ids=["sum_pieces_small", "sum_pieces_i16"])
def test_sums_of_pieces_at_their_limits(row: int, bits: int) -> None:
    """Every lane the smallest and the largest of `bits` bits: pairwise sums of 15 bits are the last to fit 16."""
    half = 1 << (bits - 1)
    for value in (-half, half - 1):
        v = np.full(W, value + half, np.int32)  # the words take `half` off again
        check(say("int_words", 14, x=rows(v, v, v, v, v))[row], np.full(W, 4 * value, np.int32))


def test_byte_words() -> None:
    a, b, c, d = (octets(i) for i in range(4))
    far = guarded(np.random.default_rng(8).integers(0, 256, 3 + 210 * (PIECES + 1), np.uint8))
    found = say("byte_words", 20, x=rows(a, b, c, d), far=far)
    check(found[0], a & b)
    check(found[1], a & 15)
    check(found[2], a >> 4)
    check(found[3], np.full(4 * W, 200, np.uint8))
    check(found[4], np.tile(a[5:9], W))
    lanes = np.stack([v.reshape(PIECES, 4, 4) for v in (a, b, c, d)], axis=1)  # [piece][vector][lane][byte]
    for j in range(4):
        check(found[5 + j], np.ascontiguousarray(lanes[:, :, j]).reshape(4 * W))
    check(found[9], np.concatenate([far[3 + 18 * i :][:16] for i in range(PIECES)]))
    shifts = np.repeat(kernel_words.SHIFTS, 16)
    check(found[10], ((a >> shifts & 3) << 4).astype(np.uint8))
    for row, first in ((11, 7), (15, 8)):
        check(found[row], np.array([far.view(np.int8)[first + 2 * (i % 8) + 210 * (i // 8)] for i in range(W)], np.int32))
    check(found[12], (a | b) ^ c)
    check(found[13], a >> 2)
    check(found[14], a)
    check(found[18], b)
    halves = np.stack([v.reshape(PIECES, 2, 8) for v in (a, b)], axis=2)  # [piece][half][vector][byte]
    check(found[16], np.ascontiguousarray(halves[:, 0]).reshape(4 * W))
    check(found[17], np.ascontiguousarray(halves[:, 1]).reshape(4 * W))
    check(found[19], a >> 5)


def test_loads_stay_within_their_vectors() -> None:
    """gather_pieces, gather_i8_pairs and load_* of the last bytes there are."""
    n_far = max(3 + 18 * (PIECES - 1) + 16, 7 + 210 * (-(-W // 8) - 1) + 2 * min(W, 8))
    x = rows(*(octets(i) for i in range(4)))
    say("byte_words", 20, x=x, far=guarded(np.zeros(n_far, np.uint8)))


@pytest.mark.parametrize("block", kernel_words.BLOCKS, ids=lambda block: f"{block[1]} of {block[0]} bytes")
def test_pieces_of_blocks(block: tuple[int, int]) -> None:
    """Each block's piece is where activations have it, and nothing beyond the last block is read."""
    nbytes, at = block
    blocks = np.random.default_rng(nbytes).integers(0, 256, (W, nbytes), np.uint8)
    halves = np.random.default_rng(0).normal(0, 1, W).astype(np.float16)
    blocks[:, at - 2 : at] = halves.view(np.uint8).reshape(W, 2)
    found = say(f"pieces_of_{nbytes}_{at}", 5, far=guarded(blocks.reshape(-1).copy()))
    check(found[4], halves.astype(np.float32))
    for i, (vector, piece) in enumerate(PLACES):
        assert np.array_equal(found[vector][16 * piece :][:16], blocks[i, at : at + 16])


def test_halves_and_nibbles_of_runs() -> None:
    far = guarded(np.random.default_rng(0).integers(0, 256, 80, np.uint8))
    found = say("run_words", 4, far=far)
    for half in range(2):
        runs = [far[place + 16 * half :][:16] for place in kernel_words.RUNS]
        check(found[half], np.concatenate(runs))
        nibbles = [run >> 4 if high else run & 15 for run, high in zip(runs, kernel_words.HIGH, strict=True)]
        check(found[2 + half], np.concatenate(nibbles))


def test_numbers_of_five_bits_and_values_of_four() -> None:
    for i in range(8):
        a, b = octets(2 * i), octets(2 * i + 1)
        found = say("five_words", 4, x=rows(a, b))
        bits = np.unpackbits(a.reshape(PIECES, 16), axis=1, bitorder="little")  # (piece, 128)
        check(found[0], (bits[:, kernel_words.SPREAD] * 32).reshape(4 * W))
        fifth = np.unpackbits(b.reshape(PIECES, 16), axis=1, bitorder="little")[:, :32] << 4
        check(found[1], (a & 15) | fifth[:, :16].reshape(4 * W))
        check(found[2], (a >> 4) | fifth[:, 16:].reshape(4 * W))
        check(found[3], np.array(kernel_words.TABLE, np.uint8)[a & 15])


def dots(u: NDArray, w: NDArray, a: NDArray, acc: NDArray) -> None:
    found = say("dot_words", 3, x=rows(acc, u.astype(np.uint8), w.astype(np.int8), a.astype(np.int8)))
    u, w, a = (v.astype(np.int64).reshape(W, 4) for v in (u, w, a))
    check(found[0], (acc + (u * a).sum(-1)).astype(np.int32))
    check(found[1], (acc + (w * a).sum(-1) + I8_BIAS * a.sum(-1)).astype(np.int32))
    check(found[2], (acc + ((u & 63) * a + (u >> 1 & 63) * w).sum(-1)).astype(np.int32))


def test_dot_words() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        acc = rng.integers(-(2**20), 2**20, W).astype(np.int32)
        dots(rng.integers(0, 128, 4 * W), rng.integers(-128, 128, 4 * W), rng.integers(-127, 128, 4 * W), acc)


@pytest.mark.parametrize("u", [0, 15, 63, 127])
@pytest.mark.parametrize("w", [-128, -127, 0, 127])
@pytest.mark.parametrize("a", [-127, 127])
def test_dot_words_at_their_limits(u: int, w: int, a: int) -> None:
    """Nothing saturates on the way."""
    dots(np.full(4 * W, u), np.full(4 * W, w), np.full(4 * W, a), np.zeros(W, np.int32))


def test_every_half_becomes_its_float() -> None:
    """All 65,536 of them, in vectors and one by one; NaN stays NaN."""
    halves = np.arange(65536, dtype=np.uint16)
    out = np.zeros(2 * 65536, np.float32)
    run(word_kernel("half_words"), x=guarded(halves), out=out, n=65536)
    with np.errstate(invalid="ignore"):  # signalling NaN
        expected = halves.view(np.float16).astype(np.float32)
    nan = np.isnan(expected)
    for found in (out[:65536], out[65536:]):
        assert np.isnan(found[nan]).all() and same_bits(found[~nan].copy(), expected[~nan].copy())


def test_floats_become_the_nearest_half() -> None:
    """Every half, what lies just beside the middle between two, the middle itself, and random floats."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = (halves[:-1] + halves[1:]) / 2
    specials = np.float32([np.inf, 65504, 65519.996, 65520, 1e30, 3e38, 0, 1e-45, 2.98e-8, 2.9802322e-8, 2.9802326e-8])
    above, below = (np.nextafter(middles, np.float32(end)) for end in (np.inf, 0))
    anything = np.random.default_rng(0).integers(0, 2**31, 4096, np.uint32).view(np.float32)
    x = np.concatenate([halves, middles, above, below, specials, anything])
    x = np.concatenate([x, -x])
    n = len(x) // W * W
    out = np.zeros(2 * n, np.uint16)
    run(word_kernel("to_half_words"), x=np.concatenate([x[:n], np.zeros(W, np.float32)]), out=out, n=n)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x[:n].astype(np.float16)
    nan = np.isnan(x[:n])
    for found in (out[:n].view(np.float16), out[n:].view(np.float16)):
        assert np.isnan(found[nan]).all() and same_bits(found[~nan].copy(), expected[~nan].copy())


def test_gathers_of_halves() -> None:
    far = np.random.default_rng(0).normal(0, 1, 105 * (W + 1) + 128).astype(np.float16)
    data = far.view(np.uint8)

    def half(offset: int) -> np.float32:
        return data[offset : offset + 2].view(np.float16)[0].astype(np.float32)

    found = say("gather_words", 16, far=guarded(far))
    check(found[0], np.array([half(18 * i) for i in range(W)]))
    check(found[1], np.array([half(2 + 210 * i) for i in range(W)]))
    check(found[4], np.array([half(210 * (i // 8)) for i in range(W)]))
    check(found[5], (far.view(np.uint16)[:W].astype(np.uint32) << 16).view(np.float32))
    for i in range(3):
        check(found[6 + 2 * i], data.view(np.int8)[i : 4 * W : 4].astype(np.float32))
        check(found[7 + 2 * i], data.view(np.int8)[i + 1 : 4 * W : 4].astype(np.float32))
    headers = np.stack([data[144 * i + 4 : 144 * i + 16] for i in range(-(-W // 8))])
    for place, numbers in enumerate(gguf.quants.Q4_K.get_scale_min(headers)):
        units = np.array([[half(144 * i + 2 * place)] for i in range(len(headers))])
        for part in range(2):
            first = 4 * part if W == 4 else 0
            expected = (units * numbers.astype(np.float32)).reshape(-1)[first : first + W]
            check(found[12 + 2 * part + place], expected)


def test_transpose_square() -> None:
    stride = 4 * W + 12
    source = np.zeros((W, stride), np.uint8)
    values = np.arange(W * W, dtype=np.float32).reshape(W, W)
    source[:, : 4 * W] = values.view(np.uint8).reshape(W, 4 * W)
    out = guarded(np.zeros(W * (W + 3) - 3, np.float32))
    source = guarded(source.reshape(-1)[:-12].copy())
    run(word_kernel("square"), source=source, stride=stride, destination=out, step=4 * (W + 3))
    rows = np.append(out, np.zeros(3, np.float32)).reshape(W, W + 3)
    assert np.array_equal(rows[:, :W], values.T) and not rows[:, W:].any()


def test_transpose_rows() -> None:
    """Rows from anywhere, more of them than lanes or fewer; between the columns nothing is written."""
    source = np.arange(8 * (W + 1), dtype=np.float32).reshape(8, W + 1)
    rows = [place // (4 * (W + 1)) for place in kernel_words.PLACES]
    out = guarded(np.zeros((W - 1) * 7 + 6, np.float32))
    run(word_kernel("rows_to_columns"), source=guarded(source.reshape(-1)[:-1]), destination=out, step=4 * 7)
    columns = np.append(out, 0).reshape(W, 7)
    assert np.array_equal(columns[:, :6], source[rows, :W].T) and not columns[:, 6].any()


def test_floats_become_the_nearest_bf16() -> None:
    """As gguf.quants rounds: ties to even, NaN to NaN."""
    bits = np.random.default_rng(0).integers(0, 2**32, (300, 2 * W), np.uint64).astype(np.uint32)
    bits[:50] = bits[:50] & 0xFFFF0000 | 0x8000  # ties
    bits[50] = 0x7F7FFFFF  # rounded up to infinity
    for x in bits.view(np.float32):
        found = bf16_words(x, np.zeros(2 * W, np.uint16))[0]
        expected = gguf.quants.quantize(x, gguf.GGMLQuantizationType.BF16).view(np.uint16)
        nan = np.isnan(x)
        assert np.array_equal(found[~nan], expected[~nan])
        assert np.isnan((found[nan].astype(np.uint32) << 16).view(np.float32)).all()


def test_sums_of_bf16_products() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        x, w = rng.normal(0, 1, (2, 2 * W)).astype(np.float32)
        w = to_bf16(w)
        found = bf16_words(x, (w.view(np.uint32) >> 16).astype(np.uint16))[1]
        products = (w.astype(np.float64) * to_bf16(x)).reshape(W, 2)
        sizes = np.abs(products).sum(1) + np.abs(x[:W])
        assert (np.abs(found - (x[:W] + products.sum(1))) <= 2e-7 * sizes).all()


def bf16_words(x: NDArray[np.float32], w: NDArray[np.uint16]) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    pairs, out = guarded(np.zeros(2 * W, np.uint16)), guarded(np.zeros(W, np.float32))
    run(word_kernel("bf16_words"), x=guarded(x), pairs=pairs, w=guarded(w), out=out)
    return pairs, out


def ulps(found: NDArray[np.float32], exact: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.abs(found - exact) / np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)


def test_exp_and_silu() -> None:
    """Within 2 units in the last place for exp, 4 for silu, over all of their range; beyond it they end flat."""
    n = 40000 // W * W
    x = np.linspace(-86.9, 87.9, n).astype(np.float32)
    out = np.zeros(2 * n, np.float32)
    run(word_kernel("math_words"), x=x, out=out, n=n)
    exact = x.astype(np.float64)
    assert ulps(out[:n], np.exp(exact)).max() < 2
    assert ulps(out[n:], exact / (1 + np.exp(-exact))).max() < 4
    x = np.resize(np.float32([-1e30, -88, -87, 0, 88, 89, 1e30, -0.0]), n)
    run(word_kernel("math_words"), x=x, out=out, n=n)
    assert np.allclose(out[:8], np.exp(np.clip(x[:8].astype(np.float64), -87, 88)), rtol=3e-7)


def test_scalar_words() -> None:
    value = np.array([-0x0123456789ABCDF0], np.int64)
    found = say("scalar_words", 1, x=value)[0]
    low = int(value[0])
    assert found[:40].view(np.int64).tolist() == [
        low,
        *(int(value.view(kind)[0]) for kind in (np.int32, np.uint16, np.uint8, np.int8)),
    ]
    assert same_bits(found[40:44].copy(), value.view(np.uint8)[:4].copy())
    assert same_bits(found[44:47].copy(), np.concatenate([value.view(np.uint8)[:2], value.view(np.uint8)[:1]]))
    assert found[48:72].view(np.int64).tolist() == [2, -4, 4194303]


def test_every_word_is_tested() -> None:
    """A word of the vocabulary that no kernel of kernel_words says is a word without a test."""
    import inspect

    from lfm2cpp.kernels import simd
    from lfm2cpp.kernels.vector import Vec

    said = inspect.getsource(kernel_words)
    words = [name for name, value in vars(simd).items() if callable(value) and not isinstance(value, Vec)]
    assert len(words) > 25
    assert [name for name in words if f"simd.{name}(" not in said] == []
