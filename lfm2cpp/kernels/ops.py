"""Row ops between the matrix products."""

from __future__ import annotations

from .activation import activation_stride, n_groups_of, quantize_block
from .compiler import kernel
from .scalar import load_i64


@kernel
def quantize_rows(x, n, act, count, ith, nth):
    """float32 rows x: (n_tokens, n) -> quantized activation rows; threads share out the blocks."""
    n_blocks, n_groups, stride = n // 32, n_groups_of(n), activation_stride(n)
    for unit in range(ith, load_i64(count) * n_blocks, nth):
        t, b = divmod(unit, n_blocks)
        quantize_block(x + 4 * (t * n + 32 * b), act + t * stride, n_groups, b)
