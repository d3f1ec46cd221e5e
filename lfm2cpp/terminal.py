"""What goes to the terminal beside the result: progress, notes, sizes, and text made safe to show. All on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

# C0 controls but tab and newline, DEL, and the C1 controls: what a terminal would obey instead of show.
_CONTROLS = {c: None for c in (*range(0x20), *range(0x7F, 0xA0)) if chr(c) not in "\n\t"}


def printable(text: str, *, tty: bool) -> str:
    """`text` without escape sequences' control characters when it goes to a terminal; untouched otherwise."""
    return text.translate(_CONTROLS) if tty else text


def format_size(n: int) -> str:
    """Bytes for people, in powers of 1000: `711.5 MB`."""
    if n < 1000:
        return f"{n} B"
    size = float(n)
    for unit in ("kB", "MB", "GB", "TB"):
        size /= 1000
        if size < 999.95:
            return f"{size:.1f} {unit}"
    return f"{size:.1f} TB"


def note(message: str) -> None:
    """One line on stderr that is no error and no result."""
    if sys.stderr is not None:
        print("note: " + " ".join(message.split()), file=sys.stderr, flush=True)


class Progress:
    """A bar on a terminal's stderr; elsewhere a plain line each 10 %. `total` is in `unit`s."""

    def __init__(self, label: str, *, total: int, unit: str = "B") -> None:
        self.label = label
        self.total = total
        self.unit = unit
        self.done = 0
        self._bar: Any = None
        self._tenths = 0
        self._started = 0.0

    def __enter__(self) -> Progress:
        self._started = time.monotonic()
        if sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=self.total, desc=self.label, unit=self.unit, unit_scale=True, leave=False, dynamic_ncols=True
            )
        return self

    def update(self, n: int) -> None:
        """`n` more units are done."""
        self.done += n
        if self._bar is not None:
            self._bar.update(n)
            return
        tenths = 10 * self.done // self.total if self.total else 10
        if tenths > self._tenths:
            self._tenths = tenths
            self._line()

    def _line(self) -> None:
        if sys.stderr is None:
            return
        amounts = [format_size(n) if self.unit == "B" else str(n) for n in (self.done, self.total)]
        elapsed = time.monotonic() - self._started
        percent = 100 * self.done // self.total if self.total else 100
        line = f"{self.label}: {percent:3d} % ({amounts[0]} of {amounts[1]}, {elapsed:.1f} s)"
        print(line, file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
