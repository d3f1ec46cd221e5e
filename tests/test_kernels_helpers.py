"""Kernels compiled in processes of their own: the same kernels, whatever happens to those processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from lfm2cpp.kernels import helpers
from lfm2cpp.kernels.library import KernelLibrary

ROOT = Path(__file__).resolve().parents[1]
ADD, QUANTIZE = "lfm2cpp.kernels.ops:add", "lfm2cpp.kernels.ops:quantize_rows"
NAMES = [ADD, "lfm2cpp.kernels.replay:dismiss", QUANTIZE]
Start = Callable[[], KernelLibrary]


@pytest.fixture
def cold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Libraries with an empty cache, on a machine of two cores."""
    monkeypatch.setenv("LFM2CPP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(helpers, "default_threads", lambda: 2)
    return KernelLibrary


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were compiled in this process."""
    import lfm2cpp.kernels.compiler as compiler

    compiled, compile_kernel = [], compiler.compile_kernel
    monkeypatch.setattr(compiler, "compile_kernel", lambda name: (compiled.append(name), compile_kernel(name))[1])
    return compiled


def works(library: KernelLibrary) -> bool:
    """All of NAMES are there, and one adds."""
    kernels = library.load(NAMES)
    a, b, out = np.float32([1, 2, 3]), np.float32([10, 20, 30]), np.zeros(3, np.float32)
    count = np.ones(1, np.int64)
    kernels[ADD](
        {"a": a.ctypes.data, "b": b.ctypes.data, "n": 3, "out": out.ctypes.data, "count": count.ctypes.data}
    )
    return sorted(kernels) == sorted(NAMES) and out.tolist() == [11, 22, 33]


def test_several_kernels_are_compiled_elsewhere_and_kept(cold: Start, here: list[str]) -> None:
    library, heard = cold(), []
    library.load(NAMES, lambda name, done, total: heard.append((name, done, total)))
    assert works(library) and here == []
    assert sorted(library.compiled_names) == sorted(NAMES)
    assert [done for _, done, _ in heard] == [0, 1, 2, 3] and heard[-1] == ("", 3, 3)
    assert sorted(name for name, _, _ in heard[:3]) == sorted(NAMES)
    again = cold()
    assert works(again) and again.compiled_names == [], "they are in the cache"
    assert psutil.Process().children() == []


def test_kernels_that_begin_at_once_are_counted_one_by_one(cold: Start) -> None:
    heard: list[int] = []

    def slowly(name: str, done: int, total: int) -> None:
        time.sleep(0.2 if name else 0)
        heard.append(done)

    cold().load(NAMES, slowly)
    assert heard == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "program",
    [
        "raise SystemExit(1)",
        "import sys; sys.stdin.readline(); print('no answer')",
        "import sys; sys.stdin.readline(); print('{\"nbytes\": 9, \"symbol\": \"s\", \"params\": [], \"key\": 1}')",
        helpers.PROGRAM.replace("from", "import os; os.environ['LFM2CPP_SIMD'] = 'generic'; from"),
    ],
    ids=["dies", "answers nonsense", "answers in part", "compiles for another CPU"],
)
def test_what_a_helper_fails_to_do_is_done_here(
    program: str, cold: Start, here: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "generic" in program and os.environ.get("LFM2CPP_SIMD") == "generic":
        pytest.skip("it is this CPU")
    monkeypatch.setattr(helpers, "PROGRAM", program)
    library, heard = cold(), []
    library.load(NAMES, lambda name, done, total: heard.append((name, done, total)))
    assert works(library) and here == NAMES
    assert [done for _, done, _ in heard] == [0, 1, 2, 3]


@pytest.mark.parametrize("reason", ["one core", "no memory", "no interpreter", "one kernel"])
def test_without_helpers(reason: str, cold: Start, here: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: object) -> None:
        raise AssertionError("a helper was started")

    if reason == "no interpreter":
        monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    else:
        monkeypatch.setattr(helpers.Helper, "__init__", never)
    if reason == "one core":
        monkeypatch.setattr(helpers, "default_threads", lambda: 1)
    if reason == "no memory":
        monkeypatch.setattr(helpers, "_free_bytes", lambda: helpers.HELPER_BYTES * 2 - 1)
    if reason == "one kernel":
        cold().load([ADD])
        assert here == [ADD]
        return
    assert works(cold()) and here == NAMES


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_helper_outlives_its_parent(how: signal.Signals, tmp_path: Path) -> None:
    code = (
        "import os, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # whoever started pytest ignores it
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})\n"
        "from lfm2cpp.kernels import helpers; helpers.default_threads = lambda: 2\n"
        "from lfm2cpp.kernels.library import library\n"
        "blocks, floats = ('q4_0', 'q4_1', 'q6_K', 'q8_0'), ('f32', 'f16', 'bf16')\n"  # more than there are helpers
        "names = [f'lfm2cpp.kernels.{op}:{op}_{t}' for op in ('mul_mat', 'swiglu') for t in blocks]\n"
        "names += ['lfm2cpp.kernels.mul_mat_float:mul_mat_' + t for t in floats]\n"
        "library().load(names, lambda *_: os.write(1, b'begun\\n'))\n"
    )
    env = {**os.environ, "LFM2CPP_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"begun\n"
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) == 2
        time.sleep(1.5)  # well into compiling
        assert all(c.is_running() for c in children)
        process.send_signal(how)
        process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    # A killed parent cannot stop them: they notice when they ask for the next kernel.
    deadline = time.monotonic() + (5 if how == signal.SIGINT else 60)
    while (left := [c for c in children if c.is_running()]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []
