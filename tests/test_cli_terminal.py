"""The chat in a pseudo-terminal: editing, Ctrl-C, history, odd terminals (E9, E12, E13, E15, E20)."""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bigram_model import HELLO, bigram_gguf, endless_gguf
from cli_process import COMMAND, environment

from lfm2cpp.cli.repl_input import TerminalInput

CTRL_C, CTRL_D, ESCAPE = "\x03", "\x04", "\x1b"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "hello": bigram_gguf(folder / "hello.gguf", HELLO),
        "endless": endless_gguf(folder / "endless.gguf"),
        "controls": bigram_gguf(folder / "controls.gguf", ["A", "\u011b", "]", "5", "2", "\u0107", "B", "<|im_end|>"]),
    }


def contents_of(path: Path) -> list[str]:
    return [message["content"] for message in json.loads(path.read_text("utf-8"))["messages"]]


class Terminal:
    """A chat in a pseudo-terminal."""

    def __init__(self, model: Path, *arguments: str, **env: str) -> None:
        pexpect = pytest.importorskip("pexpect")
        self.eof = pexpect.EOF
        self.child = pexpect.spawn(
            COMMAND[0], [*COMMAND[1:], "chat", "-m", str(model), *arguments], env=environment(TERM="xterm", **env),
            timeout=60, dimensions=(30, 100), encoding="utf-8", codec_errors="replace",
        )  # fmt: skip
        self.child.delaybeforesend = 0.05
        self.expect("/help lists the commands")
        self.prompt()

    def prompt(self) -> None:
        """Wait until a message can be typed."""
        self.expect(r"\x1b\[0m>")

    def expect(self, pattern: str) -> str:
        self.child.expect(pattern)
        return self.child.before or ""

    def line(self, text: str) -> None:
        self.child.send(text + "\r")

    def answer(self, text: str, pattern: str = r"Generation: [\d.]+ t/s \]") -> str:
        """Send a line and return what is shown until the timings."""
        self.line(text)
        shown = self.expect(pattern)
        self.prompt()
        return shown

    def leave(self) -> int:
        self.child.expect(self.eof)
        self.child.close()
        return self.child.exitstatus if self.child.exitstatus is not None else -self.child.signalstatus


