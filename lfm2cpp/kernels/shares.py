"""The rows that a thread takes of an op, share by share, and the stream of reads over them.

The hardware's prefetchers stop at every page of 4 KiB, so decode asks for its rows itself. A thread takes its next
share while it still works on the last rows in hand: what it asks for ahead is then always its own, and no share begins
with rows that nobody has asked for.
"""

from __future__ import annotations

from typing import Any

from .compiler import device
from .scalar import atomic_load, compare_and_swap, far_offset
from .simd import make_prefetch_lines
from .widths import AGAIN_NEAR, ASKED_NEAR, FLOAT_STREAMED_TOKENS, LINE, W

SHARES_A_THREAD = 2
# A byte is asked for FAR bytes before its use. Where it is asked for twice, then again NEAR bytes before, when few may
# be on their way, or AGAIN bytes before, where the first request may have been forgotten.
NEAR, AGAIN, FAR = 1536, 4096, 16384
# A unit of rows asks for the unit that follows, if it has about this many bytes; any other asks FAR ahead in the file.
LEAST, MOST = 8192, 98304


@device
def take_rows(work, n_rows, nth, unit):
    """The rows that a thread does next, whole units: (first, last); nothing, at n_rows, when all are taken.

    A share is a part of what is left, so the streams of reads are long and the threads still end together.
    """
    while True:
        first = atomic_load(work)
        left = n_rows - first
        if left <= 0:
            return n_rows, n_rows
        step = max(unit, left // (SHARES_A_THREAD * nth) // unit * unit)
        if compare_and_swap(work, first, first + step):
            return first, min(first + step, n_rows)


@device
def is_streamed(n_tokens):
    """Whether rows of blocks are used as they stream by; with more tokens they are put side by side."""
    return n_tokens == 1


@device
def is_float_streamed(n_tokens):
    """Whether rows of floats are used as they stream by, by each token in turn; with more, panels are unpacked."""
    return n_tokens <= FLOAT_STREAMED_TOKENS


@device
def rows_of_unit(row_bytes):
    """Rows that are asked for together: W or a multiple of it, LEAST bytes or a little more."""
    return (LEAST + W * row_bytes - 1) // (W * row_bytes) * W


@device
def next_unit(work, n_rows, nth, unit, row, last):
    """Of a share of rows `row` .. `last` - 1: (end of its first unit, the row and the last of what follows that)."""
    end = min(row + unit, last)
    if end < last:
        return end, end, last
    following, following_last = take_rows(work, n_rows, nth, unit)
    return end, following, following_last


@device
def distance(rows, nbytes, coming):
    """How many bytes ahead to ask while nbytes at `rows` are used, of which those at `coming` follow."""
    return coming - rows if LEAST <= nbytes <= MOST else FAR


def make_prefetches(nbytes: int, parts: int) -> list[Any]:
    """`parts` words ask(address, far), which together ask for what comes `far` bytes after the nbytes at address.

    To be put between products: side by side they hold each other up, for a core has few places for what is on its way.
    """
    lines = range(0, nbytes, LINE)
    return [_make_prefetch([n for n in lines if n * parts // nbytes == part]) for part in range(parts)]


def _make_prefetch(lines: list[int]) -> Any:
    distance = NEAR if AGAIN_NEAR else AGAIN
    ask_again = make_prefetch_lines([] if ASKED_NEAR else lines, AGAIN_NEAR)
    ask_early = make_prefetch_lines(lines, ASKED_NEAR)

    @device
    def ask(address, far):
        ask_again(address + far_offset(distance))
        ask_early(address + far)

    return ask
