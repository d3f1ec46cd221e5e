"""Who computes: the engine, or the NumPy reference. Hugging Face is in hf.py, which needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lfm2cpp import reference
from lfm2cpp.arch.lfm2 import HParams

Trace = dict[str, NDArray[np.floating]]


class Runner(Protocol):
    """One sequence of one model, which shows its intermediates."""

    label: str
    hparams: HParams

    def evaluate(self, tokens: Sequence[int]) -> Trace:
        """Append tokens to the sequence; every intermediate of these tokens, (n_tokens, width) each."""
        ...

    def reset(self) -> None:
        """Forget the sequence: the next token is the first."""
        ...


class ReferenceRunner:
    """lfm2cpp.reference: NumPy, float64."""

    label = "reference"

    def __init__(self, model: reference.Model) -> None:
        self.hparams = model.hparams
        self._model = model
        self.reset()

    def evaluate(self, tokens: Sequence[int]) -> Trace:
        trace: Trace = {}
        reference.forward(self._model, tokens, self._state, reference.recorder(trace))
        return trace

    def reset(self) -> None:
        self._state = reference.State.empty(self.hparams)


class EngineRunner:
    """The engine on a GGUF file, with tracing on. A context manager: it owns threads and a mapped file."""

    label = "lfm2cpp"

    def __init__(self, path: Path, *, n_ctx: int, n_threads: int | None = None, kv_type: str = "f32") -> None:
        from lfm2cpp.engine.engine import Engine

        # One chunk per evaluate: a trace holds the last chunk only.
        self._engine = Engine(path, n_ctx=n_ctx, n_threads=n_threads, kv_type=kv_type, n_batch=n_ctx, trace=True)
        self.hparams = self._engine.hparams
        self._sequence = self._engine.sequence()

    def evaluate(self, tokens: Sequence[int]) -> Trace:
        (logits,) = self._engine.evaluate([(self._sequence, list(tokens))], logits="all")
        return {**self._engine.trace, "result_output": logits}

    def reset(self) -> None:
        self._sequence.close()
        self._sequence = self._engine.sequence()

    def __enter__(self) -> EngineRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.close()
