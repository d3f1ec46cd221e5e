"""Where the fields of a thread team's shared memory lie, in int64. Numbers only, no Numba.

What threads wait on has cache lines of its own.
"""

from __future__ import annotations

GENERATION = 0  # slices announced so far
ARRIVED = 8  # threads at the barrier
PHASE = 16  # barriers passed
CLOSING = 24
OPS = 25  # address of the op table
FIRST_OP = 26
LAST_OP = 27
NO_RESULT = 28  # where kernels leave their empty result
YIELD = 29  # address of sched_yield or the like
CLOCK = 30  # address of clock_gettime
PROFILE = 31  # address of a row of int64, nanoseconds an op, or 0
TIMESPEC = 32  # two fields
ACQUIRE_LOCK = 34  # address of PyThread_acquire_lock
RELEASE_LOCK = 35  # address of PyThread_release_lock
N_OPS = 36  # of the plan, and of a row of the profile
PROFILE_END = 37  # where the rows of the profile end
WORKERS = 40  # then WORKER_FIELDS a worker, the first one (the leader's) unused
WORKER_FIELDS = 16

STATE = 0
LOCK = 1  # address of the lock it sleeps on
SEEN = 8
RUNNING, PARKED = 0, 1

OP_KERNEL = 0
OP_ARGS = 1
OP_WORK = 2  # address of the op's work counter
OP_SYNC = 3  # 1 when a barrier follows
OP_FIELDS = 4
