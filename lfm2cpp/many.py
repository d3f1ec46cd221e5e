"""Many requests, some of them at a time: what each asks for next is evaluated together with what the others do.

One token of eight sequences costs little more than one of a single sequence, for the weights are read once. Answers are
those that the requests get alone, to the bit, for logits do not depend on what else is in a batch.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from .errors import ContextError, LFM2Error
from .generate import F32, Generation, Outcome, Request, Step, check_fits, steps
from .text.vocab import Vocab

N_PARALLEL, MOST_PARALLEL = 8, 64  # requests at a time; of 16 a token costs hardly less than of 8
Ask = Callable[[], Request]  # a request in the making, which may fail


@dataclass
class _Running:
    """One request under way."""

    number: int
    ask: Ask
    sequence: Any
    steps: Generator[Step, F32, Generation]
    step: Step


class _Many:
    """The requests that are under way, those that wait, and what has come of others."""

    def __init__(self, engine: Any, vocab: Vocab, asks: Iterable[Ask], n_parallel: int, stop: threading.Event) -> None:
        self.engine, self.vocab, self.stop = engine, vocab, stop
        self.waiting = enumerate(asks)
        self.put_back: deque[tuple[int, Ask]] = deque()  # for want of memory
        self.n_parallel = self.room = n_parallel  # may run, and may run as far as memory is known to suffice
        self.running: list[_Running] = []
        self.outcomes: deque[tuple[int, Outcome]] = deque()

    def start(self) -> bool:
        """Begin the next request that waits; False when none does."""
        number, ask = self.put_back.popleft() if self.put_back else next(self.waiting, (-1, None))
        if ask is None:
            return False
        sequence = self.engine.sequence()
        try:
            request = replace(ask(), draft_max=0)  # a batch of many sequences has no time left for guesses
            check_fits(len(request.prompt_ids), self.engine.n_ctx)
            sequence.reuse_prefix(request.prompt_ids)
            # Each of them runs to its end: `stop` stops their batch, and what was half said is no answer.
            run = steps(self.engine, sequence, self.vocab, request, lambda event: None, threading.Event())
            self.running.append(_Running(number, ask, sequence, run, next(run)))
        except LFM2Error as error:
            self._end(number, sequence, error)
        return True

    def step(self) -> None:
        """Evaluate what the running requests ask for, and let each go on."""
        batch = [(running.sequence, running.step[0]) for running in self.running]
        rows = "none" if all(running.step[1] == "none" for running in self.running) else "last"
        try:
            logits = self.engine.evaluate(batch, logits=rows, stop=self.stop)
        except ContextError as error:
            self._make_room(error)
            return
        for running, found in zip(list(self.running), logits, strict=True):
            try:
                running.step = running.steps.send(found)
            except StopIteration as done:
                self._leave(running, done.value)
            except LFM2Error as error:
                self._leave(running, error)

    def _make_room(self, error: ContextError) -> None:
        """The pages do not suffice for all: the last to come begins again when another one has ended."""
        last = self.running[-1]
        if len(self.running) == 1:
            self._leave(last, error)
            return
        self.running.remove(last)
        last.sequence.close()
        self.put_back.appendleft((last.number, last.ask))
        self.room = len(self.running)

    def _leave(self, running: _Running, outcome: Outcome) -> None:
        self.running.remove(running)
        if not self.put_back:
            self.room = min(self.n_parallel, self.room + 1)
        self._end(running.number, running.sequence, outcome)

    def _end(self, number: int, sequence: Any, outcome: Outcome) -> None:
        sequence.close()
        self.outcomes.append((number, outcome))

    def take_outcomes(self) -> Iterator[tuple[int, Outcome]]:
        """What has ended since the last call."""
        while self.outcomes:
            yield self.outcomes.popleft()

    def close(self) -> None:
        """Give up what runs."""
        for running in self.running:
            running.steps.close()
            running.sequence.close()


def generate_many(
    engine: Any, vocab: Vocab, asks: Iterable[Ask], *, n_parallel: int = N_PARALLEL, stop: threading.Event
) -> Iterator[tuple[int, Outcome]]:
    """(number, answer) of each request as it ends; one that fails, or cannot be made, gives its error as the answer.

    Up to n_parallel run at a time, fewer where their context does not fit the memory; requests are made when it is
    their turn. KeyboardInterrupt once `stop` is set.
    """
    many = _Many(engine, vocab, asks, n_parallel, stop)
    try:
        while True:
            if stop.is_set():
                raise KeyboardInterrupt
            # One a step: so it finds in memory what those before it have read of the same beginning.
            started = len(many.running) < many.room and many.start()
            yield from many.take_outcomes()
            if many.running:
                many.step()
                yield from many.take_outcomes()
            elif not started:
                return
    finally:
        many.close()
