"""Sampling as it is defined: everything sorted, in float64."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np

from lfm2cpp.sampling import SamplingParams


def distribution(x: np.ndarray, params: SamplingParams, history: list[int], banned: Any = ()) -> np.ndarray:
    """The probabilities of all ids, in float64 and in llama.cpp's order of steps."""
    x = x.astype(np.float64)
    x[list(banned)] = -np.inf
    for token_id, bias in (params.logit_bias or {}).items():
        x[token_id] += bias
    last_n = len(history) if params.repeat_last_n == -1 else min(params.repeat_last_n, len(history))
    for token_id, count in Counter(history[len(history) - last_n :]).items():
        x[token_id] = x[token_id] * params.repeat_penalty if x[token_id] <= 0 else x[token_id] / params.repeat_penalty
        x[token_id] -= count * params.frequency_penalty + params.presence_penalty
    order = np.argsort(-x, kind="stable")
    if params.top_k > 0:
        order = order[: params.top_k]
    if params.top_p < 1:
        p = np.exp(x[order] - x[order[0]])
        order = order[: int((p.cumsum() / p.sum()).searchsorted(params.top_p)) + 1]
    if params.min_p > 0:
        order = order[x[order] >= x[order[0]] + math.log(params.min_p)]
    result = np.zeros(len(x))
    order = order[:1] if params.temp == 0 else order
    kept = np.exp((x[order] - x[order[0]]) / (params.temp or 1))
    result[order] = kept / kept.sum()
    return result
