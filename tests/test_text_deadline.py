"""Work under a deadline is stopped wherever it is, and nothing else hears of it."""

from __future__ import annotations

import gc
import sys
import threading
import time
import weakref
from collections.abc import Iterator

import pytest

from lfm2cpp.text.deadline import OutOfTime, with_deadline


@pytest.fixture(autouse=True)
def undisturbed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No thread ends in an exception, no callback either: users would see a traceback."""
    seen: list[object] = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    yield
    assert not seen


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_work_in_time() -> None:
    assert with_deadline(lambda: 42, 10.0) == 42
    with pytest.raises(ZeroDivisionError):
        with_deadline(lambda: 1 // 0, 10.0)
    with pytest.raises(KeyboardInterrupt):
        with_deadline(_interrupt, 10.0)


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_endless_work_is_stopped() -> None:
    ended = threading.Event()

    def work() -> None:
        try:
            while True:
                pass
        finally:
            ended.set()

    started = time.monotonic()
    with pytest.raises(OutOfTime):
        with_deadline(work, 0.1)
    assert ended.is_set() and time.monotonic() - started < 1.0


@pytest.mark.usefixtures("hasty")
def test_the_deadline_may_come_at_any_moment() -> None:
    """Also while the thread begins or ends."""
    ends = []
    for i in range(5000):
        try:
            ends.append(with_deadline(lambda n=i % 2000: sum(range(n)), i % 2 * 2e-5))
        except OutOfTime:
            ends.append(None)
    assert all(end in (None, sum(range(i % 2000))) for i, end in enumerate(ends))


class Thing:
    pass


def callbacks() -> None:
    """Work that nearly always is in the callback of a weak reference, which swallows what it raises."""
    while True:
        thing = Thing()
        reference = weakref.ref(thing, lambda _: [None for _ in range(1000)])
        del thing
        assert reference() is None


def collections() -> None:
    """The same in the garbage collector, called from C."""
    references = []
    while True:
        thing = Thing()
        thing.itself = thing  # type: ignore[attr-defined]
        references = [weakref.ref(thing, lambda _: [None for _ in range(1000)])]
        del thing
        gc.collect(0)
    assert references


@pytest.mark.parametrize("work", [callbacks, collections])
def test_a_callback_may_swallow_the_exception(work) -> None:  # type: ignore[no-untyped-def]
    for _ in range(20):
        before = threading.active_count()
        with pytest.raises(OutOfTime):
            with_deadline(work, 0.01)
        give_up = time.monotonic() + 5.0
        while threading.active_count() > before:  # on its last lines
            assert time.monotonic() < give_up
            time.sleep(0.001)


@pytest.mark.usefixtures("hasty")
def test_two_at_once() -> None:
    """The process has one hook for what callbacks swallow; it is as it was when both are done."""
    hook, ends = sys.unraisablehook, []

    def stop_one() -> None:
        for _ in range(20):
            try:
                with_deadline(callbacks, 0.005)
            except OutOfTime:
                ends.append(None)

    threads = [threading.Thread(target=stop_one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ends) == 40 and sys.unraisablehook == hook
