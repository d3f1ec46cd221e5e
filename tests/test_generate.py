"""The generation loop on a scripted engine: ends, limits, interruption, timings (cases E2, E3, E5, E7, E8, A27)."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vocab_model import golden_gguf

from lfm2cpp.errors import ContextError, UsageError
from lfm2cpp.generate import Event, Generation, Piece, Prefill, Request, generate
from lfm2cpp.gguf import read_gguf
from lfm2cpp.lookup import DRAFT_MAX
from lfm2cpp.sampling import SamplingError, SamplingParams
from lfm2cpp.text.vocab import Vocab

GREEDY = SamplingParams(temp=0.0, repeat_penalty=1.0)
END = 7

pytestmark = pytest.mark.usefixtures("steady_machine")


@pytest.fixture(scope="module")
def vocab(tmp_path_factory: pytest.TempPathFactory) -> Vocab:
    return Vocab(read_gguf(golden_gguf(tmp_path_factory.mktemp("vocab") / "v.gguf", n_pad=6)))


class FakeSequence:
    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self.tokens = list(tokens)

    @property
    def n_past(self) -> int:
        return len(self.tokens)

    def truncate(self, n_past: int) -> None:
        del self.tokens[n_past:]


class FakeEngine:
    """Says `script` after a prompt of `n_prompt` tokens, then END, whatever the tokens were; keeps the engine's promises
    about errors. `doubt` adds noise to the logits, the same at a position each time."""

    def __init__(self, n_prompt: int, script: Sequence[int], *, n_ctx: int = 4096, n_vocab: int = 1032) -> None:
        self.n_ctx, self.n_vocab = n_ctx, n_vocab
        self.n_prompt, self.script = n_prompt, list(script)
        self.calls: list[tuple[int, str]] = []
        self.before: Callable[[], None] = lambda: None
        self.spoil: Callable[[np.ndarray], None] = lambda row: None
        self.doubt = 0.0

    def evaluate(self, batch: Any, *, logits: str = "last", stop: threading.Event | None = None) -> list[np.ndarray]:
        ((sequence, ids),) = batch
        assert len(ids) > 0 and sequence.n_past + len(ids) <= self.n_ctx
        self.before()
        if stop is not None and stop.is_set():
            raise KeyboardInterrupt
        self.calls.append((len(ids), logits))
        sequence.tokens += ids
        end = len(sequence.tokens)
        wanted = {"last": range(end, end + 1), "all": range(end - len(ids) + 1, end + 1), "none": range(0)}[logits]
        return [np.stack([self.row(n) for n in wanted]) if wanted else np.zeros((0, self.n_vocab), np.float32)]

    def row(self, n: int) -> np.ndarray:
        """Logits after n tokens."""
        at = n - self.n_prompt
        row = self.doubt * np.random.default_rng(n).standard_normal(self.n_vocab).astype(np.float32)
        row[self.script[at] if 0 <= at < len(self.script) else END] = 9
        row[1024:] = 50  # unused rows are the most probable ones
        self.spoil(row)
        return row


def run(
    vocab: Vocab, script: Sequence[int], *, n_prompt: int = 3, cached: int = 0, **options: Any
) -> tuple[Generation, list[Event], FakeEngine, FakeSequence]:
    n_ctx, stop_event = options.pop("n_ctx", 4096), options.pop("stop_event", None)
    prepare = options.pop("prepare", lambda engine: None)
    prompt = options.pop("prompt", tuple(range(14, 14 + n_prompt)) if n_prompt <= 200 else (20,) * n_prompt)
    engine, sequence = FakeEngine(n_prompt, script, n_ctx=n_ctx), FakeSequence(prompt[:cached])
    prepare(engine)
    events: list[Event] = []
    request = Request(prompt, options.pop("sampling", GREEDY), **options)
    result = generate(engine, sequence, vocab, request, emit=events.append, stop=stop_event)
    return result, events, engine, sequence


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Piece))


def test_an_answer_ends_at_the_end_token(vocab: Vocab) -> None:
    ids = vocab.tokenize("Hello world")
    result, events, engine, sequence = run(vocab, ids)
    assert result.text == text_of(events) == "Hello world"
    assert result.token_ids == (*ids, END) and result.finish_reason == "stop" and "<|im_end|>" in result.detail
    assert sequence.tokens == [14, 15, 16, *ids]  # the end token is not evaluated
    assert engine.calls == [(3, "last"), *[(1, "last")] * len(ids)]


def test_unused_rows_are_never_chosen(vocab: Vocab) -> None:
    result, *_ = run(vocab, vocab.tokenize("hi"), sampling=SamplingParams(temp=5.0, min_p=0.0), max_tokens=50)
    assert max(result.token_ids) < 1024


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_max_tokens(vocab: Vocab, limit: int) -> None:
    ids = vocab.tokenize("Hello world")
    result, _, engine, _ = run(vocab, ids, max_tokens=limit)
    assert result.token_ids == tuple(ids[:limit]) and result.finish_reason == "length"
    assert len(engine.calls) == limit  # nothing is evaluated for a token that nobody wants


def test_max_tokens_zero_only_evaluates(vocab: Vocab) -> None:
    result, events, engine, sequence = run(vocab, [20], max_tokens=0)
    assert (result.text, result.token_ids, result.finish_reason) == ("", (), "length")
    assert sequence.tokens == [14, 15, 16] and len(engine.calls) == 1
    assert not any(isinstance(event, Piece) for event in events)


@pytest.mark.parametrize("limit", [None, -1])
def test_no_limit_means_until_the_end(vocab: Vocab, limit: int | None) -> None:
    result, *_ = run(vocab, [20] * 300, max_tokens=limit)
    assert len(result.token_ids) == 301 and result.finish_reason == "stop"


@pytest.mark.parametrize("limit", [-2, 1.5, "3", True, 2**31])
def test_limits_that_are_none_are_refused(limit: Any) -> None:
    with pytest.raises(UsageError, match="max_tokens is"):
        Request((1,), GREEDY, max_tokens=limit)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(UsageError, match="no tokens"):
        Request((), GREEDY)


# -- the context's end (E2, E3) -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_prompt", "n_answer"), [(7, 2), (8, 1), (6, 3)])
def test_the_context_is_used_to_its_last_place(vocab: Vocab, n_prompt: int, n_answer: int) -> None:
    """n_ctx 8: a prompt of 8 still gives the one token that follows it."""
    result, _, _, sequence = run(vocab, [20] * 20, n_prompt=n_prompt, n_ctx=8)
    assert len(result.token_ids) == n_answer and sequence.n_past == 8
    assert result.finish_reason == "length" and result.detail == "the context of 8 tokens is full"


def test_a_prompt_longer_than_the_context_is_refused_before_anything_happens(vocab: Vocab) -> None:
    calls: list[FakeEngine] = []
    with pytest.raises(ContextError, match="prompt 9 > ctx 8 tokens"):
        run(vocab, [20], n_prompt=9, n_ctx=8, prepare=calls.append)
    assert calls[0].calls == []


# -- what is left to evaluate, and its progress ---------------------------------------------------------------------


def test_only_what_is_new_is_evaluated(vocab: Vocab) -> None:
    result, events, engine, _ = run(vocab, [20], n_prompt=100, cached=60)
    assert engine.calls[0] == (40, "last")
    assert (result.timings.cache_n, result.timings.prompt_n) == (60, 40)
    assert events[0] == Prefill(100, 100)


def test_long_prompts_report_progress(vocab: Vocab) -> None:
    _, events, engine, _ = run(vocab, [20], n_prompt=1300)
    assert [event for event in events if isinstance(event, Prefill)] == [
        Prefill(0, 1300), Prefill(512, 1300), Prefill(1024, 1300), Prefill(1300, 1300),
    ]  # fmt: skip
    assert [call for call in engine.calls if call[0] > 1] == [(512, "none"), (512, "none"), (276, "last")]


def test_timings_add_up(vocab: Vocab) -> None:
    result, *_ = run(vocab, [20] * 5)
    t = result.timings
    assert (t.prompt_n, t.predicted_n) == (3, 6) and t.prompt_ms > 0 and t.predicted_ms > 0
    assert t.predicted_per_second == pytest.approx(1e3 * t.predicted_n / t.predicted_ms)


# -- stop strings and characters (E7, E8) ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "text"),
    [(("world",), "Hello "), (("lo w",), "Hel"), (("",), "Hello world"), (("xyz", "o"), "Hell"), (("H",), "")],
)
def test_stop_strings_over_several_tokens(vocab: Vocab, stop: tuple[str, ...], text: str) -> None:
    result, events, *_ = run(vocab, vocab.tokenize("Hello world"), stop=stop)
    assert result.text == text_of(events) == text and result.finish_reason == "stop"
    assert ("stop string" in result.detail) == any(stop)


def test_too_many_stops_are_refused() -> None:
    with pytest.raises(UsageError, match="stop holds 65 entries"):
        Request((1,), GREEDY, stop=("x",) * 65)
    with pytest.raises(UsageError, match="stop holds"):
        Request((1,), GREEDY, stop=(1,))  # type: ignore[arg-type]


def test_characters_are_whole_in_every_event(vocab: Vocab) -> None:
    ids = vocab.tokenize("é👩\u200d👧日本")
    result, events, *_ = run(vocab, ids)
    assert result.text == "é👩\u200d👧日本" and "\ufffd" not in text_of(events)
    assert sum(isinstance(event, Piece) for event in events) == len(ids)


def test_an_answer_cut_inside_a_character_says_so_at_its_end(vocab: Vocab) -> None:
    ids = vocab.tokenize("a👩")
    result, events, *_ = run(vocab, ids, max_tokens=len(ids) - 1)
    assert result.text == text_of(events) == "a\ufffd"
    assert [e.text for e in events if isinstance(e, Piece)][-1] == "\ufffd"


def test_special_tokens_show_only_on_request(vocab: Vocab) -> None:
    ids = [6, *vocab.tokenize("a"), 10, 11]
    assert run(vocab, ids)[0].text == "a<|tool_call_start|><|tool_call_end|>"
    assert run(vocab, ids, show_special=True)[0].text == "<|im_start|>a<|tool_call_start|><|tool_call_end|>"


# -- ends of other kinds --------------------------------------------------------------------------------------------


def test_all_masked_ends_the_answer(vocab: Vocab) -> None:
    """E5: an error text and no endless loop."""
    bias = {i: -math.inf for i in range(1024)}
    result, *_ = run(vocab, [20], sampling=SamplingParams(logit_bias=bias))
    assert (result.finish_reason, result.token_ids) == ("stop", ()) and "forbidden" in result.detail


def test_ignore_eos_forbids_end_tokens(vocab: Vocab) -> None:
    result, *_ = run(vocab, [20, 20], ignore_eos=True, max_tokens=30)
    assert len(result.token_ids) == 30 and not vocab.eog_ids & set(result.token_ids)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_logits_stop_with_an_error(vocab: Vocab, bad: float) -> None:
    def spoil(engine: FakeEngine) -> None:
        engine.spoil = lambda row: row.__setitem__(3, bad)

    with pytest.raises(SamplingError, match="non-finite logits .token 3"):
        run(vocab, [20], prepare=spoil)


@pytest.mark.parametrize("n_calls", [0, 1, 2, 6])
def test_an_interruption_keeps_what_was_said(vocab: Vocab, n_calls: int) -> None:
    stop, ids = threading.Event(), vocab.tokenize("Hello world")

    def prepare(engine: FakeEngine) -> None:
        engine.before = lambda: stop.set() if len(engine.calls) == n_calls else None

    result, events, _, sequence = run(vocab, ids, stop_event=stop, prepare=prepare)
    assert result.finish_reason == "interrupted"
    assert result.text == text_of(events) == vocab.detokenize(ids[: len(result.token_ids)])
    assert len(result.token_ids) == n_calls
    # The sequence holds a prefix of prompt and answer: the next turn goes on from there.
    assert sequence.tokens == [14, 15, 16, *ids][: len(sequence.tokens)]


def test_an_interruption_in_the_middle_of_a_long_prompt(vocab: Vocab) -> None:
    stop = threading.Event()

    def prepare(engine: FakeEngine) -> None:
        engine.before = lambda: stop.set() if len(engine.calls) == 2 else None

    result, _, _, sequence = run(vocab, [20], n_prompt=2000, stop_event=stop, prepare=prepare)
    assert (result.finish_reason, result.text, sequence.n_past) == ("interrupted", "", 1024)
    assert result.timings.prompt_n == 1024


def test_a_keyboard_interrupt_of_somebody_else_passes(vocab: Vocab) -> None:
    def prepare(engine: FakeEngine) -> None:
        def interrupt() -> None:
            raise KeyboardInterrupt

        engine.before = interrupt

    with pytest.raises(KeyboardInterrupt):
        run(vocab, [20], prepare=prepare)


def test_penalties_see_the_prompt_and_the_answer(vocab: Vocab) -> None:
    def prepare(engine: FakeEngine) -> None:
        engine.spoil = lambda row: row.__setitem__(slice(None), [0.0] * 14 + [1.0] * 10 + [0.0] * 1008)

    sampling = SamplingParams(temp=0.0, presence_penalty=5.0, repeat_penalty=1.0)
    result, *_ = run(vocab, [], n_prompt=3, sampling=sampling, max_tokens=7, prepare=prepare)
    assert result.token_ids == (17, 18, 19, 20, 21, 22, 23)  # 14, 15, 16 are the prompt


# -- drafts from the text -------------------------------------------------------------------------------------------

WORDS = ([20, 21, 22, 23, 24, 25], [30, 31, 32], [20, 21, 22, 40], [50], [20] * 9)
scripts = st.lists(st.sampled_from(WORDS), max_size=30).map(lambda words: [token for word in words for token in word])


def drafted(vocab: Vocab, script: Sequence[int], **options: Any) -> tuple[Generation, FakeEngine, FakeSequence]:
    """An answer with drafts, after it was found to be that of the same request without them."""
    plain, plain_events, _, held = run(vocab, script, **{**options, "draft_max": 0})
    result, events, engine, sequence = run(vocab, script, **options)
    assert (result.token_ids, result.text) == (plain.token_ids, plain.text)
    assert (result.finish_reason, result.detail) == (plain.finish_reason, plain.detail)
    assert [e for e in events if isinstance(e, Piece)] == [e for e in plain_events if isinstance(e, Piece)]
    assert sequence.tokens == held.tokens
    t, n_evaluated = result.timings, sum(n for n, _ in engine.calls)
    assert 0 <= t.draft_n_accepted <= t.draft_n and plain.timings.draft_n == 0
    assert n_evaluated <= len(result.prompt_ids) + len(result.token_ids) + t.draft_n - t.draft_n_accepted
    return result, engine, sequence


@settings(max_examples=150, deadline=None)
@given(
    prompt=scripts, script=scripts, doubt=st.sampled_from([0.0, 2.0, 5.0]), penalty=st.sampled_from([1.0, 1.05, 3.0]),
    temp=st.sampled_from([0.0, 1.0]), max_tokens=st.sampled_from([None, 1, 7, 60]), room=st.sampled_from([4000, 1, 25]),
    stop=st.sampled_from([(), ("66",), ("A",)]), draft_max=st.sampled_from([1, 4, DRAFT_MAX]),
)  # fmt: skip
def test_drafts_do_not_change_an_answer(
    vocab: Vocab, prompt: list[int], script: list[int], doubt: float, penalty: float, temp: float,
    max_tokens: int | None, room: int, stop: tuple[str, ...], draft_max: int,
) -> None:  # fmt: skip
    """Greedy or sampled, ended by whatever ends it; what the sequence holds afterwards is the same as well."""

    def prepare(engine: FakeEngine) -> None:
        engine.doubt = doubt

    sampling = SamplingParams(temp=temp, min_p=0.01, repeat_penalty=penalty, seed=5)
    ids = (14, 15, 16, *prompt)
    result, engine, _ = drafted(
        vocab, script, prompt=ids, n_prompt=len(ids), n_ctx=len(ids) + room, sampling=sampling, prepare=prepare,
        max_tokens=max_tokens, stop=stop,
    )  # fmt: skip
    assert all(n <= 1 + DRAFT_MAX for n, _ in engine.calls[1:])
    fewer, fewer_engine, _ = drafted(
        vocab, script, prompt=ids, n_prompt=len(ids), n_ctx=len(ids) + room, sampling=sampling, prepare=prepare,
        max_tokens=max_tokens, stop=stop, draft_max=draft_max,
    )  # fmt: skip
    assert fewer.token_ids == result.token_ids and all(n <= 1 + draft_max for n, _ in fewer_engine.calls[1:])


def test_an_answer_that_repeats_the_prompt_takes_few_steps(vocab: Vocab) -> None:
    text = list(range(100, 300))
    result, engine, sequence = drafted(vocab, text, prompt=(14, *text, 15), n_prompt=202)
    assert result.token_ids == (*text, END) and sequence.tokens == [14, *text, 15, *text]
    assert len(engine.calls) < 30 and result.timings.draft_n_accepted > 170


@pytest.mark.parametrize("n_calls", range(1, 9))
def test_an_interrupted_draft_leaves_what_was_said(vocab: Vocab, n_calls: int) -> None:
    stop, text = threading.Event(), list(range(100, 200))

    def prepare(engine: FakeEngine) -> None:
        engine.before = lambda: stop.set() if len(engine.calls) == n_calls else None

    result, _, engine, sequence = run(vocab, text, prompt=(14, *text, 15), n_prompt=102, stop_event=stop, prepare=prepare)
    assert result.finish_reason == "interrupted" and len(engine.calls) == n_calls
    assert result.token_ids == tuple(text[: len(result.token_ids)])
    assert sequence.tokens == [14, *text, 15, *text][: len(sequence.tokens)]
    assert len(sequence.tokens) in (101 + len(result.token_ids), 102 + len(result.token_ids))


@pytest.mark.parametrize("most", [-1, DRAFT_MAX + 1, 1.5, "3"])
def test_drafts_out_of_range_are_refused(most: Any) -> None:
    with pytest.raises(UsageError, match=f"draft_max is .*, expected a whole number from 0 to {DRAFT_MAX}"):
        Request((1,), GREEDY, draft_max=most)