@pytest.fixture
def terminal(models: dict[str, Path], tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_terminal(model: str = "hello", *arguments: str, **env: str) -> Terminal:
        opened.append(Terminal(models[model], *arguments, XDG_STATE_HOME=str(tmp_path / "state"), **env))
        return opened[-1]

    yield open_terminal
    for each in opened:
        each.child.close(force=True)


def test_a_conversation_in_a_terminal(terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    chat = terminal()
    assert "Helo!" in chat.answer("hi")
    chat.line("/nonsense")
    chat.expect("unknown command /nonsense")
    chat.prompt()
    assert "Helo!" in chat.answer("again")
    chat.child.send(CTRL_D)
    assert chat.leave() == 0
    history = tmp_path / "state" / "lfm2cpp" / "history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    typed = [line for line in history.read_text().splitlines() if line.startswith("+")]
    assert typed == ["+hi", "+/nonsense", "+again"]


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    """E9: the partial answer stays part of the conversation."""
    chat = terminal("endless")
    chat.line("hi")
    chat.expect("abababababab")
    chat.child.send(CTRL_C)
    sent = time.monotonic()
    chat.expect("interrupted")
    assert time.monotonic() - sent < 1.5
    chat.prompt()
    chat.line(f"/save {tmp_path}/s.json")
    chat.expect("2 messages saved")
    chat.prompt()
    messages = json.loads((tmp_path / "s.json").read_text())["messages"]
    assert messages[0]["content"] == "hi" and messages[1]["content"].startswith("abab")
    chat.line("/set max_tokens 3")
    chat.expect("max_tokens = 3")
    chat.prompt()
    assert "aba" in chat.answer("go on")
    chat.line("/exit")
    assert chat.leave() == 0


def test_ctrl_c_at_the_prompt(terminal: Callable[..., Terminal]) -> None:
    chat = terminal()
    chat.child.send("half a message" + CTRL_C)
    chat.expect("Ctrl-C again, Ctrl-D or /exit leaves")
    chat.prompt()
    time.sleep(2.1)
    chat.child.send(CTRL_C)
    chat.expect("Ctrl-C again")
    chat.prompt()
    chat.child.send(CTRL_C)
    assert chat.leave() == 130


def test_several_lines_in_a_terminal(terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    chat = terminal()
    chat.child.send(f"{ESCAPE}[200~pasted\rin two\r{ESCAPE}[201~")
    assert "Helo!" in chat.answer("")
    chat.child.send(f"alt{ESCAPE}\renter")
    assert "Helo!" in chat.answer("")
    chat.line("slash\\")
    assert "Helo!" in chat.answer("newline")
    chat.line('"""')
    chat.line("/quoted")
    assert "Helo!" in chat.answer('"""')
    chat.line(f"/save {tmp_path}/s.json")
    chat.expect("8 messages saved")
    assert contents_of(tmp_path / "s.json")[::2] == ["pasted\nin two\n", "alt\nenter", "slash\nnewline", "/quoted"]


def test_escape_sequences_of_a_model_do_not_reach_the_terminal(terminal: Callable[..., Terminal]) -> None:
    """E13."""
    assert "A]52B" in terminal("controls").answer("hi")


@pytest.mark.parametrize("state", ["file", "no home"])
def test_a_history_that_cannot_be_kept(terminal: Callable[..., Terminal], tmp_path: Path, state: str) -> None:
    """E15."""
    if state == "file":
        (tmp_path / "state").write_text("in the way")
    else:
        (tmp_path / "state" / "lfm2cpp" / "history").mkdir(parents=True)
    chat = terminal()
    assert "Helo!" in chat.answer("hi")
    chat.child.send(CTRL_D)
    assert chat.leave() == 0


def test_a_corrupt_history(terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    history = tmp_path / "state" / "lfm2cpp" / "history"
    history.parent.mkdir(parents=True)
    history.write_bytes(b"\xff\xfe\x00garbage\n+ok\n\x00\n+\xc3\n")
    history.chmod(0o644)
    chat = terminal()
    chat.child.send(f"{ESCAPE}[A{ESCAPE}[A")
    chat.child.send(CTRL_C)
    chat.expect("Ctrl-C again")
    chat.prompt()
    assert "Helo!" in chat.answer("hi") and stat.S_IMODE(history.stat().st_mode) == 0o600


def test_no_history(terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    assert "Helo!" in terminal("hello", "--no-history").answer("hi")
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(("arguments", "env"), [(["--simple-io"], {}), ([], {"TERM": "dumb"})])
def test_a_plain_terminal(models: dict[str, Path], arguments: list[str], env: dict[str, str]) -> None:
    """E12: no editor, no colours."""
    pexpect = pytest.importorskip("pexpect")
    command = [*COMMAND[1:], "chat", "-m", str(models["hello"]), *arguments]
    child = pexpect.spawn(COMMAND[0], command, env=environment(NO_COLOR="1", **env), timeout=60, encoding="utf-8")
    child.expect("> ")
    child.sendline("hi")
    child.expect("Helo!")
    child.expect("> ")
    child.sendeof()
    child.expect(pexpect.EOF)
    assert "\x1b[" not in child.before
    child.close()
    assert child.exitstatus == 0


def test_a_narrow_terminal_and_a_resize(terminal: Callable[..., Terminal]) -> None:
    chat = terminal()
    chat.child.setwinsize(10, 20)
    assert "Helo!" in chat.answer("a message that is longer than twenty columns")
    chat.child.setwinsize(40, 160)
    assert "Helo!" in chat.answer("hi")


def test_suspend_and_resume(terminal: Callable[..., Terminal]) -> None:
    """E20."""
    chat = terminal()
    os.kill(chat.child.pid, signal.SIGSTOP)
    time.sleep(0.2)
    os.kill(chat.child.pid, signal.SIGCONT)
    assert "Helo!" in chat.answer("hi")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_termination_at_the_prompt(terminal: Callable[..., Terminal], number: int) -> None:
    chat = terminal()
    os.kill(chat.child.pid, number)
    assert chat.leave() == 128 + number


def test_termination_amid_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a task of the prompt's, where a SystemExit would be shown as a traceback, and Enter waited for."""
    prompt_toolkit = pytest.importorskip("prompt_toolkit")
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    class Terminated(prompt_toolkit.history.InMemoryHistory):
        def load_history_strings(self) -> Iterator[str]:
            signal.raise_signal(signal.SIGTERM)
            yield from ()

    monkeypatch.setattr("prompt_toolkit.history.InMemoryHistory", Terminated)
    monkeypatch.setattr("prompt_toolkit.output.create_output", DummyOutput)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with create_pipe_input() as typed, create_app_session(input=typed, output=DummyOutput()):
            source = TerminalInput([], history=False)
            with pytest.raises(SystemExit) as left:
                source.read()
        assert left.value.code == 143
    finally:
        signal.signal(signal.SIGTERM, before)
