"""Attention over paged K and V against float64: every depth around chunks and pages, every head, ragged batches."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_calls import Batch, aligned, call, guarded, normal, relative_rms, same_bits
from numpy.typing import NDArray
from test_kernels_mul_mat import quantized

from lfm2cpp.kernels import widths
from lfm2cpp.kernels.widths import CHUNK_TOKENS, KV_COLUMN_BYTES, PAGE_TOKENS, W, padded_head

F32, F64 = NDArray[np.float32], NDArray[np.float64]
KV_TYPES = list(KV_COLUMN_BYTES)
# float32 arithmetic on what is stored; and what storing costs on normal values.
MAX_ARITHMETIC_ERROR = 1e-6
MAX_STORAGE_ERROR = {"f32": 1e-6, "f16": 5e-4, "q8_0": 2e-2}
MARK = 0xC3  # what memory holds before


class Layer:
    """An attention layer with pages of its own. K and V of every position of every run are known."""

    def __init__(
        self, runs: list[tuple[int, int]], kv_type: str, n_head: int, n_head_kv: int, n_embd_head: int
    ) -> None:
        self.kv_type, self.n_head, self.n_head_kv, self.n_embd_head = kv_type, n_head, n_head_kv, n_embd_head
        self.n_padded = padded_head(n_embd_head)
        self.k_offset = 64
        self.v_offset = self.k_offset + -(-KV_COLUMN_BYTES[kv_type] * n_head_kv * n_embd_head // 64) * 64
        self.page_bytes = self.v_offset + KV_COLUMN_BYTES[kv_type] * n_head_kv * self.n_padded + 64
        self.batch = Batch(runs, self.page_bytes)
        for pages in self.batch.pages:
            for page in pages:
                page[: self.k_offset], page[-64:] = MARK, MARK
        width = n_head_kv * n_embd_head
        self.k = [normal(past + n, width, seed=10 + i) for i, (past, n) in enumerate(runs)]
        self.v = [normal(past + n, width, seed=50 + i) for i, (past, n) in enumerate(runs)]
        self.q = normal(self.batch.n_tokens, n_head * n_embd_head, seed=90)
        for i, (past, _) in enumerate(runs):
            self._store_past(i, past)
        self.store(self.batch, [k[past:] for k, (past, _) in zip(self.k, runs, strict=True)],
                   [v[past:] for v, (past, _) in zip(self.v, runs, strict=True)])  # fmt: skip

    def _store_past(self, i: int, past: int) -> None:
        """What earlier batches would have stored, into the same pages."""
        if past:
            earlier = Batch([(0, past)], self.page_bytes)
            earlier.records[0, 3] = self.batch.addresses[i].ctypes.data
            self.store(earlier, [self.k[i][:past]], [self.v[i][:past]])

    @property
    def shape(self) -> dict[str, int]:
        return {"n_head_kv": self.n_head_kv, "n_embd_head": self.n_embd_head, "n_padded": self.n_padded,
                "k_offset": self.k_offset, "v_offset": self.v_offset}  # fmt: skip

    def store(self, batch: Batch, k: list[F32], v: list[F32], nth: int = 2) -> None:
        k_rows, v_rows = guarded(np.concatenate(k)), guarded(np.concatenate(v))
        call(f"rope:store_kv_{self.kv_type}", nth=nth, k=k_rows, v=v_rows, batch=batch.fields, **self.shape)

    def attend(self, *, split: bool, nth: int = 1, act: NDArray[np.uint8] | int = 0) -> F32:
        """The layer's output by the kernels, one unit a token and chunk (`split`) or one a group of tokens."""
        self.batch.split(split)
        n_chunks = -(-self.batch.deepest // CHUNK_TOKENS)
        shape = (self.n_head_kv, self.n_head // self.n_head_kv, self.n_padded, n_chunks)
        parts = guarded(np.full(widths.parts_nbytes(self.batch.n_tokens, *shape), MARK, np.uint8))
        out = guarded(np.full(self.q.shape, np.nan, np.float32))
        slack = np.zeros((self.batch.n_tokens + 8, self.q.shape[1]), np.float32)
        slack[: self.batch.n_tokens] = self.q
        common = {"n_head": self.n_head, "parts": parts, "out": out, "act": act, "batch": self.batch.fields}
        scale = np.float32(self.n_embd_head**-0.5)
        call(f"attention:attention_{self.kv_type}", nth=nth, q=slack, scale=scale, **common, **self.shape)
        merge = {"n_head_kv": self.n_head_kv, "n_embd_head": self.n_embd_head, "n_padded": self.n_padded}
        call("attention:merge_parts", nth=nth, **common, **merge)
        return out.copy()

    def stored(self, i: int) -> tuple[F64, F64]:
        """K and V of run i as they were stored: (n_keys, n_head_kv, n_embd_head)."""
        past, n = self.batch.runs[i]
        k = [self._unpack(page, self.k_offset, self.n_embd_head, True) for page in self.batch.pages[i]]
        v = [self._unpack(page, self.v_offset, self.n_padded, False) for page in self.batch.pages[i]]
        return np.concatenate(k)[: past + n], np.concatenate(v)[: past + n, :, : self.n_embd_head]

    def _unpack(self, page: NDArray[np.uint8], offset: int, columns: int, transposed: bool) -> F64:
        """(PAGE_TOKENS, n_head_kv, columns) of a page; the layout is kv.py's."""
        heads = []
        nbytes = KV_COLUMN_BYTES[self.kv_type] * columns
        for head in range(self.n_head_kv):
            data = page[offset + head * nbytes :][:nbytes]
            if self.kv_type == "q8_0":
                q, d = data[: columns * PAGE_TOKENS].view(np.int8), data[columns * PAGE_TOKENS :].view(np.float16)
                if transposed:
                    block = q.reshape(columns, PAGE_TOKENS).T * np.repeat(
                        d.reshape(-1, PAGE_TOKENS).T.astype(np.float64), 32, 1
                    )
                else:
                    block = q.reshape(PAGE_TOKENS, columns) * np.repeat(
                        d.reshape(PAGE_TOKENS, -1).astype(np.float64), 32, 1
                    )
            else:
                values = data.view({"f16": np.float16, "f32": np.float32}[self.kv_type]).astype(np.float64)
                block = values.reshape(columns, PAGE_TOKENS).T if transposed else values.reshape(PAGE_TOKENS, columns)
            heads.append(block)
        return np.stack(heads, axis=1)

    def twin(self, exact: bool = False) -> F64:
        """softmax(q k^T / sqrt(d)) v in float64, on K and V as stored, or on the exact ones."""
        rows, first, n_gqa = [], 0, self.n_head // self.n_head_kv
        for i, (past, n) in enumerate(self.batch.runs):
            k, v = self.stored(i)
            if exact:
                k, v = (x.astype(np.float64).reshape(past + n, self.n_head_kv, -1) for x in (self.k[i], self.v[i]))
            k, v = np.repeat(k, n_gqa, axis=1), np.repeat(v, n_gqa, axis=1)
            q = self.q[first : first + n].astype(np.float64).reshape(n, self.n_head, self.n_embd_head)
            scores = np.einsum("qhd,khd->hqk", q, k) * self.n_embd_head**-0.5
            future = np.arange(past + n)[None, :] > (past + np.arange(n))[:, None]
            scores = np.where(future, -np.inf, scores)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            rows.append(np.einsum("hqk,khd->qhd", weights, v).reshape(n, -1))
            first += n
        return np.concatenate(rows)


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("n_embd_head", [32, 64, 96, 128])
def test_storing_keeps_k_and_v(kv_type: str, n_embd_head: int) -> None:
    layer = Layer([(0, 3), (60, 70), (64, 1)], kv_type, 2, 2, n_embd_head)
    for i in range(3):
        for found, exact in zip(layer.stored(i), (layer.k[i], layer.v[i]), strict=True):
            assert relative_rms(found.reshape(exact.shape), exact) < MAX_STORAGE_ERROR[kv_type]
        for page in layer.batch.pages[i]:
            assert (page[: layer.k_offset] == MARK).all() and (page[-64:] == MARK).all(), "nothing beside K and V"


def test_f16_rounds_to_nearest_even() -> None:
    layer = Layer([(0, 64)], "f16", 1, 1, 32)
    assert np.array_equal(layer.stored(0)[0].reshape(64, 32), layer.k[0].astype(np.float16).astype(np.float64))


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("past", [0, 1, 31, 62, 63, 64, 65, 127, 128, 447, 510, 511, 512, 513, 575, 1023, 1024, 1300])
def test_one_token_at_every_kind_of_depth(kv_type: str, past: int) -> None:
    layer = Layer([(past, 1)], kv_type, 4, 2, 64)
    found = layer.attend(split=True)
    assert relative_rms(found, layer.twin()) < MAX_ARITHMETIC_ERROR
    assert relative_rms(found, layer.twin(exact=True)) < MAX_STORAGE_ERROR[kv_type]
    assert same_bits(layer.attend(split=False), found), "decode and prefill do the same arithmetic"


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize(
    "runs", [[(0, 7)], [(0, 64)], [(0, 130)], [(60, 70)], [(500, 30)], [(511, 2)], [(450, 130)], [(1020, 60)]]
)
def test_a_prompt(kv_type: str, runs: list[tuple[int, int]]) -> None:
    layer = Layer(runs, kv_type, 4, 2, 32)
    found = layer.attend(split=False)
    assert relative_rms(found, layer.twin()) < MAX_ARITHMETIC_ERROR
    assert same_bits(layer.attend(split=True), found)
    assert same_bits(layer.attend(split=False, nth=3), found)
    assert same_bits(layer.attend(split=True, nth=3), found)


@pytest.mark.parametrize("kv_type", ["f16", "f32"])
@pytest.mark.parametrize(
    ("n_head", "n_head_kv", "n_embd_head"),
    [(1, 1, 2), (3, 1, 16), (4, 4, 32), (6, 2, 96), (8, 1, 64), (5, 5, 48), (2, 1, 128), (3, 3, 2 * W + 2),
     (4, 2, 256), (12, 2, 32), (40, 1, 32), (21, 7, 32)],
)  # fmt: skip
@pytest.mark.parametrize("split", [False, True])
def test_heads_of_any_shape(kv_type: str, n_head: int, n_head_kv: int, n_embd_head: int, split: bool) -> None:
    layer = Layer([(70, 5), (0, 20)], kv_type, n_head, n_head_kv, n_embd_head)
    found = layer.attend(split=split, nth=2)
    assert relative_rms(found, layer.twin()) < MAX_ARITHMETIC_ERROR
    for nth in (1, 3, 9):  # as many KV heads a unit as there are threads' units for
        assert same_bits(layer.attend(split=split, nth=nth), found)


@pytest.mark.parametrize(("n_head", "n_head_kv", "n_embd_head"), [(3, 1, 32), (6, 2, 96), (8, 1, 64), (2, 1, 128), (12, 6, 64)])
def test_heads_of_q8_0(n_head: int, n_head_kv: int, n_embd_head: int) -> None:
    layer = Layer([(70, 5), (0, 20)], "q8_0", n_head, n_head_kv, n_embd_head)
    assert relative_rms(layer.attend(split=False), layer.twin()) < MAX_ARITHMETIC_ERROR
    assert same_bits(layer.attend(split=True), layer.attend(split=False))


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("split", [False, True])
def test_a_ragged_batch_equals_each_sequence_alone(kv_type: str, split: bool) -> None:
    runs = [(0, 1), (63, 5), (511, 3), (0, 60), (700, 1), (64, 64)]
    together = Layer(runs, kv_type, 4, 2, 64)
    found, first = together.attend(split=split, nth=2), 0
    assert relative_rms(found, together.twin()) < MAX_ARITHMETIC_ERROR
    for i, (past, n) in enumerate(runs):
        alone = Layer([(past, n)], kv_type, 4, 2, 64)
        alone.q = together.q[first : first + n].copy()
        alone.batch.records[0, 3] = together.batch.addresses[i].ctypes.data
        assert same_bits(alone.attend(split=not split), found[first : first + n].copy())
        first += n


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_the_future_is_not_seen(kv_type: str) -> None:
    """K and V of later positions, and what memory holds behind the last, change nothing. A full page is masked too."""
    runs = [(60, 10)]
    layer = Layer(runs, kv_type, 4, 2, 64)
    expected = layer.attend(split=False)
    changed = Layer(runs, kv_type, 4, 2, 64)
    changed.k[0][66:], changed.v[0][66:] = 100, -100
    changed.store(changed.batch, [changed.k[0][60:]], [changed.v[0][60:]])
    for split in (False, True):
        assert same_bits(changed.attend(split=split)[:6].copy(), expected[:6].copy())
    large = normal(PAGE_TOKENS - 6, 2 * 64, seed=7, scale=1000)
    behind = Batch([(70, PAGE_TOKENS - 6)], layer.page_bytes)
    behind.records[0, 3] = layer.batch.addresses[0].ctypes.data
    layer.store(behind, [large], [large])
    for split in (False, True):
        assert same_bits(layer.attend(split=split), expected)


@pytest.mark.parametrize("split", [False, True])
def test_scores_far_apart(split: bool) -> None:
    """One key outweighs all others by e^300 within a chunk and between chunks; nothing overflows."""
    layer = Layer([(600, 4)], "f32", 2, 1, 64)
    layer.k[0][:] = 0
    layer.k[0][17], layer.k[0][560] = 30, -30
    layer.q[:] = 0.5
    layer.q[1] = -0.5
    layer._store_past(0, 600)
    layer.store(layer.batch, [layer.k[0][600:]], [layer.v[0][600:]])
    found = layer.attend(split=split)
    assert np.isfinite(found).all()
    assert relative_rms(found, layer.twin()) < MAX_ARITHMETIC_ERROR
    assert np.allclose(found[0, :64], layer.v[0][17], rtol=1e-5) and np.allclose(
        found[1, :64], layer.v[0][560], rtol=1e-5
    )


@pytest.mark.parametrize("runs", [[(70, 1)], [(70, 1), (3, 1)], [(70, 5)], [(10, 40)]])
@pytest.mark.parametrize("split", [False, True])
def test_heads_of_whole_blocks_are_quantized_along(runs: list[tuple[int, int]], split: bool) -> None:
    if not split and runs == [(70, 1)]:
        pytest.skip("one token is always split")
    layer = Layer(runs, "f16", 4, 2, 64)
    act = aligned(widths.activation_nbytes(256) * (layer.batch.n_tokens + 16) + 4096)
    out = layer.attend(split=split, nth=2, act=act)
    assert same_bits(act, quantized(out))
