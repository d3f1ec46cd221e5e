"""A team of plain threads that replay a plan in lock-step. The calling thread leads; the others follow.

Between slices the followers spin for a moment and then sleep on a lock, so an idle engine uses no CPU. They run native
code only, from their start to their end.
"""

from __future__ import annotations

import ctypes
import sys
import threading

import numpy as np

from lfm2cpp.kernels import team_layout as at
from lfm2cpp.kernels.library import NO_RESULT, Progress, library

from .plan import CompiledPlan

KERNELS = tuple(f"lfm2cpp.kernels.replay:{name}" for name in ("lead", "follow", "dismiss"))


def _address(function: object) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0  # type: ignore[arg-type]


def _c_function(*names: str) -> int:
    """Address of the first of these C library functions that exists, else 0."""
    libraries = [ctypes.CDLL("kernel32")] if sys.platform == "win32" else [ctypes.CDLL(None)]
    for name in names:
        for lib in libraries:
            if hasattr(lib, name):
                return _address(getattr(lib, name))
    return 0


class Team:
    """`n_threads` threads including the caller's. Not thread-safe: one caller at a time."""

    def __init__(self, plan: CompiledPlan, n_threads: int, progress: Progress | None = None) -> None:
        kernels = library().load(KERNELS, progress)
        self._lead, self._follow, self._dismiss = (kernels[name].entry for name in KERNELS)
        self.n_threads = n_threads
        self.plan = plan
        self.leaving = False  # set by whoever is going to close it as soon as nothing runs
        self.closed = False
        size = at.WORKERS + at.WORKER_FIELDS * n_threads
        self._memory = np.zeros(size + 8, np.int64)
        self._base = -(-self._memory.ctypes.data // 64) * 64
        first = (self._base - self._memory.ctypes.data) // 8
        self._shared = self._memory[first : first + size]
        self._fields = memoryview(self._shared)  # a step has left nothing of NumPy in a cache
        self._shared[at.OPS] = plan.ops_address
        self._shared[at.NO_RESULT] = NO_RESULT
        self._shared[at.YIELD] = _c_function("sched_yield", "SwitchToThread")
        self._shared[at.CLOCK] = _c_function("clock_gettime")
        self._shared[at.ACQUIRE_LOCK] = _address(ctypes.pythonapi.PyThread_acquire_lock)
        self._shared[at.RELEASE_LOCK] = _address(ctypes.pythonapi.PyThread_release_lock)
        self._shared[at.N_OPS] = len(plan.ops)
        self._profile = np.zeros((0, len(plan.ops)), np.int64)
        self._lead_args = np.array([self._base, n_threads], np.int64)
        self._lead_row = self._lead_args.ctypes.data
        self._worker_args = [np.array([self._base, i, n_threads], np.int64) for i in range(n_threads)]
        self._threads = [self._start(i) for i in range(1, n_threads)]

    def _start(self, index: int) -> threading.Thread:
        self._shared[at.WORKERS + at.WORKER_FIELDS * index + at.LOCK] = _held_lock()
        thread = threading.Thread(target=self._work, args=(index,), name=f"lfm2cpp-{index}", daemon=True)
        thread.start()
        return thread

    def _work(self, index: int) -> None:
        self._follow(NO_RESULT, NO_RESULT, self._worker_args[index].ctypes.data, 0, index, self.n_threads)

    def run(self, first_op: int, last_op: int) -> None:
        """Replay ops first_op .. last_op - 1 on every thread; returns when all are done."""
        assert first_op < last_op and not self.closed, "workers would be waited for that are gone or have nothing to do"
        self._fields[at.FIRST_OP], self._fields[at.LAST_OP] = first_op, last_op
        self._lead(NO_RESULT, NO_RESULT, self._lead_row, 0, 0, self.n_threads)

    def start_profile(self, n_replays: int) -> None:
        """Time every op of the next n_replays replays of the whole plan, and of no more; at least one."""
        assert n_replays > 0, "a replay's times would have no row"
        self._profile = np.zeros((n_replays, len(self.plan.ops)), np.int64)
        self._shared[at.PROFILE] = self._profile.ctypes.data if self._shared[at.CLOCK] else 0
        self._shared[at.PROFILE_END] = self._profile.ctypes.data + self._profile.nbytes

    def stop_profile(self) -> np.ndarray:
        """Nanoseconds of each op since start_profile, (replays that have ended, ops)."""
        row = int(self._shared[at.PROFILE])
        ended = (row - self._profile.ctypes.data) // (8 * len(self.plan.ops)) if row else len(self._profile)
        self._shared[at.PROFILE] = 0
        return self._profile[:ended]

    def close(self) -> None:
        """End the threads. Safe to call twice; nothing can be run afterwards."""
        if not self.closed:
            self.closed = True
            self._dismiss(NO_RESULT, NO_RESULT, self._lead_row, 0, 0, self.n_threads)
        for thread in self._threads:
            thread.join()
        self._threads = []


def _held_lock() -> int:
    """Address of a new lock that is taken. Python's own, because the C library's differ from system to system."""
    allocate, acquire = ctypes.pythonapi.PyThread_allocate_lock, ctypes.pythonapi.PyThread_acquire_lock
    allocate.restype, acquire.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_int]
    lock = allocate()
    acquire(lock, 1)
    return lock
