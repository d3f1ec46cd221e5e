"""Every instruction set that this machine can run or imitate: chosen rightly, free of what it lacks, and right.

The short form runs here: the vocabulary at each level, the golden logits at the commonest one. With --run-slow, or by
bench/levels.sh, all of the kernels' tests and golden logits run at each level; tests/arm64/run.sh does so for ARM.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import llvmlite.binding as llvm
import pytest

from lfm2cpp.errors import UsageError
from lfm2cpp.kernels import level

ROOT = Path(__file__).resolve().parents[1]
X86 = platform.machine().lower() in ("x86_64", "amd64")
only_x86 = pytest.mark.skipif(not X86, reason="imitates x86 CPUs")
HOST = frozenset(f for f, on in llvm.get_host_cpu_features().items() if on) if X86 else frozenset()
# CPUs that stand for the levels of x86: name for NUMBA_CPU_NAME, level, what its machine code must not contain.
WIDE, VNNI, FUSED = r"%[xyz]mm(1[6-9]|2\d|3[01])\b|%[zt]mm|%k[1-7]", r"\{?vpdpb", r"\bvfn?m(add|sub)"
BITS = "gf2p8"
AVX = r"%ymm|\bv[a-z]+[sp][sd]\b|" + WIDE
CPUS = {
    "haswell": ("avx2", f"{WIDE}|{VNNI}|{BITS}"),
    "cascadelake": ("avx512-vnni", f"{BITS}|%tmm"),
    "alderlake": ("avx-vnni", WIDE),
    "x86-64": ("generic", f"{AVX}|{VNNI}|{FUSED}|{BITS}"),
}
KERNELS = ["mul_mat:mul_mat_q8_0", "mul_mat:mul_mat_q5_K", "ops:rms_norm", "rope:store_kv_f16"]
SUITE = [f"tests/test_kernels_{name}.py" for name in ("words", "mul_mat", "ops", "attention", "sample")]
GOLDEN = ["tests/test_engine_golden.py", "tests/test_engine_laws.py"]


def run_at(cpu: str, *command: str, **environment: str) -> str:
    """stdout of a Python process that compiles for a CPU named by hand."""
    env = {**os.environ, "NUMBA_CPU_NAME": cpu, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))), **environment}
    env = {k: v for k, v in env.items() if v}
    done = subprocess.run([sys.executable, *command], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def run_tests(cpu: str, *tests: str, **environment: str) -> None:
    run_at(cpu, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", *tests, **environment)


def imitable(cpu: str) -> bool:
    wanted = dict((one.name, one.features) for one in level.LEVELS)[CPUS[cpu][0]]
    return HOST.issuperset(wanted)


def each_cpu() -> list[object]:
    marks = {
        cpu: [] if X86 and imitable(cpu) else [pytest.mark.skip(reason="this CPU cannot imitate it")] for cpu in CPUS
    }
    return [pytest.param(cpu, marks=marks[cpu]) for cpu in CPUS]


# Which level


def target(monkeypatch: pytest.MonkeyPatch, **environment: str | None) -> level.Target:
    for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "LFM2CPP_SIMD"):
        value = environment.get(name)
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
    return level.target.__wrapped__()


@pytest.mark.parametrize(
    ("name", "features", "expected"),
    [
        ("haswell", None, "avx2"),
        ("skylake-avx512", None, "avx2"),
        ("alderlake", None, "avx-vnni"),
        ("icelake-server", None, "avx512-vnni"),
        ("znver4", None, "avx512-vnni"),
        ("x86-64", None, "generic"),
        ("x86-64-v3", None, "avx2"),
        ("some-cpu-of-the-future", None, "generic"),
        ("haswell", "-fma", "generic"),
        ("haswell", "+avxvnni", "avx-vnni"),
        ("x86-64", "+avx2,+fma,+f16c", "avx2"),
        ("x86-64", "", "generic"),
        ("cortex-a72", None, "generic"),
        ("cortex-a76", None, "neon-dotprod"),
        ("neoverse-n1", None, "neon-dotprod"),
        ("neoverse-v1", None, "neon-i8mm"),
        ("cortex-a76", "+neon,+fp-armv8,+dotprod,+fullfp16", "neon-dotprod"),
        ("cortex-a76", "+i8mm", "neon-i8mm"),
        ("cortex-a76", "-dotprod", "generic"),
    ],
)
def test_a_named_cpu_has_what_its_name_promises(
    monkeypatch: pytest.MonkeyPatch, name: str, features: str | None, expected: str
) -> None:
    """And nothing of this machine's."""
    found = target(monkeypatch, NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES=features)
    assert found.level.name == expected and found.cpu_name == name
    promised = level.NAMED_CPUS.get(name, frozenset()) | frozenset(re.findall(r"\+([\w-]+)", features or ""))
    assert set(re.findall(r"\+([\w.-]+)", found.switches)) <= promised


def test_matrices_are_used_where_linux_lets_us(monkeypatch: pytest.MonkeyPatch) -> None:
    for allowed, expected in ((True, "avx512-amx"), (False, "avx512-vnni")):
        monkeypatch.setattr(level, "may_use_matrices", lambda allowed=allowed: allowed)
        assert target(monkeypatch, NUMBA_CPU_NAME="sapphirerapids").level.name == expected
    with pytest.raises(UsageError, match="'avx512-amx' is not available .* choose one of: avx512-vnni, avx-vnni"):
        target(monkeypatch, NUMBA_CPU_NAME="sapphirerapids", LFM2CPP_SIMD="avx512-amx")
    monkeypatch.setattr(level, "may_use_matrices", lambda: pytest.fail("asked for a level that needs no leave"))
    assert target(monkeypatch, NUMBA_CPU_NAME="haswell").level.name == "avx2"
    assert target(monkeypatch, NUMBA_CPU_NAME="sapphirerapids", LFM2CPP_SIMD="avx2").level.name == "avx2"


