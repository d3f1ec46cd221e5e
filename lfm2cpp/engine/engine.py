"""Batches of tokens in, logits out. Owns the mapped file, the plan, the team of threads and the pages.

Works on token ids only: text belongs to lfm2cpp.text, choosing tokens to lfm2cpp.sampling.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable
from collections.abc import Sequence as ListLike
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import numpy as np

from lfm2cpp.arch.validate import validate_model
from lfm2cpp.errors import UsageError
from lfm2cpp.gguf import GGUFFile, read_gguf
from lfm2cpp.kernels import batch as at
from lfm2cpp.kernels.library import Progress
from lfm2cpp.kernels.widths import CHUNK_TOKENS
from lfm2cpp.threads import default_threads

from .batching import SLICE_BYTES, SLICE_MACS, Entry, Part, check_batch, slices, split_steps, step_tokens
from .limits import MAX_BATCH, MAX_THREADS, check_memory, checked, context_size, max_pages
from .load import RopeTable, load_weights
from .memory import KV_TYPES, LogitsPool, PageLayout, PagePool, n_pages
from .model import record_lfm2
from .plan import SPLIT_TOKENS, CompiledPlan, Plan
from .sequence import Sequence
from .team import Team


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
        sum_squares: bool = False,
        force: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Map and validate `path`, record the plan, compile what kernels are missing.

        With `trace`, `self.trace` holds every intermediate of the last step; `sum_squares` is for take_squares.
        `force` runs a model that the memory does not suffice for. Raises ModelFormatError for a file that cannot be
        run, UsageError for options out of range, ContextError without enough memory.
        """
        if kv_type not in KV_TYPES:
            raise UsageError(f"KV type {kv_type!r} is not one of {', '.join(KV_TYPES)}")
        self.kv_type = kv_type
        self.n_batch = checked("n_batch", n_batch, 1, MAX_BATCH)
        self.n_threads = checked("the number of threads", n_threads or default_threads(), 1, MAX_THREADS)
        self.path = Path(path)
        self.gguf = read_gguf(path)
        try:
            self._prepare(n_ctx, force, progress, trace, sum_squares)
        except BaseException:
            self.gguf.close()
            raise

    def _prepare(
        self, n_ctx: int | None, force: bool, progress: Progress | None, trace: bool, sum_squares: bool
    ) -> None:
        self.facts = validate_model(self.gguf)
        self.hparams = hp = self.facts.hparams
        self.n_vocab, self.n_ctx = hp.n_vocab, context_size(n_ctx, hp.n_ctx_train)
        if self.kv_type == "q8_0" and hp.n_embd_head % 32:
            raise UsageError(f"KV type q8_0 needs heads of a multiple of 32, not {hp.n_embd_head} as here; use f16")
        self.layout = PageLayout.of(hp, self.kv_type)
        page_bytes = self.layout.page_bytes
        check_memory(self.path, self.gguf.nbytes, page_bytes * n_pages(self.n_ctx) if n_ctx else 0, force)
        self.pool = PagePool(page_bytes, max_pages(page_bytes, self.n_ctx))
        self.rope = RopeTable(hp, self.n_ctx)
        self.weights, self._tables = load_weights(self.gguf, self.facts, self.layout, self.rope)
        self.plan = Plan(self.n_batch, self.n_threads, self.n_ctx, trace=trace, sum_squares=sum_squares)
        record_lfm2(self.plan, self.weights, hp)
        self._logits = LogitsPool(hp.n_vocab)
        compiled = self.plan.finish(progress)
        self._describe_buffers(compiled)
        self.trace: dict[str, np.ndarray] = {}
        self._stop_asked = False
        self.lock = threading.RLock()
        self._pid = os.getpid()
        self.team = Team(compiled, self.n_threads, progress)
        # Runs on close, when the engine is dropped, and before the interpreter ends.
        self._end = weakref.finalize(self, _end, self.lock, self.team, self.gguf, self._pid)

    def _describe_buffers(self, compiled: CompiledPlan) -> None:
        """Where a step's tokens go, and how many of them make a step short enough to be run in one go."""
        n, batch, ops = self.n_batch, self.plan.batch, self.plan.ops
        buffers = [np.zeros(n, np.int32) for _ in range(3)] + [np.zeros(n * at.RUN_FIELDS, np.int64)]
        for number, buffer in zip((at.TOKENS, at.POSITIONS, at.RUN_OF, at.RUNS), buffers, strict=True):
            batch[number] = buffer.ctypes.data
        out_rows = self.plan.int32_view(int(batch[at.OUT_ROWS]))
        tokens, positions, run_of, runs = buffers
        self._descriptor = [memoryview(array) for array in (tokens, positions, run_of, out_rows, runs)]
        self._batch, self._out = memoryview(batch), memoryview(compiled.out)
        of_all_rows = [op for op in ops if op.args.get("count") != self.plan.out_rows]
        few, many = (step_tokens(some, n, self.n_threads) for some in (of_all_rows, ops))
        self._step_tokens = {"last": few, "none": few, "all": many}
        self._attention_width = 2 * self.hparams.n_embd
        macs, nbytes = sum(op.macs for op in ops), sum(op.nbytes for op in ops)
        affordable = 2 * SLICE_MACS * self.n_threads // macs if nbytes <= 4 * SLICE_BYTES else 0
        self._unsliced_tokens = min(SPLIT_TOKENS, affordable)

    # Sequences

    def sequence(self) -> Sequence:
        """A new, empty sequence."""
        self._check_usable()
        return Sequence(self)

    def load_sequence(self, path: str | os.PathLike[str]) -> Sequence:
        """A sequence that Sequence.save wrote with this model. StateFileError if it is not that."""
        from .state_file import load_sequence

        with self.guard():
            return load_sequence(self, Path(path))

    @cached_property
    def model_digest(self) -> str:
        """What tells this model from others, for files that belong to it."""
        from .state_file import model_digest

        return model_digest(self.gguf)

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
        when tokens or pages do not fit. After an interrupt (Ctrl-C, `interrupt`, `stop`) KeyboardInterrupt is raised
        and every sequence holds what it held before, and perhaps the first of its new tokens.
        """
        with self.guard():
            self._check_usable()  # it may have been closed while this call waited
            self._stop_asked = False
            entries = [Entry(sequence, ids, logits) for sequence, ids in check_batch(self, batch, logits)]
            try:
                for entry in entries:
                    entry.state.reserve(len(entry.ids))
                for parts in split_steps(entries, self._step_tokens[logits], self._attention_width, self.n_threads):
                    self._step(parts, stop)
                return [entry.result(self.n_vocab) for entry in entries]
            except BaseException:
                for entry in entries:
                    entry.state.settle()
                raise

    def take_squares(self) -> dict[str, np.ndarray]:
        """Sums of the squares of what the layers' matrices were multiplied with since the last call, by tensor name:
        float32, (row length,). Nothing, unless the engine was made with sum_squares. An evaluation that was interrupted
        has left its part."""
        with self.guard():
            found = {name: sums.copy() for name, sums in self.plan.squares.items()}
            for sums in self.plan.squares.values():
                sums[:] = 0
            return found

    def interrupt(self) -> None:
        """Stop the evaluation that is running, from any thread; it raises KeyboardInterrupt."""
        self._stop_asked = True

    def guard(self) -> threading.RLock:
        """The lock that whoever changes a sequence holds. UsageError once the engine is not usable any more."""
        self._check_usable()
        return self.lock

    def _check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise UsageError("this engine belongs to the parent process; load the model again in the child")
        if self.team.leaving:
            raise UsageError("this engine is closed; load the model again")

    def _check_stop(self, stop: threading.Event | None) -> None:
        if self._stop_asked or self.team.leaving or (stop is not None and stop.is_set()):
            raise KeyboardInterrupt

    def _step(self, parts: list[Part], stop: threading.Event | None) -> None:
        """One replay: fill in the descriptor, run, take the logits."""
        n_tokens, n_out = self._describe(parts)
        logits, self._out[0] = self._logits.take(n_out)
        self._check_stop(stop)
        for part in parts:
            part.state.settled = False
        if n_tokens <= self._unsliced_tokens:
            self.team.run(0, len(self.plan.ops))
        else:
            for first, last in slices(self.plan.ops, n_tokens, self.n_threads):
                self._check_stop(stop)
                self.team.run(first, last)
        row = 0
        for part in parts:
            part.state.advance(part.ids)
            if part.n_wanted:
                part.entry.rows.append(logits if len(parts) == 1 else logits[row : row + part.n_wanted])
                row += part.n_wanted
        if self.plan.trace:
            self.trace = {name: self.plan.view(rows)[:n_tokens].copy() for name, rows in self.plan.named.items()}
            self.trace["result_norm"] = self.trace["result_norm"][:row]
            self.trace["result_output"] = logits.copy()

    def _describe(self, parts: list[Part]) -> tuple[int, int]:
        """Write the batch descriptor; return how many tokens it has, and how many rows of logits.

        An item at a time, through memoryviews: NumPy is slow after a step, which has left nothing of it in a cache.
        """
        row = wanted = deepest = 0
        tokens, positions, run_of, out_rows, runs = self._descriptor
        for i, part in enumerate(parts):
            state, position = part.state, part.state.n_past
            record = (row, len(part.ids), position, state.addresses_at, state.conv_address)  # in the order of at.RUN_*
            for where, value in enumerate(record, at.RUN_FIELDS * i):
                runs[where] = value
            for token in part.ids:
                tokens[row], positions[row], run_of[row] = token, position, i
                row, position = row + 1, position + 1
            for out_row in range(row - part.n_wanted, row):
                out_rows[wanted] = out_row
                wanted += 1
            deepest = max(deepest, position)
        self.rope.grow(deepest)
        batch = self._batch
        batch[at.N_TOKENS], batch[at.N_OUT], batch[at.N_RUNS] = row, wanted, len(parts)
        batch[at.SPLIT_CHUNKS] = -(-deepest // CHUNK_TOKENS) if row <= SPLIT_TOKENS else 0
        return row, wanted

    # Ending

    @property
    def closed(self) -> bool:
        return self.team.leaving  # at once when close is called; the team ends when what runs has stopped

    @property
    def is_elsewhere(self) -> bool:
        """In a forked child, where it has no threads, and its lock may be held for ever."""
        return os.getpid() != self._pid

    def close(self) -> None:
        """Interrupt what runs, end the threads and let the file go. Safe to call twice."""
        self._end()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise UsageError("an engine can be neither pickled nor copied; load the model again where it is needed")


def _end(lock: threading.RLock, team: Team, gguf: GGUFFile, pid: int) -> None:
    """What is left to do for an engine that nobody uses any more, in the process that made it."""
    team.leaving = True
    if os.getpid() == pid:
        with lock:
            team.close()
            gguf.close()
