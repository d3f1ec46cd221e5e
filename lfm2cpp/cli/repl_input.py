"""Where a chat's messages come from: prompt_toolkit on a terminal, plain lines from anything else.

Both give whole messages: three double quotes open and close one of several lines, a backslash at the end of a line
continues it. EOFError ends the chat, KeyboardInterrupt is Ctrl-C at the prompt.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from lfm2cpp.signals import TERMINATION, signals_held
from lfm2cpp.terminal import note

QUOTES = '"""'
FILE_COMMANDS = ("/read", "/load", "/save")


class MessageInput(Protocol):
    """`read` returns the next message; raises EOFError at the end."""

    def read(self) -> str: ...


def is_open(text: str) -> bool:
    """Whether a message goes on in the next line."""
    if text.lstrip().startswith(QUOTES):
        body = text.lstrip()[len(QUOTES) :]
        return QUOTES not in body
    lines = text.split("\n")
    return lines[-1].endswith("\\")


def finished(text: str) -> str:
    """The message itself: quotes and continuation signs taken away. What was quoted is never a command."""
    stripped = text.strip()
    if stripped.startswith(QUOTES):
        body = stripped[len(QUOTES) :]
        body = body[: body.rindex(QUOTES)].strip("\n") if QUOTES in body else body.strip("\n")
        return "/" + body if body.startswith("/") else body  # two slashes begin a message with one
    return text.replace("\\\n", "\n")


class PlainInput:
    """Lines of standard input, with a prompt only when a terminal too simple for more asks for one."""

    def __init__(self) -> None:
        self._tty = sys.stdin is not None and sys.stdin.isatty()

    def read(self) -> str:
        text = self._line("> ")
        while is_open(text):
            try:
                text += "\n" + self._line(". ")
            except EOFError:
                note("the input ended inside a message; it was not sent")
                raise
        return finished(text)

    def _line(self, prompt: str) -> str:
        if sys.stdin is None:
            raise EOFError
        if self._tty:
            sys.stderr.write(prompt)
            sys.stderr.flush()
        raw = sys.stdin.buffer.readline()
        if not raw:
            raise EOFError
        return raw.decode("utf-8", "replace").rstrip("\r\n")


def state_dir() -> Path:
    """Where a user's state is kept: XDG_STATE_HOME, or what the system has for it."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "lfm2cpp"
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "lfm2cpp"


def private_file(path: Path) -> Path:
    """`path`, existing, and for its owner's eyes only. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        if hasattr(os, "fchmod"):
            os.fchmod(fd, 0o600)
    finally:
        os.close(fd)
    return path


class TerminalInput:
    """prompt_toolkit: editing, history, completion, pasted text as one message, Alt-Enter for a new line."""

    def __init__(self, commands: Sequence[str], *, history: bool) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.output import create_output

        output = create_output()
        if hasattr(output, "enable_cpr"):
            output.enable_cpr = False  # asking for the cursor's place makes slow or simple terminals print a warning
        self._session: Any = PromptSession(
            output=output,
            history=_history(history),
            completer=_completer(commands),
            complete_while_typing=False,
            multiline=True,
            prompt_continuation=". ",
            key_bindings=_keys(),
            enable_open_in_editor=True,  # Ctrl-X Ctrl-E
            enable_suspend=True,
        )

    def read(self) -> str:
        """A termination signal ends the prompt, and is delivered then: its event loop would swallow a SystemExit."""
        app = self._session.app

        def leave() -> None:
            if app.future is not None and not app.future.done():
                app.exit(exception=EOFError)

        def tell() -> None:
            if app.loop is not None:
                app.loop.call_soon_threadsafe(leave)

        with signals_held(TERMINATION, tell) as held:
            return finished(self._session.prompt("> ", pre_run=lambda: leave() if held else None))


def _keys() -> Any:
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: Any) -> None:
        buffer = event.current_buffer
        if buffer.complete_state:
            buffer.complete_state = None
        elif is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _history(wanted: bool) -> Any:
    """The history file, or one in memory when it is not wanted or cannot be had."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class SafeHistory(FileHistory):
        """A history that is forgotten rather than in the way."""

        def load_history_strings(self) -> Any:
            try:
                return list(super().load_history_strings())
            except OSError as error:
                _warn(error)
                return []

        def store_string(self, string: str) -> None:
            try:
                super().store_string(string)
            except OSError as error:
                _warn(error)

    def _warn(error: OSError) -> None:
        note(f"the history is not kept: {error.strerror or error}")

    if not wanted:
        return InMemoryHistory()
    try:
        return SafeHistory(str(private_file(state_dir() / "history")))
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
        note(f"the history is not kept: {error}")
        return InMemoryHistory()


def _completer(commands: Sequence[str]) -> Any:
    """Commands at the start of a line, paths after those that take a file."""
    from prompt_toolkit.completion import Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    class CommandCompleter(Completer):
        def get_completions(self, document: Any, complete_event: Any) -> Any:
            text = document.text_before_cursor
            word, space, rest = text.partition(" ")
            if space and word in FILE_COMMANDS:
                yield from PathCompleter(expanduser=True).get_completions(Document(rest), complete_event)
            elif not space and text.startswith("/"):
                yield from (Completion(c, -len(text)) for c in commands if c.startswith(text))

    return CommandCompleter()


def open_input(commands: Sequence[str], *, history: bool, simple: bool) -> MessageInput:
    """The best input there is."""
    on_terminal = all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))
    if simple or not on_terminal or os.environ.get("TERM") == "dumb":
        return PlainInput()
    return TerminalInput(commands, history=history)
