"""Laws of cached state, to the bit: however tokens came to be in a sequence, its logits are those of a fresh one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from engine_laws import SHAPES, TokenCounter, assert_same_bits, audit, fresh, open_engine, random_ids, run

from lfm2cpp.engine.engine import Engine
from lfm2cpp.kernels.widths import KEPT_COLUMNS

BORDERS = [1, 62, 63, 64, 65, 66, 126, 127, 128, 129, 130]
IDS = random_ids(150)
OTHER = random_ids(150, seed=1)


@pytest.fixture(scope="module", params=SHAPES)
def shape(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def engine(folder: Path, shape: str) -> Iterator[Engine]:
    with open_engine(folder, shape) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(engine: Engine) -> np.ndarray:
    """Logits of IDS, evaluated at once by a sequence of their own."""
    return fresh(engine, IDS)


@pytest.mark.parametrize("at", BORDERS)
def test_a_prompt_in_two_parts_equals_one(engine: Engine, expected: np.ndarray, at: int) -> None:
    with engine.sequence() as sequence:
        assert_same_bits(run(engine, sequence, IDS, [at]), expected)


@pytest.mark.parametrize("chunks", [[1] * 70, [7] * 30, [2, 3, 5, 16, 17, 48, 49], [12, 13, 31, 33, 3]])
def test_any_chunks_equal_one_prompt(engine: Engine, expected: np.ndarray, chunks: list[int]) -> None:
    """1 is decode, up to 16 tokens split attention over the context, more group the queries."""
    with engine.sequence() as sequence:
        assert_same_bits(run(engine, sequence, IDS, chunks), expected)


def test_results_that_are_kept_stay_as_they_are(engine: Engine, expected: np.ndarray) -> None:
    """Memory of results is used again, but not while somebody holds a result, a row of it, or a view of a row."""
    with engine.sequence() as one, engine.sequence() as two:
        kept = []
        for i in range(12):
            first, second = engine.evaluate([(one, IDS[i : i + 1]), (two, IDS[i : i + 1])])
            kept.append(second[0, 1:] if i % 2 else first)
            del first, second
        for i, rows in enumerate(kept):
            assert_same_bits(np.atleast_2d(rows), expected[i : i + 1, i % 2 :])
        alone = [engine.evaluate([(one, [token])])[0][0] for token in IDS[12:24]]
        assert_same_bits(np.stack(alone), expected[12:24])


def test_a_result_that_was_dropped_is_used_again(engine: Engine) -> None:
    with engine.sequence() as sequence:
        places = {engine.evaluate([(sequence, [token])])[0].ctypes.data for token in IDS[:12]}
        assert len(places) == 1
        places = {engine.evaluate([(sequence, IDS[:n])], logits="all")[0].ctypes.data for n in (7, 1, 6, 7, 2)}
        assert len(places) <= 2, "a smaller result may be part of a larger one that was dropped"


def test_results_of_all_sizes_stay_as_they_are(engine: Engine, expected: np.ndarray) -> None:
    """Every other result is kept, by its last row, while those after it are made."""
    kept, ends = [], np.cumsum([7, 1, 5, 16, 2, 17, 3, 6, 1, 16, 4]).tolist()
    with engine.sequence() as sequence:
        for i, (first, end) in enumerate(zip([0, *ends], ends, strict=False)):
            rows = engine.evaluate([(sequence, IDS[first:end])], logits="all")[0]
            assert_same_bits(rows, expected[first:end])
            if i % 2:
                kept.append(rows[-1])
    assert_same_bits(np.stack(kept), expected[[end - 1 for end in ends[1::2]]])


@pytest.mark.parametrize("n_threads", [2, 3])
def test_threads_change_nothing(folder: Path, shape: str, engine: Engine, expected: np.ndarray, n_threads: int) -> None:
    with open_engine(folder, shape, n_threads=n_threads) as other, other.sequence() as sequence:
        assert_same_bits(run(other, sequence, IDS, [129, 1, 1, 5]), expected)


@pytest.mark.parametrize("n_batch", [1, 5, 64])
def test_the_batch_size_changes_nothing(folder: Path, shape: str, expected: np.ndarray, n_batch: int) -> None:
    n = 20 if n_batch == 1 else len(IDS)
    with open_engine(folder, shape, n_batch=n_batch) as other, other.sequence() as sequence:
        assert_same_bits(run(other, sequence, IDS[:n]), expected[:n])


@pytest.mark.parametrize("at", BORDERS)
def test_rolling_back_equals_never_having_left(engine: Engine, expected: np.ndarray, at: int) -> None:
    with engine.sequence() as sequence:
        run(engine, sequence, IDS[:at] + OTHER[at:])
        sequence.truncate(at)
        assert sequence.tokens == tuple(IDS[:at]) and sequence.n_past == at
        assert_same_bits(run(engine, sequence, IDS[at:], [1]), expected[at:])
        assert sequence.tokens == tuple(IDS)


@pytest.mark.parametrize("at", BORDERS)
@pytest.mark.parametrize("ahead", [1, 15, 0])
def test_going_back_a_few_tokens_repeats_none(engine: Engine, expected: np.ndarray, at: int, ahead: int) -> None:
    """Tokens are tried and taken back, again and again, where pages end and elsewhere; 0: as many as it can be."""
    ahead, end = ahead or KEPT_COLUMNS - engine.hparams.d_conv, at + 5
    with engine.sequence() as sequence:
        run(engine, sequence, IDS[:at])
        for n in range(at, end):
            run(engine, sequence, OTHER[:ahead])
            with sequence.fork() as fork:
                fork.truncate(n)
                assert fork.state.pending == []
                assert_same_bits(run(engine, fork, IDS[n : n + 2]), expected[n : n + 2])
            sequence.truncate(n)
            assert sequence.state.pending == [] and sequence.tokens == tuple(IDS[:n])
            assert_same_bits(run(engine, sequence, IDS[n : n + 1]), expected[n : n + 1])
        assert_same_bits(run(engine, sequence, IDS[end:]), expected[end:])
        audit(engine, [sequence])


def test_going_back_further_than_columns_are_kept(engine: Engine, expected: np.ndarray) -> None:
    d_conv = engine.hparams.d_conv
    with engine.sequence() as sequence:
        for n in (70, 64, 62, 3, 0):
            run(engine, sequence, IDS[:n] + OTHER[: KEPT_COLUMNS - d_conv + 1])
            sequence.truncate(n)
            assert sequence.state.n_past == n // 64 * 64
            assert_same_bits(run(engine, sequence, IDS[n : n + 9]), expected[n : n + 9])
            sequence.truncate(0)


@pytest.mark.parametrize("at", BORDERS)
def test_a_fork_equals_a_copy(engine: Engine, expected: np.ndarray, at: int) -> None:
    """Both go on, in turns; neither sees what the other writes."""
    with engine.sequence() as left:
        run(engine, left, IDS[:at])
        with left.fork() as right:
            other = run(engine, right, OTHER[:5])
            first = run(engine, left, IDS[at : at + 3])
            other = np.concatenate([other, run(engine, right, OTHER[5:70])])
            second = run(engine, left, IDS[at + 3 :])
            assert_same_bits(np.concatenate([first, second]), expected[at:])
            assert_same_bits(other, fresh(engine, IDS[:at] + OTHER[:70])[at:])
            audit(engine, [left, right])


@pytest.mark.parametrize("at", BORDERS)
def test_a_shared_prefix_equals_an_own_one(folder: Path, shape: str, expected: np.ndarray, at: int) -> None:
    with open_engine(folder, shape) as engine, engine.sequence() as first, engine.sequence() as second:
        run(engine, first, IDS[:at] + OTHER[at:])
        kept = second.reuse_prefix(IDS)
        assert kept == at // 64 * 64, "whole pages of what the two have in common"
        assert second.state.pages == first.state.pages[: kept // 64]
        assert_same_bits(run(engine, second, IDS[kept:], [3]), expected[kept:])
        # The first one can go on in what it shares, or leave, and the second is none the wiser.
        first.truncate(min(at, 100))
        run(engine, first, OTHER[:40])
        first.close()
        second.truncate(70)
        assert_same_bits(run(engine, second, IDS[70:]), expected[70:])
        audit(engine, [second])


@pytest.mark.parametrize("at", BORDERS)
def test_a_saved_sequence_goes_on_as_if_it_had_never_left(
    engine: Engine, expected: np.ndarray, tmp_path: Path, at: int
) -> None:
    with engine.sequence() as sequence:
        run(engine, sequence, IDS[:at])
        sequence.save(tmp_path / "state")
    with engine.load_sequence(tmp_path / "state") as loaded:
        assert loaded.tokens == tuple(IDS[:at])
        assert_same_bits(run(engine, loaded, IDS[at:], [1]), expected[at:])


def test_the_same_page_after_another_one_is_not_shared(folder: Path, shape: str) -> None:
    """A page's K, V and convolution state depend on all tokens before it."""
    left, right, common = random_ids(64, seed=20), random_ids(64, seed=21), random_ids(64, seed=22)
    with open_engine(folder, shape) as engine:
        for beginning in (left, right):
            with engine.sequence() as sequence:
                assert sequence.reuse_prefix(beginning + common + [20]) == 0
                engine.evaluate([(sequence, beginning + common)])
        with engine.sequence() as sequence:
            assert sequence.reuse_prefix(common + left) == 0
            assert sequence.reuse_prefix(right + common + [20]) == 128
            assert_same_bits(run(engine, sequence, [20]), fresh(engine, right + common + [20])[-1:])
            assert sequence.reuse_prefix(left + common[:30] + right) == 64
            assert_same_bits(run(engine, sequence, common), fresh(engine, left + common)[64:])
        audit(engine, [])


