"""Random walks: sequences grow, go back, fork, share, are saved, closed and interrupted, in a pool that is too small.

After every step each result is compared, to the bit, with that of a sequence that has only ever been evaluated at once.
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from engine_laws import FIRST_ID, SHAPES, assert_same_bits, audit, fresh, open_engine, random_ids

from lfm2cpp.engine.engine import Engine
from lfm2cpp.engine.sequence import Sequence
from lfm2cpp.errors import ContextError

N_CTX = 256
MAX_PAGES = 14  # of 64 tokens: three full contexts
STEPS = 160


class Walk:
    """Sequences of one engine under random operations, and an oracle: an engine with a pool of its own."""

    def __init__(self, engine: Engine, oracle: Engine, folder: Path, seed: int) -> None:
        self.engine, self.oracle, self.folder = engine, oracle, folder
        self.rng = np.random.default_rng(seed)
        # Few stories, which begin alike: walks meet again and again, and find each other's pages.
        trunk = random_ids(130, seed=100)
        self.stories = [trunk[:n] + random_ids(N_CTX - n, seed=n) for n in (130, 128, 70, 64, 63)]
        self.sequences: list[tuple[Sequence, list[int]]] = []  # with the story it follows
        self.n_checked = 0

    def step(self) -> None:
        names = ["begin", "grow", "grow", "grow", "go_back", "fork", "switch", "save", "drop", "interrupt", "overflow"]
        getattr(self, str(self.rng.choice(names)))()
        audit(self.engine, [sequence for sequence, _ in self.sequences])

    def _pick(self) -> tuple[Sequence, list[int]] | None:
        return self.sequences[self.rng.integers(len(self.sequences))] if self.sequences else None

    def _story(self) -> list[int]:
        return self.stories[self.rng.integers(len(self.stories))]

    def begin(self) -> None:
        if len(self.sequences) < 4:
            sequence, story = self.engine.sequence(), self._story()
            if self.rng.random() < 0.7:
                sequence.reuse_prefix(story)
            self.sequences.append((sequence, story))

    def _batch(self) -> list[tuple[Sequence, list[int]]]:
        batch = []
        for sequence, story in self.sequences:
            n = int(self.rng.choice([0, 1, 1, 2, 17, 40, 64, 100]))
            ids = story[sequence.n_past : sequence.n_past + n]
            if ids:
                batch.append((sequence, ids))
        return batch

    def grow(self) -> None:
        """Evaluate a ragged batch; in a full pool nothing may change, and dropping a sequence helps."""
        batch = self._batch()
        before = [sequence.tokens for sequence, _ in batch]
        try:
            rows = self.engine.evaluate(batch, logits="all")
        except ContextError as error:
            assert "pages" in str(error)
            assert [sequence.tokens for sequence, _ in batch] == before
            self.drop()
            return
        for (sequence, ids), tokens, found in zip(batch, before, rows, strict=True):
            assert sequence.tokens == (*tokens, *ids)
            assert_same_bits(found, fresh(self.oracle, sequence.tokens)[len(tokens) :])
            self.n_checked += len(found)

    def go_back(self) -> None:
        if picked := self._pick():
            picked[0].truncate(int(self.rng.integers(picked[0].n_past + 1)))

    def fork(self) -> None:
        if (picked := self._pick()) and len(self.sequences) < 4:
            self.sequences.append((picked[0].fork(), picked[1]))

    def switch(self) -> None:
        """Another story for an old sequence: what the two have in common is kept."""
        if picked := self._pick():
            sequence, story = picked[0], self._story()
            kept = sequence.reuse_prefix(story)
            assert list(sequence.tokens) == story[:kept]
            self.sequences[self.sequences.index(picked)] = (sequence, story)

    def save(self) -> None:
        if picked := self._pick():
            path = self.folder / "state"
            picked[0].save(path, force=True)
            try:
                loaded = self.engine.load_sequence(path)
            except ContextError:
                return  # the pool is full
            assert loaded.tokens == picked[0].tokens
            picked[0].close()
            self.sequences[self.sequences.index(picked)] = (loaded, picked[1])

    def drop(self) -> None:
        if picked := self._pick():
            self.sequences.remove(picked)
            if self.rng.random() < 0.5:
                picked[0].close()  # else it is for the collector

    def interrupt(self) -> None:
        """Stopped between two slices of ops, anywhere in a batch: earlier tokens stay, new ones may."""
        batch = self._batch()
        before = [sequence.tokens for sequence, _ in batch]
        stop, left = threading.Event(), int(self.rng.integers(30))
        run = self.engine.team.run

        def run_a_few(first: int, last: int) -> None:
            nonlocal left
            middle = int(self.rng.integers(first + 1, last + 1))
            run(first, middle if left == 0 else last)
            left -= 1
            if left < 0:
                raise KeyboardInterrupt

        self.engine.team.run = run_a_few  # type: ignore[method-assign]
        try:
            self.engine.evaluate(batch, stop=stop)
        except (KeyboardInterrupt, ContextError):
            pass
        finally:
            self.engine.team.run = run  # type: ignore[method-assign]
        for (sequence, ids), tokens in zip(batch, before, strict=True):
            assert sequence.tokens[: len(tokens)] == tokens
            assert sequence.tokens == (*tokens, *ids)[: sequence.n_past]

    def overflow(self) -> None:
        if picked := self._pick():
            before = picked[0].tokens
            with pytest.raises(ContextError, match=f"do not fit the context of {N_CTX}"):
                self.engine.evaluate([(picked[0], [FIRST_ID] * (N_CTX + 1 - len(before)))])
            assert picked[0].tokens == before


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SHAPES)
def test_a_random_walk(tmp_path: Path, name: str, seed: int) -> None:
    with (
        open_engine(tmp_path, name, n_ctx=N_CTX, n_batch=48, n_threads=1 + seed % 2) as engine,
        open_engine(tmp_path, name, n_ctx=N_CTX) as oracle,
    ):
        engine.pool.max_pages = MAX_PAGES
        walk = Walk(engine, oracle, tmp_path, seed)
        for _ in range(STEPS):
            walk.step()
        assert walk.n_checked > STEPS, "the walk has evaluated something"
        for sequence, _ in walk.sequences:
            sequence.close()
        assert engine.pool.n_used == len(engine.pool.prefixes), "no page is lost"
