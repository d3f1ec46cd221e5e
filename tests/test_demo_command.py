"""`lfm2cpp demo`: the table and a scripted chat without a terminal, the chat itself on one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lfm2cpp.demo import demo

COMMAND = [sys.executable, "-m", "lfm2cpp", "demo"]
ROOT = Path(__file__).resolve().parents[1]
READY = "\x1b[?2004h"  # the editor asks the terminal to mark pasted text: it waits for a message
SECONDS = 300  # with a cold kernel cache on a busy machine


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    done = subprocess.run(
        [*COMMAND, "--dir", str(folder)], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=SECONDS,
    )  # fmt: skip
    return done, folder


def test_table(plain: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, folder = plain
    assert done.returncode == 0, done.stderr
    header, *rows = done.stdout.split("\n\n")[0].splitlines()
    assert re.split(r"\s{2,}", header) == [
        "file", "size", "bits/weight", "tok/s", "error vs HF", "limit", "exact answers",
    ]  # fmt: skip
    assert [row.split()[0] for row in rows] == [demo.file_path(folder, t).name for t in demo.TYPES]
    assert {path.name for path in folder.iterdir()} == {row.split()[0] for row in rows}
    for row in rows:
        name, _, bits, speed, error, limit, exact = re.split(r"\s{2,}", row)
        assert float(bits) == round(demo.bits_per_weight(folder / name), 2)
        assert float(speed) > 0 and 0 < float(error) <= float(limit)
        n_exact, n = (int(part) for part in exact.split(" of "))
        assert n == len(demo.some_questions(demo.QUESTIONS_PER_SKILL)) and n_exact > 0.9 * n


def test_scripted_chat(plain: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    """The name is told in the first turn and asked for in the last."""
    chat = plain[0].stdout.split("\n\n")[1].splitlines()
    assert [line.removeprefix("> ") for line in chat[::2]] == list(demo.SCRIPT)
    assert chat[1::2] == [
        "Nice to meet you, Ada.", "68", "apple, fig, pear", "Paris", "honey, milk, bread", "54", "Your name is Ada.",
    ]  # fmt: skip


def test_progress_is_on_stderr(plain: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    stderr = plain[0].stderr
    assert "Traceback" not in stderr
    for step in ("converting", "quantizing", "checking", "lfm2cpp chat -m"):
        assert step in stderr


@pytest.mark.skipif(sys.platform == "win32", reason="pexpect needs a POSIX terminal")
def test_chat_on_a_terminal(tmp_path: Path) -> None:
    import pexpect

    environment = {**os.environ, "TERM": "xterm", "XDG_STATE_HOME": str(tmp_path)}
    child = pexpect.spawn(
        COMMAND[0], [*COMMAND[1:], "--dir", str(tmp_path)], cwd=ROOT, env=environment, timeout=SECONDS,
        dimensions=(40, 120), encoding="utf-8",
    )  # fmt: skip
    child.expect("exact answers")
    child.expect("What can you do")
    turns = {
        "My number is 57.": "I will remember the number 57", "23+45": "68", "What is my number?": "Your number is 57",
    }  # fmt: skip
    for question, answer in turns.items():
        child.expect_exact(READY)
        child.send(question + "\r")
        child.expect(rf"\?2004l{answer}\.?\r\n")  # the editor's last word, then the answer's line
    child.expect_exact(READY)
    child.send("/exit\r")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    done = subprocess.run([*COMMAND, "--dir", str(tmp_path / "taken")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert (tmp_path / "taken").read_text() == "x"