def test_ragged_batches_equal_sequences_on_their_own(engine: Engine) -> None:
    """Prefill, decode and roll-back in one batch, sequences of every length, in steps that cut through them."""
    lengths = [1, 63, 64, 65, 130, 7]
    prompts = [random_ids(150, seed=10 + i) for i in range(len(lengths))]
    expected = [fresh(engine, ids) for ids in prompts]
    sequences = [engine.sequence() for _ in lengths]
    rows: list[list[np.ndarray]] = [[] for _ in lengths]
    done = [0] * len(lengths)
    for sizes in [lengths, [1] * 6, [1, 1, 40, 1, 1, 2], [60, 1, 1, 70, 3, 1]]:
        ends = [min(150, first + n) for first, n in zip(done, sizes, strict=True)]
        batch = [(s, ids[a:b]) for s, ids, a, b in zip(sequences, prompts, done, ends, strict=True) if b > a]
        results = iter(engine.evaluate(batch, logits="all"))
        for i, (first, end) in enumerate(zip(done, ends, strict=True)):
            if end > first:
                rows[i].append(next(results))
        done = ends
        sequences[4].truncate(100)
        done[4] = 100
        rows[4] = [np.concatenate(rows[4])[:100]]
    for i, sequence in enumerate(sequences):
        assert_same_bits(np.concatenate(rows[i]), expected[i][: done[i]])
        sequence.close()
    audit(engine, [])


