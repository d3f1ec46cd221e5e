"""The float64 reference as a judge: the whole pass, or each operation by itself on somebody's own inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lfm2cpp import reference

from .runners import Trace

F64 = NDArray[np.float64]
Roundings = Mapping[str, Callable[[F64], F64]]
EXACT: Roundings = {}


def reference_trace(model: reference.Model, tokens: Sequence[int], roundings: Roundings = EXACT) -> Trace:
    """Every intermediate in float64; the ones in `roundings` are used rounded, but shown as they were."""
    trace: Trace = {}
    record = reference.recorder(trace)

    def note(name: str, x: F64) -> F64:
        record(name, x)
        return roundings[name](x) if name in roundings else x

    reference.forward(model, tokens, note=note)
    return trace


def each_operation(
    model: reference.Model, tokens: Sequence[int], ours: Trace, roundings: Roundings = EXACT
) -> Trace:
    """What float64 makes of our own intermediates, one operation at a time.

    Every operation gets the inputs that we computed (rounded if `roundings` say so), so an error shows only where
    it is made, and does not grow on its way through the layers.
    """
    trace: Trace = {}
    record = reference.recorder(trace)

    def note(name: str, x: F64) -> F64:
        record(name, x)
        x = ours[name].astype(np.float64).reshape(x.shape) if name in ours else x
        return roundings[name](x) if name in roundings else x

    reference.forward(model, tokens, note=note)
    return trace
