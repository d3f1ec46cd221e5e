"""Sizes that both the recorder (without Numba) and the kernels must agree on."""

from __future__ import annotations

from . import level

W = level.target().level.lanes

# Byte offsets of an activation row's tables, per group of W blocks: multiply by the number of groups (activation.py).
ACT_D = 32 * W
ACT_DS = 36 * W
ACT_Z8 = 40 * W
ACT_Z128 = 44 * W
ACT_Z32_LOW = 48 * W
ACT_Z32_HIGH = 52 * W
ACT_GROUP = 56 * W

PANEL_ROWS = 2 * W  # rows of weights that are unpacked together
PAGE_TOKENS = 64  # tokens of a KV page


def activation_nbytes(n: int) -> int:
    """Bytes of one quantized activation row of n elements."""
    return -(-(n // 32) // W) * ACT_GROUP
