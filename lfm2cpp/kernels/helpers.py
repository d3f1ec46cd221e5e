"""Compile kernels in processes of their own, one a core.

Compiling is Python work for the most part, which threads would do one after the other. A helper reads names of kernels
and answers with their object code; it ends with its standard input, so none outlives its parent. What no helper can do,
for whatever reason, is left to the caller.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue

from lfm2cpp.threads import default_threads

from .cache import Compiled, sources_digest

SLOW = ("attention:attention", "mul_mat:", "swiglu:", "swiglu_float:", "mul_mat_float:")  # to compile, slowest first
MOST_HELPERS = 4
HELPER_BYTES = 400 << 20  # memory that one may need
PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from lfm2cpp.kernels.helpers import serve; serve()"
)


class Helper:
    """A process that compiles one kernel after the other."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps(sys.path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def compile(self, name: str) -> Compiled | None:
        """The compiled kernel; None when the helper failed, and from then on."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(name.encode() + b"\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline())
            code = self._process.stdout.read(answer["nbytes"])
        except (OSError, ValueError):
            return None
        if len(code) != answer["nbytes"] or answer["key"] != sources_digest():  # other sources, or for another CPU
            return None
        return Compiled(answer["symbol"], tuple(answer["params"]), code)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


def compile_in_helpers(names: list[str], begins: Callable[[str], None]) -> Iterator[tuple[str, Compiled]]:
    """Those of `names` that helpers could compile, in the order in which they are done; `begins` hears of each.

    Nothing is yielded where helpers would not pay.
    """
    helpers = _start(min(len(names), MOST_HELPERS))
    if not helpers:
        return
    # The slow ones begin first, or the last of them would keep one core at work and the others waiting.
    todo = deque(sorted(names, key=_slowness))
    done: SimpleQueue[tuple[str, Compiled] | None] = SimpleQueue()

    def take() -> str | None:
        with suppress(IndexError):
            return todo.popleft()
        return None

    def work(helper: Helper) -> None:
        """Kernel after kernel, until none is left or the helper fails; then None."""
        try:
            while (name := take()) is not None:
                begins(name)
                compiled = helper.compile(name)
                if compiled is None:
                    return
                done.put((name, compiled))
        finally:
            done.put(None)

    pool = ThreadPoolExecutor(len(helpers), "lfm2cpp-compile")
    try:
        workers = [pool.submit(work, helper) for helper in helpers]
        for _ in workers:
            while (answer := done.get()) is not None:
                yield answer
        for worker in workers:
            worker.result()  # raises what `begins` raised
    finally:
        todo.clear()
        for helper in helpers:
            helper.stop()
        pool.shutdown()


def _slowness(name: str) -> int:
    return next((i for i, part in enumerate(SLOW) if part in name), len(SLOW))


def _start(most: int) -> list[Helper]:
    """As many helpers as there are cores and memory for, or none where that is only one."""
    n = min(most, default_threads(), _free_bytes() // HELPER_BYTES)
    if n < 2 or not sys.executable or getattr(sys, "frozen", False):
        return []
    helpers: list[Helper] = []
    try:
        for _ in range(n):
            helpers.append(Helper())
    except OSError:  # no more processes, or an interpreter that this system cannot start
        for helper in helpers:
            helper.stop()
        return []
    return helpers


def _free_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def serve() -> None:
    """A helper's life: names on standard input, answers on standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent as well, which then stops its helpers
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library may print

    from .compiler import compile_kernel

    for line in sys.stdin:
        compiled = compile_kernel(line.strip())
        head = {"symbol": compiled.symbol, "params": compiled.params, "nbytes": len(compiled.object_code)}
        answers.write(json.dumps(head | {"key": sources_digest()}).encode() + b"\n" + compiled.object_code)
        answers.flush()
