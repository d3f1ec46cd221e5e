"""How batches are cut into steps and steps into slices: nothing is lost, nothing takes too long."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm2cpp.engine.batching import ATTENTION_MACS, OP_MACS, SLICE_MACS, Entry, slices, split_steps, step_tokens
from lfm2cpp.engine.plan import Op

WIDTH = 4096


def entry(n_past: int, n: int, logits: str = "last") -> Entry:
    state = SimpleNamespace(n_past=n_past, pending=[], settled=True)
    return Entry(SimpleNamespace(state=state), list(range(n)), logits)  # type: ignore[arg-type]


def op(macs: int, label: str = "mul_mat") -> Op:
    return Op("kernel", label, {}, macs=macs)


@given(
    st.lists(st.tuples(st.integers(0, 60000), st.integers(1, 900)), min_size=1, max_size=6),
    st.integers(1, 512),
    st.integers(1, 4),
    st.sampled_from(["last", "all", "none"]),
)
def test_steps(lengths: list[tuple[int, int]], n_step: int, n_threads: int, logits: str) -> None:
    entries = [entry(past, n, logits) for past, n in lengths]
    seen: dict[int, list[int]] = {id(e): [] for e in entries}
    wanted = {id(e): 0 for e in entries}
    for parts in split_steps(entries, n_step, WIDTH, n_threads):
        assert 0 < sum(len(part.ids) for part in parts) <= n_step
        assert len({id(part.entry) for part in parts}) == len(parts), "a sequence stands once in a step"
        for part in parts:
            depth = part.state.n_past + len(seen[id(part.entry)])
            assert len(part.ids) == 1 or len(part.ids) * depth * WIDTH <= n_threads * ATTENTION_MACS
            seen[id(part.entry)] += part.ids
            wanted[id(part.entry)] += part.n_wanted
    for e, (_, n) in zip(entries, lengths, strict=True):
        assert seen[id(e)] == list(range(n))
        assert wanted[id(e)] == {"last": 1, "all": n, "none": 0}[logits]


@pytest.mark.parametrize(("n", "sizes"), [(512, [512]), (513, [257, 256]), (1100, [367, 367, 366])])
def test_steps_are_even(n: int, sizes: list[int]) -> None:
    """A prompt a little longer than a step does not leave a rest that is slow for its size."""
    found = [len(part.ids) for parts in split_steps([entry(0, n)], 512, 64, 2) for part in parts]
    assert found == sizes


@given(st.lists(st.integers(0, 10**8), min_size=1, max_size=40), st.integers(1, 512), st.integers(1, 4))
def test_slices(macs: list[int], n_tokens: int, n_threads: int) -> None:
    ops = [op(m, "attention" if m % 7 == 0 else "mul_mat") for m in macs]
    cuts = list(slices(ops, n_tokens, n_threads))
    assert [first for first, _ in cuts] == [0, *(last for _, last in cuts[:-1])] and cuts[-1][1] == len(ops)
    for first, last in cuts:
        assert first < last, "an empty slice would be waited for"
        assert sum(macs[first : last - 1]) * n_tokens <= SLICE_MACS * n_threads, "only its last op may be too long"


def test_a_step_is_shorter_where_an_op_is_wide() -> None:
    assert step_tokens([op(10**6)], 512, 1) == 512
    assert step_tokens([op(10**6), op(10**8)], 512, 1) == OP_MACS // 10**8
    assert step_tokens([op(10**8)], 512, 4) == 4 * OP_MACS // 10**8
    assert step_tokens([op(10**12)], 512, 1) == 1
    assert step_tokens([op(0)], 512, 1) == 512


def test_rows_of_an_entry() -> None:
    e = entry(0, 5, "all")
    assert e.result(7).shape == (0, 7)
    e.rows = [np.zeros((2, 7), np.float32), np.ones((3, 7), np.float32)]
    assert e.result(7).shape == (5, 7)
    e.rows = e.rows[:1]
    assert e.result(7) is e.rows[0]


def test_a_rolled_back_tail_comes_first_and_wants_no_logits() -> None:
    state: Any = SimpleNamespace(n_past=64, pending=[7, 8, 9], settled=True)
    e = Entry(SimpleNamespace(state=state), [10, 11], "all")  # type: ignore[arg-type]
    [[part]] = split_steps([e], 512, WIDTH, 1)
    assert part.ids == [7, 8, 9, 10, 11] and part.n_wanted == 2
