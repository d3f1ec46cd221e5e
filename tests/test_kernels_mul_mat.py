"""Matrix products and quantized activations against float64, to the bit where a law asks for it."""

from __future__ import annotations

from functools import cache

import gguf
import numpy as np
import pytest
from kernel_calls import aligned, call, count, guarded, normal, relative_rms, rows_with_slack, same_bits, with_slack
from numpy.typing import NDArray
from tiny_model import encode, to_bf16

from lfm2cpp.arch.validate import WEIGHT_TYPES
from lfm2cpp.engine.plan import kernel_type
from lfm2cpp.ggml import GGMLType
from lfm2cpp.kernels import widths
from lfm2cpp.kernels.weights import BLOCK_TYPES as BLOCK_MODULES
from lfm2cpp.kernels.widths import W

FLOAT_TYPES = ["F32", "F16", "BF16"]
BLOCK_TYPES = sorted(t.name for t in WEIGHT_TYPES if t.name not in FLOAT_TYPES)
BLOCK_SIZE = {name: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] for name in BLOCK_TYPES}  # elements, bytes
PAIR_SHAPES = [(1, 32), (5, 64), (40, 96), (33, 512), (64, 256), (2 * W + 1, 1056)]
MANY = max(widths.FEW_TOKENS, widths.SLICED_TOKENS) + 2  # tokens that a whole panel is unpacked for
KERNEL_OF = {t.name: kernel_type(t) for t in WEIGHT_TYPES}

# Sums of a few hundred float32 products, added up in float32.
MAX_SUM_ERROR = 3e-7
# ggml's scheme, one scale in 127 steps for 32 values, costs 5.4e-3 on normal values; the choice of scale saves some.
MAX_QUANTIZATION_ERROR = 5.2e-3

# (rows, columns): whole groups of blocks and incomplete ones, whole panels and tails, a single row.
SHAPES = [(1, 32), (3, 64), (16, 96), (33, 512), (40, 544), (64, 256), (2 * W + 1, 1056), (100, 32 * W), (7, 4128)]
FLOAT_SHAPES = [(1, 1), (2, 7), (5, 31), (16, 33), (33, 64), (47, 100), (64, 256), (2 * W + 1, 2 * W + 1), (100, 515)]


def test_every_block_type_that_a_model_may_have_has_a_module() -> None:
    assert set(BLOCK_MODULES) == {KERNEL_OF[name] for name in BLOCK_TYPES}
    assert all((BLOCK_MODULES[KERNEL_OF[name]].BLOCK, BLOCK_MODULES[KERNEL_OF[name]].BLOCK_BYTES) == BLOCK_SIZE[name]
               for name in BLOCK_TYPES)  # fmt: skip


class Weights:
    """A matrix (n_rows, n) as stored, behind which there is nothing, and as float64."""

    def __init__(self, name: str, n_rows: int, n: int, seed: int = 0) -> None:
        self.kind, self.n_rows, self.n = GGMLType[name], n_rows, n
        w = to_bf16(normal(n_rows, n, seed=seed))
        data = w.view(np.uint8).reshape(n_rows, -1) if name == "F32" else encode(w, self.kind).reshape(n_rows, -1)
        self.data = guarded(data)
        self.float64 = (
            gguf.quants.dequantize(data, gguf.GGMLQuantizationType(self.kind)).reshape(n_rows, n).astype(np.float64)
        )

    @property
    def row_bytes(self) -> int:
        return self.data.shape[1]


@cache
def weights(name: str, n_rows: int, n: int) -> Weights:
    return Weights(name, n_rows, n)


def shapes_of(name: str) -> list[tuple[int, int]]:
    if name in FLOAT_TYPES:
        return FLOAT_SHAPES
    shapes = [(rows, n) for rows, n in SHAPES if n % BLOCK_SIZE[name][0] == 0]
    return shapes if len(shapes) == len(SHAPES) else [*shapes, (7, 1280)]


CASES = [(name, *shape) for name in BLOCK_TYPES + FLOAT_TYPES for shape in shapes_of(name)]


def quantized(x: NDArray[np.float32], nth: int = 1) -> NDArray[np.uint8]:
    """Activation rows; the memory held something else before, but zeros where no block of the row lies."""
    n_tokens, n = x.shape
    act = aligned(widths.activation_nbytes(n) * (n_tokens + 16) + 4096)
    call("ops:quantize_rows", nth=nth, x=np.ascontiguousarray(x), n=n, act=act, count=count(n_tokens))
    return act


