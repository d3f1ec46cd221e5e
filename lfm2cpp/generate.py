"""Generation: prefill, decode, stop. One request from prompt ids to a finished answer.

A generation is a series of steps, each of which asks for some tokens to be evaluated: who runs it decides whether alone
or together with others. Reports through `emit`; queues and threads belong to llm.py.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from .errors import ContextError, LFM2Error, UsageError
from .lookup import DRAFT_MAX, PromptLookup
from .sampling import NothingAllowed, Sampler, SamplingParams, in_range
from .text.detokenize import Detokenizer, StopStrings
from .text.vocab import Vocab

F32 = NDArray[np.float32]
T = TypeVar("T")

PREFILL_CHUNK = 512  # tokens between two reports of progress
MAX_STOPS = 64


class EngineSequence(Protocol):
    """What generation needs of lfm2cpp.engine's Sequence."""

    @property
    def n_past(self) -> int: ...
    def truncate(self, n_past: int) -> None: ...


class TokenEngine(Protocol):
    """What generation needs of lfm2cpp.engine's Engine."""

    n_ctx: int
    n_vocab: int

    def evaluate(self, batch: Any, *, logits: str = "last", stop: threading.Event | None = None) -> list[F32]: ...


@dataclass(frozen=True)
class Timings:
    """Milliseconds and counts, with llama.cpp's names. `cache_n` prompt tokens needed no evaluation.

    Of `draft_n` tokens that were drafted from the text, `draft_n_accepted` were chosen.
    """

    cache_n: int
    prompt_n: int
    prompt_ms: float
    predicted_n: int
    predicted_ms: float
    draft_n: int = 0
    draft_n_accepted: int = 0

    @property
    def prompt_per_second(self) -> float:
        return 1e3 * self.prompt_n / self.prompt_ms if self.prompt_ms else 0.0

    @property
    def predicted_per_second(self) -> float:
        return 1e3 * self.predicted_n / self.predicted_ms if self.predicted_ms else 0.0


@dataclass(frozen=True)
class Prefill:
    """Event: `done` of `total` prompt tokens are evaluated."""

    done: int
    total: int


@dataclass(frozen=True)
class Piece:
    """Event: one token was chosen. `text` is what can be shown now, perhaps nothing yet."""

    text: str
    token_id: int


@dataclass(frozen=True)
class Generation:
    """Event, the last one: the whole answer.

    `finish_reason` is "stop" (end token, stop string, nothing allowed), "length" (max_tokens, context full) or
    "interrupted"; `detail` says which. `token_ids` are all tokens chosen, an end token included.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_ids: tuple[int, ...]
    finish_reason: str
    detail: str
    timings: Timings
    seed: int


Event = Prefill | Piece | Generation
Emit = Callable[[Event], None]
Outcome = Generation | LFM2Error  # of a request among others
Step = tuple[Sequence[int], str]  # token ids that follow, and the rows of logits wanted, as Engine.evaluate names them


@dataclass(frozen=True)
class Request:
    """What to generate. `max_tokens` None or -1: until the end token or the context's end; 0: only the prompt.

    `draft_max` is how many tokens may be drafted from the text and checked in one step; the answer is the same with 0.
    Raises UsageError for values out of range.
    """

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    show_special: bool = False
    draft_max: int = DRAFT_MAX

    def __post_init__(self) -> None:
        n = self.max_tokens
        if n is not None and not in_range(n, int, -1, 2**31 - 1):
            raise UsageError(f"max_tokens is {ascii(n)[:40]}, expected a whole number (-1: until the end)")
        if not in_range(self.draft_max, int, 0, DRAFT_MAX):
            shown = ascii(self.draft_max)[:40]
            raise UsageError(f"draft_max is {shown}, expected a whole number from 0 to {DRAFT_MAX} (0 is off)")
        if not self.prompt_ids:
            raise UsageError("the prompt has no tokens; give at least one")
        if len(self.stop) > MAX_STOPS or not all(isinstance(stop, str) for stop in self.stop):
            raise UsageError(f"stop holds {len(self.stop)} entries, expected at most {MAX_STOPS} strings")

    @property
    def limit(self) -> float:
        return float("inf") if self.max_tokens in (None, -1) else float(self.max_tokens or 0)


def check_fits(n_prompt: int, n_ctx: int) -> None:
    """Raise ContextError when a prompt of `n_prompt` tokens is longer than the context."""
    if n_prompt > n_ctx:
        raise ContextError(f"prompt {n_prompt} > ctx {n_ctx} tokens; shorten the prompt or raise --ctx-size")


def generate(
    engine: TokenEngine,
    sequence: EngineSequence,
    vocab: Vocab,
    request: Request,
    *,
    emit: Emit = lambda event: None,
    stop: threading.Event | None = None,
) -> Generation:
    """`steps`, one after the other, in the caller's thread; `stop` set from outside interrupts."""
    stop = stop or threading.Event()

    def evaluate(step: Step) -> F32:
        ids, logits = step
        return engine.evaluate([(sequence, ids)], logits=logits, stop=stop)[0]

    return drive(steps(engine, sequence, vocab, request, emit, stop), evaluate)


