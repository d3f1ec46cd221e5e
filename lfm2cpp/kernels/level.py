"""Which instruction set the kernels are compiled for. Knows nothing of Numba, so a warm start need not import it.

The host's features come from LLVM; NUMBA_CPU_NAME and NUMBA_CPU_FEATURES replace them as they do in Numba, except that
a CPU named by hand has only what its name promises, never what this machine happens to have. LFM2CPP_SIMD picks a
level by name among those the features allow.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
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

    @property
    def has_matrices(self) -> bool:
        """Whether it multiplies whole matrices (AMX)."""
        return not set(MATRICES).isdisjoint(self.features)


_AVX512_LEVEL = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni", "fma", "f16c")
MATRICES = ("amx-tile", "amx-int8")  # features whose registers Linux has to allow

# Best first. Every level's features are checked before it is used: a missing one would abort the process.
LEVELS: tuple[Level, ...] = (
    Level("avx512-amx", 512, (*_AVX512_LEVEL, *MATRICES)),
    Level("avx512-vnni", 512, _AVX512_LEVEL),
    Level("avx-vnni", 256, ("avx2", "avxvnni", "fma", "f16c")),
    Level("avx2", 256, ("avx2", "fma", "f16c")),
    Level("neon-i8mm", 128, ("neon", "dotprod", "i8mm")),
    Level("neon-dotprod", 128, ("neon", "dotprod")),
    Level("generic", 128, ()),
)

EXTRAS = ("avx512bf16", "gfni")  # features that no level needs, but that kernels use (Target)
_AVX2 = frozenset({"avx2", "fma", "f16c"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
_AVX512_VNNI = _AVX512 | {"avx512vnni"}
_GFNI = frozenset({"gfni"})
_BOTH_VNNI = _AVX512_VNNI | {"avxvnni"}
_DOTPROD = frozenset({"neon", "dotprod"})
_I8MM = _DOTPROD | {"i8mm"}
# What a CPU named by hand promises, of the features that matter here. Of other names only the generic level is
# expected; LLVM still uses all that it knows of them.
NAMED_CPUS: dict[str, frozenset[str]] = {
    **dict.fromkeys(("haswell", "broadwell", "skylake", "x86-64-v3", "znver1", "znver2", "znver3"), _AVX2),
    **dict.fromkeys(("skylake-avx512", "x86-64-v4"), _AVX512),
    **dict.fromkeys(("cascadelake", "cooperlake"), _AVX512_VNNI),
    **dict.fromkeys(("icelake-client", "icelake-server", "tigerlake", "rocketlake"), _AVX512_VNNI | _GFNI),
    "znver4": _AVX512_VNNI | _GFNI | {"avx512bf16"},
    **dict.fromkeys(("sapphirerapids", "emeraldrapids", "graniterapids"), _BOTH_VNNI | _GFNI | set(MATRICES)),
    "znver5": _BOTH_VNNI | _GFNI | {"avx512bf16"},
    **dict.fromkeys(
        ("alderlake", "raptorlake", "meteorlake", "arrowlake", "lunarlake", "gracemont", "sierraforest"),
        _AVX2 | _GFNI | {"avxvnni"},
    ),
    **dict.fromkeys(("cortex-a76", "cortex-a78", "neoverse-n1", "apple-m1"), _DOTPROD),
    **dict.fromkeys(
        ("cortex-x3", "cortex-a715", "neoverse-v1", "neoverse-n2", "neoverse-v2", "apple-m2", "apple-m3", "apple-m4"),
        _I8MM,
    ),
}


@dataclass(frozen=True)
class CPU:
    """LLVM's name of a CPU, the features it has, and LLVM's string of what to switch on or off."""

    name: str
    features: frozenset[str]
    switches: str


@dataclass(frozen=True)
class Target:
    """What kernels are compiled for: a level, and the CPU as LLVM is told of it."""

    level: Level
    cpu_name: str
    features: frozenset[str]
    switches: str

    @property
    def key(self) -> str:
        return "|".join((self.level.name, self.cpu_name, self.switches))

    @property
    def zen(self) -> int:
        """Which of AMD's Zen cores it is, 0 for other makers'."""
        found = re.fullmatch(r"znver(\d+)", self.cpu_name)
        return int(found[1]) if found else 0

    @property
    def has_bf16_products(self) -> bool:
        """Whether products of bfloat16 are twice as fast as those of float32. On Intel's cores they are as fast."""
        return self.zen > 0 and self.level.bits == 512 and "avx512bf16" in self.features

    @property
    def has_bit_matrices(self) -> bool:
        """Whether an instruction multiplies the bits of a byte by a matrix: any shift and mask of bytes at once."""
        return "gfni" in self.features

    @property
    def has_half(self) -> bool:
        """Whether an instruction converts float16."""
        return "f16c" in self.features or is_arm64()

    @property
    def has_fma(self) -> bool:
        """Whether an instruction multiplies and adds with one rounding."""
        return "fma" in self.features or is_arm64()