def chained(x: NDArray[np.float32], nth: int = 1) -> NDArray[np.float32]:
    """x as the float products of several tokens take it."""
    n_tokens, n = x.shape
    out = rows_with_slack(n_tokens + 8, -(-n // widths.PANEL_ROWS) * widths.PANEL_ROWS)
    call("mul_mat_float:chain_rows", nth=nth, x=x, n=n, chained=out, count=count(n_tokens))
    return out


def rounded(x: NDArray[np.float32], nth: int = 1) -> NDArray[np.float32]:
    """x in BF16, two elements a column."""
    n_tokens, n = x.shape
    pairs = rows_with_slack(n_tokens, n // 2)
    call("mul_mat_float:round_rows", nth=nth, x=with_slack(x), n=n, pairs=pairs, count=count(n_tokens))
    return pairs


def product(
    w: Weights, x: NDArray[np.float32], add: NDArray[np.float32] | None = None, nth: int = 1
) -> NDArray[np.float32]:
    """W x for each row of x, by the kernel of W's type."""
    n_tokens, n = x.shape
    out = guarded(np.full((n_tokens, w.n_rows), np.nan, np.float32))
    common = {
        "w": w.data,
        "n_rows": w.n_rows,
        "n": n,
        "out": out,
        "add": 0 if add is None else add,
        "count": count(n_tokens),
    }
    name = KERNEL_OF[w.kind.name]
    if w.kind.name in BLOCK_TYPES:
        call(f"mul_mat:mul_mat_{name}", nth=nth, act=quantized(x), row_bytes=w.row_bytes, **common)
    else:
        x = with_slack(x)
        call(f"mul_mat_float:mul_mat_{name}", nth=nth, x=x, chained=chained(x), **common)
    return out


# Quantized activations


def unpack(act: NDArray[np.uint8], n: int, n_tokens: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """(integers (n_tokens, n), scales (n_tokens, n / 32)) of rows in the layout that activation.py describes."""
    n_blocks, stride = n // 32, widths.activation_nbytes(n)
    n_groups = -(-n_blocks // W)
    qs, d = np.zeros((n_tokens, n), np.int8), np.zeros((n_tokens, n_blocks), np.float32)
    n_tile = 1 if n_tokens == 1 else widths.TILE_TOKENS
    for t in range(n_tokens):
        tile = act[(t // n_tile * n_tile + (n_tokens > 1)) * stride :]  # the tiles come behind the row for one token
        for b in range(n_blocks):
            i = np.arange(32)
            if n_tokens == 1:
                place = b
                vector, piece = divmod(b % W, 4) if W == 16 else (b % 4, b % W // 4)
                at = b // W * 32 * W + vector * 8 * W + piece * 16 + i // 16 * 4 * W + i % 16
            else:
                place = (b % W * n_groups + b // W) * n_tile + t % n_tile
                at = 32 * place + i
                if widths.PAIRS:  # 8 of a token, 8 of its neighbour
                    at = 64 * (place // 2) + i // 8 * 16 + place % 2 * 8 + i % 8
            qs[t, 32 * b : 32 * b + 32] = tile[at].view(np.int8)
            d[t, b] = tile[n_tile * n_groups * widths.ACT_D + 4 * place :][:4].view(np.float32)[0]
    return qs, d


def table(act: NDArray[np.uint8], n: int, offset: int) -> NDArray[np.int32]:
    """A table of one activation row, as int32, in block order (the layout for one token)."""
    n_groups = -(-(n // 32) // W)
    return act[n_groups * offset :][: 4 * (n // 32)].view(np.int32)


@pytest.mark.parametrize("n_tokens", [1, 3, 5])
@pytest.mark.parametrize("n", [32, 96, 512, 544, 32 * W + 32])
def test_quantized_activations(n: int, n_tokens: int) -> None:
    """Integers are the nearest for the scale; the scale is the largest value at 124 to 127 steps; errors are small."""
    x = normal(n_tokens, n)
    if n > 32:
        x[0, :32] = 0
    qs, d = unpack(quantized(x), n, n_tokens)
    blocks = x.reshape(n_tokens, -1, 32).astype(np.float64)
    largest = np.abs(blocks).max(-1)
    assert np.array_equal(d == 0, largest == 0) and not qs.reshape(n_tokens, -1, 32)[d == 0].any()
    steps = largest[d > 0] / d[d > 0]
    assert np.all(np.abs(steps - np.rint(steps)) < 1e-3) and steps.min() > 123.9 and steps.max() < 127.1
    with np.errstate(invalid="ignore"):
        exact = blocks / d[:, :, None]
    found = qs.reshape(n_tokens, -1, 32)
    assert np.abs(np.nan_to_num(exact) - found).max() < 0.5001
    assert (
        relative_rms(found * d[:, :, None].astype(np.float64), blocks) < 1.4 * MAX_QUANTIZATION_ERROR
    )  # of few values


def test_the_scale_is_the_best_of_those_that_are_tried() -> None:
    x = normal(1, 512, seed=3)
    qs, d = unpack(quantized(x), 512, 1)
    blocks = x.reshape(-1, 32).astype(np.float64)
    errors = []
    for steps in (127, 126, 125, 124):
        scale = np.abs(blocks).max(-1, keepdims=True) / steps
        errors.append(((blocks - np.rint(blocks / scale) * scale) ** 2).sum(-1))
    found = ((blocks - qs.reshape(-1, 32) * d.reshape(-1, 1).astype(np.float64)) ** 2).sum(-1)
    assert np.allclose(found, np.min(errors, axis=0), rtol=1e-4)


def test_activations_of_one_token_and_of_more_are_the_same_numbers() -> None:
    x = normal(5, 544)
    together = unpack(quantized(x), 544, 5)
    for t in range(5):
        alone = unpack(quantized(x[t : t + 1]), 544, 1)
        assert same_bits(alone[0][0], together[0][t]) and same_bits(alone[1][0], together[1][t])


def test_what_follows_from_the_sums() -> None:
    n = 544
    act = quantized(normal(1, n))
    qs, d = unpack(act, n, 1)
    halves = qs.reshape(-1, 2, 16).astype(np.int64).sum(-1)
    total = halves.sum(-1)
    from lfm2cpp.kernels.dot import I8_BIAS

    assert np.array_equal(table(act, n, widths.ACT_Z8), -8 * total)
    assert np.array_equal(table(act, n, widths.ACT_Z128), -I8_BIAS * total)
    assert np.array_equal(table(act, n, widths.ACT_Z32_LOW), -32 * halves[:, 0])
    assert np.array_equal(table(act, n, widths.ACT_Z32_HIGH), -32 * halves[:, 1])
    assert np.array_equal(table(act, n, widths.ACT_DS).view(np.float32), d[0] * total.astype(np.float32))


@pytest.mark.parametrize("n_tokens", [1, 3, 4])
def test_threads_quantize_alike(n_tokens: int) -> None:
    x = normal(n_tokens, 544)
    assert same_bits(quantized(x, nth=3), quantized(x))


@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-30, 3e38, -65504.0])
def test_activations_of_any_size(value: float) -> None:
    """Ties, tiny and huge values: the integers stay within -127..127 and represent the values.

    Up to 1e-35 everything is zero.
    """
    x = np.full((1, 64), value, np.float32)
    x[0, ::3] *= -1
    x[0, 1::3] /= 2
    qs, d = unpack(quantized(x), 64, 1)
    assert qs.min() >= -127
    with np.errstate(over="ignore"):
        back = qs.astype(np.float32) * np.repeat(d, 32, axis=1)
    assert np.abs(back.astype(np.float64) - x).max() <= abs(value) * (5e-3 if abs(value) > 1e-36 else 2)


# Products


@pytest.mark.parametrize(("name", "n_rows", "n"), CASES)
def test_one_token(name: str, n_rows: int, n: int) -> None:
    """Against float64 with the activations as quantized: only the float32 sums are left as an error."""
    w, x = weights(name, n_rows, n), normal(1, n, seed=1)
    exact_x = x.astype(np.float64)
    if name in BLOCK_TYPES:
        qs, d = unpack(quantized(x), n, 1)
        exact_x = qs * np.repeat(d, 32, axis=1).astype(np.float64)
    expected = exact_x @ w.float64.T
    magnitude = np.sqrt((exact_x**2) @ (w.float64.T**2))  # what a sum without cancellation would be
    assert np.abs(product(w, x) - expected).max() < 4 * MAX_SUM_ERROR * np.sqrt(n) * magnitude.max()
    assert np.sqrt(np.mean((product(w, x) - expected) ** 2)) < MAX_SUM_ERROR * np.sqrt(np.mean(magnitude**2)) * 3


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_quantizing_the_activations_costs_little(name: str) -> None:
    w, x = weights(name, 64, 1024), normal(6, 1024, seed=1)
    assert relative_rms(product(w, x), x.astype(np.float64) @ w.float64.T) < 1.2 * MAX_QUANTIZATION_ERROR


@pytest.mark.parametrize(("name", "n_rows", "n"), CASES)
@pytest.mark.parametrize("n_tokens", [2, 3, 7, 13, MANY])
def test_prefill_equals_decode(name: str, n_rows: int, n: int, n_tokens: int) -> None:
    """To the bit, for every number of tokens that fills tiles or leaves a rest."""
    w, x = weights(name, n_rows, n), normal(n_tokens, n, seed=2)
    together = product(w, x)
    assert same_bits(together, np.concatenate([product(w, x[t : t + 1]) for t in range(n_tokens)]))


@pytest.mark.parametrize("name", BLOCK_TYPES + FLOAT_TYPES)
def test_every_number_of_tokens(name: str) -> None:
    w, x = weights(name, 40, 512), normal(MANY + 8, 512, seed=2)
    expected = product(w, x)
    for n_tokens in range(1, MANY + 8):
        assert same_bits(product(w, x[:n_tokens]), expected[:n_tokens])
    assert product(w, x[:0]).shape == (0, 40)


@pytest.mark.parametrize("name", BLOCK_TYPES + FLOAT_TYPES)
@pytest.mark.parametrize("n_tokens", [1, 5, MANY])
@pytest.mark.parametrize("n_rows", [5, 64, 2 * W + 3])
def test_a_residual_is_added_last(name: str, n_tokens: int, n_rows: int) -> None:
    w, x = weights(name, n_rows, 256), normal(n_tokens, 256, seed=4)
    residual = normal(n_tokens, n_rows, seed=5)
    expected = product(w, x) + residual
    assert same_bits(product(w, x, guarded(residual)), expected)


@pytest.mark.parametrize("name", BLOCK_TYPES + FLOAT_TYPES)
def test_a_residual_may_be_the_result(name: str) -> None:
    """As in a plan: the sum takes the residual's place."""
    w = weights(name, 40, 256)
    for n_tokens in (1, 5, MANY):
        x, residual = normal(n_tokens, 256, seed=4), normal(n_tokens, 40, seed=5)
        expected = product(w, x) + residual
        out = with_slack(residual)
        args = {"w": w.data, "n_rows": 40, "n": 256, "out": out, "add": out, "count": count(n_tokens)}
        if name in BLOCK_TYPES:
            call(f"mul_mat:mul_mat_{KERNEL_OF[name]}", act=quantized(x), row_bytes=w.row_bytes, **args)
        else:
            x = with_slack(x)
            chained = rows_with_slack(n_tokens + 8, 256 + widths.PANEL_ROWS)
            call("mul_mat_float:chain_rows", x=x, n=256, chained=chained, count=count(n_tokens))
            call(f"mul_mat_float:mul_mat_{KERNEL_OF[name]}", x=x, chained=chained, **args)
        assert same_bits(np.ascontiguousarray(out), expected)


@pytest.mark.parametrize("name", BLOCK_TYPES + FLOAT_TYPES)
@pytest.mark.parametrize("n_tokens", [1, 5, MANY])
@pytest.mark.parametrize("nth", [2, 3, 5])
def test_threads_change_nothing(name: str, n_tokens: int, nth: int) -> None:
    w, x = weights(name, 300, 256), normal(n_tokens, 256, seed=6)
    assert same_bits(product(w, x, nth=nth), product(w, x))


@pytest.mark.parametrize("name", BLOCK_TYPES)
@pytest.mark.parametrize("n_tokens", [1, 5, widths.FEW_TOKENS, widths.FEW_TOKENS + 1, MANY])
@pytest.mark.parametrize("n_rows", [2 * W, 2 * W + 3])
def test_scratch_suffices(name: str, n_tokens: int, n_rows: int) -> None:
    """What a plan gives a thread is enough for a product and for the fused pair, whose panels lie side by side."""
    n = 2048
    w, x = weights(name, n_rows, n), normal(n_tokens, n, seed=2)
    scratch = guarded(np.full(widths.panel_nbytes(n), 0xA5, np.uint8))
    out = guarded(np.full((n_tokens, n_rows), np.nan, np.float32))
    shared = {"row_bytes": w.row_bytes, "n_rows": n_rows, "n": n, "act": quantized(x), "count": count(n_tokens)}
    shared |= {"scratch": scratch, "scratch_bytes": 0}
    call(f"mul_mat:mul_mat_{KERNEL_OF[name]}", w=w.data, out=out, add=0, **shared)
    assert same_bits(np.ascontiguousarray(out), product(w, x))
    if n_rows == 2 * W:
        call(f"swiglu:swiglu_{KERNEL_OF[name]}", gate=w.data, up=w.data, hidden=out, hidden_act=0, **shared)
        assert np.isfinite(out).all()


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_extreme_blocks(name: str) -> None:
    """Every bit pattern of the integers, largest activations: nothing saturates, sums of integers are exact."""
    kind = GGMLType[name]
    n, n_rows = 512, 12
    block, nbytes = BLOCK_SIZE[name]
    rng = np.random.default_rng(0)
    blocks = rng.choice([0x00, 0xFF, 0x7F, 0x80, 0x88, 0x0F, 0xF0], (n_rows, n // block, nbytes)).astype(np.uint8)
    one, scale_at = np.float16(1).view(np.uint16), slice(-2, None) if name == "Q6_K" else slice(0, 2)
    blocks[..., scale_at] = np.frombuffer(one.tobytes(), np.uint8)
    if name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K"):  # a minimum behind the scale
        blocks[..., 2:4] = np.frombuffer(np.float16(-7).tobytes(), np.uint8)
    w = Weights.__new__(Weights)
    w.kind, w.n_rows, w.n, w.data = kind, n_rows, n, guarded(blocks.reshape(n_rows, -1))
    w.float64 = gguf.quants.dequantize(w.data, gguf.GGMLQuantizationType(kind)).astype(np.float64)
    x = rng.choice([-127.0, 127.0], (MANY, n)).astype(np.float32)
    expected = x.astype(np.float64) @ w.float64.T
    assert np.abs(product(w, x) - expected).max() <= 1e-6 * np.abs(w.float64).max() * 127 * n
    for n_tokens in (1, 3):
        assert same_bits(product(w, x)[:n_tokens], product(w, x[:n_tokens]))


# The feed-forward's fused first half


@pytest.mark.parametrize("name", BLOCK_TYPES)
@pytest.mark.parametrize(("n_rows", "n"), [(64, 256), (96, 768), (160, 256)])
@pytest.mark.parametrize("n_tokens", [1, 2, 4, 9, MANY])
@pytest.mark.parametrize("nth", [1, 3])
def test_swiglu_equals_its_parts(name: str, n_rows: int, n: int, n_tokens: int, nth: int) -> None:
    """hidden = silu(gate x) * (up x), to the bit what the products and the row op give one after the other."""
    gate, up = Weights(name, n_rows, n, seed=1), Weights(name, n_rows, n, seed=2)
    x = normal(n_tokens, n, seed=3)
    expected = np.zeros((n_tokens, n_rows), np.float32)
    call("ops:swiglu", gate=product(gate, x), up=product(up, x), n=n_rows, out=expected, act=0, count=count(n_tokens))
    act = aligned(widths.activation_nbytes(n_rows) * (n_tokens + 16) + 4096)
    hidden = guarded(np.full((n_tokens, n_rows), np.nan, np.float32))
    call(
        f"swiglu:swiglu_{KERNEL_OF[name]}", nth=nth, gate=gate.data, up=up.data, row_bytes=gate.row_bytes,
        n_rows=n_rows,
        n=n, act=quantized(x), hidden=hidden, hidden_act=act if widths.PANEL_ROWS == 32 else 0, count=count(n_tokens),
    )  # fmt: skip
    assert same_bits(np.ascontiguousarray(hidden), expected)
    if widths.PANEL_ROWS == 32:
        assert same_bits(act, quantized(expected))


# BF16 weights by activations rounded to BF16


def product_of_pairs(w: Weights, x: NDArray[np.float32], nth: int = 1) -> NDArray[np.float32]:
    """W x for each row of x, by the kernel for CPUs that multiply BF16 faster; it runs everywhere."""
    pairs = rounded(x, nth)
    n_tokens, n = pairs.shape
    out = guarded(np.full((n_tokens, w.n_rows), np.nan, np.float32))
    call("mul_mat_float:mul_mat_bf16_pairs", nth=nth, w=w.data, n_rows=w.n_rows, n=n, x=pairs,
         chained=chained(pairs, nth), out=out, add=0, count=count(n_tokens))  # fmt: skip
    return out


@pytest.mark.parametrize("n_tokens", [1, 2, 7])
@pytest.mark.parametrize(("n_rows", "n"), PAIR_SHAPES)
def test_pairs_against_float64(n_rows: int, n: int, n_tokens: int) -> None:
    w, x = weights("BF16", n_rows, n), normal(n_tokens, n)
    found = product_of_pairs(w, x)
    assert relative_rms(found, to_bf16(x).astype(np.float64) @ w.float64.T) < MAX_SUM_ERROR


@pytest.mark.parametrize(("n_rows", "n"), PAIR_SHAPES)
def test_pairs_of_a_token_are_the_same_alone_and_by_threads(n_rows: int, n: int) -> None:
    w, x = weights("BF16", n_rows, n), normal(15, n)
    together = product_of_pairs(w, x)
    for t in range(len(x)):
        assert same_bits(product_of_pairs(w, x[t : t + 1])[0], together[t])
    assert same_bits(product_of_pairs(w, x, nth=3), together)


# The feed-forward's fused first half of float weights


@pytest.mark.parametrize("name", [*FLOAT_TYPES, "pairs"])
@pytest.mark.parametrize(("n_rows", "n"), [(2 * W, 32), (6 * W, 96), (14 * W, 544)])
@pytest.mark.parametrize("n_tokens", [1, 2, 5, 19])
@pytest.mark.parametrize("nth", [1, 3])
def test_float_swiglu_equals_its_parts(name: str, n_rows: int, n: int, n_tokens: int, nth: int) -> None:
    """The same for float weights, whose kernel leaves several tokens' rows as they are or chained."""
    kind, multiply = ("BF16", product_of_pairs) if name == "pairs" else (name, product)
    gate, up = Weights(kind, n_rows, n, seed=1), Weights(kind, n_rows, n, seed=2)
    x = normal(n_tokens, n, seed=3)
    expected = np.zeros((n_tokens, n_rows), np.float32)
    call("ops:swiglu", gate=multiply(gate, x), up=multiply(up, x), n=n_rows, out=expected, act=0, count=count(n_tokens))
    x = rounded(x) if name == "pairs" else with_slack(x)
    operand = {"n": x.shape[1], "x": x, "chained": chained(x), "count": count(n_tokens)}

    def run(hidden: NDArray[np.float32], hidden_chained: NDArray[np.float32] | int) -> None:
        kernel_type = "bf16_pairs" if name == "pairs" else KERNEL_OF[name]
        call(
            f"swiglu_float:swiglu_{kernel_type}", nth=nth, gate=gate.data, up=up.data, n_rows=n_rows, **operand,
            hidden=hidden, hidden_chained=hidden_chained,
        )  # fmt: skip

    hidden = guarded(np.full((n_tokens, n_rows), np.nan, np.float32))
    run(hidden, 0)
    assert same_bits(np.ascontiguousarray(hidden), expected)
    if n_tokens > widths.FLOAT_STREAMED_TOKENS:
        n_tile = widths.FLOAT_TILE_TOKENS
        tiles = guarded(np.full((-(-n_tokens // n_tile), W, n_rows // W, n_tile), np.nan, np.float32))
        hidden[:] = 7
        run(hidden, tiles)
        rows = tiles.transpose(0, 3, 2, 1).reshape(-1, n_rows)[:n_tokens]
        assert same_bits(np.ascontiguousarray(rows), expected)
        assert (hidden == 7).all()
