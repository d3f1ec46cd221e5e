"""Work that is stopped when it takes too long: Python that a stranger wrote, such as a chat template.

The work runs in a thread of its own, which an exception set from outside stops. Python raises it wherever that thread
is, so three things need care: it must not meet the thread on its way in or out, where nobody catches it; a callback (a
weak reference's, a destructor) may swallow it, and then it is set again; and nothing of that is told to the user.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

T = TypeVar("T")

PATIENCE = 1.0  # seconds that work which is to stop is waited for
_one_stop = threading.Lock()  # sys.unraisablehook belongs to the whole process


class OutOfTime(BaseException):
    """Set from outside in a thread that has worked for too long; what catches Exception does not catch it."""


def with_deadline(work: Callable[[], T], seconds: float) -> T:
    """`work()`, or what it raises; OutOfTime when it does not end in time.

    Work that cannot be stopped, inside one long call of C, is left to itself after PATIENCE seconds more.
    """
    job = _Job(work)
    job.thread.start()
    job.thread.join(seconds)
    if job.thread.is_alive() and job.stop():
        raise OutOfTime
    value, error = job.outcome[0]
    if error is not None:
        raise error
    return value


class _Job(Generic[T]):
    """A thread's work and its outcome. It can be stopped from `_begun` until `_over`, and within that only once."""

    def __init__(self, work: Callable[[], T]) -> None:
        self.outcome: list[tuple[Any, BaseException | None]] = []
        self.thread = threading.Thread(target=self._run, name="lfm2cpp-deadline", daemon=True)
        self._work = work
        self._begun = threading.Event()
        self._deciding = threading.Lock()
        self._over = False
        self._lost: SimpleQueue[bool] = SimpleQueue()  # for who stops it: an exception was lost, or the work is over

    def _run(self) -> None:
        try:
            self._begun.set()
            try:
                self.outcome.append((self._work(), None))
            except BaseException as error:  # handed to the caller's thread, whatever it is
                self.outcome.append((None, error))
            with self._deciding:
                self._end()
        except OutOfTime:
            self._end()

    def _end(self) -> None:
        self._over = True
        self._lost.put(False)

    def stop(self) -> bool:
        """Whether it had to be stopped: False when it ended by itself just now."""
        self._begun.wait()
        with _one_stop, self._told_of_losses():
            stopped = self._set_exception()
            while stopped and self._was_lost() and self._set_exception():
                pass
            return stopped

    def _set_exception(self) -> bool:
        with self._deciding:
            if not self._over:
                ident = ctypes.c_ulong(self.thread.ident or 0)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(OutOfTime))
            return not self._over

    def _was_lost(self) -> bool:
        try:
            return self._lost.get(timeout=PATIENCE)
        except Empty:
            return False

    @contextmanager
    def _told_of_losses(self) -> Iterator[None]:
        """Python tells sys.unraisablehook of an exception that ended in a callback."""
        theirs = sys.unraisablehook

        def hook(unraisable: Any) -> None:
            if unraisable.exc_type is OutOfTime and threading.current_thread() is self.thread:
                self._lost.put(True)
            else:
                theirs(unraisable)

        sys.unraisablehook = hook
        try:
            yield
        finally:
            sys.unraisablehook = theirs
