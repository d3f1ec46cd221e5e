"""Files that are either the old one or the complete new one, never something between.

Everything is written to `.NAME.RANDOM.partial` beside the target, synced, checked and then renamed over it. On any
failure, Ctrl-C included, the partial file is removed and the target is untouched. A partial file is locked while its
writer lives, so that a second writer to the same target is refused and what a killed one left is cleaned up.
"""

from __future__ import annotations

import atexit
import errno
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import OutputError, UsageError
from .output_file import OutputFile, named_errors
from .signals import signals_held, signals_raise
from .terminal import format_size, note

try:
    import fcntl
except ImportError:  # Windows: an open file cannot be deleted there, which serves as the lock
    fcntl = None  # type: ignore[assignment]

SPACE_MARGIN = 0.02
MAX_NAME_BYTES = 255
DIRECTORY_LOCK_SECONDS = 2.0
# What a file system answers when it cannot do something at all, as opposed to failing at it.
UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS, errno.ENOLCK, errno.EBADF}

_leftovers: set[Path] = set()


@atexit.register
def _remove_leftovers() -> None:
    for path in list(_leftovers):
        with suppress(OSError):
            path.unlink()


@contextmanager
def atomic_output(
    path: str | os.PathLike[str],
    *,
    size: int | None = None,
    force: bool = False,
    inputs: Sequence[str | os.PathLike[str]] = (),
    check: Callable[[Path], None] | None = None,
) -> Iterator[OutputFile]:
    """Write a file in whole or not at all: `with atomic_output(path, size=n, force=False) as out: out.write(...)`.

    `size` is the exact number of bytes to come, when known: space is then checked and reserved first, and the
    count at the end. `inputs` are files that the output must not be. `check(partial)` may raise to refuse the result
    after it is on the disk and before it gets its name.
    Raises OutputError or UsageError with the reason; on any exception the partial file is gone, the target as before.
    """
    target = check_destination(path, size=size, force=force, inputs=inputs)
    if target == Path(os.devnull):
        with _to_devnull(target) as out:
            yield out
        return
    out = OutputFile(target, target.with_name(f"{_partial_prefix(target)}{secrets.token_hex(8)}.partial"))
    with signals_raise():
        try:
            _create(out)
            _reserve(out, size)
            yield out
            _commit(out, size=size, force=force, check=check)
        finally:
            with signals_held():
                _discard(out)


def check_destination(
    path: str | os.PathLike[str],
    *,
    size: int | None = None,
    force: bool = False,
    inputs: Sequence[str | os.PathLike[str]] = (),
) -> Path:
    """Everything that can be known before the work: the resolved target, or OutputError / UsageError."""
    if str(path) == "-":
        raise UsageError("'-' is not supported as output: a model cannot be written to a pipe; name a file")
    if not str(path) or "\0" in str(path):
        raise UsageError(f"{str(path)!r} is not a file name")
    target = _resolve(Path(path))
    if target == Path(os.devnull):
        return target
    exists = os.path.exists(target)
    if os.path.isdir(target) or str(path).endswith(("/", os.sep)):
        raise OutputError(f"{path}: is a directory; name a file in it")
    if os.path.exists(path) and not os.path.isfile(path):
        raise UsageError(f"{path}: is not a regular file; name a file")
    for source in inputs:
        if exists and os.path.exists(source) and os.path.samefile(target, source):
            raise UsageError(f"{path}: is the input itself; name another output file")
    _check_parent(path, target.parent)
    if exists and not force:
        raise OutputError(f"{path}: exists already; use --force to replace it")
    if len(os.fsencode(target.name)) > MAX_NAME_BYTES:
        raise OutputError(f"{path}: the name is longer than {MAX_NAME_BYTES} bytes")
    if size is not None:
        _check_space(target, size)
    return target


def _check_parent(path: str | os.PathLike[str], parent: Path) -> None:
    if not os.path.isdir(parent):
        problem = "is not a directory" if os.path.exists(parent) else "does not exist; create it first"
        raise OutputError(f"{path}: {parent} {problem}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: the directory {parent} is not writable")


def _resolve(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:
        raise OutputError(f"{path}: cannot be resolved: {error}") from None


def _check_space(target: Path, size: int) -> None:
    try:
        free = shutil.disk_usage(target.parent).free
    except OSError:
        return  # some network file systems do not tell; writing will
    need = int(size * (1 + SPACE_MARGIN))
    if need > free:
        raise OutputError(
            f"{target}: needs {format_size(need)} of disk space, but only {format_size(free)} are free "
            f"in {target.parent}"
        )


@contextmanager
def _to_devnull(target: Path) -> Iterator[OutputFile]:
    out = OutputFile(target, target)
    out.fd = os.open(target, os.O_WRONLY)
    try:
        yield out
        out.flush()
    finally:
        os.close(out.fd)


# --- the partial file and its lock


def _partial_prefix(target: Path) -> str:
    """`.NAME.`, shortened so that the longest allowed NAME still leaves room for the rest."""
    name = os.fsencode(target.name)[: MAX_NAME_BYTES - len("..0123456789abcdef.partial")]
    return f".{os.fsdecode(name)}."


def _create(out: OutputFile) -> None:
    """Make and lock the partial file, after clearing away those of dead writers."""
    with named_errors(out.target), _directory_locked(out.target.parent), signals_held():
        for stale in _dead_partials(out.target):
            note(f"removed {stale}, left by a writer that was killed")
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0)
        out.fd = os.open(out.partial, flags, 0o666)  # less the umask, as for any new file
        _leftovers.add(out.partial)
        try_lock(out.fd)


