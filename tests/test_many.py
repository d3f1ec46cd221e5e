"""Many prompts at a time: each gets the answer that it gets alone, whatever becomes of the others (G19, E2)."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_laws import TokenCounter, audit
from tiny_model import tiny_gguf

from lfm2cpp import LLM
from lfm2cpp.errors import ContextError, LFM2Error, UsageError
from lfm2cpp.generate import Generation, Request
from lfm2cpp.llm import BatchItem
from lfm2cpp.many import generate_many
from lfm2cpp.sampling import NonFiniteLogits, SamplingParams

BROKEN = 60  # a token whose embedding is NaN
SAMPLED: dict[str, Any] = {"max_tokens": 20, "temp": 1.2, "min_p": 0.0, "seed": 7, "ignore_eos": True}


@pytest.fixture(scope="module", params=["Q4_0", "BF16"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = tiny_gguf(tmp_path_factory.mktemp("many") / "m.gguf", n_vocab=400, n_ctx_train=4096, types=request.param)
    with LLM(path, n_ctx=1024, n_threads=2) as llm:
        yield llm


def ids(n: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(100, 300, n).tolist()


def answer_of(outcome: Any) -> tuple[Any, ...]:
    if not isinstance(outcome, Generation):
        raise outcome
    return outcome.token_ids, outcome.text, outcome.finish_reason, outcome.detail, outcome.seed


@pytest.mark.parametrize("n_parallel", [1, 3, 8])
def test_answers_are_those_of_each_prompt_alone(llm: LLM, n_parallel: int) -> None:
    """Prompts of any length, text, ids and conversations, answers that end at different times, greedy and sampled."""
    prompts: list[Any] = [ids(n, n) for n in (1, 63, 64, 65, 700, 2, 130, 5, 90)]
    prompts += ["some text", [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]]
    items = [BatchItem(p, {"max_tokens": 5 + 7 * i % 40, "seed": i}) for i, p in enumerate(prompts)]
    items.append(BatchItem(ids(1000, 3), {"max_tokens": 100}))  # until the context is full
    items.append(BatchItem(ids(30, 9), {"temp": 0.0, "stop": ["a", "e"], "ignore_eos": False}))
    alone = []
    for item in items:
        ask = llm.chat if isinstance(item.prompt[0], dict) else llm.generate
        alone.append(answer_of(ask(item.prompt, draft_max=0, **SAMPLED | dict(item.options))))
    found = [answer_of(outcome) for outcome in llm.batch(items, n_parallel=n_parallel, **SAMPLED).in_order()]
    assert found == alone
    audit(llm._session.engine, [])


def test_answers_come_as_they_end(llm: LLM) -> None:
    prompts = [BatchItem(ids(20, n), {"max_tokens": n}) for n in (30, 2, 9)]
    found = list(llm.batch(prompts, ignore_eos=True))
    assert [number for number, _ in found] == [1, 2, 0]
    assert [len(outcome.token_ids) for _, outcome in found if isinstance(outcome, Generation)] == [2, 9, 30]


def test_what_cannot_be_asked_is_an_error_of_its_own(llm: LLM) -> None:
    prompts: list[Any] = [
        ids(20, 1), ids(1025, 2), BatchItem(ids(5, 3), {"temp": -1}), [], BatchItem("x", {"colour": "red"}), [4000],
        [{"role": 5}], ids(20, 4),
    ]  # fmt: skip
    outcomes = list(llm.batch(prompts, **SAMPLED).in_order())
    messages = [str(outcome) if isinstance(outcome, LFM2Error) else "" for outcome in outcomes]
    assert [bool(message) for message in messages] == [False, True, True, True, True, True, True, False]
    assert isinstance(outcomes[1], ContextError) and "prompt 1025 > ctx 1024" in messages[1]
    assert "temp is -1" in messages[2] and "no tokens" in messages[3] and "unknown option colour" in messages[4]
    assert "token id 4000" in messages[5]
    for i in (0, 7):
        assert answer_of(outcomes[i]) == answer_of(llm.generate(prompts[i], **SAMPLED))


@pytest.mark.parametrize(
    "item",
    [
        5, None, 1.5, BatchItem("x", {"stop": 5}), BatchItem("x", {"stop": True}), BatchItem("x", {"sampling": {}, "temp": "hot"}),
        BatchItem("x", {"sampling": 5}), BatchItem("x", {"logit_bias": 5}), BatchItem("x", {"max_tokens": "x"}),
        BatchItem("x", {"draft_max": "x"}), BatchItem("x", {"seed": []}), BatchItem("x", {"top_k": {}}),
    ],
)  # fmt: skip
def test_values_of_any_kind_are_errors_of_their_own(llm: LLM, item: Any) -> None:
    first, bad, last = llm.batch([ids(3, 1), item, ids(3, 2)], max_tokens=2).in_order()
    assert isinstance(bad, UsageError) and isinstance(first, Generation) and isinstance(last, Generation)


def test_a_batch_of_nothing_that_runs_can_be_stopped(llm: LLM) -> None:
    batch = llm.batch(itertools.repeat([]))
    assert isinstance(next(batch)[1], UsageError)
    began = time.monotonic()
    batch.close()
    assert time.monotonic() - began < 2
    with pytest.raises(UsageError, match="put a single one into a list"):
        llm.batch("abc")


def test_prompts_that_use_the_model_are_refused(llm: LLM) -> None:
    """They would wait for the batch that waits for them."""
    with pytest.raises(UsageError, match="must not come from the LLM itself"):
        list(llm.batch((llm.generate("q", max_tokens=1).token_ids for _ in range(1)), max_tokens=1))
    assert llm.generate(ids(5, 1), **SAMPLED).token_ids


def test_a_batch_has_the_memory_of_the_conversation_before(llm: LLM) -> None:
    with LLM(llm.path, n_ctx=256) as small:
        small._session.engine.pool.max_pages = 5
        small.generate(ids(250, 1), max_tokens=1)
        assert answer_of(*small.batch([ids(250, 2)], max_tokens=6, ignore_eos=True).in_order())


@pytest.mark.parametrize("n_parallel", [0, 65, 1.5, "8", True])
def test_how_many_at_a_time(llm: LLM, n_parallel: Any) -> None:
    with pytest.raises(UsageError, match="n_parallel is .*, expected a number from 1 to 64"):
        llm.batch([[1]], n_parallel=n_parallel)
    with pytest.raises(UsageError, match="unknown option tmp"):
        llm.batch([[1]], tmp=1)


def test_nan_in_one_sequence_is_its_error_alone(tmp_path: Path) -> None:
    """G19."""

    def spoil(weights: dict[str, np.ndarray]) -> None:
        weights["token_embd.weight"][BROKEN] = np.nan

    path = tiny_gguf(tmp_path / "nan.gguf", n_vocab=400, types="F32", tied=False, edit=spoil)
    prompts = [ids(20, 1), [*ids(70, 2), BROKEN, 101], ids(3, 4), [BROKEN], ids(90, 5)]
    with LLM(path, n_ctx=512) as llm:
        bias = {BROKEN: -np.inf}
        outcomes = list(llm.batch(prompts, logit_bias=bias, **SAMPLED).in_order())
        for i, outcome in enumerate(outcomes):
            if BROKEN in prompts[i]:
                assert isinstance(outcome, NonFiniteLogits) and "token_embd.weight" in str(outcome)
            else:
                assert answer_of(outcome) == answer_of(llm.generate(prompts[i], logit_bias=bias, **SAMPLED))


def test_requests_wait_for_memory(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer run at a time than asked for, and what was begun in vain begins again; the answers are the same."""
    prompts = [ids(n, n) for n in (300, 250, 310, 40, 480, 200, 30)]
    with LLM(llm.path, n_ctx=512, n_threads=2) as small:
        engine = small._session.engine
        engine.pool.max_pages = 9
        counter = TokenCounter(engine, monkeypatch)
        found = [answer_of(outcome) for outcome in small.batch(prompts, **SAMPLED).in_order()]
        assert counter.count > sum(map(len, prompts)) + len(prompts) * 20
        audit(engine, [])
    assert found == [answer_of(llm.generate(prompt, **SAMPLED)) for prompt in prompts]


