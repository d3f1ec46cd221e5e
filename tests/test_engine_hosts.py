"""An engine among threads, processes and interpreters that end: cases E19, E20 and F9."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from engine_laws import assert_same_bits, audit, fresh, make_model, open_engine, random_ids, run

from lfm2cpp.engine import limits
from lfm2cpp.engine.engine import Engine
from lfm2cpp.errors import ContextError, LFM2Error, UsageError

ROOT = Path(__file__).resolve().parents[1]
HANG = 60  # seconds: a process that takes longer hangs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    with open_engine(folder, "q8_0", n_threads=2) as engine:
        yield engine


# Threads


def test_several_threads_use_one_engine(engine: Engine) -> None:
    """Calls queue, and each thread's sequence is its own."""
    stories = [random_ids(60, seed=i) for i in range(4)]
    found: list[np.ndarray] = [np.zeros(0)] * 4

    def work(i: int) -> None:
        with engine.sequence() as sequence:
            found[i] = run(engine, sequence, stories[i], [20] + [1] * 30)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    for i, story in enumerate(stories):
        assert_same_bits(found[i], fresh(engine, story))


def test_an_idle_team_sleeps(engine: Engine) -> None:
    with engine.sequence() as sequence:
        engine.evaluate([(sequence, [20])])
    time.sleep(0.1)
    before = psutil.Process().cpu_times()
    time.sleep(0.5)
    after = psutil.Process().cpu_times()
    assert after.user + after.system - before.user - before.system < 0.05
    with engine.sequence() as sequence:  # and wakes up
        engine.evaluate([(sequence, random_ids(30))])


def test_closing_ends_what_another_thread_runs(folder: Path) -> None:
    engine = open_engine(folder, "q8_0", n_threads=2)
    ended: list[BaseException] = []
    started = threading.Event()

    def work() -> None:
        try:
            while True:
                with engine.sequence() as sequence:
                    engine.evaluate([(sequence, random_ids(500))])
                    started.set()
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            ended.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    started.wait(HANG)
    engine.close()
    thread.join(HANG)
    assert isinstance(ended[0], (KeyboardInterrupt, UsageError))


def test_dropped_engines_end_their_threads(folder: Path) -> None:
    before = threading.active_count()
    engine = open_engine(folder, "q8_0", n_threads=3)
    assert threading.active_count() == before + 2
    del engine
    gc.collect()
    assert threading.active_count() == before


def test_dropped_sequences_give_their_pages_back(engine: Engine) -> None:
    engine.pool.max_pages = 8
    for seed in range(12):
        sequence = engine.sequence()
        engine.evaluate([(sequence, random_ids(300, seed))])
        del sequence
        gc.collect()
    audit(engine, [])


# After the end


def test_everything_refuses_after_close(folder: Path, tmp_path: Path) -> None:
    engine = open_engine(folder, "q8_0")
    sequence = engine.sequence()
    engine.evaluate([(sequence, [20, 21])])
    engine.close()
    engine.close()
    for use in (
        engine.sequence,
        lambda: engine.evaluate([(sequence, [20])]),
        lambda: engine.load_sequence(tmp_path / "state"),
        sequence.fork,
        lambda: sequence.truncate(0),
        lambda: sequence.reuse_prefix([1]),
        lambda: sequence.save(tmp_path / "state"),
    ):
        with pytest.raises(UsageError, match="closed; load the model again"):
            use()
    assert not (tmp_path / "state").exists()
    sequence.close()


def test_a_closed_sequence_refuses(engine: Engine, tmp_path: Path) -> None:
    sequence = engine.sequence()
    sequence.close()
    sequence.close()
    for use in (sequence.fork, lambda: sequence.truncate(0), lambda: sequence.save(tmp_path / "state")):
        with pytest.raises(UsageError, match="closed"):
            use()
    with pytest.raises(UsageError):
        engine.evaluate([(sequence, [20])])


def test_neither_pickle_nor_deepcopy(engine: Engine) -> None:
    sequence = engine.sequence()
    for thing in (engine, sequence):
        for use in (pickle.dumps, copy.deepcopy, copy.copy):
            with pytest.raises(UsageError, match="load the model again|fork"):
                use(thing)


