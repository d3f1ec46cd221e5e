"""A file that is being written: its bytes reach the system in whole large pages, and the disk works meanwhile."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import OutputError

WRITE_CHUNK = 16 << 20  # keeps Ctrl-C prompt: Python looks at signals between system calls
# What Linux gets in pieces of this size, and aligned to it, it can keep in memory as one page: a model that was just
# written then runs as fast as one that was read.
LARGE_PAGE = 2 << 20
SYNC_FILE_RANGE_WRITE = 2

_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None) if sys.platform == "linux" else None
if _sync_file_range is not None:
    _sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


class OutputFile:
    """A partial file on its way. `write` appends; `write_at` goes back to a place that `skip` left out."""

    def __init__(self, target: Path, partial: Path) -> None:
        self.target = target
        self.partial = partial
        self.fd = -1
        self.lock = -1  # a second descriptor, which keeps the file locked when the first is closed
        self.nbytes = 0
        self._held = bytearray()  # the end of what was appended, not written yet
        self._on_its_way = 0  # bytes that the system was told to start writing to the disk

    def write(self, buffer: Any) -> None:
        """Append all bytes of a contiguous buffer."""
        view = memoryview(buffer).cast("B")
        while view:
            room = LARGE_PAGE - self.nbytes % LARGE_PAGE  # to the next border
            if self._held or len(view) < room:
                part, view = view[:room], view[room:]
                self._held += part
                self.nbytes += len(part)
                if len(part) == room:
                    self.flush()
                continue
            n = min(len(view), room + WRITE_CHUNK - LARGE_PAGE)
            n -= (self.nbytes + n) % LARGE_PAGE
            self.nbytes += n
            self._write_all(view[:n])
            view = view[n:]
            self._start_writeback()

    def flush(self) -> None:
        """Hand over what was held back until a large page would be full."""
        held, self._held = self._held, bytearray()
        self._write_all(memoryview(held))
        self._start_writeback()

    def _start_writeback(self) -> None:
        """Let the disk work while more is produced: the sync at the end, which nothing can interrupt, is short then."""
        if self.nbytes - self._on_its_way >= WRITE_CHUNK:
            if _sync_file_range is not None:  # only a hint, so its result does not matter
                _sync_file_range(self.fd, self._on_its_way, self.nbytes - self._on_its_way, SYNC_FILE_RANGE_WRITE)
            self._on_its_way = self.nbytes

    def skip(self, n: int) -> None:
        """Leave `n` bytes to be written later by `write_at`."""
        self.flush()
        self.nbytes += n
        self._seek(self.nbytes)

    def write_at(self, offset: int, buffer: Any) -> None:
        """Fill in bytes that were skipped; the position for `write` stays."""
        self.flush()
        self._seek(offset)
        self._write_all(memoryview(buffer).cast("B"))
        self._seek(self.nbytes)

    def _seek(self, offset: int) -> None:
        with named_errors(self.target):
            os.lseek(self.fd, offset, os.SEEK_SET)

    def _write_all(self, view: memoryview) -> None:
        # os.write repeats itself after EINTR; a short write is for us to continue.
        with named_errors(self.target):
            while view:
                n = os.write(self.fd, view)
                if n <= 0:
                    raise OSError(errno.EIO, "nothing was written")
                view = view[n:]


@contextmanager
def named_errors(target: Path) -> Iterator[None]:
    """An OSError while writing becomes an OutputError that names the target."""
    try:
        yield
    except OSError as error:
        hints = {
            errno.ENOSPC: "; free some space and run again",
            errno.EFBIG: "; the file system or a limit (ulimit -f) does not allow so large a file",
        }
        hint = hints.get(error.errno or 0, "")
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}{hint}") from None
