"""Which instruction set the kernels are compiled for. Knows nothing of Numba, so a warm start need not import it.

The host's features come from LLVM; NUMBA_CPU_NAME and NUMBA_CPU_FEATURES replace them as they do in Numba, and
LFM2CPP_SIMD picks a level by name among those the features allow.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache

import llvmlite.binding as llvm

from lfm2cpp.errors import UsageError


@dataclass(frozen=True)
class Level:
    """One instruction set: its name, the bits of a vector register, and the LLVM features it needs."""

    name: str
    bits: int
    features: tuple[str, ...]

    @property
    def lanes(self) -> int:
        """float32 lanes of a vector."""
        return self.bits // 32


# Best first. Every level's features are checked before it is used: a missing one would abort the process.
LEVELS: tuple[Level, ...] = (
    Level("avx512-vnni", 512, ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni", "fma", "f16c")),
    Level("avx-vnni", 256, ("avx2", "avxvnni", "fma", "f16c")),
    Level("avx2", 256, ("avx2", "fma", "f16c")),
    Level("neon-i8mm", 128, ("neon", "dotprod", "i8mm")),
    Level("neon-dotprod", 128, ("neon", "dotprod")),
    Level("generic", 128, ()),
)


@dataclass(frozen=True)
class Target:
    """What kernels are compiled for: a level, and the CPU name and feature string given to LLVM."""

    level: Level
    cpu_name: str
    features: frozenset[str]

    @property
    def key(self) -> str:
        return "|".join((self.level.name, self.cpu_name, ",".join(sorted(self.features))))


def _known_features(cpu_name: str) -> frozenset[str]:
    """Features of a CPU that is named by hand: only what its name promises."""
    x86_vnni = {"avx2", "fma", "f16c", "avxvnni"}
    by_name = {
        "haswell": {"avx2", "fma", "f16c"},
        "skylake": {"avx2", "fma", "f16c"},
        "znver3": {"avx2", "fma", "f16c"},
        "alderlake": x86_vnni,
        "cortex-a76": {"neon", "dotprod", "fullfp16"},
    }
    return frozenset(by_name.get(cpu_name, set()))


def host_features() -> tuple[str, frozenset[str]]:
    """(CPU name, enabled features) as Numba would compile for, without importing it."""
    name = os.environ.get("NUMBA_CPU_NAME") or ""
    features = os.environ.get("NUMBA_CPU_FEATURES")
    if features is not None:
        enabled = {f[1:] for f in features.split(",") if f.startswith("+")}
        return name or llvm.get_host_cpu_name(), frozenset(enabled | _known_features(name))
    if name and name != "host":
        return name, _known_features(name)
    host = llvm.get_host_cpu_features()
    return llvm.get_host_cpu_name(), frozenset(f for f, on in host.items() if on)


@lru_cache(maxsize=1)
def target() -> Target:
    """The level in use. UsageError when LFM2CPP_SIMD names one that this CPU does not have."""
    cpu_name, features = host_features()
    usable = [level for level in LEVELS if features.issuperset(level.features)]
    wanted = os.environ.get("LFM2CPP_SIMD")
    if not wanted:
        return Target(usable[0], cpu_name, features)
    for level in usable:
        if level.name == wanted:
            return Target(level, cpu_name, features)
    names = ", ".join(level.name for level in usable)
    raise UsageError(f"LFM2CPP_SIMD={wanted!r} is not available on this CPU ({cpu_name}); choose one of: {names}")