def test_which_zen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, generation in (("znver2", 2), ("znver4", 4), ("znver5", 5), ("alderlake", 0), ("neoverse-n1", 0)):
        assert target(monkeypatch, NUMBA_CPU_NAME=name).zen == generation


def test_which_cpu_has_matrices_of_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("haswell", "znver3", "cascadelake", "neoverse-v1"):
        assert not target(monkeypatch, NUMBA_CPU_NAME=name).has_bit_matrices
    for name in ("icelake-server", "alderlake", "znver4"):
        assert target(monkeypatch, NUMBA_CPU_NAME=name).has_bit_matrices
    assert target(monkeypatch, NUMBA_CPU_NAME="haswell", NUMBA_CPU_FEATURES="+gfni").has_bit_matrices


def test_features_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Numba: they are added to what the host's name promises."""
    found, name = target(monkeypatch, NUMBA_CPU_FEATURES="+avx2,+fma,+f16c"), llvm.get_host_cpu_name()
    assert found.cpu_name == name
    assert found.features == level.NAMED_CPUS.get(name, frozenset()) | {"avx2", "fma", "f16c"}


def test_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    found = target(monkeypatch)
    best = next(one for one in level.levels_of(found.features) if level.is_allowed(one))
    assert found.level == best and HOST <= found.features


def test_a_level_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    host = target(monkeypatch)
    for one in level.LEVELS:
        if host.features.issuperset(one.features) and level.is_allowed(one):
            assert target(monkeypatch, LFM2CPP_SIMD=one.name).level == one
        else:
            with pytest.raises(
                UsageError, match=f"LFM2CPP_SIMD='{one.name}' is not available on this CPU .*choose one of"
            ):
                target(monkeypatch, LFM2CPP_SIMD=one.name)
    with pytest.raises(UsageError, match="choose one of: .*generic"):
        target(monkeypatch, LFM2CPP_SIMD="mmx")


def test_each_target_has_kernels_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {target(monkeypatch, NUMBA_CPU_NAME=name).key for name in ("haswell", "skylake", "alderlake", "x86-64")}
    assert len(keys) == 4


# Machine code

ASSEMBLY = """
import sys
from lfm2cpp.kernels.compiler import assembly
for name in sys.argv[1:]:
    print(assembly("lfm2cpp.kernels." + name))
"""


@only_x86
@pytest.mark.parametrize("cpu", each_cpu())
def test_no_instruction_that_the_cpu_lacks(cpu: str) -> None:
    """In the machine code of a few kernels, compiled on a machine that has more."""
    name, forbidden = CPUS[cpu]
    code = run_at(cpu, "-c", ASSEMBLY, *KERNELS)
    found = sorted({match.group() for match in re.finditer(forbidden, code)})
    assert len(code) > 10000 and found == []
    assert not re.search(r"(?:call|movabs).*(?:fmaf|hf2|h2f|__)", code), "calls of a C runtime that may not be there"


# Results


@only_x86
@pytest.mark.parametrize("cpu", each_cpu())
def test_the_vocabulary_at_each_level(cpu: str) -> None:
    run_tests(cpu, SUITE[0])


@only_x86
@pytest.mark.skipif(not (X86 and imitable("haswell")), reason="this CPU cannot imitate it")
@pytest.mark.skipif(level.target().level.name == "avx2", reason="the whole suite runs at this level")
def test_golden_logits_with_avx2() -> None:
    run_tests("haswell", GOLDEN[0], "-k", "further and Q4_0 or decode and Q4_0")


PRODUCTS = """
import sys
from kernel_calls import normal
from test_kernels_mul_mat import product, weights
for name in sys.argv[1:]:
    for n in (1024, 4352, 5120):  # 2, 8 or 9, and 10 blocks a chain
        w, x = weights(name, 40, n), normal(72, n, seed=1)
        for n_tokens in (12, 13, 66, 72):
            print(name, n, n_tokens, product(w, x[:n_tokens]).tobytes().hex())
"""


@pytest.mark.skipif(not level.target().level.has_matrices, reason="this level multiplies no matrices")
@pytest.mark.parametrize("types", ["Q4_0 Q6_K", *(pytest.param(two, marks=pytest.mark.slow) for two in ("Q4_1 Q8_0", "Q5_0 IQ4_NL", "Q5_1 IQ4_NL", "Q4_K Q5_K"))])
def test_matrices_and_vectors_give_the_same_bits(types: str) -> None:
    with_matrices, in_vectors = (
        run_at("", "-c", PRODUCTS, *types.split(), LFM2CPP_SIMD=name) for name in ("avx512-amx", "avx512-vnni")
    )
    assert len(with_matrices) > 10000 and with_matrices == in_vectors


@pytest.mark.slow
@pytest.mark.parametrize("cpu", each_cpu() if X86 else [])
def test_everything_at_each_level(cpu: str) -> None:
    run_tests(cpu, *SUITE, *GOLDEN)


@pytest.mark.slow
@pytest.mark.parametrize("name", [one.name for one in level.LEVELS])
def test_everything_at_each_level_of_this_cpu(name: str) -> None:
    if name not in [one.name for one in level.levels_of(level.target().features) if level.is_allowed(one)]:
        pytest.skip("not a level of this CPU")
    run_tests("", *SUITE, *GOLDEN, LFM2CPP_SIMD=name)
