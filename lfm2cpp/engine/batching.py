"""What one call of Engine.evaluate has to do: entries, cut into steps of a batch's tokens, steps into slices of ops.

How a prompt is cut never shows in its results, so that the cuts can serve speed, memory and a prompt Ctrl-C.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as ListLike
from typing import TYPE_CHECKING

import numpy as np

from lfm2cpp.errors import ContextError, UsageError

from .plan import Op
from .state import SequenceState

if TYPE_CHECKING:
    from .engine import Engine
    from .sequence import Sequence

# Between two slices of a step Python looks for a Ctrl-C. A slice is meant to take about 50 ms, the longest single op
# 0.1 s, of a slow core: 40 G multiply-adds of floats, or 100 G of bytes, and 10 GB a second.
SLICE_MACS = 2_000_000_000
SLICE_BYTES = 500_000_000
OP_MACS = 10_000_000_000
ATTENTION_MACS = 4_000_000_000

ROWS_WANTED = ("last", "all", "none")


class Entry:
    """One entry of a batch: the tokens to run, a rolled-back tail first, and the rows of logits so far."""

    def __init__(self, sequence: Sequence, ids: list[int], logits: str) -> None:
        self.state: SequenceState = sequence.state
        if not self.state.settled:  # torn off twice: by an exception, and by another one while that was seen to
            self.state.settle()
        self.ids = self.state.pending + ids
        self.n_wanted = {"last": 1, "all": len(ids), "none": 0}[logits]
        self.rows: list[np.ndarray] = []

    def result(self, n_vocab: int) -> np.ndarray:
        """Logits (n_wanted, n_vocab)."""
        if len(self.rows) == 1:
            return self.rows[0]
        return np.concatenate(self.rows) if self.rows else np.zeros((0, n_vocab), np.float32)


class Part:
    """The tokens of one entry in one step; logits are wanted of the last n_wanted of them."""

    def __init__(self, entry: Entry, first: int, count: int) -> None:
        self.entry, self.state = entry, entry.state
        self.ids = entry.ids[first : first + count]
        left_after = len(entry.ids) - first - count
        self.n_wanted = max(0, min(count, entry.n_wanted - left_after))


def check_batch(
    engine: Engine, batch: Iterable[tuple[Sequence, ListLike[int]]], logits: str
) -> list[tuple[Sequence, list[int]]]:
    """The batch as lists of ints. UsageError or ContextError for what cannot be evaluated; nothing has changed then."""
    if logits not in ROWS_WANTED:
        raise UsageError(f"logits={logits!r}: expected one of {', '.join(ROWS_WANTED)}")
    entries: list[tuple[Sequence, list[int]]] = []
    seen: set[int] = set()
    for sequence, token_ids in batch:
        ids = token_list(token_ids, engine.n_vocab)
        if sequence.engine is not engine or sequence.closed or id(sequence) in seen:
            raise UsageError("a sequence must belong to this engine, be open, and stand once in a batch")
        seen.add(id(sequence))
        if not ids:
            raise UsageError("no tokens to evaluate for a sequence; give at least one")
        entries.append((sequence, ids))
        total = len(sequence.state.tokens) + len(ids)
        if total > engine.n_ctx:
            raise ContextError(
                f"{total} tokens do not fit the context of {engine.n_ctx}; shorten the prompt or raise --ctx-size"
                f" (the model was made for {engine.hparams.n_ctx_train})"
            )
    return entries


def token_list(ids: ListLike[int], n_vocab: int) -> list[int]:
    """`ids` as plain ints of the vocabulary, or UsageError."""
    try:
        found = list(map(operator.index, ids))
    except TypeError:
        raise UsageError("token ids must be whole numbers") from None
    for token in (min(found), max(found)) if found else ():
        if not 0 <= token < n_vocab:
            raise UsageError(f"token id {token} is outside the vocabulary, 0..{n_vocab - 1}")
    return found


def step_tokens(ops: list[Op], n_batch: int, n_threads: int) -> int:
    """Tokens of a step: n_batch, or fewer where a single op would take too long."""
    return max(1, min(n_batch, n_threads * OP_MACS // max(1, max(op.macs for op in ops))))


def split_steps(entries: list[Entry], n_step: int, attention_width: int, n_threads: int) -> Iterator[list[Part]]:
    """Steps of at most n_step tokens, entries in order, each in as few and as even parts as it needs.

    Far into a long context a step is shorter, so that its attention stays within ATTENTION_MACS a thread;
    attention_width is the multiply-adds of a token and a key.
    """
    parts: list[Part] = []
    room = n_step
    for entry in entries:
        first, past = 0, entry.state.n_past
        while first < len(entry.ids):
            left = len(entry.ids) - first
            most = min(n_step, max(1, n_threads * ATTENTION_MACS // (attention_width * (past + n_step))))
            count = min(room, -(-left // -(-left // most)))
            parts.append(Part(entry, first, count))
            first, past, room = first + count, past + count, room - count
            if room == 0 or first < len(entry.ids):
                yield parts
                parts, room = [], n_step
    if parts:
        yield parts


def slices(ops: list[Op], n_tokens: int, n_threads: int) -> Iterator[tuple[int, int]]:
    """(first op, last op + 1) of each slice of a step."""
    first = macs = nbytes = 0
    for i, op in enumerate(ops):
        macs += op.macs * n_tokens
        nbytes += op.nbytes
        if macs > SLICE_MACS * n_threads or nbytes > SLICE_BYTES * n_threads or op.label == "attention":
            yield first, i + 1
            first, macs, nbytes = i + 1, 0, 0
    if first < len(ops):
        yield first, len(ops)
