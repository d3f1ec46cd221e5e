"""Stored blocks -> float32, in plain NumPy: what each type means, one small function a type.

For reading, tests and parity; the runtime never unpacks a weight this way. Every product is rounded to float32 in
the order in which ggml does it, so the values are the ones of llama.cpp and of `gguf.quants`, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lfm2cpp.errors import ModelFormatError
from lfm2cpp.ggml import IQ4_NL_VALUES, QK_K, TRAITS, GGMLType

F32 = NDArray[np.float32]


def dequantize(data: NDArray[np.uint8], ggml_type: GGMLType, shape: tuple[int, ...]) -> F32:
    """The bytes of whole blocks -> float32 array of `shape`. Raises ModelFormatError for a type not known here."""
    if ggml_type not in _DEQUANTIZE:
        known = " ".join(t.name for t in _DEQUANTIZE)
        raise ModelFormatError(f"tensor type {ggml_type.name} cannot be unpacked; known are {known}")
    blocks = np.frombuffer(data, TRAITS[ggml_type].dtype)
    with np.errstate(all="ignore"):  # a file may hold NaN and Inf; they are values like any other here
        return _DEQUANTIZE[ggml_type](blocks).reshape(shape)


def dequantize_f32(x: NDArray) -> F32:
    return x.astype(np.float32)


def dequantize_f16(x: NDArray) -> F32:
    return x.astype(np.float32)


def dequantize_bf16(x: NDArray) -> F32:
    """BF16 is the upper half of a float32."""
    return (x.astype(np.uint32) << 16).view(np.float32)


def dequantize_q8_0(blocks: NDArray) -> F32:
    """x = d * q, q in -128..127; 32 elements share d"""
    return _scale(blocks["d"]) * blocks["qs"].astype(np.float32)


def dequantize_q4_0(blocks: NDArray) -> F32:
    """x = d * (q - 8), q in 0..15; 32 elements share d"""
    return _scale(blocks["d"]) * (_nibbles(blocks["qs"]) - np.float32(8))


def dequantize_q4_1(blocks: NDArray) -> F32:
    """x = d * q + m, q in 0..15; 32 elements share d and m"""
    return _scale(blocks["d"]) * _nibbles(blocks["qs"]) + _scale(blocks["m"])


def dequantize_q5_0(blocks: NDArray) -> F32:
    """x = d * (q - 16), q in 0..31; 32 elements share d"""
    return _scale(blocks["d"]) * (_nibbles(blocks["qs"]) + _fifth_bits(blocks["qh"]) - np.float32(16))


def dequantize_q5_1(blocks: NDArray) -> F32:
    """x = d * q + m, q in 0..31; 32 elements share d and m"""
    return _scale(blocks["d"]) * (_nibbles(blocks["qs"]) + _fifth_bits(blocks["qh"])) + _scale(blocks["m"])


def dequantize_iq4_nl(blocks: NDArray) -> F32:
    """x = d * IQ4_NL_VALUES[q]; 32 elements share d"""
    values = np.array(IQ4_NL_VALUES, np.float32)[_nibbles(blocks["qs"]).astype(np.intp)]
    return _scale(blocks["d"]) * values


def dequantize_q4_K(blocks: NDArray) -> F32:
    """x = (d * scale) * q - dmin * min, q in 0..15; 256 elements share d and dmin, 32 a scale and a min"""
    return _scale_sub_blocks(blocks, _nibbles_of_64(blocks["qs"]))


def dequantize_q5_K(blocks: NDArray) -> F32:
    """The same with q in 0..31: bit j of byte i of qh is the fifth of element i of sub-block j."""
    high = blocks["qh"][:, None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1    # (nb, 8, 32)
    return _scale_sub_blocks(blocks, _nibbles_of_64(blocks["qs"]) | high << 4)


def dequantize_q6_K(blocks: NDArray) -> F32:
    """x = (d * scale) * (q - 32), q in 0..63; 256 elements share d, 16 share a scale.

    The 256 elements are two halves of four quarters of 32. Low bits: 64 bytes a half, whose low nibbles are
    quarters 0 1 and whose high nibbles are quarters 2 3. High bits: 32 bytes a half, two bits for each quarter.
    """
    nb = len(blocks)
    ql = blocks["ql"].reshape(nb, 2, 2, 32)
    qh = blocks["qh"].reshape(nb, 2, 1, 32)
    low = np.concatenate([ql & 0x0F, ql >> 4], axis=2)                         # (nb, 2, 4, 32)
    high = qh >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3                 # (nb, 2, 4, 32)
    q = (low | high << 4).astype(np.float32) - np.float32(32)
    scale = _scale(blocks["d"]) * blocks["scales"].astype(np.float32)          # (nb, 16)
    return scale[:, :, None] * q.reshape(nb, QK_K // 16, 16)


def _nibbles_of_64(qs: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(nb, 128) bytes -> (nb, 8, 32): of every 32 bytes the low nibbles are one sub-block, the high ones the next."""
    pairs = qs.reshape(-1, 4, 1, 32)
    return np.concatenate([pairs & 0x0F, pairs >> 4], axis=2).reshape(-1, 8, 32)


def _scale_sub_blocks(blocks: NDArray, q: NDArray[np.uint8]) -> F32:
    """Levels (nb, 8, 32) -> elements.

    Of the 12 bytes of 6-bit numbers the first four hold scales 0..3 and the next four minima 0..3; the last four hold
    the low halves of scales 4..7 and, above them, of minima 4..7, whose upper two bits are on top of the first eight.
    """
    first, second, low = np.split(blocks["scales"], 3, axis=1)                       # (nb, 4) each
    scales = np.concatenate([first & 63, low & 15 | first >> 6 << 4], axis=1)
    minima = np.concatenate([second & 63, low >> 4 | second >> 6 << 4], axis=1)
    scale, minimum = _scale(blocks["d"]) * scales.astype(np.float32), _scale(blocks["dmin"]) * minima.astype(np.float32)
    return scale[:, :, None] * q.astype(np.float32) - minimum[:, :, None]


def _scale(d: NDArray) -> F32:
    """One factor per block (nb,) -> (nb, 1), to be multiplied with the block's elements."""
    return d.astype(np.float32)[:, None]


def _nibbles(qs: NDArray[np.uint8]) -> F32:
    """(nb, 16) bytes -> (nb, 32): the low nibbles are elements 0..15, the high ones 16..31."""
    return np.concatenate([qs & 0x0F, qs >> 4], axis=1).astype(np.float32)


def _fifth_bits(qh: NDArray[np.uint32]) -> F32:
    """(nb,) words -> (nb, 32): 16 where the element's bit is set, else 0."""
    return ((qh[:, None] >> np.arange(32, dtype=np.uint32) & 1) << 4).astype(np.float32)


_DEQUANTIZE: dict[GGMLType, Callable[[NDArray], F32]] = {
    GGMLType.F32: dequantize_f32,
    GGMLType.F16: dequantize_f16,
    GGMLType.BF16: dequantize_bf16,
    GGMLType.Q8_0: dequantize_q8_0,
    GGMLType.Q4_0: dequantize_q4_0,
    GGMLType.Q4_1: dequantize_q4_1,
    GGMLType.Q5_0: dequantize_q5_0,
    GGMLType.Q5_1: dequantize_q5_1,
    GGMLType.IQ4_NL: dequantize_iq4_nl,
    GGMLType.Q4_K: dequantize_q4_K,
    GGMLType.Q5_K: dequantize_q5_K,
    GGMLType.Q6_K: dequantize_q6_K,
}
