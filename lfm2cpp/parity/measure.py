"""How far two arrays, or two rows of logits, are apart. Everything is computed in float64."""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


def relative_rms(ours: Array, theirs: Array) -> float:
    """rms(ours - theirs) / rms(theirs); 0 when both are zero, inf when anything is not finite."""
    with np.errstate(all="ignore"):
        difference = np.sum(np.square(ours.astype(np.float64) - theirs))
        scale = np.sum(np.square(theirs.astype(np.float64)))
    if not np.isfinite(difference) or not np.isfinite(scale):
        return float("inf")
    if scale == 0:
        return 0.0 if difference == 0 else float("inf")
    return float(np.sqrt(difference / scale))


def max_abs(ours: Array, theirs: Array) -> float:
    """The largest absolute difference; inf when anything is not finite."""
    with np.errstate(all="ignore"):
        largest = np.abs(ours.astype(np.float64) - theirs).max(initial=0.0)
    return float(largest) if np.isfinite(largest) else float("inf")


def first_row_above(ours: Array, theirs: Array, limit: float) -> int | None:
    """The first token whose own relative RMS is above `limit`."""
    return next((t for t in range(len(ours)) if not relative_rms(ours[t], theirs[t]) <= limit), None)


def log_softmax(logits: Array) -> NDArray[np.float64]:
    x = logits.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def kl_divergence(ours: Array, theirs: Array) -> float:
    """Mean over the tokens of KL(theirs || ours), in nats."""
    if not np.isfinite(ours).all():
        return float("inf")
    p, q = log_softmax(theirs), log_softmax(ours)
    return float(np.mean(np.sum(np.exp(p) * (p - q), axis=-1)))


def top1_agreement(ours: Array, theirs: Array) -> float:
    """The share of tokens after which both put the same token first."""
    return float(np.mean(ours.argmax(axis=-1) == theirs.argmax(axis=-1)))


def checksum(x: Array) -> str:
    """CRC-32 of the values as float32: equal only for bitwise equal results, so it tells runs apart."""
    return f"{zlib.crc32(np.ascontiguousarray(x, dtype='<f4').tobytes()):08x}"