def steps(
    engine: TokenEngine, sequence: EngineSequence, vocab: Vocab, request: Request, emit: Emit, stop: threading.Event
) -> Generator[Step, F32, Generation]:
    """Steps that evaluate what `sequence` does not hold yet of the prompt, and then generate.

    `sequence` must hold a true prefix of the prompt (Sequence.reuse_prefix sees to that). Afterwards it holds the
    prompt and the answer but for the last token, whose logits nobody asked for.
    """
    return _Run(engine, sequence, vocab, request, emit, stop).run()


def drive(steps: Generator[Step, F32, T], evaluate: Callable[[Step], F32]) -> T:
    """What steps return, each of them evaluated by itself."""
    try:
        step = next(steps)
        while True:
            try:
                rows = evaluate(step)
            except BaseException as error:
                step = steps.throw(error)
            else:
                step = steps.send(rows)
    except StopIteration as done:
        return done.value


class Ahead:
    """Logits after one token after the other of a sequence, which is evaluated ahead where a lookup has a draft."""

    def __init__(self, sequence: EngineSequence, lookup: PromptLookup) -> None:
        self.sequence, self.lookup = sequence, lookup
        self.draft: list[int] = []  # tokens that the sequence holds already
        self.rows = np.zeros((0, 0), np.float32)  # logits before the draft, and after each of its tokens
        self.n_right = 0  # tokens of the draft that were chosen
        self.n_drafted = self.n_accepted = 0  # of all drafts

    def logits_after(self, token_id: int, room: int) -> Generator[Step, F32, F32]:
        """Step to the logits (n_vocab,) after a token that follows; up to `room` more may be evaluated with it."""
        self.lookup.extend((token_id,))
        if self.draft[self.n_right : self.n_right + 1] == [token_id]:
            self.n_right += 1
            self.n_accepted += 1
        else:
            self._take_back()
            draft = self.lookup.draft(room)
            began = time.perf_counter()
            self.rows = yield (token_id, *draft), "all" if draft else "last"
            self.lookup.took(len(draft), time.perf_counter() - began)
            self.draft, self.n_drafted = draft, self.n_drafted + len(draft)
        return self.rows[self.n_right]

    def _take_back(self) -> None:
        """What was drafted and not chosen."""
        n_drafted, n_right, self.draft, self.n_right = len(self.draft), self.n_right, [], 0
        if n_drafted:
            self.lookup.was_right(n_right, n_drafted)
        if n_right < n_drafted:
            self.sequence.truncate(self.sequence.n_past - (n_drafted - n_right))


