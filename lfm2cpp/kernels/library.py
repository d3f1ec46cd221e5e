"""Load kernels by name: from a cache of object files when it holds them, else by compiling them once.

A kernel is named "package.module:function". Its machine code is kept as a plain object file, keyed by the source of
every kernel, the versions of Python, Numba and llvmlite, and the CPU. LLVM links it back in a few milliseconds, so a
process that finds all its kernels in the cache never imports Numba. A file that is damaged, or written by somebody
else, is compiled again.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import json
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import llvmlite.binding as llvm

from . import level

MAGIC = b"lfm2cpp-kernel-1\n"
# Numba's calling convention: where the (empty) result and an exception would go, then our arguments: the argument
# row, the work counter, the thread's index and the number of threads. Calling it releases the GIL.
ENTRY_TYPE = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_int64] * 6)
_no_result = (ctypes.c_int64 * 8)()
NO_RESULT = ctypes.addressof(_no_result)
_PACKAGES = Path(__file__).resolve().parents[2]
SOURCE_DIRS = ("lfm2cpp/kernels", "quant")

Progress = Callable[[str, int, int], None]  # kernel name, how many are done, of how many


@dataclass(frozen=True)
class Compiled:
    """What the cache keeps of one kernel."""

    symbol: str
    params: tuple[str, ...]
    object_code: bytes


@dataclass(frozen=True)
class Kernel:
    """A kernel ready to run: its address, and its parameter names in the order of an argument row."""

    name: str
    address: int
    params: tuple[str, ...]
    entry: Callable[[int, int, int, int, int, int], int] = field(repr=False, compare=False)

    def __call__(self, args: dict[str, int], ith: int = 0, nth: int = 1) -> None:
        """Run it once, now, on this thread. `args`: int64 by parameter name."""
        row = (ctypes.c_int64 * (len(self.params) + 1))(*(args[name] for name in self.params))
        counter = ctypes.c_int64(0)
        self.entry(NO_RESULT, NO_RESULT, ctypes.addressof(row), ctypes.addressof(counter), ith, nth)


@lru_cache(maxsize=1)
def sources_digest() -> str:
    """sha256 over every file whose text can change a kernel's machine code, and over the compiler's versions."""
    digest = hashlib.sha256(MAGIC)
    for folder in SOURCE_DIRS:
        for path in sorted((_PACKAGES / folder).rglob("*.py")):
            digest.update(path.relative_to(_PACKAGES).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    versions = [f"{name}={importlib.metadata.version(name)}" for name in ("numba", "llvmlite")]
    digest.update(" ".join([sys.version, *versions, level.target().key]).encode())
    return digest.hexdigest()[:24]


def cache_root() -> Path:
    """Where kernels are cached: LFM2CPP_CACHE_DIR, else the user's cache folder."""
    if override := os.environ.get("LFM2CPP_CACHE_DIR"):
        return Path(override)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", tempfile.gettempdir())) / "lfm2cpp" / "cache"
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "lfm2cpp"
    home = Path(os.path.expanduser("~"))
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "lfm2cpp"


class KernelCache:
    """The object files of one sources_digest(); every failure means "not there", never an error."""

    def __init__(self) -> None:
        self.folder = cache_root() / "kernels" / sources_digest()
        self._warned = False

    def _path(self, name: str) -> Path:
        return self.folder / (name.replace(":", "-") + ".o")

    def read(self, name: str) -> Compiled | None:
        try:
            with open(self._path(name), "rb") as file:
                if hasattr(os, "getuid"):
                    status = os.fstat(file.fileno())
                    if status.st_uid not in (os.getuid(), 0) or status.st_mode & 0o022:
                        return None
                data = file.read()
        except OSError:
            return None
        try:
            digest, header, code = data.removeprefix(MAGIC).split(b"\n", 2)
            if not data.startswith(MAGIC) or hashlib.sha256(header + code).hexdigest().encode() != digest:
                return None
            info = json.loads(header)
            return Compiled(info["symbol"], tuple(info["params"]), code)
        except (ValueError, KeyError):
            return None

    def write(self, name: str, compiled: Compiled) -> None:
        header = json.dumps({"symbol": compiled.symbol, "params": compiled.params}).encode()
        digest = hashlib.sha256(header + compiled.object_code).hexdigest().encode()
        temporary = None
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=".partial")
            with os.fdopen(handle, "wb") as file:
                file.write(MAGIC + digest + b"\n" + header + b"\n" + compiled.object_code)
            os.replace(temporary, self._path(name))
        except OSError as error:
            if temporary:
                Path(temporary).unlink(missing_ok=True)
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"kernels cannot be cached in {self.folder} ({error.strerror}); they are compiled anew in every "
                    "process; set LFM2CPP_CACHE_DIR to a writable folder",
                    RuntimeWarning,
                    stacklevel=2,
                )


class KernelLibrary:
    """The kernels of this process. Thread-safe; loading a kernel twice gives the same one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loaded: dict[str, Kernel] = {}
        self._cache = KernelCache()
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        self._engines: list[llvm.ExecutionEngine] = []
        self.compiled_names: list[str] = []  # those that were not in the cache

    def load(self, names: Iterable[str], progress: Progress | None = None) -> dict[str, Kernel]:
        """The kernels of these names, compiled if they must be. `progress` hears of each compilation."""
        with self._lock:
            wanted = list(dict.fromkeys(names))
            missing = []
            for name in wanted:
                if name not in self._loaded and not self._link(name, self._cache.read(name)):
                    missing.append(name)
            for done, name in enumerate(missing):
                if progress:
                    progress(name, done, len(missing))
                self._compile(name)
            if progress and missing:
                progress("", len(missing), len(missing))
            return {name: self._loaded[name] for name in wanted}

    def is_cached(self, name: str) -> bool:
        return name in self._loaded or self._cache.read(name) is not None

    def _compile(self, name: str) -> None:
        from .compiler import compile_kernel

        compiled = compile_kernel(name)
        self.compiled_names.append(name)
        self._cache.write(name, compiled)
        self._link(name, compiled)

    def _link(self, name: str, compiled: Compiled | None) -> bool:
        if compiled is None:
            return False
        # An engine each: helpers of two kernels may carry the same name.
        machine = llvm.Target.from_default_triple().create_target_machine()
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        engine.add_object_file(llvm.ObjectFileRef.from_data(compiled.object_code))
        engine.finalize_object()
        self._engines.append(engine)
        address = engine.get_function_address(compiled.symbol)
        self._loaded[name] = Kernel(name, address, compiled.params, ENTRY_TYPE(address))
        return True


@lru_cache(maxsize=1)
def library() -> KernelLibrary:
    """The library of this process, made when first asked for."""
    return KernelLibrary()
