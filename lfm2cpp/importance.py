"""Measure how much each column of a model's matrices matters, on a text: what llama-imatrix does.

The text is cut into chunks, each of which the model reads from the beginning, after a BOS in place of the chunk's first
token. Of every matrix in the layers the squares of its inputs are added up, column by column.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .engine.engine import Engine
from .errors import LFM2Error, ModelFormatError

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Importances:
    """Sums of squares, float64 (row length,), by tensor name, over n_chunks chunks of n_inputs tokens in all."""

    sums: dict[str, F64]
    n_inputs: int
    n_chunks: int


def measure_importances(
    engine: Engine,
    tokens: Sequence[int],
    *,
    bos: int | None,
    n_ctx: int,
    n_chunks: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Importances:
    """Run whole chunks of n_ctx tokens, at most n_chunks; what is left over of the text is not used.

    `engine` was made with sum_squares. `bos` stands at the beginning of every chunk, unless it is None. `progress(n)`
    hears of every n tokens. Raises LFM2Error for a text of less than a chunk, ModelFormatError for a model whose
    activations are NaN or infinite.
    """
    chunks = [list(tokens[i : i + n_ctx]) for i in range(0, len(tokens) - n_ctx + 1, n_ctx)][:n_chunks]
    if not chunks:
        raise LFM2Error(f"the text has {len(tokens)} tokens, expected a chunk of {n_ctx} or many; give a longer text")
    sums: dict[str, F64] = {}
    for chunk in chunks:
        if bos is not None:
            chunk[0] = bos
        sequence = engine.sequence()
        engine.evaluate([(sequence, chunk)], logits="none")
        sequence.close()
        for name, squares in engine.take_squares().items():
            sums[name] = sums.get(name, 0) + squares.astype(np.float64)
        if progress is not None:
            progress(len(chunk))
    for name, total in sums.items():
        if not np.isfinite(total).all():
            raise ModelFormatError(f"{engine.path}: the inputs of {name} are not finite on this text; is it damaged?")
    return Importances(sums, n_ctx * len(chunks), len(chunks))
