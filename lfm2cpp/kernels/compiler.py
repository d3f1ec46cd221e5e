"""Compile one kernel to an object file through Numba. Imported only when the cache does not hold it.

Numba compiles for the host, or for what its environment variables said when it was first used. Kernels are compiled for
level.target() and nothing else, so they have a code generator of their own; the rest of the process keeps Numba's.

A kernel is a plain function marked with @kernel. Its parameters are int64 (addresses and sizes) read from an argument
row in order; `work`, `ith` and `nth` come from the caller: the address of the op's own work counter, which starts at
zero, the thread's index and the number of threads. Float parameters are passed as the bits of a float32 in the low
half of an int64 and annotated F32.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numba
from numba import types
from numba.core import codegen, compiler
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target

from . import level
from .cache import Compiled
from .scalar import align_stack, f32_of_bits, load_i64

F32 = numba.float32  # annotation of a float parameter
FROM_CALLER = ("work", "ith", "nth")


class KernelCode(codegen.CPUCodeLibrary):
    """The LLVM module of a kernel, or of a helper that is compiled into kernels.

    Numba optimizes each function and makes it executable before a caller takes it in. A helper of ours never runs by
    itself: only the whole kernel is optimized, and becomes machine code, once.
    """

    def emit_object(self) -> bytes:
        """Machine code, relocatable."""
        return bytes(self._codegen._tm.emit_object(self._optimized()))

    def emit_assembly(self) -> str:
        return str(self._codegen._tm.emit_assembly(self._optimized()))

    def get_pointer_to_function(self, name: str) -> int:
        self._ensure_finalized()
        return 0

    def _optimized(self) -> Any:
        super()._optimize_final_module()
        return self._final_module

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_specific(self) -> None:
        pass


class KernelCodegen(codegen.JITCPUCodegen):
    """Code for level.target()."""

    _library_class = KernelCode

    def set_env(self, env_name: str, env: Any) -> None:
        """A kernel has no environment: it uses no Python object."""

    def _add_module(self, module: Any) -> None:
        pass

    def _get_host_cpu_name(self) -> str:
        return level.target().cpu_name

    def _get_host_cpu_features(self) -> str:
        return level.target().switches


@lru_cache(maxsize=1)
def _codegen() -> KernelCodegen:
    return KernelCodegen("lfm2cpp.exec")


@contextmanager
def _numba_for_kernels() -> Iterator[None]:
    """Numba as kernels need it, whatever the environment or the rest of the process has made of it."""
    context = cpu_target.target_context
    with global_compiler_lock, _jit_enabled():
        theirs, context._internal_codegen = context._internal_codegen, _codegen()
        try:
            yield
        finally:
            context._internal_codegen = theirs


@contextmanager
def _jit_enabled() -> Iterator[None]:
    """NUMBA_DISABLE_JIT is meant for other code: kernels cannot be interpreted."""
    disabled, numba.config.DISABLE_JIT = numba.config.DISABLE_JIT, 0
    try:
        yield
    finally:
        numba.config.DISABLE_JIT = disabled


def device(function: Callable[..., Any]) -> Any:
    """Mark a small helper of kernels: it is compiled into its callers.

    No fastmath: sums keep the order they are written in, at every level and on every machine. LLVM may not fuse a*b+c
    by itself either; a kernel that wants a fused operation says fma.
    """
    with _jit_enabled():
        return numba.njit(error_model="numpy", forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)(
            function
        )


def kernel(function: Callable[..., None]) -> Callable[..., None]:
    """Mark a function as a kernel that plans, or Python, can call by "module:function"."""
    function.is_kernel = True  # type: ignore[attr-defined]
    return function


def kernel_params(function: Callable[..., None]) -> tuple[str, ...]:
    """The parameters that an argument row carries, in its order."""
    return tuple(name for name in inspect.signature(function).parameters if name not in FROM_CALLER)


def _entry(function: Callable[..., None]) -> Callable[[int, int, int, int], None]:
    """entry(args, work, ith, nth) that reads the argument row and calls the kernel's body, inlined."""
    lines, row = [], 0
    for name, parameter in inspect.signature(function).parameters.items():
        if name in FROM_CALLER:
            lines.append(name)
            continue
        value = f"load_i64(args + {8 * row})"
        lines.append(f"f32_of_bits({value})" if parameter.annotation in (F32, "F32") else value)
        row += 1
    source = f"def entry(args, work, ith, nth):\n    align_stack()\n    body({', '.join(lines)})\n"
    words = {"align_stack": align_stack, "load_i64": load_i64, "f32_of_bits": f32_of_bits}
    scope: dict[str, Any] = {"body": device(function), **words}
    exec(source, scope)  # noqa: S102 - the text above, nothing of a user's
    return scope["entry"]


def compile_kernel(name: str) -> Compiled:
    """Compile "module:function"; returns its object code, its symbol and its parameters."""
    with _numba_for_kernels():
        result = _compile(name)
        code = result.library.emit_object()
    return Compiled(result.fndesc.mangled_name, kernel_params(_function(name)), code)


def assembly(name: str) -> str:
    """The assembly of "module:function", to look at."""
    with _numba_for_kernels():
        return _compile(name).library.emit_assembly()


def _function(name: str) -> Callable[..., None]:
    module_name, function_name = name.split(":")
    function = getattr(importlib.import_module(module_name), function_name)
    assert function.is_kernel, name
    return function


def _compile(name: str) -> Any:
    flags = compiler.Flags()
    flags.no_cpython_wrapper = True
    flags.no_cfunc_wrapper = True
    flags.error_model = "numpy"
    flags.nrt = False
    entry = _entry(_function(name))
    entry.__name__ = entry.__qualname__ = "lfm2_" + re.sub(r"\W", "_", name)
    context = cpu_target.target_context
    return compiler.compile_extra(
        cpu_target.typing_context, context, entry, (types.int64,) * 4, types.void, flags, {}
    )  # fmt: skip
