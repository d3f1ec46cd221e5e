"""The machine's limits: probes that compute what they claim, rates that make sense, profiles that add up."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from kernel_calls import aligned

from lfm2cpp.benchmark import limits
from lfm2cpp.benchmark.limits import OPERANDS, READ_STEP, VECTOR, best_seconds, f32_rate, int8_rates, read_rate
from lfm2cpp.benchmark.random_model import write_random_model
from lfm2cpp.benchmark.shapes import find_shape
from lfm2cpp.cli.bench import bench
from lfm2cpp.engine.engine import Engine
from lfm2cpp.kernels import widths
from lfm2cpp.kernels.library import library

MAX_FMA_ERROR = 1e-5  # relative to the sum of magnitudes, float32
STEPS = 8


@pytest.fixture
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BUFFER_BYTES", 32 << 20)
    monkeypatch.setattr(limits, "SMALLEST_BUFFER", 32 << 20)


def probe(name: str, **args: int) -> np.ndarray:
    out = np.zeros(8, np.int64)
    library().load([limits.PROBE + name])[limits.PROBE + name]({**args, "out": out.ctypes.data})
    return out


def test_numbers_of_the_probes_agree() -> None:
    """limits.py knows the kernels' sizes without importing them, for they import Numba."""
    from lfm2cpp.kernels import probe as kernels

    assert (limits.READ_STEP, limits.OPERANDS, limits.PRODUCTS, limits.VECTOR) == (
        kernels.READ_STEP, kernels.OPERANDS, kernels.PRODUCTS, kernels.VECTOR,
    )  # fmt: skip
    assert limits.MATRIX_OPERANDS == kernels.MATRIX_OPERANDS


