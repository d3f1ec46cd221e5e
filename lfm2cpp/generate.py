"""Generation: prefill, decode, stop. One request from prompt ids to a finished answer.

Runs to its end in the caller's thread and reports through `emit`; queues and threads belong to llm.py.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import ContextError, UsageError
from .sampling import NothingAllowed, Sampler, SamplingParams
from .text.detokenize import Detokenizer, StopStrings
from .text.vocab import Vocab

F32 = NDArray[np.float32]

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
    """Milliseconds and counts, with llama.cpp's names. `cache_n` prompt tokens needed no evaluation."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    predicted_n: int
    predicted_ms: float

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


@dataclass(frozen=True)
class Request:
    """What to generate. `max_tokens` None or -1: until the end token or the context's end; 0: only the prompt.

    Raises UsageError for values out of range.
    """

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    show_special: bool = False

    def __post_init__(self) -> None:
        n = self.max_tokens
        if n is not None and (not isinstance(n, int) or isinstance(n, bool) or not -1 <= n < 2**31):
            raise UsageError(f"max_tokens is {ascii(n)[:40]}, expected a whole number (-1: until the end)")
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
    """Evaluate what `sequence` does not hold yet of the prompt, then generate; `stop` set from outside interrupts.

    `sequence` must hold a true prefix of the prompt (Sequence.reuse_prefix sees to that). Afterwards it holds the
    prompt and the answer but for the last token, whose logits nobody asked for.
    """
    return _Run(engine, sequence, vocab, request, emit, stop or threading.Event()).run()


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

    def run(self) -> Generation:
        prompt = self.request.prompt_ids
        check_fits(len(prompt), self.engine.n_ctx)
        self.n_cached = self.sequence.n_past
        self.started = time.perf_counter()
        try:
            logits = self._prefill(prompt)
            self.sampler.accept(prompt)  # ids that the engine has looked at
            self.prompt_done = time.perf_counter()
            reason, detail = self._decode(logits)
        except KeyboardInterrupt:
            # Ours, when `stop` is set; otherwise a Ctrl-C that hit this thread, which is the caller's to handle.
            if not self.stop.is_set():
                raise
            reason, detail = "interrupted", "stopped from outside"
        return self._finish(reason, detail)

    def _prefill(self, prompt: Sequence[int]) -> F32:
        """Logits (n_vocab,) after the prompt."""
        total = len(prompt)
        done = self.n_cached
        while total - done > PREFILL_CHUNK:
            self.emit(Prefill(done, total))
            self._evaluate(prompt[done : done + PREFILL_CHUNK], "none")
            done += PREFILL_CHUNK
        if done > self.n_cached:
            self.emit(Prefill(done, total))
        logits = self._evaluate(prompt[done:], "last")
        self.emit(Prefill(total, total))
        return logits

    def _evaluate(self, ids: Sequence[int], logits: str) -> F32:
        if self.stop.is_set():
            raise KeyboardInterrupt
        rows = self.engine.evaluate([(self.sequence, ids)], logits=logits, stop=self.stop)[0]
        return rows[-1] if logits == "last" else rows

    def _decode(self, logits: F32) -> tuple[str, str]:
        """Choose and evaluate tokens until something ends it; returns the finish reason and its detail."""
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
            if self.sequence.n_past >= self.engine.n_ctx:
                return "length", f"the context of {self.engine.n_ctx} tokens is full"
            self.sampler.accept((token_id,))
            logits = self._evaluate((token_id,), "last")

    def _show(self, token_id: int, text: str) -> None:
        text = self.stops.push(text)
        self.parts.append(text)
        self.emit(Piece(text, token_id))

    def _finish(self, reason: str, detail: str) -> Generation:
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
        )
        return Generation(
            "".join(self.parts), tuple(self.ids), self.request.prompt_ids, reason, detail, timings, self.sampler.seed
        )
