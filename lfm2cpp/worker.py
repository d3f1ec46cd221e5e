"""One thread that works off jobs in turn, and what such a job has to say to whoever asked for it."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from .errors import LFM2Error, UsageError
from .generate import Event, Generation, Outcome

T = TypeVar("T")
S = TypeVar("S", bound="Events[Any]")
Job = Callable[[], None]
POLL_SECONDS = 0.25  # where a blocked wait cannot be interrupted (Windows), Ctrl-C is noticed this late


class Worker:
    """A daemon thread and its queue. It belongs to the process that made it; a forked child gets an error."""

    def __init__(self, name: str) -> None:
        self._pid = os.getpid()
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    @property
    def in_other_process(self) -> bool:
        return os.getpid() != self._pid

    def check(self) -> None:
        """Raise UsageError when no job can be run any more."""
        if self.in_other_process:
            raise UsageError("this LLM was loaded before a fork and stays with its process; load it again in the child")
        if self._closed:
            raise UsageError("this LLM is closed; load the model again")

    def submit(self, job: Job) -> None:
        """Run `job` after those before it. A job handles its own errors. UsageError from a job, which would wait for
        itself."""
        if threading.current_thread() is self._thread:
            raise UsageError("this LLM works for who calls it; prompts of a batch must not come from the LLM itself")
        with self._lock:
            self.check()
            self._jobs.put(job)

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def refuse(self) -> None:
        """Take no more jobs, and drop those that wait."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)

    def close(self, timeout: float = 10.0) -> None:
        """`refuse`, and wait for the running job to end. Safe to call twice, and from a job."""
        if self.in_other_process:
            return
        self.refuse()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if not self._closed:
                job()
            del job  # or it would keep what it holds alive until the next one


@dataclass(frozen=True)
class _End:
    """The last that a job says: what it has returned, or raised."""

    outcome: Any


class Events(Iterator[T], Generic[T]):
    """What a job says, as it comes. `stop` ends it early; so do dropping this and a Ctrl-C that hits it."""

    def __init__(
        self, worker: Worker, work: Callable[[Callable[[T], None], threading.Event], Any], *, owner: object = None
    ) -> None:
        """Queue `work(emit, stop)`. `owner` lives as long as this does, and may be what keeps a model open."""
        events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        stop = threading.Event()
        outcome: list[Any] = []

        def job() -> None:
            try:
                outcome.append(work(events.put, stop))
            except BaseException as error:  # raised again where the events are read
                outcome.append(error)
            events.put(_End(outcome[0]))

        self._events, self._stop, self._worker, self._owner = events, stop, worker, owner
        self._outcome = outcome
        self._ended = False
        worker.submit(job)

    def __next__(self) -> T:
        if self._ended:
            raise StopIteration
        try:
            event = self._next_event()
        except KeyboardInterrupt:
            self.stop()  # a traceback may keep this alive, and the engine busy, for long
            raise
        if not isinstance(event, _End):
            return event
        self._ended = True
        if isinstance(event.outcome, BaseException):
            raise event.outcome
        return self._last(event.outcome)

    def _last(self, outcome: Any) -> T:
        """The event that a job's outcome is."""
        raise StopIteration

    def _next_event(self) -> Any:
        while True:
            try:
                return self._events.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if self._outcome and self._events.empty():
                    return _End(self._outcome[0])  # a Ctrl-C came just when the last event was taken
                if not self._worker.alive and self._events.empty():
                    return _End(UsageError("this LLM was closed while it generated"))

    def stop(self) -> None:
        """Ask the job to end; its last events still come."""
        self._stop.set()

    def close(self) -> None:
        """Stop, and wait until the engine is free."""
        self.stop()
        while not self._ended and not self._worker.in_other_process:
            with suppress(LFM2Error, StopIteration):
                next(self)

    def __enter__(self: S) -> S:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        stop = getattr(self, "_stop", None)
        if stop is not None:
            stop.set()


class Stream(Events[Event]):
    """The events of one generation: Prefill and Piece as they come, Generation last.

    One that was stopped says "interrupted" in its Generation.
    """

    def _last(self, outcome: Generation) -> Event:
        return outcome

    def result(self) -> Generation:
        """The whole answer; waits for it. A KeyboardInterrupt here ends the generation before it is passed on."""
        try:
            for _ in self:
                pass
        except KeyboardInterrupt:
            for _ in self:
                pass
            raise
        if not self._outcome:
            raise UsageError("this LLM was closed while it generated")
        if isinstance(self._outcome[0], BaseException):
            raise self._outcome[0]
        return self._outcome[0]


class Batch(Events[tuple[int, Outcome]]):
    """(number, answer) of every prompt of a batch, as they end; `in_order` gives the answers in the prompts' order.

    A prompt that fails has its error as its answer. A batch that was stopped gives what had ended until then.
    """

    def in_order(self) -> Iterator[Outcome]:
        """The answers, the first prompt's first; of a batch that was stopped, those before one that is missing."""
        ended: dict[int, Outcome] = {}
        due = 0
        for number, outcome in self:
            ended[number] = outcome
            while due in ended:
                yield ended.pop(due)
                due += 1
