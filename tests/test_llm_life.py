"""An LLM among threads, signals, forks and exits (E9, E20)."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bigram_model import HELLO, bigram_gguf, endless_gguf
from tiny_model import tiny_gguf

from lfm2cpp import LLM
from lfm2cpp.errors import LFM2Error, UsageError
from lfm2cpp.generate import Piece

ROOT = Path(__file__).parents[1]
USER = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def hello_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bigram_gguf(tmp_path_factory.mktemp("llm") / "hello.gguf", HELLO)


@pytest.fixture(scope="module")
def endless_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return endless_gguf(tmp_path_factory.mktemp("llm") / "endless.gguf")


@pytest.fixture(scope="module")
def hello(hello_path: Path) -> Iterator[LLM]:
    with LLM(hello_path) as llm:
        yield llm


@pytest.fixture
def endless(endless_path: Path) -> Iterator[LLM]:
    with LLM(endless_path) as llm:
        yield llm


def test_several_threads_share_one_llm(hello: LLM) -> None:
    answers: list[str] = []

    def work() -> None:
        for _ in range(10):
            answers.append(hello.chat("hi").text)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == ["Helo!"] * 40


def test_streams_at_once_do_not_mix(hello: LLM) -> None:
    first, second = hello.stream("\n"), hello.chat_stream("hi")
    texts = ["", ""]
    for a, b in zip(first, second, strict=False):
        for i, event in enumerate((a, b)):
            texts[i] += event.text if isinstance(event, Piece) else ""
    assert first.result().text == second.result().text == "Helo!"


def test_stop_ends_an_answer_and_the_next_one_is_right(endless: LLM) -> None:
    stream = endless.stream("\n")
    for event in stream:
        if isinstance(event, Piece) and event.text == "b":
            stream.stop()
    result = stream.result()
    assert result.finish_reason == "interrupted" and ("ab" * 2000).startswith(result.text) and len(result.text) > 1
    assert endless.generate("\n", max_tokens=3).text == "aba"


def test_a_dropped_stream_frees_the_engine(endless: LLM) -> None:
    stream = endless.stream("\n")
    next(stream)
    del stream
    started = time.monotonic()
    assert endless.generate("\n", max_tokens=1).text == "a"
    assert time.monotonic() - started < 2


def test_a_stream_as_a_context_stops_at_its_end(endless: LLM) -> None:
    with endless.stream("\n") as stream:
        next(stream)
    assert endless.generate("\n", max_tokens=1).text == "a"


def test_an_error_comes_out_where_events_are_read(tmp_path: Path) -> None:
    def spoil(weights: Any) -> None:
        weights["token_embd.weight"][20] = np.nan

    with LLM(tiny_gguf(tmp_path / "nan.gguf", edit=spoil, tied=False)) as llm:
        stream = llm.stream([1, 20])
        with pytest.raises(LFM2Error, match="non-finite logits"):
            list(stream)
        assert list(stream) == []
        llm.generate([1, 21], max_tokens=1)


def test_use_after_close(hello_path: Path) -> None:
    llm = LLM(hello_path)
    llm.close()
    llm.close()
    for call in (
        lambda: llm.chat("x"), lambda: llm.generate("x"), lambda: llm.tokenize("x"), lambda: llm.logits("x"),
        lambda: llm.render([USER]), lambda: llm.detokenize([1]),
    ):  # fmt: skip
        with pytest.raises(UsageError, match="closed"):
            call()


def test_close_ends_what_runs_and_what_waits(endless_path: Path) -> None:
    llm = LLM(endless_path)
    running, waiting = llm.stream("\n"), llm.stream("\n")
    next(running)
    started = time.monotonic()
    llm.close()
    assert time.monotonic() - started < 2
    assert list(running)[-1].finish_reason == "interrupted"
    with pytest.raises(UsageError, match="closed while"):
        list(waiting)


def test_pickle_and_copy_are_refused(hello: LLM) -> None:
    for call in (pickle.dumps, copy.deepcopy, copy.copy):
        with pytest.raises(TypeError, match="cannot be pickled or copied"):
            call(hello)


def test_an_unused_llm_goes_away_with_its_thread(hello_path: Path) -> None:
    before = threading.active_count()
    llm = LLM(hello_path)
    assert llm.chat("hi").text == "Helo!"
    del llm
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_a_stream_keeps_its_llm_open(hello_path: Path) -> None:
    assert LLM(hello_path).stream("\n").result().text == "Helo!"


def script(body: str, *arguments: Any, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import sys, os, signal, threading, time\nfrom lfm2cpp import LLM\n" + body]
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=timeout, cwd=ROOT, check=False
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
def test_a_forked_child_gets_an_error(endless_path: Path) -> None:
    result = script(
        """
llm = LLM(sys.argv[1]); llm.generate("x", max_tokens=1)
pid = os.fork()
if pid == 0:
    try:
        llm.chat("x")
    except Exception as error:
        print(type(error).__name__, error, flush=True)
    sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), llm.generate("\\n", max_tokens=2).text)
""",
        endless_path,
    )
    assert result.stdout.splitlines() == [
        "UsageError this LLM was loaded before a fork and stays with its process; load it again in the child", "7 ab",
    ], result.stderr  # fmt: skip


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise RuntimeError('mine')"])
def test_the_interpreter_may_end_in_the_middle_of_a_stream(endless_path: Path, end: str) -> None:
    started = time.monotonic()
    body = "llm = LLM(sys.argv[1]); stream = llm.stream('\\n'); next(stream); next(stream)\n"
    result = script(body + end, endless_path)
    assert time.monotonic() - started < 20
    assert result.returncode == {"": 0, "sys.exit(3)": 3}.get(end, 1)
    assert "Fatal" not in result.stderr and ("Traceback" in result.stderr) == end.startswith("raise")


def test_ctrl_c_leaves_the_object_usable(endless_path: Path) -> None:
    result = script(
        """
llm = LLM(sys.argv[1])
for call in (lambda: llm.generate("\\n"), lambda: [e for e in llm.stream("\\n")], lambda: llm.chat("x")):
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    started = time.monotonic()
    try:
        call()
    except KeyboardInterrupt:
        print("interrupted", time.monotonic() - started < 1.3, llm.generate("\\n", max_tokens=2).text)
""",
        endless_path,
    )
    assert result.stdout == "interrupted True ab\n" * 3, result.stderr
