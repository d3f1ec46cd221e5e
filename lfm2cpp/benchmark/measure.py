"""Tests as llama-bench defines them, on an engine: pp, tg and pp+tg at a depth, a warm-up first, then samples.

Only evaluation is inside the clock. Tokens are random but the same in every repetition; the context that a depth asks
for is evaluated once, outside the clock, and shared by the tests that begin there.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path

import numpy as np

from lfm2cpp.engine.engine import Engine
from lfm2cpp.engine.sequence import Sequence
from lfm2cpp.ggml import FileType
from lfm2cpp.gguf import GGUFFile
from lfm2cpp.kernels.library import Progress

from .shapes import NAME_OF_N_FF


@dataclass(frozen=True)
class Setup:
    """What an engine is made for."""

    path: Path
    n_threads: int
    n_batch: int = 512
    kv_type: str = "f16"


@dataclass(frozen=True)
class Test:
    """n_prompt tokens at once, then n_gen one by one, behind n_depth tokens of context."""

    n_prompt: int
    n_gen: int
    n_depth: int = 0

    @property
    def name(self) -> str:
        """pp512, tg128, pp512+tg128, with ` @ d4096` behind."""
        parts = [f"pp{self.n_prompt}"] * (self.n_prompt > 0) + [f"tg{self.n_gen}"] * (self.n_gen > 0)
        return "+".join(parts) + (f" @ d{self.n_depth}" if self.n_depth else "")

    @property
    def n_tokens(self) -> int:
        return self.n_prompt + self.n_gen


@dataclass(frozen=True)
class ModelInfo:
    """A file as llama-bench describes it: `lfm2 350M Q4_0`, bytes of all tensors, number of weights."""

    filename: str
    type: str
    size: int
    n_params: int

    @classmethod
    def of(cls, engine: Engine) -> ModelInfo:
        gguf = engine.gguf
        n_params = sum(int(np.prod(info.shape, dtype=object)) for info in gguf.tensors.values())
        size = sum(info.nbytes for info in gguf.tensors.values())
        name = NAME_OF_N_FF.get(engine.hparams.n_ff, "?B")
        return cls(str(engine.path), f"{engine.facts.arch.NAME} {name} {_file_type(gguf)}", size, n_params)


@dataclass
class Result:
    """The samples of one test. `test_time` is RFC 3339, when the test began."""

    setup: Setup
    test: Test
    model: ModelInfo
    test_time: str
    samples_ns: list[int] = field(default_factory=list)

    @property
    def samples_ts(self) -> list[float]:
        """Tokens a second, by sample."""
        return [1e9 * self.test.n_tokens / ns for ns in self.samples_ns]


def average(samples: list[float] | list[int]) -> float:
    return sum(samples) / len(samples) if samples else 0.0


def deviation(samples: list[float] | list[int]) -> float:
    """Standard deviation of a sample; 0 for one."""
    return statistics.stdev(samples) if len(samples) > 1 else 0.0


def run_tests(
    setup: Setup, tests: Iterable[Test], repetitions: int, *, warmup: bool = True, progress: Progress | None = None
) -> Iterator[Result]:
    """Load the model and run the tests in order. Compilation is over before the first sample.

    Raises UsageError before loading takes long when a test does not fit the model's context.
    """
    tests = list(tests)
    n_ctx = max(test.n_depth + test.n_tokens for test in tests)
    with open_engine(setup, n_ctx, progress) as engine:
        model = ModelInfo.of(engine)
        base = Base(engine)
        for test in tests:
            yield _run_test(Runner(engine, base.at(test.n_depth)), setup, test, model, repetitions, warmup)


def open_engine(setup: Setup, n_ctx: int, progress: Progress | None = None) -> Engine:
    return Engine(
        setup.path, n_ctx=n_ctx, n_threads=setup.n_threads, kv_type=setup.kv_type, n_batch=setup.n_batch,
        progress=progress,
    )  # fmt: skip


def random_tokens(n: int, n_vocab: int, seed: int = 0) -> list[int]:
    """n ids; the first ones do not depend on n."""
    return (np.random.default_rng(seed).random(n) * n_vocab).astype(int).tolist()


class Base:
    """The context that tests of one depth share: evaluated when first asked for, let go for the next depth."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._sequence: Sequence | None = None

    def at(self, n_depth: int) -> Sequence:
        """A sequence of n_depth random tokens, to be forked, not changed."""
        if self._sequence is None or self._sequence.n_past != n_depth:
            if self._sequence is not None:
                self._sequence.close()
            self._sequence = self._engine.sequence()
            if n_depth:
                tokens = random_tokens(n_depth, self._engine.n_vocab, seed=1)
                self._engine.evaluate([(self._sequence, tokens)], logits="none")
        return self._sequence


class Runner:
    """Runs a test behind a base sequence."""

    def __init__(self, engine: Engine, base: Sequence) -> None:
        self.engine, self.base = engine, base

    def run(self, n_prompt: int, n_gen: int) -> list[int]:
        """Nanoseconds that each evaluation takes: the prompt's, then every token's."""
        sequence = self.base.fork()
        evaluate = self.engine.evaluate
        tokens = random_tokens(n_prompt + n_gen, self.engine.n_vocab)
        prompt, generated = tokens[:n_prompt], tokens[n_prompt:]
        marks = [time.perf_counter_ns()]
        if prompt:
            evaluate([(sequence, prompt)])
            marks.append(time.perf_counter_ns())
        for token in generated:
            evaluate([(sequence, [token])])
            marks.append(time.perf_counter_ns())
        sequence.close()
        return [end - begin for begin, end in pairwise(marks)]


def _run_test(
    runner: Runner, setup: Setup, test: Test, model: ModelInfo, repetitions: int, warmup: bool
) -> Result:
    result = Result(setup, test, model, datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"))
    if warmup:
        runner.run(test.n_prompt, min(test.n_gen, 1))
    for _ in range(repetitions):
        gc.collect()
        result.samples_ns.append(sum(runner.run(test.n_prompt, test.n_gen)))
    return result


def _file_type(gguf: GGUFFile) -> str:
    """general.file_type as llama.cpp spells it."""
    value = gguf.metadata.get("general.file_type")
    try:
        file_type = FileType(value.value if value is not None else -1)
    except ValueError:
        return "unknown"
    if file_type == FileType.F32:
        return "all F32"
    sizes = {"_S": " - Small", "_M": " - Medium", "_L": " - Large"}
    name = file_type.name
    return name[:-2] + sizes[name[-2:]] if name[-2:] in sizes else name
