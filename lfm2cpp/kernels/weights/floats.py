"""F32, F16 and BF16: W columns of a row in a vector, how they are multiplied, and the bytes of a column.

A column is one element as float32; of bf16_pairs two elements as they are, which meet two activations rounded to BF16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lfm2cpp.kernels import simd
from lfm2cpp.kernels.dot import dot_bf16
from lfm2cpp.kernels.simd.lanes import make_transpose_square
from lfm2cpp.kernels.simd.memory import bf16_at, f16_at


@dataclass(frozen=True)
class FloatWeights:
    load: Any  # (address) -> W columns
    transpose: Any  # W columns of W rows as make_transpose_square transposes them
    size: int
    multiply_add: Any = simd.fma  # (columns, activations, sums) -> sums
    element: str = "f32"  # of the panel, for make_tile


f32 = FloatWeights(simd.load_f32, simd.transpose_square, 4)
f16 = FloatWeights(simd.load_f16, make_transpose_square(f16_at), 2)
bf16 = FloatWeights(simd.load_bf16, make_transpose_square(bf16_at), 2)
bf16_pairs = FloatWeights(simd.load_f32, simd.transpose_square, 4, dot_bf16, "bf16_pairs")
