"""Ctrl-C and termination around work that must not be left half done. Only the main thread ever hears of signals."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

TERMINATION = [getattr(signal, name) for name in ("SIGHUP", "SIGTERM") if hasattr(signal, name)]
SIGNALS = [*TERMINATION, signal.SIGINT]


@contextmanager
def signals_raise() -> Iterator[None]:
    """Let a termination signal unwind the stack, so that cleaning up happens, where it would just kill the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    fatal = [s for s in SIGNALS if signal.getsignal(s) == signal.SIG_DFL]
    try:
        for number in fatal:
            signal.signal(number, leave)
        yield
    finally:
        for number in fatal:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def signals_held(numbers: Sequence[int] = SIGNALS, tell: Callable[[], None] = lambda: None) -> Iterator[list[int]]:
    """Keep signals back in the list yielded, and deliver them at the end; `tell` is called at each.

    For a few system calls that belong together, or for code that an exception raised just anywhere would confuse.
    """
    held: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield held
        return
    handlers = {s: h for s in numbers if callable(h := signal.getsignal(s))}

    def hold(number: int, frame: FrameType | None) -> None:
        held.append(number)
        tell()

    try:
        for number in handlers:
            signal.signal(number, hold)
        yield held
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in held:
            signal.raise_signal(number)


@contextmanager
def first_interrupt_calls(stop: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C calls `stop`; it raises nothing, so that no work in hand is lost. The next one raises again."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, handler)
        stop()

    try:
        signal.signal(signal.SIGINT, ask)
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
