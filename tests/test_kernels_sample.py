"""The sampling kernel: what may be chosen, and how likely, beside a reference that sorts everything; at every level."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from sampling_reference import distribution

from lfm2cpp.kernels.widths import LOGITS_GROUP
from lfm2cpp.sampling import NonFiniteLogits, Sampler, SamplingParams

SIZES = [1, 7, LOGITS_GROUP - 1, LOGITS_GROUP, LOGITS_GROUP + 1, 2500, 40000]
CHAINS: list[dict[str, Any]] = [
    {},
    {"temp": 0.0},
    {"temp": 0.3, "min_p": 0.15},
    {"temp": 2.5, "top_k": 1},
    {"top_k": 50},
    {"top_k": 3000},
    {"top_k": 50, "min_p": 0.3},
    {"top_p": 0.0},
    {"top_p": 0.5},
    {"top_p": 0.9375, "min_p": 0.01},
    {"top_p": 0.75, "top_k": 40, "temp": 0.7},
]
PENALTIES: dict[str, Any] = {"repeat_penalty": 1.25, "frequency_penalty": 0.5, "presence_penalty": 0.25}


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_candidates_are_the_references(n: int, chain: dict[str, Any]) -> None:
    rng = np.random.default_rng(n)
    x = (rng.standard_normal(n) * 3).astype(np.float32)
    banned = rng.integers(0, n, n // 8).tolist()[: n - 1]
    history = rng.integers(0, n, 200).tolist()
    bias = {int(i): float(b) for i, b in zip(rng.integers(0, n, 5), (2.0, -2.0, 0.5, 8.0, -math.inf), strict=True)}
    free = set(range(n)) - set(banned) - {i for i, b in bias.items() if b == -math.inf}
    params = SamplingParams(**{"temp": 1.0, "min_p": 0.0, "repeat_last_n": 50, "seed": 1, **PENALTIES, **chain},
                            logit_bias=bias if free else None)  # fmt: skip
    s = Sampler(params, n_vocab=n, banned_ids=banned)
    s.accept(history)
    for _ in range(2):  # what one call leaves behind must not show in the next
        ids, found = s.candidates(x)
        expected = distribution(x, params, history, banned)
        assert sorted(ids) == np.flatnonzero(expected).tolist()
        np.testing.assert_allclose(found, expected[ids], rtol=2e-5)
        assert expected[s.sample(x)] > 0


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("top_k", [1, 2, 9, 64])
def test_of_equal_logits_the_lower_ids_are_kept(n: int, top_k: int) -> None:
    x = np.random.default_rng(n).integers(0, 3, n).astype(np.float32)
    ids, _ = Sampler(SamplingParams(temp=1.0, top_k=top_k, min_p=0.0), n_vocab=n).candidates(x)
    assert sorted(ids) == sorted(np.argsort(-x, kind="stable")[:top_k])


@pytest.mark.parametrize("n", SIZES)
def test_the_first_logit_that_is_not_finite_is_named(n: int) -> None:
    for value in (np.nan, np.inf, -np.inf):
        for at in {0, n // 2, n - 1}:
            x = np.zeros(n, np.float32)
            x[at:] = value
            with pytest.raises(NonFiniteLogits, match=rf"token {at}: {value}"):
                Sampler(SamplingParams(), n_vocab=n).sample(x)


def test_draws_follow_the_weights() -> None:
    x = np.log(np.array([1, 2, 3, 4], np.float32))
    s = Sampler(SamplingParams(temp=1.0, min_p=0.0, repeat_penalty=1.0, seed=5), n_vocab=4)
    found = np.bincount([s.sample(x) for _ in range(20000)], minlength=4) / 20000
    np.testing.assert_allclose(found, [0.1, 0.2, 0.3, 0.4], atol=0.015)  # four standard deviations
