"""Measure how much each column of a model's matrices matters, on a text: what llama-imatrix does.

Of every matrix in the layers the squares of its inputs are added up, column by column, over all tokens of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from .engine.engine import Engine
from .errors import ModelFormatError

F64 = NDArray[np.float64]


def measure_importances(
    engine: Engine, chunks: Sequence[list[int]], progress: Callable[[int], None] | None = None
) -> dict[str, F64]:
    """Sums of squares, float64 (row length,), by tensor name, over the tokens of all chunks.

    `engine` was made with sum_squares. `progress(n)` hears of every n tokens. Raises ModelFormatError for a model whose
    activations are NaN or infinite.
    """
    assert engine.plan.sum_squares
    engine.take_squares()  # what others may have left
    sums: dict[str, F64] = {}
    for chunk in chunks:
        with engine.sequence() as sequence:
            engine.evaluate([(sequence, chunk)], logits="none")
        for name, squares in engine.take_squares().items():
            sums[name] = sums.get(name, 0) + squares.astype(np.float64)
            if not (sums[name] < np.finfo(np.float32).max).all():  # nor NaN: it is stored as float32
                raise ModelFormatError(f"{engine.path}: inputs of {name} are not finite on this text; is it damaged?")
        if progress is not None:
            progress(len(chunk))
    return sums
