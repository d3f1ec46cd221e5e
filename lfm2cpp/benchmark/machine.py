"""Facts about this machine and installation, for `lfm2cpp doctor` and for reports. Nothing here is measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from lfm2cpp import __version__
from lfm2cpp.engine.memory import KV_TYPES
from lfm2cpp.kernels import level
from lfm2cpp.kernels.cache import KernelCache
from lfm2cpp.threads import affinity_cpus, cgroup_cpus, default_threads, physical_cores

from .kernel_names import all_kernels

# The oldest and newest versions that the test suite has passed with.
TESTED: dict[str, tuple[str, str]] = {
    "numpy": ("1.26", "2.4"),
    "numba": ("0.61", "0.68"),
    "llvmlite": ("0.44", "0.50"),
}
OTHERS = ("tokenizers", "jinja2", "safetensors", "huggingface_hub", "click", "psutil")


@lru_cache(maxsize=1)
def cpu_name() -> str:
    """What the CPU calls itself."""
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model", "Hardware") and value.strip():
                return value.strip()
    except OSError:
        pass
    if sys.platform == "darwin":
        import subprocess

        try:
            command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, check=True, capture_output=True, text=True, timeout=5).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            pass
    return platform.processor() or platform.machine() or "unknown"


def describe_machine() -> dict[str, Any]:
    """Everything `lfm2cpp doctor` shows but the measurements, ready for JSON."""
    return {
        "lfm2cpp": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "threads": _threads(),
        "memory": _memory(),
        "kernel_cache": _kernel_cache(),
        "versions": versions(),
        "warnings": [],
    }


def _cpu() -> dict[str, Any]:
    target = level.target()
    levels = level.levels_of(target.features)
    interesting = sorted({*level.EXTRAS, *(f for one in level.LEVELS for f in one.features)} & target.features)
    return {
        "name": cpu_name(),
        "machine": platform.machine(),
        "llvm_name": target.cpu_name,
        "level": target.level.name,
        "usable_levels": [one.name for one in levels if level.is_allowed(one)],
        "refused_levels": [one.name for one in levels if not level.is_allowed(one)],
        "LFM2CPP_SIMD": os.environ.get("LFM2CPP_SIMD"),
        "NUMBA_CPU_NAME": os.environ.get("NUMBA_CPU_NAME"),
        "features": interesting,
        "all_features": sorted(target.features),
    }


def _threads() -> dict[str, Any]:
    return {
        "logical": os.cpu_count(),
        "physical": physical_cores(),
        "affinity": affinity_cpus(),
        "cgroup_quota": cgroup_cpus(),
        "chosen": default_threads(),
    }


def _memory() -> dict[str, Any]:
    import psutil

    memory = psutil.virtual_memory()
    limit = _cgroup_memory()
    return {"total": memory.total, "available": memory.available, "cgroup_limit": limit}


def _cgroup_memory() -> int | None:
    """Bytes that the container may use, or None without a limit."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = int(Path(path).read_text())
        except (OSError, ValueError):
            continue
        return limit if limit < 1 << 60 else None
    return None


def _kernel_cache() -> dict[str, Any]:
    """The cache folder, and how many of the kernels this version could need are in it."""
    names = all_kernels(KV_TYPES)
    cache = KernelCache()
    missing = [name for name in names if cache.read(name) is None]
    parent = cache.folder.parent
    others = [path for path in parent.iterdir() if path != cache.folder] if parent.is_dir() else []
    return {
        "folder": str(cache.folder),
        "writable": folder_is_writable(cache.folder),
        "cached": len(names) - len(missing),
        "kernels": len(names),
        "missing": missing,
        "nbytes": sum(_size(path) for path in _files(cache.folder)),
        "older_folders": len(others),
    }


def _files(folder: Path) -> Iterable[Path]:
    return folder.glob("*") if folder.is_dir() else ()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def folder_is_writable(folder: Path) -> bool:
    """Whether a file can be made in this folder, or, where it is not there yet, in the nearest one above. Tries it."""
    while not os.path.lexists(folder) and folder.parent != folder:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def versions() -> dict[str, dict[str, Any]]:
    """Installed versions of what the results depend on, and whether they lie in the range that was tested."""
    found: dict[str, dict[str, Any]] = {}
    for name in (*TESTED, *OTHERS):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        entry: dict[str, Any] = {"version": version}
        if name in TESTED:
            entry["tested"] = list(TESTED[name])
            entry["in_range"] = version is not None and in_range(version, *TESTED[name])
        found[name] = entry
    return found


def in_range(version: str, oldest: str, newest: str) -> bool:
    """Whether `version` is at least `oldest` and no newer a minor version than `newest`."""
    return _release(oldest) <= _release(version)[:2] <= _release(newest)


def _release(version: str) -> tuple[int, ...]:
    """2.4.6rc1 -> (2, 4, 6)"""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()
