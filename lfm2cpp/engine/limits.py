"""What an engine may use: the context it offers, pages of memory, and whether the model fits at all."""

from __future__ import annotations

import os
from pathlib import Path

from lfm2cpp.errors import ContextError, UsageError
from lfm2cpp.terminal import format_size

from .memory import n_pages

DEFAULT_N_CTX = 32768  # what LFM2 models are trained for; pages are committed only when used
MAX_BATCH = 8192
MAX_THREADS = 1024
RESERVE_BYTES = 100 << 20  # of an engine beside weights and pages: the interpreter, activations, kernels


def checked(name: str, value: int, low: int, high: int) -> int:
    """value, or UsageError when it is not a whole number in low..high."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise UsageError(f"{name} is {value!r}, expected a whole number in {low}..{high}")
    return value


def context_size(n_ctx: int | None, n_ctx_train: int) -> int:
    """The context to offer: what was asked for, else the model's up to DEFAULT_N_CTX."""
    if n_ctx is None or n_ctx == 0:
        return min(n_ctx_train, DEFAULT_N_CTX)
    return checked("the context size", n_ctx, 1, n_ctx_train)


def memory_limit() -> int:
    """Bytes of memory this process can have: the machine's, or the container's if that is less."""
    limits = []
    try:
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        limits.append(_windows_memory())
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(path).read_text()))  # "max" is no number
        except (OSError, ValueError):
            continue
    return min(limits)


def _windows_memory() -> int:
    import psutil

    return psutil.virtual_memory().total


def check_memory(path: Path, weights: int, context: int, force: bool) -> None:
    """ContextError when the weights and the context that was asked for cannot be in memory together."""
    limit, need = memory_limit(), weights + context + RESERVE_BYTES
    if need > limit and not force:
        advice = "use a smaller context or a smaller quantization" if context else "use a smaller quantization"
        raise ContextError(
            f"{path}: needs {format_size(need)} of memory ({format_size(weights)} weights, {format_size(context)} "
            f"context), but there are {format_size(limit)}; {advice}, or run it all the same with --force"
        )


def max_pages(page_bytes: int, n_ctx: int) -> int:
    """Pages for four full contexts, but no more than half of the memory."""
    whole = n_pages(n_ctx)
    return max(whole + 1, min(4 * whole, memory_limit() // 2 // page_bytes))