@dataclass
class _Run:
    """The state of one generation."""

    engine: TokenEngine
    sequence: EngineSequence
    vocab: Vocab
    request: Request
    emit: Emit
    stop: threading.Event
    ids: list[int] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    started: float = 0.0
    prompt_done: float = 0.0
    n_cached: int = 0

    def __post_init__(self) -> None:
        banned = [*self.vocab.unused_ids, *range(self.vocab.n_tokens, self.engine.n_vocab)]
        if self.request.ignore_eos:
            banned += self.vocab.eog_ids
        self.sampler = Sampler(self.request.sampling, n_vocab=self.engine.n_vocab, banned_ids=banned)
        self.detokenizer = Detokenizer(self.vocab, special=self.request.show_special)
        self.stops = StopStrings(self.request.stop)
        self.ahead = Ahead(self.sequence, PromptLookup(self.request.draft_max))

    def run(self) -> Generator[Step, F32, Generation]:
        prompt = self.request.prompt_ids
        check_fits(len(prompt), self.engine.n_ctx)
        self.n_cached = self.sequence.n_past
        self.started = time.perf_counter()
        try:
            logits = yield from self._prefill(prompt)
            self.sampler.accept(prompt)  # ids that the engine has looked at
            self.ahead.lookup.extend(prompt)
            self.prompt_done = time.perf_counter()
            reason, detail = yield from self._decode(logits)
        except KeyboardInterrupt:
            # Ours, when `stop` is set; otherwise a Ctrl-C that hit this thread, which is the caller's to handle.
            if not self.stop.is_set():
                raise
            reason, detail = "interrupted", "stopped from outside"
        return self._finish(reason, detail)

    def _prefill(self, prompt: Sequence[int]) -> Generator[Step, F32, F32]:
        """Step to the logits (n_vocab,) after the prompt."""
        total = len(prompt)
        done = self.n_cached
        while total - done > PREFILL_CHUNK:
            self.emit(Prefill(done, total))
            yield prompt[done : done + PREFILL_CHUNK], "none"
            done += PREFILL_CHUNK
        if done > self.n_cached:
            self.emit(Prefill(done, total))
        rows = yield prompt[done:], "last"
        self.emit(Prefill(total, total))
        return rows[-1]

    def _decode(self, logits: F32) -> Generator[Step, F32, tuple[str, str]]:
        """Choose tokens and step on until something ends it; returns the finish reason and its detail."""
        limit = self.request.limit
        while True:
            if len(self.ids) >= limit:
                return "length", f"max_tokens {len(self.ids)}"
            if self.stop.is_set():
                return "interrupted", "stopped from outside"
            try:
                token_id = self.sampler.sample(logits)
            except NothingAllowed as error:
                return "stop", str(error)
            self.ids.append(token_id)
            if self.vocab.is_eog(token_id) and not self.request.ignore_eos:
                return "stop", f"end token {self.vocab.piece(token_id)}"
            self._show(token_id, self.detokenizer.push(token_id))
            if self.stops.found is not None:
                return "stop", f"stop string {self.stops.found[:80]!r}"
            if len(self.ids) >= limit:
                return "length", f"max_tokens {len(self.ids)}"
            if self.n_held >= self.engine.n_ctx:
                return "length", f"the context of {self.engine.n_ctx} tokens is full"
            self.sampler.accept((token_id,))
            room = min(self.engine.n_ctx - self.n_held, limit - len(self.ids)) - 1
            logits = yield from self.ahead.logits_after(token_id, int(room))

    @property
    def n_held(self) -> int:
        """Tokens of the prompt and the answer but for the last one; the sequence may hold drafted ones beyond them."""
        return len(self.request.prompt_ids) + max(0, len(self.ids) - 1)

    def _show(self, token_id: int, text: str) -> None:
        text = self.stops.push(text)
        self.parts.append(text)
        self.emit(Piece(text, token_id))

    def _finish(self, reason: str, detail: str) -> Generation:
        if self.sequence.n_past > self.n_held:
            self.sequence.truncate(self.n_held)
        if self.stops.found is None:
            rest = self.stops.push(self.detokenizer.finish()) + self.stops.finish()
            if rest:
                self.parts.append(rest)
                self.emit(Piece(rest, self.ids[-1]))
        now = time.perf_counter()
        self.prompt_done = self.prompt_done or now  # interrupted before
        timings = Timings(
            cache_n=self.n_cached,
            prompt_n=min(self.sequence.n_past, len(self.request.prompt_ids)) - self.n_cached,
            prompt_ms=1e3 * (self.prompt_done - self.started),
            predicted_n=len(self.ids),
            predicted_ms=1e3 * (now - self.prompt_done),
            draft_n=self.ahead.n_drafted,
            draft_n_accepted=self.ahead.n_accepted,
        )
        return Generation(
            "".join(self.parts), tuple(self.ids), self.request.prompt_ids, reason, detail, timings, self.sampler.seed
        )