def test_a_common_beginning_is_read_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    beginning = ids(320, 77)
    prompts = [[*beginning, *ids(10, n)] for n in range(6)]
    counter = TokenCounter(llm._session.engine, monkeypatch)
    found = [answer_of(outcome) for outcome in llm.batch(prompts, **SAMPLED).in_order()]
    assert counter.count < 320 + 6 * (10 + 20)
    assert found == [answer_of(llm.generate(prompt, **SAMPLED)) for prompt in prompts]


def test_a_batch_can_be_stopped_and_dropped(llm: LLM) -> None:
    endless: dict[str, Any] = {"max_tokens": None, "ignore_eos": True}
    with llm.batch([BatchItem(ids(5, 1), {"max_tokens": 2}), *[ids(5, n) for n in range(20)]], **endless) as batch:
        number, first = next(batch)
        assert number == 0 and answer_of(first)[2] == "length"
        batch.stop()
        assert list(batch) == []
    del batch
    llm.batch([ids(5, n) for n in range(20)], **endless)  # nobody looks at it
    assert answer_of(llm.generate(ids(5, 1), **SAMPLED))
    audit(llm._session.engine, [llm._session._sequence])


def test_closing_ends_a_batch_with_an_error(llm: LLM) -> None:
    with LLM(llm.path, n_ctx=512) as other:
        batch = other.batch([BatchItem(ids(5, 1), {"max_tokens": 2}), *[ids(5, n) for n in range(20)]], ignore_eos=True)
        next(batch)
        other.close()
        with pytest.raises(UsageError, match="was closed while it generated"):
            list(batch.in_order())


def test_requests_are_made_when_it_is_their_turn(llm: LLM) -> None:
    made: list[int] = []

    def ask(n: int) -> Request:
        made.append(n)
        return Request(tuple(ids(5, n)), SamplingParams(seed=1), max_tokens=3, ignore_eos=True)

    asks = (partial(ask, n) for n in range(7))
    session, n_ended = llm._session, 0
    for _ in generate_many(session.engine, session.vocab, asks, n_parallel=2, stop=threading.Event()):
        n_ended += 1
        assert n_ended <= len(made) <= n_ended + 1
    assert made == list(range(7)) and n_ended == 7
    audit(session.engine, [session._sequence] if session._sequence else [])


def test_an_error_of_the_prompts_themselves_is_raised(llm: LLM) -> None:
    def prompts() -> Iterator[list[int]]:
        yield from [ids(5, n) for n in range(6)]
        raise RuntimeError("no more")

    numbers = []
    with pytest.raises(RuntimeError, match="no more"):
        for number, _ in llm.batch(prompts(), n_parallel=2, max_tokens=3, ignore_eos=True):
            numbers.append(number)
    assert len(numbers) >= 4
    assert llm.generate(ids(5, 1), **SAMPLED).token_ids