def is_arm64() -> bool:
    return platform.machine().lower() in ("aarch64", "arm64")


def _cpu() -> CPU:
    """The CPU to compile for: the host, unless NUMBA_CPU_NAME or NUMBA_CPU_FEATURES say otherwise."""
    name, switches = os.environ.get("NUMBA_CPU_NAME"), os.environ.get("NUMBA_CPU_FEATURES")
    if not name and switches is None:
        return _host()
    name = name or llvm.get_host_cpu_name()
    switched = (switches or "").replace(" ", "").split(",")
    on = {switch[1:] for switch in switched if switch.startswith("+")}
    off = {switch[1:] for switch in switched if switch.startswith("-")}
    return CPU(name, NAMED_CPUS.get(name, frozenset()) - off | on, switches or "")


def _host() -> CPU:
    name = llvm.get_host_cpu_name()
    try:
        found = llvm.get_host_cpu_features()
    except RuntimeError:  # LLVM cannot tell on this system
        return CPU(name, _arm_features(name), "")
    on = {feature for feature, is_on in found.items() if is_on}
    return CPU(name, frozenset(on) | _arm_features(name), found.flatten())


def _arm_features(name: str) -> frozenset[str]:
    """What LLVM's list of an ARM host's features may leave out."""
    if not is_arm64():
        return frozenset()
    if sys.platform == "darwin":
        return NAMED_CPUS.get(name, _DOTPROD)  # every Mac has it
    if sys.platform != "linux":
        return NAMED_CPUS.get(name, frozenset())
    # Bits of the kernel's ABI: HWCAP_ASIMD, HWCAP_ASIMDDP, HWCAP2_I8MM.
    getauxval = ctypes.CDLL(None).getauxval
    getauxval.restype, getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    hwcap, hwcap2 = getauxval(16), getauxval(26)
    bits = {"neon": hwcap >> 1 & 1, "dotprod": hwcap >> 20 & 1, "i8mm": hwcap2 >> 13 & 1}
    return frozenset(feature for feature, is_on in bits.items() if is_on)


@lru_cache(maxsize=1)
def may_use_matrices() -> bool:
    """Ask Linux to let this process use AMX's registers, 8 KiB that are saved of every thread that does."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return False
    syscall = ctypes.CDLL(None).syscall
    syscall.restype, syscall.argtypes = ctypes.c_long, [ctypes.c_long] * 3
    arch_prctl, request, tile_data = 158, 0x1023, 18  # a system call, ARCH_REQ_XCOMP_PERM and XFEATURE_XTILEDATA
    return syscall(arch_prctl, request, tile_data) == 0


def levels_of(features: frozenset[str]) -> list[Level]:
    """The levels that a CPU's features allow, best first."""
    return [level for level in LEVELS if features.issuperset(level.features)]


def is_allowed(level: Level) -> bool:
    """Whether this process may use a level of its CPU. Linux is asked only for one that needs it to be."""
    return not level.has_matrices or may_use_matrices()


@lru_cache(maxsize=1)
def target() -> Target:
    """The level in use. UsageError when LFM2CPP_SIMD names one that this CPU does not have."""
    cpu = _cpu()
    usable, wanted = levels_of(cpu.features), os.environ.get("LFM2CPP_SIMD")
    for level in usable:
        if (not wanted or level.name == wanted) and is_allowed(level):
            # Said once more, because not every list of LLVM's tells all.
            switches = [cpu.switches, *("+" + feature for feature in level.features)]
            return Target(level, cpu.name, cpu.features, ",".join(filter(None, switches)))
    names = ", ".join(level.name for level in usable if is_allowed(level))
    raise UsageError(f"LFM2CPP_SIMD={wanted!r} is not available on this CPU ({cpu.name}); choose one of: {names}")
