"""Replay a recorded plan on a team of threads: one native call a thread and slice.

The plan is a table of ops, OP_FIELDS int64 each. Every thread walks the same rows; a barrier follows an op that others
depend on. Threads that find nothing to do spin for a short while and then sleep on a lock of their own.

The team shares no Python code: one call leads a slice from its announcement to its end, so that an exception (a signal
can raise one between any two lines of Python) finds it either not begun or done.
"""

from __future__ import annotations

from .compiler import device, kernel
from .scalar import (
    atomic_add,
    atomic_load,
    atomic_store,
    atomic_swap,
    call_address,
    call_kernel,
    compare_and_swap,
    load_i64,
    pause,
    store_i64,
)
from .team_layout import (
    ACQUIRE_LOCK,
    ARRIVED,
    CLOCK,
    CLOSING,
    FIRST_OP,
    GENERATION,
    LAST_OP,
    LOCK,
    N_OPS,
    NO_RESULT,
    OP_ARGS,
    OP_FIELDS,
    OP_KERNEL,
    OP_SYNC,
    OP_WORK,
    OPS,
    PARKED,
    PHASE,
    PROFILE,
    PROFILE_END,
    RELEASE_LOCK,
    RUNNING,
    SEEN,
    STATE,
    TIMESPEC,
    WORKER_FIELDS,
    WORKERS,
    YIELD,
)

BARRIER_SPINS = 2000  # pauses before a waiting thread gives its core away; a pause is 25 to 70 ns on x86
IDLE_SPINS = 50000  # pauses, 1 to 4 ms, before an idle thread goes to sleep: more than there is between two tokens


@device
def barrier(team, nth):
    phase = atomic_load(team + 8 * PHASE)
    if atomic_add(team + 8 * ARRIVED, 1) == nth - 1:
        atomic_store(team + 8 * ARRIVED, 0)
        atomic_store(team + 8 * PHASE, phase + 1)
        return
    spins = 0
    while atomic_load(team + 8 * PHASE) == phase:
        pause(0)
        spins += 1
        if spins > BARRIER_SPINS:
            call_address(load_i64(team + 8 * YIELD), 0, 0)


@device
def read_clock(team):
    """Nanoseconds, through the C library's clock_gettime(CLOCK_MONOTONIC, timespec)."""
    timespec = team + 8 * TIMESPEC
    call_address(load_i64(team + 8 * CLOCK), 1, timespec)
    return load_i64(timespec) * 1_000_000_000 + load_i64(timespec + 8)


@device
def replay_slice(team, ith, nth):
    ops, no_result = load_i64(team + 8 * OPS), load_i64(team + 8 * NO_RESULT)
    profile = load_i64(team + 8 * PROFILE) if ith == 0 else 0
    began = read_clock(team) if profile else 0
    last = load_i64(team + 8 * LAST_OP)
    for i in range(load_i64(team + 8 * FIRST_OP), last):
        op = ops + 8 * OP_FIELDS * i
        call_kernel(
            load_i64(op + 8 * OP_KERNEL), no_result, load_i64(op + 8 * OP_ARGS), load_i64(op + 8 * OP_WORK), ith, nth
        )
        if load_i64(op + 8 * OP_SYNC) or i == last - 1:
            barrier(team, nth)  # also at the end: then nobody is still at work, or about to look what there is to do
        if profile:
            now = read_clock(team)
            store_i64(profile + 8 * i, now - began)
            began = now
    if profile and last == load_i64(team + 8 * N_OPS):
        next_row = profile + 8 * last
        store_i64(team + 8 * PROFILE, next_row if next_row < load_i64(team + 8 * PROFILE_END) else 0)


@device
def announce(team, nth):
    """Begin a slice: workers that spin set out at once, those that sleep are woken."""
    atomic_add(team + 8 * GENERATION, 1)
    for i in range(1, nth):
        worker = team + 8 * (WORKERS + WORKER_FIELDS * i)
        if atomic_swap(worker + 8 * STATE, RUNNING) == PARKED:
            call_address(load_i64(team + 8 * RELEASE_LOCK), load_i64(worker + 8 * LOCK), 0)


@device
def reset_work(team):
    """No op of the slice has given out work yet."""
    ops = load_i64(team + 8 * OPS)
    for i in range(load_i64(team + 8 * FIRST_OP), load_i64(team + 8 * LAST_OP)):
        store_i64(load_i64(ops + 8 * (OP_FIELDS * i + OP_WORK)), 0)


@kernel
def lead(team, nth):
    """The calling thread's part of a slice, from its announcement on."""
    reset_work(team)
    announce(team, nth)
    replay_slice(team, 0, nth)


@kernel
def dismiss(team, nth):
    """Announce the end: every worker returns."""
    store_i64(team + 8 * CLOSING, 1)
    announce(team, nth)


@device
def wait_for_slice(team, mine, seen):
    """Return when a slice after number `seen` has been announced."""
    spins = 0
    while atomic_load(team + 8 * GENERATION) == seen:
        pause(0)
        spins += 1
        if spins > IDLE_SPINS and compare_and_swap(mine + 8 * STATE, RUNNING, PARKED):
            # A slice may have been announced just before: then do not sleep, unless we are being woken already.
            if atomic_add(team + 8 * GENERATION, 0) == seen or not compare_and_swap(mine + 8 * STATE, PARKED, RUNNING):
                call_address(load_i64(team + 8 * ACQUIRE_LOCK), load_i64(mine + 8 * LOCK), 1)


@kernel
def follow(team, index, nth):
    """A worker's life: slice after slice, until the team is dismissed."""
    mine = team + 8 * (WORKERS + WORKER_FIELDS * index)
    while True:
        seen = load_i64(mine + 8 * SEEN)
        wait_for_slice(team, mine, seen)
        store_i64(mine + 8 * SEEN, seen + 1)
        if atomic_load(team + 8 * CLOSING):
            return
        replay_slice(team, index, nth)
