"""Ctrl-C and termination around work that must not be left half done. Only the main thread ever hears of signals."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = [getattr(signal, name) for name in ("SIGHUP", "SIGTERM", "SIGINT") if hasattr(signal, name)]


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
def signals_held() -> Iterator[None]:
    """Keep signals back for a few system calls that belong together, and deliver them afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    handlers = {s: h for s in SIGNALS if callable(h := signal.getsignal(s))}
    try:
        for number in handlers:
            signal.signal(number, lambda n, frame: held.append(n))
        yield
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