def test_a_forked_child_is_refused_and_leaves_the_parent_alone(engine: Engine, folder: Path) -> None:
    """Also while another thread holds the engine's lock, and when the child ends as Python programs do."""
    script = f"""
import os, sys, threading
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import warnings; warnings.simplefilter("ignore")
from pathlib import Path
from engine_laws import open_engine, random_ids, fresh, assert_same_bits
from lfm2cpp.errors import UsageError
engine = open_engine(Path({str(folder)!r}), "q8_0", n_threads=2)
ids = random_ids(40)
expected = fresh(engine, ids)
sequence = engine.sequence()
def hold():
    while not done.is_set():
        with engine.sequence() as other:
            engine.evaluate([(other, ids)])
done = threading.Event()
thread = threading.Thread(target=hold); thread.start()
for i in range(20):
    child = os.fork()
    if child == 0:
        for use in (lambda: engine.evaluate([(sequence, ids)]), sequence.fork, engine.sequence):
            try:
                use()
                os._exit(1)
            except UsageError as error:
                assert "parent process" in str(error)
        sequence.close()
        engine.close()
        os._exit(0) if i else sys.exit(0)
    assert os.waitpid(child, 0)[1] == 0
done.set(); thread.join()
assert_same_bits(fresh(engine, ids), expected)
print("fine")
"""
    assert run_python(script) == "fine\n"


def test_a_child_may_load_the_model_itself(folder: Path) -> None:
    make_model(folder, "q8_0")
    script = f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import warnings; warnings.simplefilter("ignore")
from pathlib import Path
from engine_laws import open_engine, random_ids, fresh, assert_same_bits
engine = open_engine(Path({str(folder)!r}), "q8_0", n_threads=2)
expected = fresh(engine, random_ids(40))
child = os.fork()
if child == 0:
    with open_engine(Path({str(folder)!r}), "q8_0", n_threads=2) as own:
        assert_same_bits(fresh(own, random_ids(40)), expected)
    os._exit(0)
print(os.waitpid(child, 0)[1])
"""
    assert run_python(script) == "0\n"


@pytest.mark.parametrize("ending", ["pass", "sys.exit(0)", "raise SystemExit(0)", "del engine"])
def test_the_interpreter_ends_while_a_daemon_thread_evaluates(folder: Path, ending: str) -> None:
    make_model(folder, "q8_0")
    script = f"""
import sys, threading, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
from engine_laws import open_engine, random_ids
engine = open_engine(Path({str(folder)!r}), "q8_0", n_threads=2)
started = threading.Event()
def work(engine):
    try:
        while True:
            with engine.sequence() as sequence:
                engine.evaluate([(sequence, random_ids(900))])
                started.set()
    except (KeyboardInterrupt, Exception):
        pass
