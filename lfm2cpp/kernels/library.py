"""Load kernels by name: from the cache of object files when it holds them, else by compiling them once.

A kernel is named "package.module:function". LLVM links an object file back in a few milliseconds, so a process that
finds all its kernels in the cache never imports Numba.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache

import llvmlite.binding as llvm

from .cache import Compiled, KernelCache

# Numba's calling convention: where the (empty) result and an exception would go, then our arguments: the argument
# row, the work counter, the thread's index and the number of threads. Calling it releases the GIL.
ENTRY_TYPE = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_int64] * 6)
_no_result = (ctypes.c_int64 * 8)()
NO_RESULT = ctypes.addressof(_no_result)
Progress = Callable[[str, int, int], None]  # kernel name, how many are done, of how many


def float_bits(value: float) -> int:
    """A float argument as kernels expect it."""
    return int.from_bytes(struct.pack("=f", value), sys.byteorder)


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
            if self._missing(wanted):
                with self._cache.compiling():
                    self._compile(self._missing(wanted), progress)
            return {name: self._loaded[name] for name in wanted}

    def is_cached(self, name: str) -> bool:
        return name in self._loaded or self._cache.read(name) is not None

    def _missing(self, names: list[str]) -> list[str]:
        """Those that are neither loaded nor in the cache; what is in the cache is linked."""
        return [name for name in names if name not in self._loaded and not self._link(name, self._cache.read(name))]

    def _compile(self, names: list[str], progress: Progress | None) -> None:
        """Compile, keep and link these, in helper processes as far as those can."""
        if not names:
            return
        from .helpers import compile_in_helpers

        begun: set[str] = set()
        one_by_one = threading.Lock()

        def begins(name: str) -> None:
            with one_by_one:  # helpers are asked from a thread each
                if progress and name not in begun:
                    progress(name, len(begun), len(names))
                begun.add(name)

        with closing(compile_in_helpers(names, begins)) as helped:
            for name, compiled in helped:
                self._keep(name, compiled)
        for name in names:
            if name not in self._loaded:
                from .compiler import compile_kernel

                begins(name)
                self._keep(name, compile_kernel(name))
        if progress:
            progress("", len(names), len(names))

    def _keep(self, name: str, compiled: Compiled) -> None:
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


def _after_fork_in_child() -> None:
    if library.cache_info().currsize:
        library()._lock = threading.Lock()  # the parent's may have been held, by a thread that is not here


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
