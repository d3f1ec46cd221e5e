"""Sampling: a row of logits -> one token id. Knows no text and no model.

What is remembered of a text and what is drawn are here, the steps from logits to candidates in kernels/sample.py.
"""

from __future__ import annotations

import math
import random
import secrets
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import LFM2Error, UsageError
from .kernels.library import NO_RESULT, Kernel, Progress, float_bits, library
from .kernels.widths import LOGITS_BINS, LOGITS_GROUP

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I32 = NDArray[np.int32]

KERNELS = ("lfm2cpp.kernels.sample:sample",)

MIN_TEMP = 1e-6  # below it the best token has all the probability: greedy
MAX_LOGIT_BIAS = 1024


def load_kernel(progress: Progress | None = None) -> Kernel:
    """The kernel that samples, compiled if it must be."""
    return library().load(KERNELS, progress)[KERNELS[0]]


class SamplingError(LFM2Error):
    """The logits leave nothing to choose from: they are not finite, or every token is forbidden."""


class NonFiniteLogits(SamplingError):
    """The model computed NaN or Inf."""


class NothingAllowed(SamplingError):
    """Every token is masked: the generation can only end."""


@dataclass(frozen=True)
class SamplingParams:
    """How to choose a token. The defaults are Liquid's recommendation for the LFM2 text models.

    Raises UsageError for values out of range. `temp` 0 (anything below 1e-6) is greedy. Off are: `top_k` 0 or -1,
    `top_p` 1, `min_p` 0, `repeat_penalty` 1, the other penalties 0. `repeat_last_n` counts the tokens the penalties
    look at, prompt included; -1 is all. `seed` None or -1 is a random one. `logit_bias` maps token ids to what is
    added to their logits; -inf forbids one.
    """

    temp: float = 0.3
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.15
    repeat_penalty: float = 1.05
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _RANGES and not in_range(value, *_RANGES[field.name]):
                kind, low, high = _RANGES[field.name]
                name = "a whole number" if kind is int else "a number"
                raise UsageError(f"{field.name} is {_shown(value)}, expected {name} from {low:g} to {high:g}")
        if self.repeat_penalty <= 0:
            raise UsageError(f"repeat_penalty is {self.repeat_penalty!r}, expected more than 0 (1 is off)")
        if self.seed is not None and not in_range(self.seed, int, -1, 2**64 - 1):
            raise UsageError(f"seed is {_shown(self.seed)}, expected a whole number from 0 to 2^64-1, or -1 for random")
        self._check_bias()

    def _check_bias(self) -> None:
        bias = self.logit_bias or {}
        if not isinstance(bias, Mapping):
            raise UsageError(f"logit_bias is {_shown(bias)}, expected numbers by token id")
        if len(bias) > MAX_LOGIT_BIAS:
            raise UsageError(f"logit_bias has {len(bias)} entries, expected at most {MAX_LOGIT_BIAS}")
        for token_id, value in bias.items():
            if not in_range(token_id, int, 0, 2**31 - 1):
                raise UsageError(f"logit_bias names token {_shown(token_id)}, expected an id of the vocabulary")
            if value != -math.inf and not in_range(value, float, -1e6, 1e6):
                raise UsageError(f"logit_bias of token {token_id} is {_shown(value)}, expected a number or -inf")

    @property
    def greedy(self) -> bool:
        return self.temp < MIN_TEMP


_RANGES: dict[str, tuple[type, float, float]] = {
    "temp": (float, 0, 1e6),
    "top_k": (int, -1, 2**31 - 1),
    "top_p": (float, 0, 1),
    "min_p": (float, 0, 1),
    "repeat_penalty": (float, 0, 1e6),
    "repeat_last_n": (int, -1, 2**31 - 1),
    "presence_penalty": (float, -1e6, 1e6),
    "frequency_penalty": (float, -1e6, 1e6),
}


def in_range(value: Any, kind: type, low: float, high: float) -> bool:
    """Whether a value of any type is a whole number (kind int) or a number (float) from low to high; True is none."""
    kinds = (int,) if kind is int else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high  # NaN is in no range


def _shown(value: Any) -> str:
    return ascii(value)[:40]


