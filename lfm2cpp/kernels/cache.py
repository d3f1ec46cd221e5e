"""Machine code of kernels as plain object files, so that a warm start does not compile, or import Numba.

A file is keyed by the source of every kernel, the versions of Python, Numba and llvmlite, and the CPU. One that is
damaged, or that somebody else could have written, counts as not there: it is compiled again. So does everything where
there is no folder to write to; one warning says so.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from . import level

try:
    import fcntl
except ImportError:  # Windows: processes that start together compile each for itself
    fcntl = None  # type: ignore[assignment]

MAGIC = b"lfm2cpp-kernel-2\n"
PACKAGES = Path(__file__).resolve().parents[2]
SOURCE_DIRS = ("lfm2cpp/kernels", "quant")
COMPILER_SWITCHES = ("NUMBA_OPT", "NUMBA_LOOP_VECTORIZE", "NUMBA_SLP_VECTORIZE")  # environment
LOCK_SECONDS = 120.0  # to wait for another process that compiles, before compiling as well
KEEP_SECONDS = 60 * 24 * 3600.0  # how long the kernels of another version stay after they were last used


KEY = re.compile("[0-9a-f]{24}")  # what sources_digest gives


@dataclass(frozen=True)
class Compiled:
    """What the cache keeps of one kernel."""

    symbol: str
    params: tuple[str, ...]
    object_code: bytes


@lru_cache(maxsize=1)
def sources_digest() -> str:
    """sha256 over every file whose text can change a kernel's machine code, and over the compiler's versions.

    Empty where the sources cannot be read (a zip archive, a frozen program): there nothing tells old code from new.
    """
    digest = hashlib.sha256(MAGIC)
    for folder in SOURCE_DIRS:
        paths = sorted((PACKAGES / folder).rglob("*.py"))
        if not paths:
            return ""
        for path in paths:
            digest.update(path.relative_to(PACKAGES).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    facts = [f"{name}={importlib.metadata.version(name)}" for name in ("numba", "llvmlite")]
    facts += [f"{name}={os.environ[name]}" for name in COMPILER_SWITCHES if name in os.environ]
    digest.update(" ".join([sys.version, *facts, level.target().key]).encode())
    return digest.hexdigest()[:24]


def cache_root() -> Path:
    """Where kernels are cached: LFM2CPP_CACHE_DIR, else the user's cache folder, else one for temporary files."""
    if override := os.environ.get("LFM2CPP_CACHE_DIR"):
        return Path(override)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", tempfile.gettempdir())) / "lfm2cpp" / "cache"
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if base.is_absolute():
        return base / "lfm2cpp"
    home = Path(os.path.expanduser("~"))
    if not home.is_absolute():  # no HOME, and a user id without a name, as in some containers
        return Path(tempfile.gettempdir()) / f"lfm2cpp-{os.getuid()}"
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "lfm2cpp"


class KernelCache:
    """The object files of one sources_digest(); every failure means "not there", never an error."""

    _warned = False  # in this process

    def __init__(self) -> None:
        root = cache_root()
        self.folder = root / "kernels" / (sources_digest() or "unknown")
        self._folders = (root, root / "kernels", self.folder)
        self._known = False  # whether this process has said that the folder is in use

    def read(self, name: str) -> Compiled | None:
        """What was kept of a kernel, or None."""
        try:
            with open(self._path(name), "rb") as file:
                if self._why_not() or not _is_ours(os.fstat(file.fileno())):
                    return None
                data = file.read()
        except OSError:
            return None
        try:
            digest, header, code = data.removeprefix(MAGIC).split(b"\n", 2)
            info = json.loads(header)
            if not data.startswith(MAGIC) or _checksum(header, code) != digest:
                return None
            if (info["name"], info["key"]) != (name, sources_digest()):  # a file that was moved here
                return None
            self._note_use()
            return Compiled(info["symbol"], tuple(info["params"]), code)
        except (ValueError, KeyError):
            return None

    def write(self, name: str, compiled: Compiled) -> None:
        """Keep a kernel, or warn once that it cannot be kept."""
        info = {"name": name, "key": sources_digest(), "symbol": compiled.symbol, "params": compiled.params}
        header = json.dumps(info).encode()
        content = MAGIC + _checksum(header, compiled.object_code) + b"\n" + header + b"\n" + compiled.object_code
        temporary = None
        try:
            self._make_folders()
            if reason := self._why_not():
                self._warn(reason)
                return
            handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=".partial")
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(temporary, self._path(name))
            self._note_use(forget_others=True)
        except OSError as error:
            if temporary:
                with suppress(OSError):
                    os.unlink(temporary)
            self._warn(error.strerror or str(error))

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Hold the right to compile, as far as that is possible: who starts at the same time waits, and then reads."""
        handle = None
        with suppress(OSError):
            if fcntl is not None:
                self._make_folders()
                handle = os.open(self.folder / ".lock", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            if handle is not None:
                _lock(handle)
            yield
        finally:
            if handle is not None:
                os.close(handle)

    def _note_use(self, forget_others: bool = False) -> None:
        """Once a process: date the folder, and where something was compiled remove those of versions long unused."""
        if self._known:
            return
        self._known = True
        with suppress(OSError):
            os.utime(self.folder)
            for other in self.folder.parent.iterdir() if forget_others else ():
                unused = time.time() - other.stat().st_mtime
                if other != self.folder and KEY.fullmatch(other.name) and unused > KEEP_SECONDS:
                    shutil.rmtree(other, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / (name.replace(":", "-") + ".o")

    def _make_folders(self) -> None:
        self._folders[0].parent.mkdir(parents=True, exist_ok=True)
        for folder in self._folders:
            folder.mkdir(mode=0o700, exist_ok=True)

    def _why_not(self) -> str:
        """Why this cache must not be used; empty when it may."""
        if not sources_digest():
            return "the sources of the kernels cannot be read"
        if not _is_ours(os.stat(self.folder)):
            return f"{self.folder} belongs to somebody else, or others may write to it"
        for folder in self._folders:
            if os.stat(folder).st_mode & (stat.S_IWOTH | stat.S_ISVTX) == stat.S_IWOTH and os.name != "nt":
                return f"{folder} may be written by everybody"
        return ""

    def _warn(self, reason: str) -> None:
        if not KernelCache._warned:
            KernelCache._warned = True
            warnings.warn(
                f"kernels cannot be cached in {self.folder} ({reason}); they are compiled anew in every process; "
                "set LFM2CPP_CACHE_DIR to a folder of your own",
                RuntimeWarning,
                stacklevel=2,
            )


def _checksum(header: bytes, code: bytes) -> bytes:
    return hashlib.sha256(header + b"\n" + code).hexdigest().encode()


def _is_ours(status: os.stat_result) -> bool:
    """Whether only this user, or the system's administrator, can have written this."""
    return not hasattr(os, "getuid") or (status.st_uid in (os.getuid(), 0) and not status.st_mode & 0o022)


def _lock(handle: int) -> None:
    deadline = time.monotonic() + LOCK_SECONDS
    while time.monotonic() < deadline:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.05)
        except OSError:
            return  # a file system without locks