@pytest.mark.parametrize("n_rounds", [1, 2, 7])
def test_read_stream_reads_every_byte(n_rounds: int) -> None:
    data = np.random.default_rng(n_rounds).integers(-(2**31), 2**31, n_rounds * READ_STEP // 4).astype(np.int32)
    expected = int(data.sum(dtype=np.int64))
    wrapped = (expected + 2**31) % 2**32 - 2**31
    assert probe("read_stream", source=data.ctypes.data, nbytes=data.nbytes)[0] == wrapped


@pytest.mark.parametrize("rounds", [1, 3])
def test_dot_stream_multiplies_every_operand(rounds: int) -> None:
    rng = np.random.default_rng(rounds)
    operands = rng.integers(-127, 128, OPERANDS).astype(np.int8).reshape(STEPS, 8, VECTOR)
    operands[:, :2] = rng.integers(0, 64, operands[:, :2].shape)
    wide = operands.astype(np.int64)
    products = [(wide[s, i] * wide[s, 2 + t]).sum() for s in range(STEPS) for i in range(2) for t in range(6)]
    expected = rounds * int(sum(products))
    assert probe("dot_stream", operands=operands.ctypes.data, rounds=rounds)[0] == expected


@pytest.mark.skipif(not widths.MATRICES, reason="this level has no products of matrices")
def test_matrix_stream_multiplies_every_operand() -> None:
    data = aligned(limits.MATRIX_OPERANDS)
    W, tokens = widths.W, widths.TILE_TOKENS
    end, sums = 2 * 16 * VECTOR, 2 * (16 * VECTOR + 32 * tokens)
    data[:sums] = np.random.default_rng(0).integers(0, 256, sums)
    w = data[:end].view(np.int8).reshape(2, 8, 2 * W, 4).astype(np.int64)
    a = data[end:sums].view(np.int8).reshape(2, tokens, 8, 4).astype(np.int64)
    at = probe("matrix_stream", operands=data.ctypes.data, rounds=3)[0]
    assert at == data.ctypes.data + sums
    found = data[sums:].view(np.int32).reshape(2, 2, tokens, W)
    assert np.array_equal(found.transpose(0, 2, 1, 3).reshape(2, tokens, 2 * W), np.einsum("bktc,bnkc->bnt", w, a))


def test_fma_stream_multiplies_every_operand() -> None:
    operands = np.random.default_rng(0).uniform(-1, 1, OPERANDS // 4).astype(np.float32).reshape(STEPS, 8, -1)
    wide = operands.astype(np.float64)
    products = [wide[s, i] * wide[s, 2 + t] for s in range(STEPS) for i in range(2) for t in range(6)]
    found = probe("fma_stream", operands=operands.ctypes.data, rounds=1).view(np.float32)[0]
    assert abs(found - np.sum(products)) < MAX_FMA_ERROR * np.sum(np.abs(products))


def test_rates_are_of_this_planet() -> None:
    buffer = limits.touched_buffer(16 << 20)
    address = -(-buffer.ctypes.data // READ_STEP) * READ_STEP
    assert 1e8 < read_rate(address, buffer.nbytes - READ_STEP, 2, rounds=2) < 1e13
    assert 1e8 < f32_rate(1, rounds=2) < 1e13
    assert 1e8 < int8_rates(2, rounds=2)[1] < 1e14


def test_best_seconds_spans_all_threads() -> None:
    """A round lasts from the first start to the last end, and every thread works in every round."""
    calls: list[int] = []
    lock = threading.Lock()

    def work(ith: int) -> None:
        with lock:
            calls.append(ith)
        time.sleep(0.02 * (ith + 1))

    assert 0.06 <= best_seconds(work, 3, 2) < 1
    assert sorted(calls) == [0, 0, 1, 1, 2, 2]


def test_failure_in_a_thread_is_raised() -> None:
    def work(ith: int) -> None:
        if ith == 1:
            raise MemoryError("of thread 1")

    with pytest.raises((MemoryError, threading.BrokenBarrierError)):
        best_seconds(work, 2, 3)


@pytest.mark.usefixtures("small_buffer")
def test_profile_adds_up(tmp_path: Path) -> None:
    """Bytes of a decode step are the file's weights once; MACs are weights times tokens."""
    path = tmp_path / "m.gguf"
    write_random_model(path, find_shape("350M,n_embd=256,n_layer=3,attention=1,n_ff=512,n_vocab=1024"), "Q8_0")
    args = ["-m", str(path), "--profile", "-p", "70", "-n", "4", "-d", "0,64", "-r", "2", "-b", "32", "-o", "jsonl"]
    done = CliRunner().invoke(bench, args)
    assert done.exit_code == 0, done.output
    pp, tg, pp_deep, tg_deep = (json.loads(line) for line in done.stdout.splitlines())
    assert [p["test"] for p in (pp, tg, pp_deep, tg_deep)] == ["pp70", "tg4", "pp70 @ d64", "tg4 @ d64"]
    block_bytes = 34 / 32
    matrices = 2 * 4 * 256 * 256 + 4 * 256 * 256 + 3 * 3 * 512 * 256  # convolutions, attention, FFN
    head = 1024 * 256

    def total(profile: dict, key: str, *kinds: str) -> float:
        return sum(op[key] for op in profile["ops"] if op["kind"].startswith(kinds))

    products = ("mul_mat", "swiglu")
    assert total(tg, "macs", *products) == matrices + head
    assert total(tg, "bytes", *products) == pytest.approx((matrices + head) * block_bytes)
    assert total(pp, "macs", *products) == 70 * matrices + head
    assert total(pp, "bytes", *products) == pytest.approx(3 * (matrices + head) * block_bytes)  # 3 chunks of 32
    assert total(tg, "macs", "attention") == pytest.approx(2 * 2 * 4 * 64)
    assert total(tg_deep, "macs", "attention") == pytest.approx((64 + 2) * 2 * 4 * 64)
    assert total(tg_deep, "bytes", "attention") == pytest.approx((64 + 2) * 2 * 4 * 64 * 2)  # K and V, f16
    for profile in (pp, tg, pp_deep, tg_deep):
        assert 0 < profile["ops_share"] <= 1.0
        ops_ns = profile["ops_share"] * profile["step_ns"]
        assert sum(op["ns"] for op in profile["ops"]) == pytest.approx(ops_ns, rel=1e-3)
        assert profile["limits"]["n_threads"] == profile["n_threads"]
        reads = profile["read_samples_bytes_per_s"]
        assert len(reads) == len(profile["weights_read_samples_bytes_per_s"]) == 3  # around two repetitions
        assert profile["limits"]["read_bytes_per_s"] == sorted(reads)[1]


def test_a_profile_has_a_row_a_replay_and_ends_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_random_model(path, find_shape("350M,n_embd=256,n_layer=2,attention=1,n_ff=256,n_vocab=512"), "Q4_0")
    with Engine(path, n_ctx=512, n_batch=16) as engine:
        sequence = engine.sequence()

        def rows(n_replays: int, tokens: int) -> list[int]:
            engine.team.start_profile(n_replays)
            for _ in range(tokens):
                engine.evaluate([(sequence, [5])])
            return engine.team.stop_profile().sum(axis=1).tolist()

        assert rows(3, 0) == []
        assert [ns > 0 for ns in rows(3, 2)] == [True] * 2
        assert [ns > 0 for ns in rows(3, 5)] == [True] * 3
        engine.team.start_profile(9)
        engine.evaluate([(sequence, [5] * 40)])  # steps of 16, each in slices
        assert engine.team.stop_profile().shape == (3, len(engine.plan.ops))


@pytest.mark.usefixtures("small_buffer")
def test_profile_table(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_random_model(path, find_shape("350M,n_embd=256,n_layer=2,attention=1,n_ff=256,n_vocab=512"), "Q4_0")
    done = CliRunner().invoke(bench, ["-m", str(path), "--profile", "-p", "0", "-n", "4", "-r", "1"])
    assert done.exit_code == 0, done.output
    for text in ("sum of ops", "of limit", "GB/s", "G MAC/s", "mul_mat Q4_0", "% of the step", "limits with"):
        assert text in done.stdout
