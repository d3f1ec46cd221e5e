"""Writing answers to stdout: at once, safe on a terminal, and quiet when the reader is gone."""

from __future__ import annotations

import os
import sys

from lfm2cpp.errors import LFM2Error
from lfm2cpp.terminal import printable


def settle_stdout() -> OSError | None:
    """Flush stdout. What cannot be written goes nowhere, or the flush at exit would fail again; returns the reason."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error
    return None


class AnswerOutput:
    """stdout for the text of a model. On a terminal control characters are dropped; a pipe gets the text as it is."""

    def __init__(self) -> None:
        if sys.stdout is None:
            raise LFM2Error("stdout is closed; there is nowhere to write the answer")
        self.tty = sys.stdout.isatty()
        self._last = "\n"
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # a console of another encoding shows '?' instead of failing

    def write(self, text: str) -> None:
        """Show `text` now."""
        text = printable(text, tty=self.tty)
        if not text:
            return
        self._last = text[-1]
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            settle_stdout()
            raise LFM2Error(f"stdout cannot be written: {error.strerror}") from None

    def end_line(self) -> None:
        """Finish the line, unless it is finished."""
        if self._last != "\n":
            self.write("\n")


class StatusLine:
    """A line on a terminal's stderr that comes and goes: what the program is doing while nothing else shows."""

    def __init__(self) -> None:
        self._tty = sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._shown = False

    def show(self, text: str) -> None:
        if self._tty:
            sys.stderr.write(f"\r{text}\x1b[K")
            sys.stderr.flush()
            self._shown = True

    def clear(self) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._shown = False


def dimmed(text: str) -> str:
    """`text` in faint letters when stderr is a terminal that wants colours."""
    colour = sys.stderr is not None and sys.stderr.isatty()
    colour = colour and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    return f"\x1b[2m{text}\x1b[0m" if colour else text
