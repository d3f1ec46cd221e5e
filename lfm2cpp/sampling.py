"""Sampling: a row of logits -> one token id. Knows no text and no model.

The order of the steps is llama.cpp's: bias, penalties, top-k, top-p, min-p, and the temperature last. A vocabulary
has 65,536 entries or more, and a decode step of a small model takes 5 ms, so nothing here sorts all of it:
candidates are picked by a threshold first (10-60 us in all; `python -m pytest tests/test_sampling.py -k microseconds`).
"""

from __future__ import annotations

import math
import random
import secrets
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import LFM2Error, UsageError

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

MIN_TEMP = 1e-6  # below it the best token has all the probability: greedy
N_BLOCKS = 1024  # block maxima for top-k
MAX_LOGIT_BIAS = 1024
NEG_INF = np.float32(-np.inf)


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
            if field.name in _RANGES and not _in_range(value, *_RANGES[field.name]):
                kind, low, high = _RANGES[field.name]
                name = "a whole number" if kind is int else "a number"
                raise UsageError(f"{field.name} is {_shown(value)}, expected {name} from {low:g} to {high:g}")
        if self.repeat_penalty <= 0:
            raise UsageError(f"repeat_penalty is {self.repeat_penalty!r}, expected more than 0 (1 is off)")
        if self.seed is not None and not _in_range(self.seed, int, -1, 2**64 - 1):
            raise UsageError(f"seed is {_shown(self.seed)}, expected a whole number from 0 to 2^64-1, or -1 for random")
        self._check_bias()

    def _check_bias(self) -> None:
        bias = self.logit_bias or {}
        if len(bias) > MAX_LOGIT_BIAS:
            raise UsageError(f"logit_bias has {len(bias)} entries, expected at most {MAX_LOGIT_BIAS}")
        for token_id, value in bias.items():
            if not _in_range(token_id, int, 0, 2**31 - 1):
                raise UsageError(f"logit_bias names token {_shown(token_id)}, expected an id of the vocabulary")
            if value != -math.inf and not _in_range(value, float, -1e6, 1e6):
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


