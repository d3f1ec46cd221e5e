"""A sequence of tokens as its user sees it: append through Engine.evaluate, go back, copy, save."""

from __future__ import annotations

import os
from collections.abc import Sequence as ListLike
from pathlib import Path
from typing import TYPE_CHECKING

from lfm2cpp.errors import UsageError

from .memory import SequenceState

if TYPE_CHECKING:
    from .engine import Engine


class Sequence:
    """Tokens with their K, V and convolution state. Made by Engine.sequence."""

    def __init__(self, engine: Engine, state: SequenceState | None = None) -> None:
        self.engine = engine
        self.state = state or SequenceState(engine.pool, engine.layout)
        self.closed = False

    @property
    def tokens(self) -> tuple[int, ...]:
        """The ids this sequence stands for."""
        return tuple(self.state.tokens)

    @property
    def n_past(self) -> int:
        """How many tokens it holds."""
        return len(self.state.tokens)

    def truncate(self, n_past: int) -> None:
        """Keep the first n_past tokens. The next evaluation repeats fewer than 64 of them."""
        if not 0 <= n_past <= self.n_past:
            raise UsageError(f"cannot keep {n_past} tokens of a sequence that holds {self.n_past}")
        with self.engine._lock:
            self.state.truncate(n_past)

    def reuse_prefix(self, token_ids: ListLike[int]) -> int:
        """Keep what this sequence has in common with token_ids, short of its last token; returns how many tokens.

        An empty sequence takes over pages that earlier sequences left for the same prefix.
        """
        ids = list(token_ids)
        with self.engine._lock:
            if not self.state.tokens:
                return self.state.adopt_prefix(ids)
            common = 0
            for ours, theirs in zip(self.state.tokens, ids[:-1], strict=False):
                if ours != theirs:
                    break
                common += 1
            self.state.truncate(common)
            return common

    def fork(self) -> Sequence:
        """An independent copy that shares memory until one of the two writes."""
        with self.engine._lock:
            return Sequence(self.engine, self.state.fork())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a file that Engine.load_sequence reads back."""
        from .state_file import save_sequence

        with self.engine._lock:
            save_sequence(self, Path(path))

    def close(self) -> None:
        """Give the pages back. Safe to call twice."""
        with self.engine._lock:
            if not self.closed:
                self.closed = True
                self.state.release()
