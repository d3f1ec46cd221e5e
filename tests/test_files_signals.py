"""Writers that are interrupted and killed: the target is old or complete, a signal leaves nothing (C8 to C14)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from lfm2cpp.files import atomic_output
from lfm2cpp.signals import SIGNALS, signals_held, signals_raise

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OPENBLAS_NUM_THREADS": "1"}


def interrupt(directory: Path, rounds: int, signals: str) -> dict[str, Any]:
    script = Path(__file__).with_name("kill_writer.py")
    command = [sys.executable, script, directory, str(rounds), signals]
    run = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def assert_outcomes(result: dict[str, Any], code: int) -> None:
    """Interrupted before the rename, after it, or not at all; and not always the same."""
    assert set(result["outcomes"]) <= {f"{code} old", f"{code} new", "0 new"}
    assert result["outcomes"][f"{code} old"] > 0


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_c8_c9_a_signal_leaves_nothing_behind(name: str, code: int, tmp_path: Path) -> None:
    result = interrupt(tmp_path, 60, name)
    assert_outcomes(result, code)
    assert result["partials"] == 0


def test_c8_a_second_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    """The second may come while the first is being handled, outside of every handler: the exit code may vary."""
    result = interrupt(tmp_path, 60, "SIGINT,SIGINT")
    assert {outcome.split()[1] for outcome in result["outcomes"]} <= {"old", "new"}
    assert result["partials"] == 0


def test_c10_sigkill_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    """At most the last partial file is left, because each new writer removes those of dead ones."""
    result = interrupt(tmp_path, 200, "SIGKILL")
    assert_outcomes(result, -9)
    assert result["partials"] <= 1
    with atomic_output(tmp_path / "m.gguf", force=True) as out:
        out.write(b"next")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_c13_c14_a_live_writer_in_another_process_is_respected(tmp_path: Path) -> None:
    code = (
        "import sys; from lfm2cpp.files import atomic_output\n"
        "with atomic_output(sys.argv[1]) as out:\n"
        "    out.write(b'first'); print('ready', flush=True); sys.stdin.read()"
    )
    target = tmp_path / "m.bin"
    first = subprocess.Popen(
        [sys.executable, "-c", code, target], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    assert first.stdin is not None and first.stdout is not None
    with first:
        assert first.stdout.readline() == "ready\n"
        second = subprocess.run(
            [sys.executable, "-c", code, target],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=ENVIRONMENT,
        )
        assert "m.bin: in use: another process is writing .m.bin." in second.stderr
        first.stdin.close()
        assert first.wait(10) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["m.bin"] and target.read_bytes() == b"first"


def test_sigterm_cleans_up_in_a_program_that_has_no_handler(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from lfm2cpp.files import atomic_output\n"
        "with atomic_output(sys.argv[1]) as out:\n"
        "    out.write(b'half'); os.kill(os.getpid(), signal.SIGTERM); out.write(b'rest')"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "m.bin"], env=ENVIRONMENT)
    assert run.returncode == 143
    assert list(tmp_path.iterdir()) == []


def test_held_signals_are_delivered_afterwards() -> None:
    done = False
    with pytest.raises(KeyboardInterrupt):
        with signals_held():
            signal.raise_signal(signal.SIGINT)
            done = True
    assert done


def test_handlers_are_restored(tmp_path: Path) -> None:
    before = [signal.getsignal(s) for s in SIGNALS]
    with signals_raise(), signals_held():
        assert [signal.getsignal(s) for s in SIGNALS] != before
    with atomic_output(tmp_path / "x"):
        pass
    assert [signal.getsignal(s) for s in SIGNALS] == before


def test_ignored_signals_stay_ignored() -> None:
    """nohup: a hang-up must not end the work."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_raise(), signals_held():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_leave_signals_alone(tmp_path: Path) -> None:
    def work() -> None:
        with atomic_output(tmp_path / "x") as out:
            out.write(b"new")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert (tmp_path / "x").read_bytes() == b"new"
