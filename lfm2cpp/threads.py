"""How many threads to use by default: physical cores, the process's affinity and the container's quota, the least."""

from __future__ import annotations

import math
import os
from pathlib import Path


def cgroup_cpus() -> float | None:
    """CPUs that the container's quota allows, or None without one (cgroup v2, then v1)."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        base = Path("/sys/fs/cgroup/cpu")
        quota = int((base / "cpu.cfs_quota_us").read_text())
        return None if quota <= 0 else quota / int((base / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError, ZeroDivisionError):
        return None


def affinity_cpus() -> int:
    """CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def physical_cores() -> int:
    """Cores of the machine, hyper-threads counted once; read from Linux's topology, else all logical ones."""
    cores = set()
    for topology in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology"):
        try:
            package = (topology / "physical_package_id").read_text()
            cores.add((package, (topology / "core_id").read_text()))
        except OSError:
            continue
    return len(cores) or os.cpu_count() or 1


def default_threads() -> int:
    """Threads for an engine when nobody says how many."""
    quota = cgroup_cpus()
    limits = [physical_cores(), affinity_cpus()] + ([math.ceil(quota)] if quota else [])
    return max(1, min(limits))
