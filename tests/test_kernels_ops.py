"""The ops between the products, each against a float64 twin: norms, SwiGLU, sums, embedding rows, convolution."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from kernel_calls import Batch, aligned, call, count, guarded, normal, relative_rms, same_bits
from numpy.typing import NDArray
from test_kernels_mul_mat import BLOCK_TYPES, FLOAT_TYPES, KERNEL_OF, Weights, quantized
from tiny_model import to_bf16

from lfm2cpp.kernels import batch as at
from lfm2cpp.kernels import widths
from lfm2cpp.kernels.widths import PAGE_TOKENS, W

F64 = NDArray[np.float64]
MAX_ROUNDING = 2e-7  # relative RMS of a result that a few float32 operations in a row give
EPS = 1e-5
WIDTHS = [1, 7, 31, 32, 33, 64, 96, 256, 515]


def rms_norm(x: F64, weight: F64, eps: float = EPS) -> F64:
    return weight * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize(("n_tokens", "nth"), [(1, 1), (1, 3), (4, 1), (4, 3)])
def test_rms_norm(n: int, n_tokens: int, nth: int) -> None:
    x, weight = normal(n_tokens, n, scale=3), 1 + normal(n, scale=0.1)
    out = guarded(np.full((n_tokens, n), np.nan, np.float32))
    args = {"x": guarded(x), "weight": guarded(weight), "eps": np.float32(EPS), "n": n, "rows": 0}
    call("ops:rms_norm", nth=nth, out=out, act=0, count=count(n_tokens), **args)
    assert relative_rms(out, rms_norm(x.astype(np.float64), weight)) < MAX_ROUNDING
    for t in range(n_tokens):
        alone = np.zeros((1, n), np.float32)
        call("ops:rms_norm", out=alone, act=0, count=count(1), **{**args, "x": x[t : t + 1].copy()})
        assert same_bits(alone, out[t : t + 1].copy()), "a token's norm does not depend on the others"


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e6, 1e15])
def test_rms_norm_of_small_and_large_rows(scale: float) -> None:
    """eps counts where the row is small; squares stay finite up to rows of 1e18."""
    x, weight, out = normal(2, 256, scale=scale), np.ones(256, np.float32), np.zeros((2, 256), np.float32)
    call("ops:rms_norm", x=x, weight=weight, eps=np.float32(EPS), n=256, out=out, act=0, rows=0, count=count(2))
    expected = rms_norm(x.astype(np.float64), weight)
    assert np.abs(out - expected).max() <= 1e-6 * max(np.abs(expected).max(), 1e-30)


def test_rms_norm_of_wanted_rows() -> None:
    """`rows` picks tokens: logits are computed for some only."""
    x, weight = normal(9, 64), 1 + normal(64, scale=0.1)
    everything, wanted = np.zeros((9, 64), np.float32), np.array([8, 0, 3], np.int32)
    args = {"x": x, "weight": weight, "eps": np.float32(EPS), "n": 64, "act": 0}
    call("ops:rms_norm", out=everything, rows=0, count=count(9), **args)
    out = guarded(np.zeros((3, 64), np.float32))
    call("ops:rms_norm", out=out, rows=wanted, count=count(3), **args)
    assert same_bits(out.copy(), everything[wanted])


@pytest.mark.parametrize("n_tokens", [1, 3, 5])
@pytest.mark.parametrize("nth", [1, 2])
def test_a_row_op_quantizes_what_it_writes(n_tokens: int, nth: int) -> None:
    n = 544
    x, weight = normal(n_tokens, n), 1 + normal(n, scale=0.1)
    out, up = np.zeros((n_tokens, n), np.float32), normal(n_tokens, n, seed=1)
    act = aligned(widths.activation_nbytes(n) * (n_tokens + 16) + 4096)
    norm = {"x": x, "weight": weight, "eps": np.float32(EPS), "n": n, "rows": 0}
    call("ops:rms_norm", nth=nth, out=out, act=act, count=count(n_tokens), **norm)
    assert same_bits(act, quantized(out))
    act[:] = 0
    call("ops:rms_norm", nth=nth, out=0, act=act, count=count(n_tokens), **norm)
    assert same_bits(act, quantized(out))
    act[:] = 0
    call("ops:swiglu", nth=nth, gate=x, up=up, n=n, out=out, act=act, count=count(n_tokens))
    assert same_bits(act, quantized(out))


def silu(x: F64) -> F64:
    return x * (0.5 + 0.5 * np.tanh(0.5 * x))


@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize(("n_tokens", "nth"), [(1, 1), (1, 2), (3, 2)])
def test_swiglu(n: int, n_tokens: int, nth: int) -> None:
    gate, up = normal(n_tokens, n, scale=5), normal(n_tokens, n, seed=1)
    out = guarded(np.full((n_tokens, n), np.nan, np.float32))
    call("ops:swiglu", nth=nth, gate=guarded(gate), up=guarded(up), n=n, out=out, act=0, count=count(n_tokens))
    assert relative_rms(out, silu(gate.astype(np.float64)) * up) < MAX_ROUNDING
    whole = n // W * W  # in a vector or alone, an element is the same
    alone = np.zeros((n_tokens, n), np.float32)
    call("ops:swiglu", gate=np.roll(gate, 1, 1), up=np.roll(up, 1, 1), n=n, out=alone, act=0, count=count(n_tokens))
    assert same_bits(np.roll(alone, -1, 1), out.copy()) or whole == 0


@pytest.mark.parametrize("value", [-1e30, -200.0, -88.5, -87.0, 0.0, 87.0, 88.5, 200.0, 1e30])
def test_silu_far_out(value: float) -> None:
    gate, up, out = (
        np.full((1, W + 1), value, np.float32),
        np.ones((1, W + 1), np.float32),
        np.zeros((1, W + 1), np.float32),
    )
    call("ops:swiglu", gate=gate, up=up, n=W + 1, out=out, act=0, count=count(1))
    expected = value if value > 0 else 0.0
    assert np.allclose(out, expected, rtol=1e-6, atol=1e-30 * max(1.0, abs(value)))


@pytest.mark.parametrize(("n_tokens", "nth"), [(1, 1), (3, 2)])
def test_add(n_tokens: int, nth: int) -> None:
    a, b = normal(n_tokens, 33), normal(n_tokens, 33, seed=1)
    out = guarded(np.zeros((n_tokens, 33), np.float32))
    call("ops:add", nth=nth, a=guarded(a), b=guarded(b), n=33, out=out, count=count(n_tokens))
    assert same_bits(out.copy(), a + b)


# Embedding rows


@pytest.mark.parametrize("name", BLOCK_TYPES + FLOAT_TYPES)
@pytest.mark.parametrize("nth", [1, 3])
def test_get_rows(name: str, nth: int) -> None:
    """Bit for bit what gguf-py makes of the stored bytes."""
    n = {"F32": 33, "F16": 33, "BF16": 33}.get(name, 512)
    w = Weights(name, 20, n)
    tokens = np.array([0, 19, 7, 7, 3], np.int32)
    address = np.array([tokens.ctypes.data], np.int64)
    out = guarded(np.full((5, n), np.nan, np.float32))
    args = {"w": w.data, "row_bytes": w.row_bytes, "n": n, "tokens": address, "out": out, "count": count(5)}
    call(f"get_rows:get_rows_{KERNEL_OF[name]}", nth=nth, **args)
    assert same_bits(out.copy(), w.float64.astype(np.float32)[tokens])


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_get_rows_of_random_bytes(name: str) -> None:
    """Any bit pattern, scales included: what is finite is equal to the bit."""
    kind = gguf.GGMLQuantizationType[name]
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    data = guarded(np.random.default_rng(0).integers(0, 256, (50, 4 * nbytes), np.uint8))
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(data, kind).astype(np.float32)
    tokens, out = np.arange(50, dtype=np.int32), np.zeros((50, 4 * block), np.float32)
    address = np.array([tokens.ctypes.data], np.int64)
    args = {"w": data, "row_bytes": 4 * nbytes, "n": 4 * block, "tokens": address, "out": out, "count": count(50)}
    call(f"get_rows:get_rows_{KERNEL_OF[name]}", **args)
    finite = np.isfinite(expected)
    assert finite.mean() > 0.9 and np.array_equal(np.isnan(out), np.isnan(expected))
    assert np.array_equal(out[finite].view(np.int32), expected[finite].view(np.int32))


# Rotary positions


@pytest.mark.parametrize("n_embd_head", [2, 16, 32, 64, 128])
@pytest.mark.parametrize("nth", [1, 3])
def test_norm_rope(n_embd_head: int, nth: int) -> None:
    n_head, half = 3, n_embd_head // 2
    batch = Batch([(0, 2), (70, 3), (5, 1)], 64)
    x, weight = normal(batch.n_tokens, n_head * n_embd_head), 1 + normal(n_embd_head, scale=0.1)
    angles = np.arange(80)[:, None] * 10000.0 ** (-np.arange(half) / half)
    table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    normed, out = (guarded(np.full(x.shape, np.nan, np.float32)) for _ in range(2))
    call(
        "rope:norm_rope", nth=nth, x=guarded(x), weight=guarded(weight), eps=np.float32(EPS), n_head=n_head,
        n_embd_head=n_embd_head, table=table, normed=normed, out=out, batch=batch.fields,
    )  # fmt: skip
    heads = rms_norm(x.reshape(-1, n_head, n_embd_head).astype(np.float64), weight)
    assert relative_rms(normed, heads.reshape(x.shape)) < MAX_ROUNDING
    cos, sin = np.split(table[batch.positions].astype(np.float64)[:, None, :], 2, axis=-1)
    a, b = np.split(heads, 2, axis=-1)
    expected = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    assert relative_rms(out, expected.reshape(x.shape)) < MAX_ROUNDING


# Short convolution


class Conv:
    """One convolution layer over a batch, by the kernel; `run` gives its outputs, and the states stay in the batch."""

    def __init__(self, n: int, l_cache: int, runs: list[tuple[int, int]], seed: int = 0) -> None:
        self.n, self.l_cache, self.d_conv = n, l_cache, l_cache - 1
        self.offset, self.snapshot = 128, 192  # the layer does not come first
        nbytes = 4 * self.d_conv * n
        self.batch = Batch(runs, self.snapshot + nbytes + 64, self.offset + 4 * widths.KEPT_COLUMNS * n + 64)
        self.weight = normal(l_cache, n, seed=seed + 1)
        self.bcx = normal(self.batch.n_tokens, 3 * n, seed=seed + 2)
        self.states = [normal(self.d_conv, n, seed=seed + 3 + i) for i in range(len(runs))]
        for i, ((past, _), state) in enumerate(zip(runs, self.states, strict=True)):
            self.kept(i)[:] = np.nan
            self.kept(i)[np.arange(past - self.d_conv, past) % widths.KEPT_COLUMNS] = state

    def kept(self, i: int) -> NDArray[np.float32]:
        """The columns that a sequence keeps, each where its position says."""
        return self._columns(self.batch.conv[i], self.offset, widths.KEPT_COLUMNS)

    def snapshot_of(self, i: int, page: int) -> NDArray[np.float32]:
        return self._columns(self.batch.pages[i][page], self.snapshot, self.d_conv)

    def _columns(self, memory: NDArray[np.uint8], offset: int, count: int) -> NDArray[np.float32]:
        return memory[offset:][: 4 * count * self.n].view(np.float32).reshape(count, self.n)

    def run(self, nth: int = 1, act: NDArray[np.uint8] | int = 0) -> dict[str, NDArray[np.float32]]:
        rows = {
            name: guarded(np.full((self.batch.n_tokens, self.n), np.nan, np.float32)) for name in ("bx", "conv", "out")
        }
        call(
            "shortconv:shortconv", nth=nth, bcx=guarded(self.bcx), n=self.n, weight=guarded(self.weight),
            l_cache=self.l_cache,
            state_offset=self.offset, snapshot_offset=self.snapshot, act=act, batch=self.batch.fields, **rows,
        )  # fmt: skip
        return rows

    def twin(self) -> tuple[dict[str, F64], list[F64]]:
        """Rows in float64, and for each run B * X from d_conv columns before its first token on."""
        b, c, x = np.split(self.bcx.astype(np.float64), 3, axis=1)
        bx, conv, pasts, first = b * x, [], [], 0
        for (_, n_tokens), state in zip(self.batch.runs, self.states, strict=True):
            past = np.concatenate([state.astype(np.float64), bx[first : first + n_tokens]])
            conv.append(sum(past[k : k + n_tokens] * self.weight[k] for k in range(self.l_cache)))
            pasts.append(past)
            first += n_tokens
        return {"bx": bx, "conv": np.concatenate(conv), "out": c * np.concatenate(conv)}, pasts


@pytest.mark.parametrize("l_cache", [2, 3, 4, 5, 9])
@pytest.mark.parametrize("n", [1, 7, 32, 64, 96, 100])
@pytest.mark.parametrize("nth", [1, 3])
def test_shortconv(l_cache: int, n: int, nth: int) -> None:
    """Runs shorter and longer than the kernel, with states, over page ends."""
    conv = Conv(n, l_cache, [(0, 5), (60, 10), (62, 1), (63, 1), (0, 1), (100, 130)])
    rows, (expected, pasts) = conv.run(nth), conv.twin()
    for name, twin in expected.items():
        assert relative_rms(rows[name], twin) < MAX_ROUNDING, name
    for i, ((past, n_tokens), columns) in enumerate(zip(conv.batch.runs, pasts, strict=True)):
        end = past + n_tokens
        positions = np.arange(max(past - conv.d_conv, end - widths.KEPT_COLUMNS), end)
        kept = conv.kept(i)[positions % widths.KEPT_COLUMNS]
        assert relative_rms(kept, columns[-len(positions) :]) < MAX_ROUNDING
        assert np.isnan(conv.kept(i)).all(-1).sum() == widths.KEPT_COLUMNS - len(positions)  # no other was written
        for page in range((past + n_tokens) // PAGE_TOKENS):
            end = (page + 1) * PAGE_TOKENS - past  # tokens of this run before the page's end
            if end > 0:
                assert relative_rms(conv.snapshot_of(i, page), columns[end : end + conv.d_conv]) < MAX_ROUNDING


@pytest.mark.parametrize("n", [7, 64])
def test_shortconv_in_pieces(n: int) -> None:
    """A prompt at once, and one token at a time from the state that the one before has left: the same bits."""
    at_once = Conv(n, 3, [(60, 9)])
    expected = at_once.run()["out"]
    kept = Conv(n, 3, [(60, 9)]).kept(0)
    for t in range(9):
        one = Conv(n, 3, [(60 + t, 1)])
        one.weight, one.bcx = at_once.weight, at_once.bcx[t : t + 1].copy()
        one.kept(0)[:] = kept
        assert same_bits(one.run()["out"].copy(), expected[t : t + 1].copy())
        kept = one.kept(0).copy()
        if t == 3:
            assert same_bits(one.snapshot_of(0, 0).copy(), at_once.snapshot_of(0, 0).copy())
    assert same_bits(kept, at_once.kept(0).copy())


@pytest.mark.parametrize("runs", [[(3, 1)], [(3, 1), (60, 1)], [(3, 4), (60, 7)]])
@pytest.mark.parametrize("nth", [1, 2])
def test_shortconv_quantizes_its_rows(runs: list[tuple[int, int]], nth: int) -> None:
    conv = Conv(96, 3, runs)
    act = aligned(widths.activation_nbytes(96) * (conv.batch.n_tokens + 16) + 4096)
    out = conv.run(nth, act)["out"]
    assert same_bits(act, quantized(out.copy()))


def test_shortconv_without_traces() -> None:
    """bx = 0 leaves B * X and the convolution out; nothing else changes."""
    conv, other = Conv(33, 3, [(0, 4)]), Conv(33, 3, [(0, 4)])
    expected, out = conv.run()["out"], np.zeros((4, 33), np.float32)
    call(
        "shortconv:shortconv", bcx=other.bcx, n=33, weight=other.weight, l_cache=3, state_offset=other.offset,
        snapshot_offset=other.snapshot, bx=0, conv=0, out=out, act=0, batch=other.batch.fields,
    )  # fmt: skip
    assert same_bits(out, expected.copy())


def test_constants_of_the_batch() -> None:
    """Fields must not overlap: kernels and the engine share only their numbers."""
    names = [n for n in vars(at) if n.isupper() and n not in ("FIELDS", "RUN_FIELDS")]
    plain = [getattr(at, n) for n in names if n == "RUN_OF" or not n.startswith("RUN_")]
    of_runs = [getattr(at, n) for n in names if n.startswith("RUN_") and n != "RUN_OF"]
    assert len(set(plain)) == len(plain) and max(plain) < at.FIELDS
    assert len(set(of_runs)) == len(of_runs) and max(of_runs) < at.RUN_FIELDS
    assert np.array_equal(to_bf16(np.float32([1.0])), [1.0])