def _dead_partials(target: Path) -> list[Path]:
    """Remove the partial files of dead writers and return their paths; a live one raises OutputError."""
    removed = []
    prefix = _partial_prefix(target)
    for entry in sorted(os.listdir(target.parent)):
        if not (entry.startswith(prefix) and re.fullmatch(r"[0-9a-f]+\.partial", entry[len(prefix) :])):
            continue
        path = target.with_name(entry)
        if _is_alive(path):
            raise OutputError(f"{target}: in use: another process is writing {path.name} now; wait for it to end")
        with suppress(FileNotFoundError):
            path.unlink()
            removed.append(path)
    return removed


def _is_alive(path: Path) -> bool:
    """Whether a partial file still has its writer. Where nobody can tell, it counts as alive."""
    if fcntl is None:
        try:
            path.unlink(missing_ok=True)
        except PermissionError:
            return True
        return False
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        return not stat.S_ISREG(os.fstat(fd).st_mode) or try_lock(fd) is not True
    finally:
        os.close(fd)


def try_lock(fd: int) -> bool | None:
    """Lock an open file without waiting: True, False when another holds it, None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextmanager
def _directory_locked(directory: Path) -> Iterator[None]:
    """Let one process at a time look for partial files and add its own.

    Best effort: a directory that somebody else keeps locked, or that cannot be locked, is used all the same.
    """
    fd = None
    if fcntl is not None:
        with suppress(OSError):
            fd = os.open(directory, os.O_RDONLY)
    try:
        deadline = time.monotonic() + DIRECTORY_LOCK_SECONDS
        while fd is not None and try_lock(fd) is False and time.monotonic() < deadline:
            time.sleep(0.01)
        yield
    finally:
        if fd is not None:
            os.close(fd)


def _reserve(out: OutputFile, size: int | None) -> None:
    """Claim the disk space now: a full disk shows in the first second, not after the work."""
    if not size or not hasattr(os, "posix_fallocate"):
        return
    with named_errors(out.target):
        try:
            os.posix_fallocate(out.fd, 0, size)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise


# --- giving the file its name


def _commit(out: OutputFile, *, size: int | None, force: bool, check: Callable[[Path], None] | None) -> None:
    if size is not None and out.nbytes != size:
        raise OutputError(f"{out.target}: {out.nbytes} bytes were written where {size} were planned; nothing was kept")
    out.flush()
    with named_errors(out.target):
        os.fsync(out.fd)
        if fcntl is not None:
            out.lock = os.dup(out.fd)
        fd, out.fd = out.fd, -1
        os.close(fd)  # may still report a failed write
    if check is not None:
        check(out.partial)
    with named_errors(out.target), signals_held():
        _rename(out.partial, out.target, force)
        _leftovers.discard(out.partial)
    _sync_directory(out.target)


def _rename(partial: Path, target: Path, force: bool) -> None:
    if not force and os.path.lexists(target):
        raise OutputError(f"{target}: appeared while it was being written; use --force to replace it")
    for attempt in range(4):
        try:
            os.replace(partial, target)
            return
        except PermissionError:
            if os.name != "nt":
                raise
            if attempt == 3:
                _leftovers.discard(partial)
                raise OutputError(f"{target}: is open in another program; the complete new file is {partial}") from None
            time.sleep(0.5)


def _sync_directory(target: Path) -> None:
    """Make the new name itself durable."""
    if os.name == "nt":
        return
    try:
        fd = os.open(target.parent, os.O_RDONLY)
    except OSError:
        return  # a directory may be writable and not readable
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise OutputError(f"{target}: is complete, but its directory cannot be synced: {error.strerror}") from None
    finally:
        os.close(fd)


def _discard(out: OutputFile) -> None:
    """Remove what is left of a partial file, and unlock it; nothing is left after a success."""
    if fcntl is None:  # Windows cannot remove what is open
        _close(out)
    if out.partial in _leftovers:
        with suppress(OSError):
            out.partial.unlink()
        _leftovers.discard(out.partial)
    _close(out)


def _close(out: OutputFile) -> None:
    for fd in (out.fd, out.lock):
        if fd >= 0:
            with suppress(OSError):
                os.close(fd)
    out.fd = out.lock = -1
