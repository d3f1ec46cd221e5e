"""exp and silu over vectors."""

from __future__ import annotations

from .compiler import device
from .simd import add_exponent, fma, maximum, minimum, product_to_i32, reciprocal, splat_f32, to_f32

LOG2_E = 1.4426950408889634
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
# Minimax polynomial of (exp(r) - 1 - r) / r**2 on [-ln2/2, ln2/2] (Cephes expf); exp is good to 2 ulp.
P0, P1, P2, P3, P4, P5 = 1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5


@device
def exp(x):
    """exp(x), lane by lane; below -87 the smallest normal numbers, above 88 the largest"""
    x = minimum(maximum(x, splat_f32(-87.0)), splat_f32(88.0))
    n = product_to_i32(x, splat_f32(LOG2_E))
    whole = to_f32(n)
    r = fma(whole, splat_f32(-LN2_HIGH), x)
    r = fma(whole, splat_f32(-LN2_LOW), r)
    p = fma(splat_f32(P0), r, splat_f32(P1))
    p = fma(p, r, splat_f32(P2))
    p = fma(p, r, splat_f32(P3))
    p = fma(p, r, splat_f32(P4))
    p = fma(p, r, splat_f32(P5))
    return add_exponent(fma(p, r * r, r) + splat_f32(1.0), n)


@device
def silu(x):
    """x / (1 + exp(-x))"""
    return x * reciprocal(splat_f32(1.0) + exp(splat_f32(0.0) - x))
