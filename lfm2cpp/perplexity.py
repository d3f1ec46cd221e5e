"""How surprised a model is by a text: what llama-perplexity measures, for comparing files of one model.

perplexity = exp(mean of -log p(token | what stands before it in its chunk)), over the second half of every chunk, so
that something always stands before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .engine.engine import Engine
from .errors import ModelFormatError

ROWS = 32  # of logits, looked at together: 8 MB at a vocabulary of 65,536


@dataclass(frozen=True)
class Perplexity:
    """`error`: one standard error of the value."""

    value: float
    error: float
    n_tokens: int  # that were predicted


def measure_perplexity(
    engine: Engine, chunks: Sequence[list[int]], progress: Callable[[int], None] | None = None
) -> Perplexity:
    """Chunks of one length, three tokens or more. `progress(n)` hears of every n tokens. Raises ModelFormatError for a
    model whose logits are NaN."""
    losses: list[NDArray[np.float64]] = []
    for chunk in chunks:
        half = len(chunk) // 2
        with engine.sequence() as sequence:
            engine.evaluate([(sequence, chunk[:half])], logits="none")
            (logits,) = engine.evaluate([(sequence, chunk[half:-1])], logits="all")
        losses.append(negative_log_likelihood(logits, np.array(chunk[half + 1 :])))
        if not np.isfinite(losses[-1]).all():
            raise ModelFormatError(f"{engine.path}: logits are not finite on this text; is it damaged?")
        if progress is not None:
            progress(len(chunk))
    loss = np.concatenate(losses)
    value = math.exp(loss.mean())
    return Perplexity(value, value * loss.std() / math.sqrt(max(1, loss.size - 1)), loss.size)


def negative_log_likelihood(logits: NDArray[np.float32], ids: NDArray[np.integer]) -> NDArray[np.float64]:
    """-log softmax(logits)[id] of every row; logits: (n, n_vocab), ids: (n,)"""
    found = np.empty(len(ids))
    for first in range(0, len(ids), ROWS):
        rows = logits[first : first + ROWS]
        rows = rows - rows.max(axis=1, keepdims=True)
        chosen = rows[np.arange(len(rows)), ids[first : first + ROWS]].astype(np.float64)
        found[first : first + ROWS] = np.log(np.exp(rows).sum(axis=1, dtype=np.float64)) - chosen
    return found
