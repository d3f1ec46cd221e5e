"""Sequences that decode together, counted as llama-batched-bench counts them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from lfm2cpp.engine.engine import Engine
from lfm2cpp.kernels.library import Progress
from lfm2cpp.kernels.widths import PAGE_TOKENS

from .measure import Setup, average, open_engine, random_tokens

COLUMNS = ("PP", "TG", "B", "N_KV", "T_PP s", "S_PP t/s", "T_TG s", "S_TG t/s", "T s", "S t/s")
_WIDTHS = (6, 6, 4, 6, 8, 8, 8, 8, 8, 8)
WARMUP_TOKENS = 16


@dataclass(frozen=True)
class BatchedTest:
    """`n_parallel` sequences: a prompt of n_prompt tokens each (one for all if `shared`), then n_gen tokens each."""

    n_prompt: int
    n_gen: int
    n_parallel: int
    shared: bool = False

    @property
    def n_kv(self) -> int:
        """Tokens in the cache at the end."""
        return (1 if self.shared else self.n_parallel) * self.n_prompt + self.n_parallel * self.n_gen

    @property
    def n_pages(self) -> int:
        """Pages that all sequences take at most, one each to spare."""
        return self.n_parallel * (-(-(self.n_prompt + self.n_gen) // PAGE_TOKENS) + 1)


@dataclass(frozen=True)
class BatchedResult:
    """Seconds of both phases, the averages of the repetitions."""

    setup: Setup
    test: BatchedTest
    t_pp: float
    t_tg: float

    def values(self) -> tuple[float, ...]:
        """The numbers of COLUMNS, in their order."""
        test, t = self.test, self.t_pp + self.t_tg
        n_pp = (1 if test.shared else test.n_parallel) * test.n_prompt
        n_tg = test.n_parallel * test.n_gen
        phases = ((n_pp, self.t_pp), (n_tg, self.t_tg), (n_pp + n_tg, t))
        rates = [n / seconds if seconds else 0.0 for n, seconds in phases]
        return (
            test.n_prompt, test.n_gen, test.n_parallel, test.n_kv,
            self.t_pp, rates[0], self.t_tg, rates[1], t, rates[2],
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """llama-batched-bench's keys."""
        keys = ("pp", "tg", "pl", "n_kv", "t_pp", "speed_pp", "t_tg", "speed_tg", "t", "speed")
        setup = {
            "n_batch": self.setup.n_batch,
            "n_ubatch": self.setup.n_batch,
            "is_pp_shared": int(self.test.shared),
            "n_threads": self.setup.n_threads,
            "n_threads_batch": self.setup.n_threads,
            "type_k": self.setup.kv_type,
            "type_v": self.setup.kv_type,
        }
        return {**setup, **dict(zip(keys, self.values(), strict=True))}


def run_batched(
    setup: Setup, tests: Iterable[BatchedTest], repetitions: int, *, progress: Progress | None = None
) -> Iterator[BatchedResult]:
    """Load the model and run the tests in order."""
    tests = list(tests)
    with open_engine(setup, max(test.n_prompt + test.n_gen for test in tests), progress) as engine:
        # The pool's own limit is made for a few conversations, not for dozens of sequences. It grows in slabs that are
        # cut to the limit, so this comes before the first page is taken.
        engine.pool.max_pages = max(engine.pool.max_pages, *(test.n_pages for test in tests))
        sequence = engine.sequence()
        engine.evaluate([(sequence, random_tokens(min(WARMUP_TOKENS, engine.n_ctx), engine.n_vocab))])
        sequence.close()
        for test in tests:
            times = [_run(engine, test) for _ in range(repetitions)]
            yield BatchedResult(setup, test, average([t[0] for t in times]), average([t[1] for t in times]))


def _run(engine: Engine, test: BatchedTest) -> tuple[float, float]:
    """Seconds of the prompts and of the tokens after them."""
    prompts = [
        random_tokens(test.n_prompt + test.n_gen, engine.n_vocab, seed=i) for i in range(test.n_parallel)
    ]
    sequences = [engine.sequence() for _ in range(1 if test.shared else test.n_parallel)]
    began = time.perf_counter()
    if test.n_prompt:
        engine.evaluate([(s, ids[: test.n_prompt]) for s, ids in zip(sequences, prompts, strict=False)])
    t_pp = time.perf_counter() - began
    sequences += [sequences[0].fork() for _ in range(test.n_parallel - len(sequences))]
    began = time.perf_counter()
    for i in range(test.n_prompt, test.n_prompt + test.n_gen):
        engine.evaluate([(s, [ids[i]]) for s, ids in zip(sequences, prompts, strict=True)])
    t_tg = time.perf_counter() - began
    for sequence in sequences:
        sequence.close()
    return t_pp, t_tg


def header() -> list[str]:
    """The two lines above the table."""
    names = " | ".join(f"{name:>{width}}" for name, width in zip(COLUMNS, _WIDTHS, strict=True))
    return [f"|{names} |", "|" + "|".join("-" * (width + 2) for width in _WIDTHS)[1:] + "|"]


def row(result: BatchedResult) -> str:
    formats = ("6d", "6d", "4d", "6d", "8.3f", "8.2f", "8.3f", "8.2f", "8.3f", "8.2f")
    texts = [f"{v:{f}}" for v, f in zip(result.values(), formats, strict=True)]
    return "|" + " | ".join(_fitted(t, width) for t, width in zip(texts, _WIDTHS, strict=True)) + " |"


def _fitted(number: str, width: int) -> str:
    """Without the decimals that there is no room for."""
    whole, point, _ = number.partition(".")
    return number[: max(len(whole), width)].removesuffix(".").rjust(width) if point else number
