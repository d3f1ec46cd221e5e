"""A sequence of tokens as its user sees it: append through Engine.evaluate, go back, copy, save."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence as ListLike
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lfm2cpp.errors import UsageError

from .batching import token_list
from .state import SequenceState

if TYPE_CHECKING:
    from .engine import Engine


class Sequence:
    """Tokens with their K, V and convolution state. Made by Engine.sequence, of which it keeps the engine alive."""

    def __init__(self, engine: Engine, state: SequenceState | None = None) -> None:
        self.closed = False
        self.engine = engine
        self.state = state or SequenceState(engine.pool, engine.layout)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The ids this sequence stands for."""
        return tuple(self.state.tokens)

    @property
    def n_past(self) -> int:
        """How many tokens it holds."""
        return len(self.state.tokens)

    def truncate(self, n_past: int) -> None:
        """Keep the first n_past tokens. The next evaluation repeats fewer than 64 of them, and none after a few steps
        back."""
        with self._guard():
            if not isinstance(n_past, int) or not 0 <= n_past <= self.n_past:
                raise UsageError(f"cannot keep {n_past!r} tokens of a sequence that holds {self.n_past}")
            self.state.truncate(n_past)

    def reuse_prefix(self, token_ids: ListLike[int]) -> int:
        """Keep what this sequence has in common with token_ids, short of its last token; returns how many tokens.

        Where earlier sequences have left more of the same prefix, it is taken over from them.
        """
        ids = token_list(token_ids, self.engine.n_vocab)
        with self._guard():
            return self.state.reuse_prefix(ids)

    def fork(self) -> Sequence:
        """An independent copy that shares memory until one of the two writes."""
        with self._guard():
            return Sequence(self.engine, self.state.fork())

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write the state to a file that Engine.load_sequence reads back; `force` replaces an existing one.

        Raises OutputError or UsageError when it cannot be written; what stood there is then untouched.
        """
        from .state_file import save_sequence

        with self._guard():
            save_sequence(self, Path(path), force=force)

    def close(self) -> None:
        """Give the pages back. Safe to call twice, and after the engine was closed."""
        if not self.closed:
            self.closed = True
            if not self.engine.is_elsewhere:
                with self.engine.lock:
                    self.state.release()

    def _guard(self) -> threading.RLock:
        """The engine's lock; UsageError when there is nothing left to use. What was torn off is put right first."""
        lock = self.engine.guard()
        if self.closed:
            raise UsageError("this sequence is closed; make a new one")
        with lock:
            if not self.state.settled:
                self.state.settle()
        return lock

    def __enter__(self) -> Sequence:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Not release: this may run in the midst of anything, also of a change to the pool.
        if not getattr(self, "closed", True):
            self.closed = True
            self.state.pool.abandoned.append(self.state.release)

    def __reduce__(self) -> NoReturn:
        raise UsageError("a sequence cannot be pickled or copied: fork() copies it, save() writes it to a file")
