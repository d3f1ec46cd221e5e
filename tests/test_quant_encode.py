"""The row encoders: equal to gguf.quants where that is right, to plain twins for K-quants, and lawful everywhere."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from quant_model import N_KINDS, bell, hard_row, uniform
from quant_reference import quantize_iq4_nl, quantize_legacy, quantize_q4_K, quantize_q5_K, quantize_q6_K

from lfm2cpp.ggml import TRAITS, GGMLType, row_nbytes
from quant import encode
from quant.encode import ENCODABLE, KERNELS, EncodingError, decode_rows, encode_rows

K_TWINS = {GGMLType.Q4_K: quantize_q4_K, GGMLType.Q5_K: quantize_q5_K, GGMLType.Q6_K: quantize_q6_K}
TWINS = {GGMLType.IQ4_NL: quantize_iq4_nl, **K_TWINS}
WEIGHTED_TWINS = TWINS | {
    GGMLType.Q4_0: partial(quantize_legacy, bits=4, affine=False), GGMLType.Q4_1: partial(quantize_legacy, bits=4, affine=True),
    GGMLType.Q5_0: partial(quantize_legacy, bits=5, affine=False), GGMLType.Q5_1: partial(quantize_legacy, bits=5, affine=True),
}  # fmt: skip
LEGACY = [t for t in KERNELS if t not in TWINS]
SUB_BLOCKS = [GGMLType.Q4_K, GGMLType.Q5_K]
AFFINE = [GGMLType.Q4_1, GGMLType.Q5_1, *SUB_BLOCKS]
# What one level spans at most, as a share of the block's largest magnitude (affine types: of max - min).
LEVEL = {
    "Q8_0": 1 / 127, "Q4_0": 1 / 8, "Q5_0": 1 / 16, "Q4_1": 1 / 15, "Q5_1": 1 / 31, "Q4_K": 1 / 13, "Q5_K": 1 / 29,
    "Q6_K": 1 / 29, "IQ4_NL": 24 / 113,
}  # fmt: skip
# Levels times scales: how often the scale of the block, a half with an error of up to 2^-25, is taken at most.
MULTIPLES = {
    "Q8_0": 127, "Q4_0": 8, "Q5_0": 16, "Q4_1": 16, "Q5_1": 32, "Q4_K": 16 * 63, "Q5_K": 32 * 63, "Q6_K": 32 * 128, "IQ4_NL": 127,
}  # fmt: skip


def oracle(rows: np.ndarray, ggml_type: GGMLType) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.quantize(rows, gguf.GGMLQuantizationType(ggml_type)).view(np.uint8)


def hard_rows(n_per_row: int = 256, repeats: int = 8) -> np.ndarray:
    return np.stack([hard_row(kind, n_per_row, 1000 * r + kind) for r in range(repeats) for kind in range(N_KINDS)])


# Blocks with structure that a search meets: few distinct values, ties, scales from subnormal to 1e4.
elements = st.one_of(
    st.floats(-4, 4, width=32),
    st.integers(-16, 16).map(lambda n: n / 8),
    st.sampled_from([0.0, -0.0, 1e-8, -1e-8, 1e4, -1e4, 1.0, -1.0, 2.0**-14, 6e-8, 1e-40]),
)


@st.composite
def blocks(draw, n: int = 256):
    """One row of n elements, in groups of 16 that are of one power of two each."""
    pool = draw(hnp.arrays(np.float32, (16,), elements=elements.map(np.float32)))
    pick = draw(hnp.arrays(np.uint8, (n,), elements=st.integers(0, 15)))
    exponents = draw(hnp.arrays(np.int32, (n // 16,), elements=st.integers(-24, 0)))
    return np.ldexp(pool[pick], np.repeat(exponents, 16)).astype(np.float32)[None]


def oracle_knows(rows: np.ndarray) -> np.ndarray:
    """The rows less what gguf.quants gets wrong: the sign of zeros, and scales whose inverse overflows."""
    largest = np.repeat(np.abs(rows.reshape(-1, 32)).max(-1), 32).reshape(rows.shape)
    return np.where((largest > 0) & (largest < 1e-30), np.float32(0.25), rows + np.float32(0))


@pytest.mark.parametrize("ggml_type", LEGACY, ids=lambda t: t.name)
def test_hard_rows_equal_gguf_quants(ggml_type):
    rows = oracle_knows(hard_rows())
    np.testing.assert_array_equal(encode_rows(rows, ggml_type), oracle(rows, ggml_type))


@pytest.mark.parametrize("ggml_type", LEGACY, ids=lambda t: t.name)
@settings(max_examples=150, deadline=None)
@given(row=blocks())
def test_any_block_equals_gguf_quants(ggml_type, row):
    row = oracle_knows(row)
    np.testing.assert_array_equal(encode_rows(row, ggml_type), oracle(row, ggml_type))


@pytest.mark.parametrize(("name", "values", "head"), [
    ("Q8_0", [0.0], "0000 00"), ("Q8_0", [-0.0], "0000 00"),
    ("Q4_0", [0.0], "0080 88"), ("Q4_0", [-0.0], "0080 88"), ("Q5_0", [-0.0, 0.0], "0080 ffffffff 00"),
    ("Q4_1", [0.0, -0.0], "0000 0000 00"), ("Q4_1", [-0.0, 0.0], "0000 0080 00"),
    ("Q5_1", [-0.0, 0.0, 1.0], "2128 0080"), ("Q5_1", [0.0, -0.0, 1.0], "2128 0000"),
    ("Q8_0", [1e-40], "0000 00"), ("Q4_0", [1e-40], "0080 00"), ("Q4_0", [-1e-40], "0000 00"),
    ("Q5_0", [1e-40], "0080 00000000 00"), ("Q4_1", [0, 1e-40], "0000 0000 00"),
])  # fmt: skip
def test_zeros_and_overflowing_inverses_as_in_llama_cpp(name, values, head):
    """First bytes of a block whose values repeat; gguf.quants has others for most of these."""
    row = np.resize(np.array(values, np.float32), (1, 32))
    expected = bytes.fromhex(head)
    assert encode_rows(row, GGMLType[name]).tobytes()[: len(expected)] == expected


@pytest.mark.parametrize("ggml_type", TWINS, ids=lambda t: t.name)
@settings(max_examples=60, deadline=None)
@given(row=blocks())
def test_any_block_equals_the_plain_twin(ggml_type, row):
    with np.errstate(all="ignore"):
        expected = TWINS[ggml_type](row[0])
    assert encode_rows(row, ggml_type).tobytes() == expected


@pytest.mark.parametrize("ggml_type", TWINS, ids=lambda t: t.name)
def test_hard_rows_equal_the_plain_twin(ggml_type):
    rows = hard_rows(repeats=2)
    with np.errstate(all="ignore"):
        expected = b"".join(TWINS[ggml_type](row) for row in rows)
    assert encode_rows(rows, ggml_type).tobytes() == expected


@pytest.mark.parametrize(("largest", "counts_for", "block"), [
    (1.0, 0.0, "0000 8888888888888888"), (1.0, 1e-38, "0000 8f88888888888888"), (1e-6, 1e-34, "0000 ffffffffffffffff"),
])  # fmt: skip
def test_a_scale_with_an_infinite_inverse_as_in_llama_cpp(largest, counts_for, block):
    """Of IQ4_NL: one element among zeros that count for more than it does leaves a scale too small to divide by."""
    row, qw = np.zeros((1, 32), np.float32), np.ones(32, np.float32)
    row[0, 0], qw[0] = largest, counts_for
    expected = bytes.fromhex(block)
    assert encode_rows(row, GGMLType.IQ4_NL, importance=qw).tobytes()[: len(expected)] == expected


counts = st.sampled_from([0.0, 1e-6, 0.25, 1.0, 3.0, 1e3, 1e9])
# Of every column, or of one in many: a sub-block then has one that counts for everything.
importances = st.one_of(
    hnp.arrays(np.float32, (256,), elements=counts.map(np.float32)),
    hnp.arrays(np.float32, (256,), elements=counts.map(np.float32), fill=st.just(np.float32(0))),
)


@pytest.mark.parametrize("ggml_type", WEIGHTED_TWINS, ids=lambda t: t.name)
@settings(max_examples=40, deadline=None)
@given(row=blocks(), qw=importances)
def test_any_block_by_importance_equals_the_plain_twin(ggml_type, row, qw):
    with np.errstate(all="ignore"):
        expected = WEIGHTED_TWINS[ggml_type](row[0], qw)
    assert encode_rows(row, ggml_type, importance=qw).tobytes() == expected


@pytest.mark.parametrize("n", [256, 768, 1280])
@pytest.mark.parametrize("ggml_type", WEIGHTED_TWINS, ids=lambda t: t.name)
def test_hard_rows_by_importance_equal_the_plain_twin(ggml_type, n):
    """Of as many blocks as fill the lanes of a search, of fewer and of more."""
    rows, qw, twin = hard_rows(n, 1), np.abs(bell(n, 5)), WEIGHTED_TWINS[ggml_type]
    with np.errstate(all="ignore"):
        if ggml_type in K_TWINS:
            expected = [twin(row[i : i + 256], qw[i : i + 256]) for row in rows for i in range(0, n, 256)]
        else:
            expected = [twin(row, qw) for row in rows]
    assert encode_rows(rows, ggml_type, importance=qw).tobytes() == b"".join(expected)


def test_importance_does_not_change_what_is_not_searched():
    rows, qw = np.clip(hard_rows(256, 1), -6e4, 6e4), np.abs(bell(256, 5))
    for ggml_type in ("F32", "F16", "BF16", "Q8_0"):
        t = GGMLType[ggml_type]
        np.testing.assert_array_equal(encode_rows(rows, t, importance=qw), encode_rows(rows, t))


@pytest.mark.parametrize("ggml_type", WEIGHTED_TWINS, ids=lambda t: t.name)
def test_importance_lowers_the_weighted_error(ggml_type):
    """What it is for: errors in columns that matter become smaller."""
    rows, qw = uniform(64 * 512, 3).reshape(64, 512), np.exp(3 * bell(512, 9))

    def error(importance):
        back = decode_rows(encode_rows(rows, ggml_type, importance=importance), ggml_type, 512)
        return float((qw * (back - rows).astype(np.float64) ** 2).sum())

    assert error(qw) < 0.9 * error(None)


@pytest.mark.parametrize("ggml_type", WEIGHTED_TWINS, ids=lambda t: t.name)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_refused_by_importance(ggml_type, value):
    rows = hard_rows(1280, 1)[:3]
    rows[2, 700] = value
    reason = f"holds {value}, expected finite" if not np.isfinite(value) else "which is too large"
    with pytest.raises(EncodingError, match=f"w, row 12, .*{reason}"):
        encode_rows(rows, ggml_type, name="w", first_row=10, importance=np.ones(1280, np.float32))


@pytest.mark.parametrize("n_blocks", [1, 2, 3, 5])
@pytest.mark.parametrize("ggml_type", TWINS, ids=lambda t: t.name)
def test_any_number_of_blocks(ggml_type, n_blocks):
    """Two at a time where lanes are the sub-blocks of two."""
    row = hard_rows(1280, 1)[:, : 256 * n_blocks]
    blocks = encode_rows(row.reshape(-1, 256), ggml_type)
    assert encode_rows(np.ascontiguousarray(row), ggml_type).tobytes() == blocks.tobytes()


@pytest.mark.parametrize("ggml_type", KERNELS, ids=lambda t: t.name)
@settings(max_examples=60, deadline=None)
@given(row=blocks())
def test_error_is_bounded(ggml_type, row):
    """Half a level, and what rounding the scales adds."""
    size, name = 16 if ggml_type == GGMLType.Q6_K else 32, ggml_type.name
    groups = row.reshape(-1, size)
    largest = np.abs(groups).max(-1)
    lowest = np.minimum(groups.min(-1), 0) if ggml_type in SUB_BLOCKS else groups.min(-1)
    spread = groups.max(-1) - lowest if ggml_type in AFFINE else largest
    limit = LEVEL[name] * spread + MULTIPLES[name] * 2.0**-25 + largest * 2.0**-10
    if ggml_type == GGMLType.Q6_K:  # a sub-block's scale is one of 128 fractions of the largest
        limit += np.abs(row).max() / 200
    if ggml_type in SUB_BLOCKS:  # scales and minima are one of 64 fractions of the largest, of up to 2 max and max
        limit += 3 * np.abs(row).max() / 126
    back = decode_rows(encode_rows(row, ggml_type), ggml_type, row.shape[1])
    assert (np.abs(back.reshape(-1, size) - groups).max(-1) <= limit).all()


@pytest.mark.parametrize("ggml_type", ENCODABLE, ids=lambda t: t.name)
def test_decoding_equals_gguf_quants(ggml_type):
    rows = hard_rows(512, 4)
    rows = np.clip(rows, -6e4, 6e4)
    stored = encode_rows(rows, ggml_type)
    assert stored.shape == (len(rows), row_nbytes(ggml_type, 512)) and stored.dtype == np.uint8
    expected = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType(ggml_type)).reshape(rows.shape)
    np.testing.assert_array_equal(decode_rows(stored, ggml_type, 512), expected)


def test_float_types_round_to_nearest_even():
    words = np.concatenate([np.arange(0, 2**32, 104729, dtype=np.uint64), 0x3F800000 + np.arange(2**17)])
    x = words.astype(np.uint32).view(np.float32)
    x = x[np.isfinite(x)]
    rows = x[: x.size // 64 * 64].reshape(-1, 64)
    assert encode_rows(rows, GGMLType.F32).tobytes() == rows.tobytes()
    fits = np.abs(rows).max(-1) < 3.38e38
    assert encode_rows(rows[fits], GGMLType.BF16).tobytes() == oracle(rows[fits], GGMLType.BF16).tobytes()
    small = rows[np.abs(rows).max(-1) < 65504]
    with np.errstate(under="ignore"):
        assert encode_rows(small, GGMLType.F16).tobytes() == small.astype(np.float16).tobytes()


@pytest.mark.parametrize("ggml_type", ENCODABLE, ids=lambda t: t.name)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [0, 31, 700, 767])
def test_nonfinite_is_found(ggml_type, value, column):
    rows = np.ones((5, 768), np.float32)
    rows[3, column] = value
    with pytest.raises(EncodingError, match=f"blk.0.x, row 13, holds {value}"):
        encode_rows(rows, ggml_type, name="blk.0.x", first_row=10)


@pytest.mark.parametrize(("name", "value"), [
    ("Q8_0", 65520 * 127), ("Q4_0", 65520 * 8), ("Q5_0", 65520 * 16), ("Q4_1", -65520), ("Q5_1", 65520 * 31),
    ("Q4_K", 65520 * 15 * 63 * 1.1), ("Q4_K", -65520 * 63), ("Q5_K", 65520 * 31 * 63 * 1.1), ("Q5_K", -65520 * 63),
    ("Q6_K", 65520 * 32 * 128 * 1.1), ("F16", 65520), ("BF16", 3.4e38),
])  # fmt: skip
def test_largest_value_that_fits(name, value):
    """65520 is where a half becomes infinite."""
    rows = np.zeros((2, 256), np.float32)
    rows[1, 77] = value
    with pytest.raises(EncodingError, match=f"row 1, holds .* too large for {name}"):
        encode_rows(rows, GGMLType[name])
    rows[1, 77] = value * 0.8
    encode_rows(rows, GGMLType[name])


def test_threads_and_slabs_do_not_change_the_bytes(monkeypatch):
    rows = hard_rows(512, 4)
    for ggml_type in ENCODABLE:
        expected = encode_rows(rows, ggml_type) if ggml_type != GGMLType.F16 else encode_rows(rows / 2, ggml_type)
        for n_threads, slab in ((2, 512), (3, 5000), (8, 1)):
            monkeypatch.setattr(encode, "SLAB_ELEMENTS", slab)
            found = encode_rows(rows if ggml_type != GGMLType.F16 else rows / 2, ggml_type, n_threads)
            np.testing.assert_array_equal(found, expected)


def test_the_first_bad_row_is_named_whatever_the_threads(monkeypatch):
    monkeypatch.setattr(encode, "SLAB_ELEMENTS", 64)
    rows = np.ones((500, 32), np.float32)
    rows[[123, 400], 5] = np.nan
    with pytest.raises(EncodingError, match="row 123,"):
        encode_rows(rows, GGMLType.Q8_0, 4)


def test_rows_need_not_be_contiguous_or_aligned():
    rows = hard_rows(256, 1)
    expected = encode_rows(rows, GGMLType.Q6_K)
    np.testing.assert_array_equal(encode_rows(np.asfortranarray(rows), GGMLType.Q6_K), expected)
    shifted = np.frombuffer(b"x" + rows.tobytes(), np.uint8)[1:].view(np.float32).reshape(rows.shape)
    assert shifted.ctypes.data % 4
    np.testing.assert_array_equal(encode_rows(shifted, GGMLType.Q6_K), expected)


def digest() -> str:
    """Of the bytes of all encoders, without and with importances"""
    rows, qw = hard_rows(), np.abs(bell(256, 5))
    encoded = [encode_rows(rows, t, importance=importance) for t in KERNELS for importance in (None, qw)]
    return hashlib.sha256(b"".join(found.tobytes() for found in encoded)).hexdigest()


@pytest.mark.skipif(not sys.platform.startswith("linux") or os.uname().machine != "x86_64", reason="names x86 CPUs")
def test_bytes_do_not_depend_on_the_instruction_set(tmp_path):
    """A CPU without FMA, AVX or conversions of halves gives the same bytes as this one."""
    root = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}", "LFM2CPP_CACHE_DIR": str(tmp_path)}
    env |= {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""}
    done = subprocess.run([sys.executable, "-c", "from test_quant_encode import digest; print(digest())"], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest()


def test_traits_agree_with_the_kernels_strides():
    """A kernel that wrote past its blocks, or between them, would show in what surrounds them."""
    for ggml_type in KERNELS:
        out = np.full((3, row_nbytes(ggml_type, 256)), 0xAA, np.uint8)
        encode.load_kernels([encode.kernel_name(ggml_type)])
        encode.encode_into(np.full((1, 256), 0.5, np.float32), ggml_type, out[1:2], "x", 0)
        assert (out[[0, 2]] == 0xAA).all()
        assert out[1].tobytes() == encode_rows(np.full((1, 256), 0.5, np.float32), ggml_type).tobytes()
        assert out.shape[1] == 256 // TRAITS[ggml_type].block_size * TRAITS[ggml_type].type_size