class Sampler:
    """Chooses the tokens of one generation, and remembers them for the penalties.

    `banned_ids` are never chosen: the unused rows of the vocabulary. Raises UsageError when `logit_bias` names an
    id that is not in the vocabulary.
    """

    def __init__(self, params: SamplingParams, *, n_vocab: int, banned_ids: Sequence[int] = ()) -> None:
        self.params = params
        self.seed = secrets.randbits(32) if params.seed in (None, -1) else params.seed
        self._random = random.Random(self.seed)
        self._n_vocab = n_vocab
        # Padding rows stand at the end, and are cut off.
        n_real, banned = n_vocab, set(banned_ids)
        while n_real and n_real - 1 in banned:
            n_real -= 1
        self._history = array("i")
        self._counts = memoryview(np.zeros(n_vocab, np.intc))  # how often each id is among those penalties look at
        self._penalizes = params.repeat_last_n != 0 and (
            params.repeat_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
        )
        self._make_buffers(n_real, _added(params.logit_bias or {}, banned, n_vocab, n_real))

    def _make_buffers(self, n: int, bias: Mapping[int, float]) -> None:
        """What the kernel reads and writes, and the row of its arguments."""
        n_groups = -(-n // LOGITS_GROUP)
        filled = max(1, n_groups) * LOGITS_GROUP + LOGITS_GROUP  # vectors may begin anywhere before the end
        self._padded = np.full(filled, -np.inf, np.float32)
        self._logits = self._padded[:n]
        self._ids, self._weights = np.empty(filled, np.int32), np.empty(filled, np.float32)
        self._masses, self._bins = np.empty(filled, np.float32), np.empty(LOGITS_BINS, np.float64)
        self._maxima, self._out = np.empty(n_groups, np.float32), np.zeros(2, np.int64)
        self._biased, self._bias = np.array(list(bias), np.int32), np.array(list(bias.values()), np.float32)
        kernel, p = load_kernel(), self.params
        args = {
            "recent": 0, "n_recent": 0, "draw": 0,  # of each call
            "x": self._padded, "n": n, "maxima": self._maxima, "biased": self._biased, "bias": self._bias,
            "n_biased": len(bias), "counts": self._counts.obj, "repeat": float(p.repeat_penalty),
            "frequency": float(p.frequency_penalty), "presence": float(p.presence_penalty), "top_k": p.top_k,
            "top_p": int(p.top_p * 2**53), "log_min_p": math.log(p.min_p) if p.min_p > 0 else -math.inf,
            "temp": 0.0 if p.greedy else float(p.temp), "ids": self._ids, "values": self._weights,
            "masses": self._masses, "bins": self._bins, "out": self._out,
        }  # fmt: skip
        row = np.array([_as_int64(args[name]) for name in kernel.params], np.int64)
        self._entry, self._row_address = kernel.entry, row.ctypes.data
        self._row, self._result = memoryview(row), memoryview(self._out)
        self._recent_at, self._n_recent_at, self._draw_at = map(kernel.params.index, ("recent", "n_recent", "draw"))

    def accept(self, token_ids: Iterable[int]) -> None:
        """Tokens that are now part of the text: the prompt first, then each token chosen.

        Raises UsageError for an id that is not in the vocabulary.
        """
        if not self._penalizes:
            return
        last_n, history, counts = self.params.repeat_last_n, self._history, self._counts
        for token_id in token_ids:
            if not 0 <= token_id < self._n_vocab:
                raise UsageError(f"token id {token_id} is outside the vocabulary, 0..{self._n_vocab - 1}")
            history.append(token_id)
            counts[token_id] += 1
            if 0 <= last_n < len(history):
                counts[history[-1 - last_n]] -= 1

    def sample(self, logits: F32) -> int:
        """One token id for `logits` (n_vocab,), which stay as they are. Does not `accept` it.

        Raises SamplingError when a logit is NaN or infinite, NothingAllowed when no token is left.
        """
        if logits.shape != (self._n_vocab,):
            raise ValueError(f"logits have shape {logits.shape}, expected ({self._n_vocab},)")
        self._logits[:] = logits[: len(self._logits)]
        row, (history_at, n_recent), last_n = self._row, self._history.buffer_info(), self.params.repeat_last_n
        if 0 <= last_n < n_recent:
            history_at, n_recent = history_at + 4 * (n_recent - last_n), last_n
        row[self._recent_at], row[self._n_recent_at] = history_at, n_recent
        row[self._draw_at] = 0 if self.params.greedy else int(self._random.random() * 2**53)
        self._entry(NO_RESULT, NO_RESULT, self._row_address, 0, 0, 1)
        count, token_id = self._result
        if count < 0:
            raise NonFiniteLogits(f"non-finite logits (token {token_id}: {self._logits[token_id]})")
        if count == 0:
            why = "is forbidden by logit_bias or a mask" if len(self._logits) else "of the vocabulary is unused"
            raise NothingAllowed(f"every token {why}")
        return token_id

    def candidates(self, logits: F32) -> tuple[I32, F64]:
        """The ids that `sample` chooses from, in no order, and their probabilities. Draws, as `sample` does."""
        self.sample(logits)
        weights = self._weights[: self._out[0]].astype(np.float64)
        return self._ids[: self._out[0]].copy(), weights / weights.sum()


def _added(bias: Mapping[int, float], banned: set[int], n_vocab: int, n_real: int) -> dict[int, float]:
    """What to add to logits, by id; banned ids get -inf."""
    for token_id in bias:
        if token_id >= n_vocab:
            raise UsageError(f"logit_bias names token {token_id}, expected an id from 0 to {n_vocab - 1}")
    return {i: b for i, b in {**bias, **dict.fromkeys(banned, -math.inf)}.items() if 0 <= i < n_real}


def _as_int64(value: Any) -> int:
    """An argument as a kernel takes it."""
    if isinstance(value, np.ndarray):
        return int(value.ctypes.data)
    return float_bits(value) if isinstance(value, float) else value