threading.Thread(target=work, args=(engine,), daemon=True).start()
started.wait()
print("fine", flush=True)
{ending}
"""
    assert run_python(script) == "fine\n"


def run_python(script: str, **environment: str) -> str:
    """stdout of a Python process that must end well, and soon."""
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **environment}, capture_output=True, text=True, timeout=HANG,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# Values


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([320], "token id 320 is outside the vocabulary, 0..319"),
        ([-1], "token id -1"),
        ([20, 2**40], "token id 1099511627776"),
        ([], "give at least one"),
        ([1.5], "whole numbers"),
        (["a"], "whole numbers"),
        ([None], "whole numbers"),
    ],
)
def test_bad_tokens_are_refused(engine: Engine, batch: list, message: str) -> None:
    with engine.sequence() as sequence:
        engine.evaluate([(sequence, [20])])
        with pytest.raises(UsageError, match=message):
            engine.evaluate([(sequence, batch)])
        assert sequence.tokens == (20,)


def test_tokens_may_be_any_integers(engine: Engine) -> None:
    with engine.sequence() as sequence:
        engine.evaluate([(sequence, np.array([20, 21], np.int64))])
        engine.evaluate([(sequence, (22,))])
        assert sequence.tokens == (20, 21, 22) and all(type(token) is int for token in sequence.tokens)


def test_bad_batches_are_refused(engine: Engine, folder: Path) -> None:
    with engine.sequence() as sequence, open_engine(folder, "q8_0") as other:
        with pytest.raises(UsageError, match="once in a batch"):
            engine.evaluate([(sequence, [20]), (sequence, [21])])
        with pytest.raises(UsageError, match="belong to this engine"):
            other.evaluate([(sequence, [20])])
        with pytest.raises(UsageError, match="expected one of last, all, none"):
            engine.evaluate([(sequence, [20])], logits="some")
        assert engine.evaluate([]) == [] and sequence.n_past == 0
        for n in (-1, 1, 0.5):
            with pytest.raises(UsageError, match="cannot keep"):
                sequence.truncate(n)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="outside the vocabulary"):
            sequence.reuse_prefix([20, 10**12])
        assert sequence.reuse_prefix([]) == 0


@pytest.mark.parametrize(
    "options",
    [{"n_ctx": -5}, {"n_ctx": 4097}, {"n_ctx": 10**12}, {"n_ctx": 1.5}, {"n_batch": 0}, {"n_batch": 10**9},
     {"n_threads": -1}, {"n_threads": 10**6}, {"kv_type": "q3"}],
)  # fmt: skip
def test_bad_options_are_refused(folder: Path, options: dict) -> None:
    with pytest.raises(UsageError):
        open_engine(folder, "q8_0", **options)


@pytest.mark.parametrize("n_ctx", [1, 63, 64, 65])
def test_a_context_can_be_filled_to_its_last_token(folder: Path, n_ctx: int) -> None:
    ids = random_ids(n_ctx)
    with open_engine(folder, "q8_0", n_ctx=n_ctx) as engine, open_engine(folder, "q8_0") as wide:
        with engine.sequence() as sequence:
            assert_same_bits(run(engine, sequence, ids, [n_ctx - 1]), fresh(wide, ids))
            with pytest.raises(ContextError, match=f"{n_ctx + 1} tokens do not fit the context of {n_ctx}"):
                engine.evaluate([(sequence, [20])])
            assert sequence.tokens == tuple(ids)


def test_the_default_context_is_the_models(folder: Path) -> None:
    with open_engine(folder, "q8_0", n_ctx=None) as engine:
        assert engine.n_ctx == 4096


def test_a_full_pool_refuses_before_anything_changes(folder: Path) -> None:
    with open_engine(folder, "q8_0", n_batch=32) as engine:
        engine.pool.max_pages = 3
        first, second = engine.sequence(), engine.sequence()
        engine.evaluate([(first, random_ids(70))])
        with pytest.raises(ContextError, match="all 3 pages of context memory are in use"):
            engine.evaluate([(first, random_ids(10)), (second, random_ids(70, 1))])
        assert first.n_past == 70 and second.n_past == 0
        assert len(first.state.pages) == 2 and second.state.pages == [], "pages taken in vain are given back"
        audit(engine, [first, second])
        engine.evaluate([(first, random_ids(100, 2)[:50])])
        audit(engine, [first, second])


def test_a_model_larger_than_the_memory_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "memory_limit", lambda: 101 << 20)
    with pytest.raises(ContextError, match=r"needs .* of memory \(.* weights, .* context\), but there are 105.9 MB"):
        open_engine(folder, "q8_0", n_ctx=4096)
    with open_engine(folder, "q8_0", n_ctx=4096, force=True) as engine, engine.sequence() as sequence:
        engine.evaluate([(sequence, [20])])


def test_a_failed_load_leaves_no_threads_and_no_map(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()
    monkeypatch.setattr(limits, "memory_limit", lambda: 1)
    for _ in range(3):
        with pytest.raises(LFM2Error):
            open_engine(folder, "q8_0", n_threads=3)
    assert threading.active_count() == before
    assert not any("q8_0.gguf" in m.path for m in psutil.Process().memory_maps()) or sys.platform != "linux"
