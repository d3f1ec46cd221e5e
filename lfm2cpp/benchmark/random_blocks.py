"""Bytes of random weights in every type that runs: blocks drawn as they are stored, not encoded.

Every weight has mean zero and about the standard deviation that is asked for, so that activations and logits stay
finite. Scales get random signs and mantissas and one exponent, so no bit pattern is NaN or infinite.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from lfm2cpp.ggml import (
    IQ4_NL_VALUES,
    QK_K,
    TRAITS,
    GGMLType,
    block_iq4_nl,
    block_q4_0,
    block_q4_1,
    block_q4_K,
    block_q5_0,
    block_q5_1,
    block_q5_K,
    block_q6_K,
    block_q8_0,
)

U8 = NDArray[np.uint8]
SLAB_BYTES = 16 << 20
# Root mean square of a mantissa 1.0 to 2.0: what a float of exponent 0 and random other bits has.
MANTISSA_RMS = math.sqrt(7 / 3)


def random_chunks(name: str, ggml_type: GGMLType, n_elements: int, std: float, seed: int) -> Iterator[U8]:
    """The bytes of a tensor, a slab at a time. They depend on its name, its type, its size and the seed only."""
    bits = np.random.SFC64([seed, zlib.crc32(name.encode())])
    traits = TRAITS[ggml_type]
    left = n_elements // traits.block_size
    step = SLAB_BYTES // traits.type_size
    while left:
        n = min(step, left)
        yield _MAKERS[ggml_type](bits, n, std).view(np.uint8).reshape(-1)
        left -= n


def random_bytes(bits: np.random.SFC64, nbytes: int) -> U8:
    return np.asarray(bits.random_raw(-(-nbytes // 8)), np.uint64).view(np.uint8)[:nbytes]


def _floats(word: type, exponent_bits: int, mantissa_bits: int) -> Callable[[np.random.SFC64, int, float], np.ndarray]:
    """A maker of floats of this layout: random sign and mantissa, the exponent that fits std best."""
    bias = 2 ** (exponent_bits - 1) - 1
    keep = word((1 << (exponent_bits + mantissa_bits)) | ((1 << mantissa_bits) - 1))

    def make(bits: np.random.SFC64, n: int, std: float) -> np.ndarray:
        exponent = max(1, min(2 * bias, round(math.log2(std / MANTISSA_RMS)) + bias))
        values = random_bytes(bits, n * np.dtype(word).itemsize).view(word)
        return (values & keep) | word(exponent << mantissa_bits)

    return make


_f32 = _floats(np.uint32, 8, 23)
_f16 = _floats(np.uint16, 5, 10)
_bf16 = _floats(np.uint16, 8, 7)


def _scales(bits: np.random.SFC64, n: int, std: float) -> np.ndarray:
    return _f32(bits, n, std).view(np.float32).astype(np.float16)  # of Q6_K they are subnormal


def _uniform_std(n_levels: int) -> float:
    """Of n_levels consecutive integers."""
    return math.sqrt((n_levels**2 - 1) / 12)


def _q4_0(bits: np.random.SFC64, n: int, std: float) -> np.ndarray:
    blocks = np.empty(n, block_q4_0)
    blocks["qs"] = random_bytes(bits, n * 16).reshape(n, 16)
    blocks["d"] = _scales(bits, n, std / _uniform_std(16))
    return blocks


def _iq4_nl(bits: np.random.SFC64, n: int, std: float) -> np.ndarray:
    blocks = np.empty(n, block_iq4_nl)
    blocks["qs"] = random_bytes(bits, n * 16).reshape(n, 16)
    blocks["d"] = _scales(bits, n, std / float(np.std(IQ4_NL_VALUES)))
    return blocks


def _q4_1(bits: np.random.SFC64, n: int, std: float) -> np.ndarray:
    blocks = np.empty(n, block_q4_1)
    blocks["qs"] = random_bytes(bits, n * 16).reshape(n, 16)
    blocks["d"] = np.abs(_scales(bits, n, std / _uniform_std(16)))
    blocks["m"] = blocks["d"] * np.float16(-7.5)
    return blocks


def _q5_0(bits: np.random.SFC64, n: int, std: float) -> np.ndarray:
    blocks = np.empty(n, block_q5_0)
    blocks["qs"], blocks["qh"] = random_bytes(bits, n * 16).reshape(n, 16), random_bytes(bits, n * 4).view(np.uint32)
    blocks["d"] = _scales(bits, n, std / _uniform_std(32))
    return blocks


def _q5_1(bits: np.random.SFC64, n: int, std: float) -> np.ndarray:
    blocks = np.empty(n, block_q5_1)
    blocks["qs"], blocks["qh"] = random_bytes(bits, n * 16).reshape(n, 16), random_bytes(bits, n * 4).view(np.uint32)
    blocks["d"] = np.abs(_scales(bits, n, std / _uniform_std(32)))
    blocks["m"] = blocks["d"] * np.float16(-15.5)
    return blocks


def _q8_0(bits: np.random.SFC64, n: int, std: float) -> np.ndarray:
    blocks = np.empty(n, block_q8_0)
    quants = random_bytes(bits, n * 32).view(np.int8).reshape(n, 32)
    blocks["qs"] = np.maximum(quants, -127)  # encoders never write -128
    blocks["d"] = _scales(bits, n, std / _uniform_std(255))
    return blocks


def _q4_K(bits: np.random.SFC64, n: int, std: float) -> np.ndarray:
    blocks = np.empty(n, block_q4_K)
    _fill_sub_blocks(blocks, bits, std, 16)
    return blocks


def _q5_K(bits: np.random.SFC64, n: int, std: float) -> np.ndarray:
    blocks = np.empty(n, block_q5_K)
    blocks["qh"] = random_bytes(bits, n * QK_K // 8).reshape(n, -1)
    _fill_sub_blocks(blocks, bits, std, 32)
    return blocks


def _fill_sub_blocks(blocks: np.ndarray, bits: np.random.SFC64, std: float, n_levels: int) -> None:
    """Scales 32..63, and minima that are equal to them: dmin is what makes the mean zero."""
    n = len(blocks)
    blocks["qs"] = random_bytes(bits, n * QK_K // 2).reshape(n, -1)
    scales = random_bytes(bits, n * 8).reshape(n, 8) & 31 | 32
    first = scales[:, :4] | scales[:, 4:] >> 4 << 6
    blocks["scales"] = np.concatenate([first, first, (scales[:, 4:] & 15) * 17], axis=1)
    blocks["d"] = np.abs(_scales(bits, n, std / (_uniform_std(n_levels) * 48.4)))  # 48.4: their root mean square
    blocks["dmin"] = blocks["d"] * np.float16((n_levels - 1) / 2)


def _q6_K(bits: np.random.SFC64, n: int, std: float) -> np.ndarray:
    blocks = np.empty(n, block_q6_K)
    blocks["ql"] = random_bytes(bits, n * QK_K // 2).reshape(n, -1)
    blocks["qh"] = random_bytes(bits, n * QK_K // 4).reshape(n, -1)
    magnitude = random_bytes(bits, n * QK_K // 16).reshape(n, -1)  # 64..127 with either sign
    blocks["scales"] = ((magnitude & 63) + 64).astype(np.int8) * np.where(magnitude & 64, 1, -1).astype(np.int8)
    blocks["d"] = _scales(bits, n, std / (_uniform_std(64) * 97))
    return blocks


_MAKERS: dict[GGMLType, Callable[[np.random.SFC64, int, float], np.ndarray]] = {
    GGMLType.F32: _f32,
    GGMLType.F16: _f16,
    GGMLType.BF16: _bf16,
    GGMLType.Q4_0: _q4_0,
    GGMLType.Q4_1: _q4_1,
    GGMLType.IQ4_NL: _iq4_nl,
    GGMLType.Q5_0: _q5_0,
    GGMLType.Q5_1: _q5_1,
    GGMLType.Q8_0: _q8_0,
    GGMLType.Q4_K: _q4_K,
    GGMLType.Q5_K: _q5_K,
    GGMLType.Q6_K: _q6_K,
}
RANDOM_TYPES = tuple(_MAKERS)