def _in_range(value: Any, kind: type, low: float, high: float) -> bool:
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
        # Padding rows stand at the end; a slice is cheaper than an index.
        n_real, banned = n_vocab, set(banned_ids)
        while n_real and n_real - 1 in banned:
            n_real -= 1
        self._banned = np.array(sorted(i for i in banned if 0 <= i < n_real), np.int64)
        self._logits = np.empty(n_real, np.float32)
        self._init_bias(params.logit_bias or {}, n_vocab, n_real)
        self._history: deque[int] = deque()
        self._counts: dict[int, int] = {}
        self._penalizes = params.repeat_last_n != 0 and (
            params.repeat_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
        )

    def _init_bias(self, bias: Mapping[int, float], n_vocab: int, n_real: int) -> None:
        for token_id in bias:
            if token_id >= n_vocab:
                raise UsageError(f"logit_bias names token {token_id}, expected an id from 0 to {n_vocab - 1}")
        kept = {i: b for i, b in bias.items() if i < n_real}
        self._bias_ids = np.array(list(kept), np.int64)
        self._bias = np.array(list(kept.values()), np.float32)

    def accept(self, token_ids: Iterable[int]) -> None:
        """Tokens that are now part of the text: the prompt first, then each token chosen."""
        if not self._penalizes:
            return
        last_n = self.params.repeat_last_n
        for token_id in token_ids:
            self._history.append(token_id)
            self._counts[token_id] = self._counts.get(token_id, 0) + 1
            if 0 <= last_n < len(self._history):
                oldest = self._history.popleft()
                self._counts[oldest] -= 1
                if not self._counts[oldest]:
                    del self._counts[oldest]

    def sample(self, logits: F32) -> int:
        """One token id for `logits` (n_vocab,), which stay as they are. Does not `accept` it.

        Raises SamplingError when a logit is NaN or infinite, NothingAllowed when no token is left.
        """
        x = self._adjusted(logits)
        if self.params.greedy:
            best = int(x.argmax())
            self._check_any(x[best])
            return best
        ids, values = self._candidates(x)
        return int(ids[self._draw(values)])

    def _adjusted(self, logits: F32) -> F32:
        """The logits of real tokens with masks, bias and penalties, in this sampler's own buffer."""
        if logits.shape != (self._n_vocab,):
            raise ValueError(f"logits have shape {logits.shape}, expected ({self._n_vocab},)")
        x = self._logits
        np.copyto(x, logits[: len(x)])
        if len(x) and not (math.isfinite(x.max()) and math.isfinite(x.min())):  # NaN is the maximum of anything
            at = int(np.flatnonzero(~np.isfinite(x))[0])
            raise NonFiniteLogits(f"non-finite logits (token {at}: {x[at]})")
        if len(self._banned):
            x[self._banned] = NEG_INF
        if len(self._bias_ids):
            x[self._bias_ids] += self._bias
        if self._counts:
            self._penalize(x)
        if not len(x):
            raise NothingAllowed("every token of the vocabulary is unused")
        return x

    def _penalize(self, x: F32) -> None:
        n = len(self._counts)
        ids = np.fromiter(self._counts, np.int64, n)
        ids_in = ids < len(x)
        counts = np.fromiter(self._counts.values(), np.float32, n)
        if not ids_in.all():
            ids, counts = ids[ids_in], counts[ids_in]
        p, values = self.params, x[ids]
        values = np.where(values <= 0, values * np.float32(p.repeat_penalty), values / np.float32(p.repeat_penalty))
        x[ids] = values - (counts * np.float32(p.frequency_penalty) + np.float32(p.presence_penalty))

    def _check_any(self, best: np.float32) -> None:
        if best == NEG_INF:
            raise NothingAllowed("every token is forbidden by logit_bias or a mask")

    def _candidates(self, x: F32) -> tuple[I64, F32]:
        """Ids that may be chosen and their logits; the best has logit 0 (a softmax does not mind)."""
        p = self.params
        best = x.max()
        self._check_any(best)
        floor = best + np.float32(math.log(p.min_p)) if p.min_p > 0 else NEG_INF
        if 0 < p.top_k < len(x):
            ids = top_k_ids(x, p.top_k)
            if p.top_p < 1:
                ids = ids[: _nucleus_size(np.exp(x[ids] - best), p.top_p)]
            ids = ids[x[ids] >= floor]
        else:
            if p.top_p < 1:
                floor = max(floor, _nucleus_floor(x, best, floor, p.top_p))
            ids = np.flatnonzero(x >= floor if floor > NEG_INF else x > NEG_INF)
        return ids, x[ids] - best

    def _draw(self, values: F32) -> int:
        """An index of `values` (logits, the largest 0) by its probability at the temperature."""
        with np.errstate(over="ignore", under="ignore"):
            cumulated = np.exp(values / np.float32(self.params.temp)).cumsum(dtype=np.float64)
        at = int(cumulated.searchsorted(self._random.random() * cumulated[-1], side="right"))
        return min(at, len(values) - 1)


def top_k_ids(x: F32, k: int) -> I64:
    """The ids of the k largest, best first; the lower id first where they are equal; -inf is left out."""
    ids = np.flatnonzero(x >= _top_k_threshold(x, k))
    values = x[ids]
    ids = ids[np.argsort(-values, kind="stable")[:k]]
    return ids[x[ids] > NEG_INF]


def _top_k_threshold(x: F32, k: int) -> np.float32:
    """A value that at least k of x reach, and rarely many more: the k-th largest of interleaved blocks' maxima."""
    n_rows = len(x) // N_BLOCKS
    if k > N_BLOCKS // 2 or n_rows < 4:
        return np.partition(x, len(x) - k)[len(x) - k]
    maxima = x[: n_rows * N_BLOCKS].reshape(n_rows, N_BLOCKS).max(axis=0)
    return np.partition(maxima, N_BLOCKS - k)[N_BLOCKS - k]


def _nucleus_size(weights: F32, top_p: float) -> int:
    """How many of `weights` (largest first) it takes to have `top_p` of their sum; at least one."""
    cumulated = weights.cumsum(dtype=np.float64)
    return min(int(cumulated.searchsorted(top_p * cumulated[-1])) + 1, len(weights))


def _nucleus_floor(x: F32, best: np.float32, floor: np.float32, top_p: float) -> np.float32:
    """The lowest logit among the most probable ids that together have `top_p` of all probability.

    Ids below `floor` count in the total, but are not looked at: they are out anyway. Equal logits stay together.
    """
    target = top_p * float(np.exp(x - best).sum(dtype=np.float64))
    largest = np.sort(x[x >= floor] if floor > NEG_INF else x)[::-1]
    cumulated = np.exp(largest - best).cumsum(dtype=np.float64)
    return largest[min(int(cumulated.searchsorted(target)), len(largest) - 1)]
