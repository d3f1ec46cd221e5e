"""Text made safe, sizes, notes and progress."""

from __future__ import annotations

import io
import sys

import pytest

from lfm2cpp.terminal import Progress, format_size, note, printable


def test_printable_strips_what_a_terminal_would_obey() -> None:
    text = "a\x1b[31mb\x07\r\x9b0m\x7f\ttab\nline \u00e9\u96ea\U0001f600\u200d"
    assert printable(text, tty=True) == "a[31mb0m\ttab\nline \u00e9\u96ea\U0001f600\u200d"
    assert printable(text, tty=False) == text


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_999, "1.0 MB"),
        (711_523_616, "711.5 MB"), (2_343_365_920, "2.3 GB"), (10**15, "1000.0 TB"),
    ],
)  # fmt: skip
def test_format_size(n: int, text: str) -> None:
    assert format_size(n) == text


def test_note_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    note("two\nlines")
    assert capsys.readouterr() == ("", "note: two lines\n")


def test_progress_without_a_terminal_is_a_line_each_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("working", total=1000) as bar:
        for _ in range(1000):
            bar.update(1)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and len(lines) == 10
    assert lines[0].startswith("working:  10 % (100 B of 1.0 kB, ") and lines[-1].startswith(
        "working: 100 % (1.0 kB of 1.0 kB"
    )


def test_progress_of_large_steps_and_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("copying", total=4, unit="file") as bar:
        bar.update(1)
        bar.update(3)
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        "copying:  25 % (1 of 4",
        "copying: 100 % (4 of 4",
    ]
    with Progress("nothing", total=0) as bar:
        bar.update(0)
    assert "100 %" in capsys.readouterr().err


def test_progress_on_a_terminal_is_a_bar_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    with Progress("working", total=1000) as bar:
        bar.update(500)
    assert "working" in stderr.getvalue() and "\n" not in stderr.getvalue() and stderr.getvalue().endswith("\r")


def test_progress_without_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    """A windowed Python has none."""
    monkeypatch.setattr(sys, "stderr", None)
    note("x")
    with Progress("working", total=10) as bar:
        bar.update(10)
