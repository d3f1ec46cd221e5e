"""An evaluation that is stopped, by whatever and wherever: prompt, and the sequences stay true."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from engine_laws import assert_same_bits, fresh, open_engine, random_ids, run
from tiny_model import tiny_gguf

from lfm2cpp.engine.engine import Engine
from lfm2cpp.engine.sequence import Sequence

REACTION = 0.3  # seconds
N_PROMPT = 4000
STRIKES = 60


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model big enough to be busy with a prompt for a second or more."""
    path = tmp_path_factory.mktemp("models") / "wide.gguf"
    tiny_gguf(path, types="Q8_0", n_embd=1024, n_head=16, n_head_kv=8, n_ff=2560, n_layer=6, n_ctx_train=8192)
    return path


@pytest.fixture(scope="module")
def engine(path: Path) -> Iterator[Engine]:
    with Engine(path, n_threads=2, n_ctx=8192) as engine:
        yield engine


def control_c(engine: Engine, stop: threading.Event) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def engine_interrupt(engine: Engine, stop: threading.Event) -> None:
    engine.interrupt()


def stop_event(engine: Engine, stop: threading.Event) -> None:
    stop.set()


@pytest.mark.parametrize("way", [control_c, engine_interrupt, stop_event])
def test_a_prefill_stops_at_once_and_can_be_taken_up_again(engine: Engine, way: Callable[..., None]) -> None:
    ids, stop, struck = random_ids(N_PROMPT), threading.Event(), []

    def strike() -> None:
        struck.append(time.monotonic())
        way(engine, stop)

    with engine.sequence() as sequence:
        engine.evaluate([(sequence, ids[:70])])
        timer = threading.Timer(0.2, strike)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            engine.evaluate([(sequence, ids[70:])], stop=stop)
        assert time.monotonic() - struck[0] < REACTION
        timer.join()
        assert sequence.tokens == tuple(ids[: sequence.n_past]) and 70 <= sequence.n_past < N_PROMPT
        sequence.truncate(min(sequence.n_past, 600))  # no need to check it all
        end = sequence.n_past + 50
        found = run(engine, sequence, ids[sequence.n_past : end])
        assert_same_bits(found, fresh(engine, ids[:end])[-len(found) :])


def test_closing_stops_a_prefill_at_once(path: Path) -> None:
    engine = Engine(path, n_threads=2, n_ctx=8192)
    took: list[float] = []

    def close() -> None:
        began = time.monotonic()
        engine.close()
        took.append(time.monotonic() - began)

    timer = threading.Timer(0.2, close)
    sequence = engine.sequence()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        engine.evaluate([(sequence, random_ids(N_PROMPT))])
    timer.join()
    assert took[0] < REACTION


def test_a_stop_that_came_before_changes_nothing(engine: Engine) -> None:
    stop = threading.Event()
    stop.set()
    with engine.sequence() as sequence:
        engine.evaluate([(sequence, random_ids(140))])
        for n, n_evaluated in ((137, 137), (67, 64)):  # by a few tokens, and by more than it keeps columns of
            sequence.truncate(n)
            for ids in ([20], random_ids(100)):
                with pytest.raises(KeyboardInterrupt):
                    engine.evaluate([(sequence, ids)], stop=stop)
                assert sequence.tokens == tuple(random_ids(140)[:n]) and sequence.state.n_past == n_evaluated


@pytest.mark.parametrize("n", [10, 64, 100, 130])
def test_a_sequence_that_was_torn_off_twice(tmp_path: Path, n: int) -> None:
    """A second exception may come before the first one's damage is repaired: whoever uses the sequence next does it."""
    ids = random_ids(150)
    uses = [
        lambda s: None,
        lambda s: s.truncate(max(0, n - 3)),
        lambda s: s.reuse_prefix(ids),
        lambda s: s.save(tmp_path / "state", force=True),
    ]
    with open_engine(tmp_path, "q8_0") as engine:
        expected = fresh(engine, ids)
        for use in uses:
            sequence = engine.sequence()
            engine.evaluate([(sequence, ids[:n])])
            sequence.state.settled = False
            sequence.state.conv.view(np.float32)[:] = 99.0
            sequence.state.reserve(100)
            use(sequence)
            kept = sequence.n_past
            assert sequence.tokens == tuple(ids[:kept])
            assert_same_bits(run(engine, sequence, ids[kept:]), expected[kept:])
            fork = sequence.fork()
            assert_same_bits(run(engine, fork, [20]), fresh(engine, [*ids, 20])[-1:])


class Strike(BaseException):
    """Raised by a signal handler, between any two lines of Python."""


@pytest.fixture
def striking() -> Iterator[Callable[[float], None]]:
    def strike(number: int, frame: object) -> None:
        raise Strike

    old = signal.signal(signal.SIGALRM, strike)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds) and None
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, old)


@pytest.mark.parametrize("sizes", [[1] * 400, [90, 1, 1, 30, 2] * 10])
def test_an_exception_anywhere_leaves_true_sequences(
    tmp_path: Path, striking: Callable[[float], None], sizes: list[int]
) -> None:
    """Signals at random moments, in decode and in prefill, of two sequences that share a page."""
    rng, story, n_struck = np.random.default_rng(0), random_ids(900), 0
    with open_engine(tmp_path, "q8_0", n_threads=2) as engine, open_engine(tmp_path, "q8_0") as oracle:
        first = engine.sequence()
        engine.evaluate([(first, story[:75])])
        second = first.fork()
        for _ in range(STRIKES):
            known = [first.tokens, second.tokens]
            try:
                striking(float(rng.uniform(5e-5, 0.01)))
                for size in sizes:
                    batch = [(s, story[s.n_past : s.n_past + size]) for s in (first, second)]
                    engine.evaluate([(s, ids) for s, ids in batch if ids])
                    if first.n_past > 700:
                        break
            except Strike:
                n_struck += 1
            finally:
                striking(0)
            for sequence, tokens in zip((first, second), known, strict=True):
                assert sequence.tokens[: len(tokens)] == tokens and sequence.tokens == tuple(story[: sequence.n_past])
                sequence.truncate(min(sequence.n_past, int(rng.integers(75, 400))))
        assert n_struck > STRIKES // 2
        for sequence in (first, second):
            found = run(engine, sequence, story[sequence.n_past : 420])
            assert_same_bits(found, fresh(oracle, story[:420])[-len(found) :])
        assert lost_pages(engine, [first, second]) <= n_struck // 10


def lost_pages(engine: Engine, sequences: list[Sequence]) -> int:
    """Pages that are counted as held, but by nobody: a strike between two lines may cost one, never free one in use."""
    held = {page for s in sequences for page in s.state.pages} | set(engine.pool.prefixes.values())
    assert not held & set(engine.pool._free)
    return len(engine.pool._references) - len(engine.pool._free) - len(held)
