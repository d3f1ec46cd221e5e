"""A team of plain threads that replay a plan in lock-step. The calling thread leads; the others follow.

Between slices the followers spin for a moment and then sleep on a lock, so an idle engine uses no CPU.
"""

from __future__ import annotations

import ctypes
import sys
import threading

import numpy as np

from lfm2cpp.kernels import team_layout as at
from lfm2cpp.kernels.library import NO_RESULT, Progress, library

from .plan import CompiledPlan

REPLAY = "lfm2cpp.kernels.replay:"
KERNELS = (REPLAY + "announce", REPLAY + "lead", REPLAY + "follow")


def _c_function(*names: str) -> int:
    """Address of the first of these C library functions that exists, else 0."""
    libraries = [ctypes.CDLL("kernel32")] if sys.platform == "win32" else [ctypes.CDLL(None)]
    for name in names:
        for lib in libraries:
            if hasattr(lib, name):
                return ctypes.cast(getattr(lib, name), ctypes.c_void_p).value or 0
    return 0


class Team:
    """`n_threads` threads including the caller's. Not thread-safe: one caller at a time."""

    def __init__(self, plan: CompiledPlan, n_threads: int, progress: Progress | None = None) -> None:
        kernels = library().load(KERNELS, progress)
        self._announce, self._lead, self._follow = (kernels[name].entry for name in KERNELS)
        self.n_threads = n_threads
        self.plan = plan
        size = at.WORKERS + at.WORKER_FIELDS * n_threads
        self._memory = np.zeros(size + 8, np.int64)
        self._base = -(-self._memory.ctypes.data // 64) * 64
        first = (self._base - self._memory.ctypes.data) // 8
        self._shared = self._memory[first : first + size]
        self._shared[at.OPS] = plan.ops_address
        self._shared[at.NO_RESULT] = NO_RESULT
        self._shared[at.YIELD] = _c_function("sched_yield", "SwitchToThread")
        self._shared[at.CLOCK] = _c_function("clock_gettime")
        self._profile = np.zeros(len(plan.ops), np.int64)
        self._locks = [threading.Lock() for _ in range(n_threads)]
        self._args = [np.array([self._base, i, n_threads], np.int64) for i in range(n_threads)]
        self._lead_args = np.array([self._base, n_threads], np.int64)
        self._threads = []
        for i in range(1, n_threads):
            self._locks[i].acquire()
            thread = threading.Thread(target=self._work, args=(i,), name=f"lfm2cpp-{i}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self, index: int) -> None:
        args = self._args[index].ctypes.data
        while True:
            self._follow(NO_RESULT, NO_RESULT, args, 0, index, self.n_threads)
            if self._shared[at.CLOSING]:
                return
            self._locks[index].acquire()  # parked, until the next slice

    def run(self, first_op: int, last_op: int) -> None:
        """Replay ops first_op .. last_op - 1 on every thread; returns when all are done."""
        self._shared[at.FIRST_OP], self._shared[at.LAST_OP] = first_op, last_op
        if self.n_threads > 1:
            self._announce_slice()
        self._lead(NO_RESULT, NO_RESULT, self._lead_args.ctypes.data, 0, 0, self.n_threads)

    def _announce_slice(self) -> None:
        self._announce(NO_RESULT, NO_RESULT, self._lead_args.ctypes.data, 0, 0, self.n_threads)
        if self._shared[at.N_PARKED]:
            for i in range(1, self.n_threads):
                if self._shared[at.WORKERS + at.WORKER_FIELDS * i + at.WAKE]:
                    self._locks[i].release()

    def profile(self, on: bool) -> np.ndarray:
        """Switch timing on or off; returns the nanoseconds an op has taken since it was switched on."""
        times = self._profile.copy()
        self._profile[:] = 0
        self._shared[at.PROFILE] = self._profile.ctypes.data if on and self._shared[at.CLOCK] else 0
        return times

    def close(self) -> None:
        """End the threads. Safe to call twice."""
        if self._threads:
            self._shared[at.CLOSING] = 1
            self._announce_slice()
            for thread in self._threads:
                thread.join()
            self._threads = []
