"""What this machine can do at most, measured: bytes read, int8 products and float32 multiply-adds a second.

Threads run one of the probe kernels at the same time and the clock runs from the first start to the last end. Of
several rounds the best counts: whatever else the machine does can only make a round slower.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lfm2cpp.kernels.library import Kernel, Progress, library
from lfm2cpp.kernels.widths import MATRICES, PANEL_SUMS, TILE_TOKENS, W

PROBE = "lfm2cpp.kernels.probe:"
NAMES = ("read_stream", "dot_stream", "fma_stream", *(["matrix_stream"] if MATRICES else []))
KERNELS = tuple(PROBE + name for name in NAMES)
VECTOR = 4 * W  # bytes
READ_STEP = 8 * VECTOR
OPERANDS = 64 * VECTOR
PRODUCTS = 96  # vector products a round of dot_stream and fma_stream
MATRIX_OPERANDS = 2 * (16 * VECTOR + 32 * TILE_TOKENS + PANEL_SUMS)
MATRIX_MACS = 2 * 2 * W * TILE_TOKENS * 32  # a round of matrix_stream

BUFFER_BYTES = 1 << 30  # several times the last-level cache of any machine this runs on
SMALLEST_BUFFER = 64 << 20
MEMORY_SHARE = 4  # the buffer takes at most 1 / MEMORY_SHARE of the memory that is free
READ_ROUNDS = 5
PEAK_ROUNDS = 5
PEAK_SECONDS = 0.03  # a round


@dataclass(frozen=True)
class Limits:
    """The best rates of `n_threads` together, and the size of the buffer that was read."""

    n_threads: int
    read_bytes_per_s: float
    int8_macs_per_s: float  # of the level's fastest product, vectors or matrices
    int8_vector_macs_per_s: float
    f32_macs_per_s: float
    buffer_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_limits(n_threads: list[int], progress: Progress | None = None) -> list[Limits]:
    """The limits for each number of threads. Takes about a second, and up to a gigabyte of memory meanwhile."""
    library().load(KERNELS, progress)
    memory = Memory()
    return [Limits(n, memory.read_rate(n), *int8_rates(n), f32_rate(n), memory.nbytes) for n in n_threads]


class Memory:
    """A buffer of several times the caches, for as long as it is to be read."""

    def __init__(self) -> None:
        self._buffer = touched_buffer(buffer_size())
        self.nbytes = self._buffer.nbytes

    def read_rate(self, n_threads: int, rounds: int = READ_ROUNDS) -> float:
        """Bytes a second at which threads read it."""
        address = -(-self._buffer.ctypes.data // READ_STEP) * READ_STEP
        return read_rate(address, self.nbytes - READ_STEP, n_threads, rounds)


def buffer_size() -> int:
    """BUFFER_BYTES, or less where memory is short."""
    import psutil

    free = psutil.virtual_memory().available // MEMORY_SHARE
    return max(SMALLEST_BUFFER, min(BUFFER_BYTES, free))


def touched_buffer(nbytes: int) -> np.ndarray:
    """Bytes whose pages are all committed."""
    buffer = np.empty(nbytes, np.uint8)
    buffer.fill(1)
    return buffer


def read_rate(address: int, nbytes: int, n_threads: int, rounds: int = READ_ROUNDS) -> float:
    """Bytes a second at which threads read nbytes at address, each a part of its own, front to back."""
    share = nbytes // n_threads // READ_STEP * READ_STEP
    kernel = _load("read_stream")

    def read(ith: int) -> None:
        _call(kernel, source=address + ith * share, nbytes=share)

    return share * n_threads / best_seconds(read, n_threads, rounds)


def int8_rates(n_threads: int, rounds: int = PEAK_ROUNDS) -> tuple[float, float]:
    """Products of bytes, weights of up to 6 bits by int8, summed to int32, a second: at most, and in vectors."""
    operands = np.random.default_rng(0).integers(0, 64, OPERANDS).astype(np.int8)  # weights and activations alike
    vectors = _peak("dot_stream", operands, PRODUCTS * VECTOR, n_threads, rounds)
    if not MATRICES:
        return vectors, vectors
    operands = np.random.default_rng(0).integers(0, 64, MATRIX_OPERANDS).astype(np.int8)
    return max(_peak("matrix_stream", operands, MATRIX_MACS, n_threads, rounds), vectors), vectors


def f32_rate(n_threads: int, rounds: int = PEAK_ROUNDS) -> float:
    """float32 multiply-adds a second."""
    operands = np.random.default_rng(0).uniform(-1, 1, OPERANDS // 4).astype(np.float32)
    return _peak("fma_stream", operands, PRODUCTS * W, n_threads, rounds)


def _peak(name: str, operands: np.ndarray, macs_a_round: int, n_threads: int, rounds: int) -> float:
    kernel = _load(name)
    copies = [_aligned_copy(operands) for _ in range(n_threads)]

    def seconds_of(n: int, n_threads: int, rounds: int) -> float:
        return best_seconds(
            lambda ith: _call(kernel, operands=copies[ith].ctypes.data, rounds=n), n_threads, rounds
        )

    n = 1000
    while (seconds := seconds_of(n, 1, 1)) < PEAK_SECONDS / 4:  # find how many rounds take long enough to be timed
        n *= 4
    n = max(1, int(n * PEAK_SECONDS / seconds))
    return n * macs_a_round * n_threads / seconds_of(n, n_threads, rounds)


def _load(name: str) -> Kernel:
    return library().load([PROBE + name])[PROBE + name]


def _call(kernel: Kernel, **args: int) -> None:
    out = np.zeros(8, np.int64)
    kernel({**args, "out": out.ctypes.data})


def _aligned_copy(operands: np.ndarray) -> np.ndarray:
    area = np.zeros(operands.nbytes + VECTOR, np.uint8)
    copy = area[-area.ctypes.data % VECTOR :][: operands.nbytes]
    copy[:] = operands.view(np.uint8)
    return copy


def best_seconds(work: Callable[[int], None], n_threads: int, rounds: int) -> float:
    """The shortest of `rounds` rounds in which every thread does work(ith) once, from first start to last end."""
    starts, ends = np.zeros((rounds, n_threads), np.int64), np.zeros((rounds, n_threads), np.int64)
    barrier = threading.Barrier(n_threads)
    failures: list[BaseException] = []

    def run(ith: int) -> None:
        try:
            for i in range(rounds):
                barrier.wait()
                starts[i, ith] = time.perf_counter_ns()
                work(ith)
                ends[i, ith] = time.perf_counter_ns()
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(ith,), daemon=True) for ith in range(1, n_threads)]
    for thread in threads:
        thread.start()
    run(0)
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return max(1, int((ends.max(axis=1) - starts.min(axis=1)).min())) / 1e9
