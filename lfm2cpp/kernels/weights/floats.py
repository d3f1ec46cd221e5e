"""F32, F16 and BF16: W elements of a row as float32, and the bytes of an element."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lfm2cpp.kernels import simd


@dataclass(frozen=True)
class FloatWeights:
    load: Any
    size: int


f32 = FloatWeights(simd.load_f32, 4)
f16 = FloatWeights(simd.load_f16, 2)
bf16 = FloatWeights(simd.load_bf16, 2)
