"""The command line for tests: in this process for speed, as a process of its own for pipes, signals and terminals."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "lfm2cpp"]


@dataclass
class Outcome:
    code: int
    out: str
    err: str


class Cli:
    """Runs `lfm2cpp ...` in this process; a fixture makes one (`cli` in the tests that use it)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capfd = capfd

    def __call__(self, *arguments: Any, stdin: bytes | None = b"") -> Outcome:
        from lfm2cpp.cli import main

        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        stream = None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin))
        with self._monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["lfm2cpp", *map(str, arguments)])
            patch.setattr(sys, "stdin", stream)
            try:
                main()
                code = 0
            except SystemExit as leave:
                code = leave.code if isinstance(leave.code, int) else int(bool(leave.code))
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        out, err = self._capfd.readouterr()
        assert "Traceback" not in err, err
        return Outcome(code, out, err)


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **extra}


@contextmanager
def started(*arguments: Any, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process of its own, with pipes where nothing else is said; gone at the end whatever happens.

    The pipes are unbuffered: what `first` leaves unread, `finish` reads.
    """
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    extra = options.pop("env", {})
    with subprocess.Popen(
        [*COMMAND, *map(str, arguments)], env=environment(**extra), bufsize=0, **{**pipes, **options}
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def first(process: subprocess.Popen[bytes], n: int) -> bytes:
    """The first `n` bytes of standard output, fewer at its end."""
    assert process.stdout is not None
    got = b""
    while len(got) < n and (part := process.stdout.read(n - len(got))):
        got += part
    return got


def finish(process: subprocess.Popen[bytes], stdin: bytes | None = None, timeout: float = 60) -> Outcome:
    """Send `stdin`, wait for the end; fails on a traceback."""
    out, err = process.communicate(stdin, timeout=timeout)
    text = (err or b"").decode("utf-8", "replace")
    assert "Traceback" not in text, text
    return Outcome(process.returncode, (out or b"").decode("utf-8", "replace"), text)


def lfm2cpp(*arguments: Any, stdin: bytes = b"", **options: Any) -> Outcome:
    """Run a process of its own to its end."""
    with started(*arguments, **options) as process:
        return finish(process, stdin)


def shell(line: str) -> Outcome:
    """`line` in sh, with $LFM for the command."""
    command = environment(LFM=" ".join(COMMAND))
    result = subprocess.run(["sh", "-c", line], capture_output=True, timeout=60, env=command, check=False)
    out, err = (stream.decode("utf-8", "replace") for stream in (result.stdout, result.stderr))
    return Outcome(result.returncode, out, err)


def modules_imported(names: str, *arguments: Any) -> tuple[list[str], list[str]]:
    """Lines of output of a command, and which of `names` (blank-separated) it imported."""
    code = (
        f"import sys; sys.argv = ['lfm2cpp', *{list(map(str, arguments))!r}]\nfrom lfm2cpp.cli import main\n"
        f"try: main()\nexcept SystemExit: pass\n"
        f"print(*({{m.split('.')[0] for m in sys.modules}} & set({names!r}.split())))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment(), check=True
    )
    *lines, last = result.stdout.splitlines()
    return lines, last.split()
