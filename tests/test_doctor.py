"""doctor tells what is chosen and what looks wrong; warmup leaves nothing to compile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lfm2cpp.benchmark.kernel_names import all_kernels, file_kernels, type_kernels
from lfm2cpp.benchmark.limits import KERNELS as PROBES
from lfm2cpp.benchmark.machine import describe_machine, folder_is_writable, in_range
from lfm2cpp.benchmark.random_model import write_random_model
from lfm2cpp.benchmark.shapes import find_shape
from lfm2cpp.cli.doctor import describe, find_warnings
from lfm2cpp.engine.engine import Engine
from lfm2cpp.engine.memory import KV_TYPES
from lfm2cpp.ggml import GGMLType
from lfm2cpp.kernels.cache import KernelCache
from lfm2cpp.kernels.level import LEVELS, target

ROOT = Path(__file__).resolve().parents[1]
TINY = "350M,n_embd=256,n_layer=3,attention=1,n_ff=512,n_vocab=1024"


def lfm2cpp(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lfm2cpp", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **env})


def facts_of(*args: str, **env: str) -> dict[str, Any]:
    done = lfm2cpp("doctor", "--quick", "--json", *args, **env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_facts() -> None:
    facts = facts_of()
    assert facts["cpu"]["level"] == target().level.name
    assert facts["cpu"]["level"] in facts["cpu"]["usable_levels"] and "generic" in facts["cpu"]["usable_levels"]
    assert facts["cpu"]["name"] and facts["limits"] == []
    threads = facts["threads"]
    assert 1 <= threads["chosen"] <= min(threads["physical"], threads["affinity"])
    assert 0 < facts["memory"]["available"] <= facts["memory"]["total"]
    cache = facts["kernel_cache"]
    assert cache["folder"] == str(KernelCache().folder)
    assert 0 <= cache["cached"] == cache["kernels"] - len(cache["missing"])
    assert set(facts["versions"]) >= {"numpy", "numba", "llvmlite"}
    for name in ("numpy", "numba", "llvmlite"):
        assert facts["versions"][name]["in_range"] is True, facts["versions"][name]


def test_text_says_the_same() -> None:
    done = lfm2cpp("doctor", "--quick")
    assert done.returncode == 0 and done.stderr == ""
    words = ("CPU", "SIMD level", target().level.name, "threads", "memory", "kernel cache", "numba", "not measured")
    for text in words:
        assert text in done.stdout


def test_level_that_was_asked_for() -> None:
    facts = facts_of(LFM2CPP_SIMD="generic")
    assert facts["cpu"]["level"] == "generic" and facts["cpu"]["LFM2CPP_SIMD"] == "generic"
    if len(facts["cpu"]["usable_levels"]) > 1:
        assert any("generic" in warning for warning in facts["warnings"])
    refused = lfm2cpp("doctor", "--quick", LFM2CPP_SIMD="mmx")
    assert refused.returncode == 2 and "mmx" in refused.stderr and "Traceback" not in refused.stderr


def test_quick_does_not_import_numba() -> None:
    code = (
        "import sys; from lfm2cpp.cli import main\n"
        "sys.argv = ['lfm2cpp', 'doctor', '--quick']\n"
        "try: main()\n"
        "except SystemExit as e: assert not e.code\n"
        "assert 'numba' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(("version", "inside"), [
    ("1.25.9", False), ("1.26", True), ("1.26.4", True), ("2.0.0rc1", True), ("2.4.6", True), ("2.5", False),
    ("3", False), ("10.0", False),
])  # fmt: skip
def test_range_of_versions(version: str, inside: bool) -> None:
    assert in_range(version, "1.26", "2.4") is inside


def healthy() -> dict[str, Any]:
    facts = describe_machine()
    facts["cpu"].update(level="avx2", usable_levels=["avx2", "generic"], LFM2CPP_SIMD=None)
    facts["kernel_cache"]["writable"] = True
    facts["threads"]["cgroup_quota"] = None
    for entry in facts["versions"].values():
        if "tested" in entry:
            entry["in_range"] = True
    facts["limits"] = []
    return facts


def test_a_healthy_machine_has_no_warnings() -> None:
    facts = healthy()
    assert find_warnings(facts) == []
    facts["warnings"] = []
    assert describe(facts)[-1] == "Nothing looks wrong."


@pytest.mark.parametrize(("change", "words"), [
    (lambda f: f["versions"]["numpy"].update(version="9.9", in_range=False), ["numpy 9.9", "tested range"]),
    (lambda f: f["versions"]["numba"].update(version=None, in_range=False), ["numba is not installed"]),
    (lambda f: f["kernel_cache"].update(writable=False), ["LFM2CPP_CACHE_DIR"]),
    (lambda f: f["cpu"].update(level="generic", usable_levels=["generic"]), ["slow"]),
    (lambda f: f["cpu"].update(level="generic"), ["LFM2CPP_SIMD picks generic", "avx2"]),
    (lambda f: f["threads"].update(cgroup_quota=0.5), ["0.5"]),
])  # fmt: skip
def test_what_looks_wrong(change: Any, words: list[str]) -> None:
    facts = healthy()
    change(facts)
    (warning,) = find_warnings(facts)
    assert all(word in warning for word in words)


def test_writable_folders(tmp_path: Path) -> None:
    assert folder_is_writable(tmp_path / "to" / "be" / "made")
    (tmp_path / "file").write_text("")
    assert not folder_is_writable(tmp_path / "file" / "below")
    assert not folder_is_writable(Path("/proc/lfm2cpp"))


# --- kernel names


@pytest.mark.parametrize("file_type", ["Q4_0", "F16"])
@pytest.mark.parametrize("kv_type", sorted(KV_TYPES))
def test_names_are_those_that_an_engine_loads(tmp_path: Path, file_type: str, kv_type: str) -> None:
    path = tmp_path / "m.gguf"
    write_random_model(path, find_shape(TINY), file_type)
    names = set(file_kernels(path, kv_type))
    with Engine(path, n_ctx=64, n_threads=1, kv_type=kv_type) as engine:
        assert {op.kernel for op in engine.plan.ops} <= names
    assert names <= set(all_kernels(KV_TYPES))
    base = GGMLType[file_type]
    assert set(type_kernels(base, kv_type)) <= set(all_kernels(KV_TYPES))


def test_every_level_has_a_name_of_its_own() -> None:
    assert len({level.name for level in LEVELS}) == len(LEVELS)


# --- warmup


def warmup_of_probes(cache: Path) -> subprocess.CompletedProcess[str]:
    """The command on kernels that compile in two seconds instead of forty."""
    code = (
        "import lfm2cpp.cli.warmup as command; from lfm2cpp.benchmark.limits import KERNELS\n"
        "command._needed = lambda model, kv_type: list(KERNELS)\n"
        "command.warmup()"
    )
    env = {**os.environ, "LFM2CPP_CACHE_DIR": str(cache)}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=env)


def test_warmup_compiles_once_and_says_what(tmp_path: Path) -> None:
    first = warmup_of_probes(tmp_path / "cache")
    assert first.returncode == 0, first.stderr
    names = [name.removeprefix("lfm2cpp.kernels.") for name in PROBES]
    assert first.stderr.splitlines() == [f"compiling {i + 1}/{len(names)}: {name}" for i, name in enumerate(names)]
    assert f"{len(names)} kernels ready" in first.stdout and f"{len(names)} compiled" in first.stdout
    again = warmup_of_probes(tmp_path / "cache")
    assert again.returncode == 0 and again.stderr == ""
    assert " 0 compiled" in again.stdout and f"{len(names)} were there" in again.stdout


@pytest.mark.slow
def test_after_warmup_a_model_starts_without_compiling(tmp_path: Path) -> None:
    path, cache = tmp_path / "m.gguf", tmp_path / "cache"
    write_random_model(path, find_shape(TINY), "Q8_0")
    first = lfm2cpp("warmup", "-m", str(path), LFM2CPP_CACHE_DIR=str(cache))
    assert first.returncode == 0, first.stderr
    bench = lfm2cpp("bench", "-m", str(path), "-p", "2", "-n", "1", "-r", "1", LFM2CPP_CACHE_DIR=str(cache))
    assert bench.returncode == 0 and "compil" not in bench.stderr


def test_warmup_that_cannot_keep_anything(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "m.gguf"
    write_random_model(path, find_shape(TINY), "F32")
    done = lfm2cpp("warmup", "-m", str(path), LFM2CPP_CACHE_DIR=str(tmp_path / "file"))
    assert done.returncode == 1 and "LFM2CPP_CACHE_DIR" in done.stderr and "compiling" not in done.stderr


def test_warmup_refuses(tmp_path: Path) -> None:
    assert lfm2cpp("warmup", "-m", str(tmp_path / "no.gguf")).returncode == 1
    assert lfm2cpp("warmup", "--kv-type", "q3").returncode == 2