def test_logits_of_the_last_token_of_all_or_of_none(engine: Engine, expected: np.ndarray) -> None:
    with engine.sequence() as sequence:
        assert engine.evaluate([(sequence, IDS[:66])], logits="none")[0].shape == (0, engine.n_vocab)
        assert_same_bits(engine.evaluate([(sequence, IDS[66:130])])[0], expected[129:130])
        engine.evaluate([(sequence, OTHER[:70])], logits="none")
        sequence.truncate(129)  # the token before is repeated, but nobody asked for its logits
        assert sequence.state.pending == [IDS[128]]
        assert_same_bits(engine.evaluate([(sequence, IDS[129:])], logits="all")[0], expected[129:])


def test_a_result_does_not_change_when_the_engine_goes_on(engine: Engine, expected: np.ndarray) -> None:
    with engine.sequence() as sequence:
        first = engine.evaluate([(sequence, IDS[:10])], logits="all")[0]
        copy = first.copy()
        engine.evaluate([(sequence, OTHER[:20])], logits="all")
        assert_same_bits(first, copy)


def test_a_chat_of_4000_tokens_repeats_fewer_than_64(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted: tokens evaluated beyond the new ones, for each way in which a second turn can begin."""
    path_options = {"n_ctx": 4096, "n_threads": 2}
    with open_engine(folder, "q8_0", **path_options) as engine:
        conversation, answer = random_ids(4000, seed=5), random_ids(30, seed=6)
        counter = TokenCounter(engine, monkeypatch)
        with engine.sequence() as sequence:
            engine.evaluate([(sequence, conversation)])
            assert counter.count == 4000
            for token in answer[:5]:
                engine.evaluate([(sequence, [token])])

            def turn(ids: list[int], n_new: int, from_sequence=sequence) -> None:
                counter.reset()
                kept = from_sequence.reuse_prefix(ids)
                engine.evaluate([(from_sequence, ids[kept:])])
                assert n_new <= counter.count < n_new + 64

            turn(conversation + answer[:5] + random_ids(20, seed=7), 20)  # goes on
            assert counter.count == 20
            turn(conversation + random_ids(20, seed=8), 20)  # another question after the same history
            turn(conversation[:3000] + random_ids(20, seed=9), 20)  # an edited history
            turn(conversation[:3000] + random_ids(20, seed=9), 1)  # the same once more: only the last one's logits
            with engine.sequence() as newcomer:
                turn(conversation[:3990], 1, newcomer)  # what another chat has left
