"""Calling kernels from tests: arrays become addresses, what a kernel may not touch lies behind a forbidden page."""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfm2cpp.kernels import batch as at
from lfm2cpp.kernels.library import NO_RESULT, Kernel, library
from lfm2cpp.kernels.widths import CHUNK_TOKENS, PAGE_TOKENS

F32 = NDArray[np.float32]
SLACK = 1 << 16  # bytes behind activations, which a tile may read but never uses
PROT_NONE = 0


def call(name: str, *, nth: int = 1, **args: Any) -> None:
    """Run lfm2cpp.kernels.NAME on `nth` real threads. Arrays are passed by address, floats as their bits."""
    run(library().load([f"lfm2cpp.kernels.{name}"])[f"lfm2cpp.kernels.{name}"], nth=nth, **args)


def run(kernel: Kernel, *, nth: int = 1, **args: Any) -> None:
    if "scratch" in kernel.params and "scratch" not in args:
        args["scratch_bytes"] = 1 << 20
        args["scratch"] = aligned(args["scratch_bytes"] * nth, 0xA5)
    values = {name: as_int64(value) for name, value in args.items()}
    row = (ctypes.c_int64 * (len(kernel.params) + 1))(*(values[name] for name in kernel.params))
    work = ctypes.c_int64(0)

    def one(ith: int) -> None:
        kernel.entry(NO_RESULT, NO_RESULT, ctypes.addressof(row), ctypes.addressof(work), ith, nth)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(1, nth)]
    for thread in threads:
        thread.start()
    one(0)
    for thread in threads:
        thread.join()


def as_int64(value: Any) -> int:
    if isinstance(value, np.ndarray):
        assert value.flags.c_contiguous
        return value.ctypes.data
    if isinstance(value, float | np.floating):
        return int(np.float32(value).view(np.uint32))
    return int(value)


def count(n: int) -> NDArray[np.int64]:
    """Kernels take the address of a number of tokens."""
    return np.array([n], np.int64)


def aligned(nbytes: int, fill: int = 0) -> NDArray[np.uint8]:
    """Bytes at a multiple of 64, as a plan hands them out."""
    area = np.full(nbytes + 64, fill, np.uint8)
    return area[-area.ctypes.data % 64 :][:nbytes]


def guarded(array: NDArray[Any]) -> NDArray[Any]:
    """A copy that ends where memory ends: reading or writing a byte beyond it is a segmentation fault."""
    size = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    area = mmap.mmap(-1, size + mmap.PAGESIZE)
    whole = np.frombuffer(area, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    behind = ctypes.c_void_p(whole.ctypes.data + size)
    assert libc.mprotect(behind, ctypes.c_size_t(mmap.PAGESIZE), PROT_NONE) == 0
    copy = whole[size - array.nbytes : size].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def rows_with_slack(n_tokens: int, n: int) -> F32:
    """float32 (n_tokens, n) to be written, followed by memory that may be read."""
    return aligned(4 * n_tokens * n + SLACK)[: 4 * n_tokens * n].view(np.float32).reshape(n_tokens, n)


def with_slack(x: F32) -> F32:
    rows = rows_with_slack(*x.shape)
    rows[...] = x
    return rows


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> F32:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32) * np.float32(scale)


def relative_rms(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """sqrt(mean(error^2) / mean(expected^2))"""
    error = np.asarray(found, np.float64) - expected
    return float(np.sqrt(np.mean(error**2) / np.mean(np.asarray(expected, np.float64) ** 2)))


def same_bits(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and np.array_equal(a.view(np.uint8), b.view(np.uint8))


class Batch:
    """A batch descriptor: runs of (n_past, n_tokens), each with pages and a convolution state of its own."""

    def __init__(self, runs: Sequence[tuple[int, int]], page_bytes: int, conv_bytes: int = 64) -> None:
        self.runs = list(runs)
        self.n_tokens = sum(n for _, n in runs)
        self.pages = [[aligned(page_bytes) for _ in range(-(-(past + n) // PAGE_TOKENS))] for past, n in runs]
        self.conv = [aligned(conv_bytes) for _ in runs]
        self.addresses = [np.array([page.ctypes.data for page in pages], np.int64) for pages in self.pages]
        self.positions = np.concatenate([np.arange(past, past + n) for past, n in runs]).astype(np.int32)
        self.run_of = np.repeat(np.arange(len(runs)), [n for _, n in runs]).astype(np.int32)
        self.records = np.zeros((len(runs), at.RUN_FIELDS), np.int64)
        first = 0
        for i, (past, n) in enumerate(runs):
            self.records[i, : at.RUN_CONV + 1] = (
                first, n, past, self.addresses[i].ctypes.data, self.conv[i].ctypes.data,
            )  # fmt: skip
            first += n
        self.fields = np.zeros(at.FIELDS, np.int64)
        self.fields[at.N_TOKENS], self.fields[at.N_RUNS] = self.n_tokens, len(runs)
        self.fields[at.POSITIONS], self.fields[at.RUN_OF] = self.positions.ctypes.data, self.run_of.ctypes.data
        self.fields[at.RUNS] = self.records.ctypes.data

    @property
    def deepest(self) -> int:
        return max(past + n for past, n in self.runs)

    def split(self, on: bool) -> None:
        """Attention splits the tokens over their chunks of context, or not."""
        self.fields[at.SPLIT_CHUNKS] = -(-self.deepest // CHUNK_TOKENS) if on else 0
