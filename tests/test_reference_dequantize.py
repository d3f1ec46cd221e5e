"""Unpacking of stored blocks: bit for bit what gguf.quants makes of any bytes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from tiny_model import encode

from lfm2cpp.errors import ModelFormatError
from lfm2cpp.ggml import TRAITS, GGMLType
from lfm2cpp.gguf.dequantize import dequantize

TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "Q4_K", "Q5_K", "Q6_K"]


def oracle(data: np.ndarray, ggml_type: GGMLType, shape: tuple[int, ...]) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(data.reshape(shape[0], -1), gguf.GGMLQuantizationType(ggml_type)).reshape(shape)


@pytest.mark.parametrize("name", TYPES)
def test_any_bytes_unpack_as_in_gguf_quants(name):
    """Every bit pattern: scales that are NaN, Inf, negative, subnormal; all nibbles and all high bits."""
    ggml_type, shape = GGMLType[name], (64, 512)
    traits = TRAITS[ggml_type]
    rng = np.random.default_rng(3)
    data = rng.integers(0, 256, shape[0] * shape[1] // traits.block_size * traits.type_size, dtype=np.uint8)
    ours, theirs = dequantize(data, ggml_type, shape), oracle(data, ggml_type, shape)
    assert ours.dtype == np.float32 and ours.shape == shape
    np.testing.assert_array_equal(ours, theirs)  # NaN equals NaN here


@pytest.mark.parametrize("name", TYPES)
def test_encoded_weights_come_back_near(name):
    """Half a step of each type, for values in -1..1."""
    w = np.random.default_rng(4).uniform(-1, 1, (8, 512)).astype(np.float32)
    limit = {
        "F32": 0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 240, "Q4_0": 1 / 7, "Q4_1": 1 / 14, "Q5_0": 1 / 15, "Q5_1": 1 / 30, "IQ4_NL": 1 / 8, "Q4_K": 1 / 11,
        "Q5_K": 1 / 20, "Q6_K": 1 / 30,
    }  # fmt: skip
    back = dequantize(encode(w, GGMLType[name]) if name != "F32" else w, GGMLType[name], w.shape)
    assert np.abs(back - w).max() <= limit[name]


def test_an_unknown_type_is_named():
    with pytest.raises(ModelFormatError, match="Q2_K"):
        dequantize(np.zeros(84, np.uint8), GGMLType.Q2_K, (1, 256))
