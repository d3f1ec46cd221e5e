"""Batches of tokens in, logits out. Owns the mapped file, the plan, the team of threads and the pages.

Works on token ids only: text belongs to lfm2cpp.text, choosing tokens to lfm2cpp.sampling.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence as ListLike
from pathlib import Path

import numpy as np

from lfm2cpp.arch.validate import validate_model
from lfm2cpp.errors import ContextError, UsageError
from lfm2cpp.gguf import read_gguf
from lfm2cpp.kernels import batch as at
from lfm2cpp.kernels.library import Progress
from lfm2cpp.kernels.widths import CHUNK_TOKENS, PAGE_TOKENS

from .load import RopeTable, load_weights
from .memory import KV_BYTES, PageLayout, PagePool
from .model import record_lfm2
from .plan import SPLIT_TOKENS, Plan
from .sequence import Sequence
from .team import Team
from .threads import default_threads

SLICE_OPS = 8  # of a prefill between two looks at Python: bounds the reaction to Ctrl-C
DEFAULT_N_CTX = 32768  # what LFM2 models are trained for; pages are committed only when used


class Engine:
    """A model ready to run. Safe to use from several threads: calls queue. Must not be used in a forked child."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        kv_type: str = "f16",
        n_batch: int = 512,
        trace: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Map and validate `path`, record the plan, compile what kernels are missing.

        Raises ModelFormatError for a file that cannot be run, UsageError for options out of range.
        """
        if kv_type not in KV_BYTES:
            raise UsageError(f"KV type {kv_type!r} is not one of {', '.join(KV_BYTES)}")
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._closed = False
        self._interrupted = False
        self.path = Path(path)
        self.gguf = read_gguf(path)
        self.facts = validate_model(self.gguf)
        self.hparams = hp = self.facts.hparams
        self.n_ctx = _context_size(n_ctx, hp.n_ctx_train)
        self.n_threads = n_threads or default_threads()
        self.n_batch = n_batch
        self.n_vocab = hp.n_vocab
        self.kv_type = kv_type
        self.layout = PageLayout.of(hp, kv_type)
        self.pool = PagePool(self.layout.page_bytes, _max_pages(self.layout.page_bytes, self.n_ctx))
        self.rope = RopeTable(hp, self.n_ctx)
        self.weights, self._tables = load_weights(self.gguf, self.facts, self.layout, self.rope)
        self.plan = Plan(n_batch, self.n_threads, self.n_ctx, trace)
        self._logits = record_lfm2(self.plan, self.weights, hp)
        self._logits_view = self.plan.view(self._logits)
        compiled = self.plan.finish(progress)
        self.team = Team(compiled, self.n_threads, progress)
        self._tokens = np.zeros(n_batch, np.int32)
        self._positions = np.zeros(n_batch, np.int32)
        self._run_of = np.zeros(n_batch, np.int32)
        self._runs = np.zeros((n_batch, at.RUN_FIELDS), np.int64)
        self._out_rows = self.plan.int32_view(int(self.plan.batch[at.OUT_ROWS]))
        batch = self.plan.batch
        batch[at.TOKENS], batch[at.POSITIONS] = self._tokens.ctypes.data, self._positions.ctypes.data
        batch[at.RUN_OF], batch[at.RUNS] = self._run_of.ctypes.data, self._runs.ctypes.data
        self.trace: dict[str, np.ndarray] = {}

    # Sequences

    def sequence(self) -> Sequence:
        """A new, empty sequence."""
        return Sequence(self)

    def load_sequence(self, path: str | os.PathLike[str]) -> Sequence:
        """A sequence that Sequence.save wrote with this model. StateFileError if it is not that."""
        from .state_file import load_sequence

        with self._lock:
            return load_sequence(self, Path(path))

    # Evaluation

    def evaluate(
        self,
        batch: Iterable[tuple[Sequence, ListLike[int]]],
        *,
        logits: str = "last",
        stop: threading.Event | None = None,
    ) -> list[np.ndarray]:
        """Append tokens to sequences; returns float32 (n_rows, n_vocab) an entry.

        `logits`: "last" (1 row an entry), "all" (one a token) or "none". Raises ContextError before anything changes
        when tokens do not fit; on an interrupt (Ctrl-C, `interrupt`, `stop`) the sequences are left at a point they
        were at before, and KeyboardInterrupt is raised.
        """
        with self._lock:
            self._check_usable()
            self._interrupted = False
            entries = [(sequence, [int(i) for i in ids]) for sequence, ids in batch]
            self._validate(entries, logits)
            steps = [_Entry(sequence, ids, logits) for sequence, ids in entries]
            for parts in _split(steps, self.n_batch):
                self._step(parts, stop)
            return [entry.result(self.n_vocab) for entry in steps]

    def interrupt(self) -> None:
        """Stop the evaluation that is running, from any thread; it raises KeyboardInterrupt."""
        self._interrupted = True

    def _check_usable(self) -> None:
        if self._closed:
            raise UsageError("this engine is closed; load the model again")
        if os.getpid() != self._pid:
            raise UsageError("this engine belongs to the parent process; load the model again in the child")

    def _validate(self, entries: list[tuple[Sequence, list[int]]], logits: str) -> None:
        if logits not in ("last", "all", "none"):
            raise UsageError(f"logits={logits!r}: expected last, all or none")
        seen: set[int] = set()
        for sequence, ids in entries:
            if sequence.engine is not self or sequence.closed or id(sequence) in seen:
                raise UsageError("a sequence must belong to this engine, be open, and stand once in a batch")
            seen.add(id(sequence))
            if not ids:
                raise UsageError("no tokens to evaluate for a sequence; give at least one")
            for token in (min(ids), max(ids)):
                if not 0 <= token < self.n_vocab:
                    raise UsageError(f"token id {token} is outside the vocabulary, 0..{self.n_vocab - 1}")
            total = len(sequence.state.tokens) + len(ids)
            if total > self.n_ctx:
                raise ContextError(
                    f"{total} tokens do not fit the context of {self.n_ctx}; shorten the prompt or raise --ctx-size"
                    f" (the model was made for {self.hparams.n_ctx_train})"
                )

    def _step(self, parts: list[_Part], stop: threading.Event | None) -> None:
        """One replay: fill in the descriptor, run, take the logits."""
        n_tokens = sum(len(part.ids) for part in parts)
        sliced = n_tokens > SPLIT_TOKENS
        before = [part.sequence.state.conv.copy() if sliced else None for part in parts]
        wanted = self._describe(parts, n_tokens)
        n_ops = len(self.plan.ops)
        try:
            for first in range(0, n_ops, SLICE_OPS if sliced else n_ops):
                if self._interrupted or (stop is not None and stop.is_set()):
                    raise KeyboardInterrupt
                self.team.run(first, min(n_ops, first + SLICE_OPS) if sliced else n_ops)
        except BaseException:
            for part, conv in zip(parts, before, strict=True):
                if conv is not None:
                    part.sequence.state.conv[:] = conv
                del part.sequence.state.tokens[part.sequence.state.n_past :]
            raise
        row = 0
        for part, n_rows in zip(parts, wanted, strict=True):
            part.sequence.state.advance(len(part.ids))
            if n_rows:
                part.entry.rows.append(self._logits_view[row : row + n_rows].copy())
                row += n_rows
        if self.plan.trace:
            self.trace = {name: self.plan.view(rows)[:n_tokens].copy() for name, rows in self.plan.named.items()}
            self.trace["result_norm"] = self.trace["result_norm"][:row]
            self.trace["result_output"] = self.trace["result_output"][:row]

    def _describe(self, parts: list[_Part], n_tokens: int) -> list[int]:
        """Write the batch descriptor; returns how many rows of logits each part wants."""
        row = n_out = deepest = 0
        wanted = []
        for i, part in enumerate(parts):
            state, n = part.sequence.state, len(part.ids)
            state.reserve(n)
            self._tokens[row : row + n] = part.ids
            self._positions[row : row + n] = np.arange(state.n_past, state.n_past + n)
            self._run_of[row : row + n] = i
            self._runs[i, : at.RUN_CONV + 1] = (
                row, n, state.n_past, state.addresses.ctypes.data, state.conv.ctypes.data,
            )  # fmt: skip
            self._out_rows[n_out : n_out + part.n_wanted] = np.arange(row + n - part.n_wanted, row + n)
            n_out += part.n_wanted
            wanted.append(part.n_wanted)
            row += n
            deepest = max(deepest, state.n_past + n)
        self.rope.grow(deepest)
        batch = self.plan.batch
        batch[at.N_TOKENS], batch[at.N_OUT], batch[at.N_RUNS] = n_tokens, n_out, len(parts)
        batch[at.SPLIT_CHUNKS] = -(-deepest // CHUNK_TOKENS) if n_tokens <= SPLIT_TOKENS else 0
        self.team.plan.counters[:] = 0
        return wanted

    # Ending

    def close(self) -> None:
        """End the threads and let the file go. Safe to call twice."""
        with self._lock:
            if not self._closed and os.getpid() == self._pid:
                self._closed = True
                self.team.close()
                self.gguf.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Entry:
    """One entry of an evaluate call: tokens still to do (a rolled-back tail first), rows of logits so far."""

    def __init__(self, sequence: Sequence, ids: list[int], logits: str) -> None:
        state = sequence.state
        self.sequence = sequence
        replayed = state.tokens[state.n_past :]
        state.tokens += ids
        self.ids = replayed + ids
        self.n_wanted = {"last": 1, "all": len(ids), "none": 0}[logits]
        self.rows: list[np.ndarray] = []

    def result(self, n_vocab: int) -> np.ndarray:
        return np.concatenate(self.rows) if self.rows else np.zeros((0, n_vocab), np.float32)


class _Part:
    """The tokens of one entry in one step."""

    def __init__(self, entry: _Entry, first: int, count: int) -> None:
        self.entry, self.sequence = entry, entry.sequence
        self.ids = entry.ids[first : first + count]
        left_after = len(entry.ids) - first - count
        self.n_wanted = max(0, min(count, entry.n_wanted - left_after))


def _split(entries: list[_Entry], n_batch: int) -> Iterable[list[_Part]]:
    """Steps of at most n_batch tokens, entries in order, each in as few steps as it needs."""
    parts: list[_Part] = []
    room = n_batch
    for entry in entries:
        first = 0
        while first < len(entry.ids):
            count = min(room, len(entry.ids) - first)
            parts.append(_Part(entry, first, count))
            first, room = first + count, room - count
            if room == 0:
                yield parts
                parts, room = [], n_batch
    if parts:
        yield parts


def _context_size(n_ctx: int | None, n_ctx_train: int) -> int:
    """The context to offer: what was asked for, else the model's up to DEFAULT_N_CTX."""
    if n_ctx is None or n_ctx == 0:
        return min(n_ctx_train, DEFAULT_N_CTX)
    if not 1 <= n_ctx <= n_ctx_train:
        raise UsageError(f"context size {n_ctx} is outside 1..{n_ctx_train}, the range of this model")
    return n_ctx


def _max_pages(page_bytes: int, n_ctx: int) -> int:
    """Pages for four full contexts, but no more than half of the machine's memory."""
    whole = -(-n_ctx // PAGE_TOKENS)
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        memory = 8 << 30
    return max(whole + 1, min(4 * whole, memory // 2 // page_bytes))
