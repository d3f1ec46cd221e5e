"""What a kernel may round: the activations that meet a stored weight, and the KV cache.

A matrix of blocks of 4 to 8 bits is multiplied with activations that were rounded to 8 bits, as llama.cpp does it; F16
and BF16 matrices with activations of the same type. The limits for such files are not guessed: they are what these
roundings cost on this very model and prompt, computed by the float64 reference with and without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from lfm2cpp.arch.lfm2 import HParams
from lfm2cpp.ggml import QK8_0, QK_K, GGMLType

from .intermediates import LINEAR, LOGITS

F64 = NDArray[np.float64]


def keep(x: F64) -> F64:
    return x


def round_f16(x: F64) -> F64:
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float64)


def round_bf16(x: F64) -> F64:
    bits = x.astype(np.float32).view(np.uint32)
    bits = bits + (0x7FFF + (bits >> 16 & 1)).astype(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(np.float64)


def round_q8_0(x: F64) -> F64:
    """8 bits and one float16 scale per 32 elements"""
    return _round_blocks(x, QK8_0, round_f16)


def round_q8_K(x: F64) -> F64:
    """8 bits and one float32 scale per 256 elements"""
    return _round_blocks(x, QK_K, keep)


def _round_blocks(x: F64, block: int, round_scale: Callable[[F64], F64]) -> F64:
    blocks = x.reshape(-1, block)
    d = np.abs(blocks).max(axis=1, keepdims=True) / 127
    q = np.rint(blocks / np.where(d > 0, d, 1))
    return (round_scale(d) * q).reshape(x.shape)


# From the finest to the coarsest.
_ROUNDINGS: tuple[tuple[Callable[[F64], F64], tuple[GGMLType, ...]], ...] = (
    (keep, (GGMLType.F32,)),
    (round_f16, (GGMLType.F16,)),
    (round_bf16, (GGMLType.BF16,)),
    (round_q8_0, (GGMLType.Q8_0, GGMLType.Q5_0, GGMLType.Q5_1, GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.IQ4_NL)),
    (round_q8_K, (GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K)),
)


def activation_roundings(
    hp: HParams, types: Mapping[str, GGMLType], kv_type: str = "f32"
) -> dict[str, Callable[[F64], F64]]:
    """Intermediate -> how a kernel may round it before it uses it. `types` are the tensors' by canonical name."""
    output = "output.weight" if "output.weight" in types else "token_embd.weight"
    consumers: dict[str, set[GGMLType]] = {"result_norm": {types[output]}}
    for il in range(hp.n_layer):
        for source, tensor in LINEAR.values():
            ggml_type = types.get(f"blk.{il}.{tensor}")
            if ggml_type is not None:
                consumers.setdefault(f"{source}-{il}", set()).add(ggml_type)
    roundings = {name: _coarsest(found) for name, found in consumers.items()}
    if kv_type == "f16":
        roundings |= {f"{part}-{il}": round_f16 for il in hp.attention_layers for part in ("k_rope", "v")}
    return roundings


def linear_names(hp: HParams) -> set[str]:
    """The intermediates that are a matrix times activations."""
    return {f"{part}-{il}" for il in range(hp.n_layer) for part in LINEAR} | {LOGITS}


def _coarsest(types: Iterable[GGMLType]) -> Callable[[F64], F64]:
    return [rounding for rounding, of in _ROUNDINGS if not set(of).isdisjoint(types)][-1]
