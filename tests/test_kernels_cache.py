"""The kernel cache and the places it may live in: cases F1 to F6, F9 and F11, each in processes of their own."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lfm2cpp.kernels import cache as cache_module
from lfm2cpp.kernels.cache import MAGIC, Compiled, KernelCache

ROOT = Path(__file__).resolve().parents[1]
KERNEL = "lfm2cpp.kernels.ops:add"  # quick to compile
IS_ROOT = os.getuid() == 0

# Adds two rows with KERNEL; prints the sum, what had to be compiled, whether Numba was needed, how many warnings came.
SCRIPT = """
import sys, warnings
sys.path.insert(0, {root!r})
{before}
import numpy as np
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from lfm2cpp.kernels.library import library
    for _ in range(2):
        kernel = library().load([{kernel!r}])[{kernel!r}]
    library().load(["lfm2cpp.kernels.ops:quantize_rows"]) if {twice} else None
a, b, out, count = np.float32([1, 2, 3]), np.float32([10, 20, 30]), np.zeros(3, np.float32), np.ones(1, np.int64)
kernel(dict(a=a.ctypes.data, b=b.ctypes.data, n=3, out=out.ctypes.data, count=count.ctypes.data))
n_warnings = len([w for w in caught if "kernels" in str(w.message)])
print(out.tolist(), len(library().compiled_names), "numba" in sys.modules, n_warnings)
{after}
"""
SUM = "[11.0, 22.0, 33.0]"


def start(
    cache: Path | None, *, root: Path = ROOT, flags: tuple[str, ...] = (), before: str = "", after: str = "",
    twice: bool = False, **environment: str | None,
) -> subprocess.Popen[str]:  # fmt: skip
    script = SCRIPT.format(root=str(root), kernel=KERNEL, before=before, after=after, twice=twice)
    changed = {"LFM2CPP_CACHE_DIR": str(cache) if cache else None, "PYTHONDONTWRITEBYTECODE": "1", **environment}
    env = {k: v for k, v in {**os.environ, **changed}.items() if v is not None}
    command = [sys.executable, *flags, "-c", script]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, bool, int]:
    """(kernels compiled, whether Numba was imported, warnings about the cache); the sum must be right."""
    out, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors[-3000:]
    result, n_compiled, numba, n_warnings = out.splitlines()[-1].rsplit(" ", 3)
    assert result == SUM
    return int(n_compiled), numba == "True", int(n_warnings)


def files(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.o"))


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the kernel; to be copied, not changed."""
    cache = tmp_path_factory.mktemp("warm")
    assert finish(start(cache)) == (1, True, 0)
    return cache


@pytest.fixture
def cache(warm: Path, tmp_path: Path) -> Path:
    shutil.copytree(warm, tmp_path / "cache")
    return tmp_path / "cache"


def test_a_warm_start_neither_compiles_nor_imports_numba(cache: Path) -> None:
    assert finish(start(cache)) == (0, False, 0)


def test_files_and_folders_are_the_users_alone(warm: Path) -> None:
    [file] = files(warm)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


# F1, F2: nowhere to write to


@pytest.mark.skipif(IS_ROOT, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert finish(start(tmp_path / "cache", twice=True)) == (2, True, 1)


@pytest.mark.parametrize("place", ["/dev/null", "/proc/lfm2cpp"])
def test_a_place_where_no_folder_can_be(place: str) -> None:
    """Works, and warns once, however many kernels there are."""
    assert finish(start(Path(place), twice=True)) == (2, True, 1)


def test_a_full_disk(tmp_path: Path) -> None:
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))"
    assert finish(start(tmp_path, before=limit, twice=True)) == (2, True, 1)
    assert files(tmp_path) == [] and not list(tmp_path.rglob("*.partial"))


def test_no_home(tmp_path: Path) -> None:
    """HOME unset and a user id without a name: the folder for temporary files serves."""
    no_name = "import pwd; pwd.getpwuid = lambda uid: {}[uid]"
    where = {"HOME": None, "XDG_CACHE_HOME": None, "TMPDIR": str(tmp_path)}
    assert finish(start(None, before=no_name, **where)) == (1, True, 0)
    assert finish(start(None, before=no_name, **where)) == (0, False, 0)
    assert files(tmp_path / f"lfm2cpp-{os.getuid()}")


@pytest.mark.parametrize("home", ["", "/nonexistent/home"])
def test_a_home_that_is_not_there(home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", home)
    monkeypatch.delenv("LFM2CPP_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert cache_module.cache_root().is_absolute() and "relative" not in str(cache_module.cache_root())


def test_xdg_cache_home(tmp_path: Path) -> None:
    assert finish(start(None, XDG_CACHE_HOME=str(tmp_path))) == (1, True, 0)
    assert files(tmp_path / "lfm2cpp")


def test_a_read_only_cache_that_is_warm_is_used(cache: Path) -> None:
    for path in [*cache.rglob("*"), cache]:
        path.chmod(path.stat().st_mode & ~0o222)
    assert finish(start(cache)) == (0, False, 0)


def test_a_cache_that_is_deleted_while_it_is_used(cache: Path) -> None:
    delete = f"import shutil; shutil.rmtree({str(cache)!r})"
    assert finish(start(cache, after=delete)) == (0, False, 0)
    assert finish(start(cache)) == (1, True, 0)


@pytest.mark.parametrize("mode", [0o770, 0o777, 0o702])
def test_a_folder_that_others_may_write_to_is_refused(cache: Path, mode: int) -> None:
    files(cache)[0].parent.chmod(mode)
    assert finish(start(cache)) == (1, True, 1)


def test_a_cache_that_everybody_may_write_to_is_refused(cache: Path) -> None:
    cache.chmod(0o777)
    assert finish(start(cache)) == (1, True, 1)
    cache.chmod(0o1777)  # as /tmp: there nobody removes what others have made
    assert finish(start(cache)) == (0, False, 0)


def test_a_file_that_others_may_write_to_is_compiled_again(cache: Path) -> None:
    files(cache)[0].chmod(0o666)
    assert finish(start(cache)) == (1, True, 0)
    assert finish(start(cache)) == (0, False, 0)


def test_somebody_elses_files_are_refused_and_roots_are_not(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An administrator may have warmed a cache up for everybody; any other user may not."""
    monkeypatch.setenv("LFM2CPP_CACHE_DIR", str(cache))
    assert KernelCache().read(KERNEL) is not None
    for path in (files(cache)[0], files(cache)[0].parent):
        real = os.stat(path)
        for uid, is_ours in ((0, True), (4321, False)):
            fields = list(real)
            fields[4] = uid  # st_uid
            assert cache_module._is_ours(os.stat_result(fields)) == is_ours
    if IS_ROOT:
        os.chown(files(cache)[0], 4321, 4321)
        assert KernelCache().read(KERNEL) is None


# F3: damage


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    return data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]


DAMAGES: list[Callable[[bytes], bytes]] = [
    cut,
    flip,
    lambda data: b"",
    lambda data: b"garbage" * 1000,
    lambda data: MAGIC,
    lambda data: MAGIC + b"\n\n",
    lambda data: data.replace(b"kernel-2", b"kernel-1", 1),
    lambda data: data + b"x",
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_counts_as_not_there(cache: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable) -> None:
    monkeypatch.setenv("LFM2CPP_CACHE_DIR", str(cache))
    [file] = files(cache)
    assert KernelCache().read(KERNEL) is not None
    file.write_bytes(damage(file.read_bytes()))
    assert KernelCache().read(KERNEL) is None


@pytest.mark.parametrize("damage", DAMAGES[:3])
def test_a_damaged_file_is_replaced(cache: Path, damage: Callable) -> None:
    [file] = files(cache)
    file.write_bytes(damage(file.read_bytes()))
    assert finish(start(cache)) == (1, True, 0)
    assert finish(start(cache)) == (0, False, 0)


def test_a_file_under_another_name_or_key_is_not_taken(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel called with another's arguments would write anywhere."""
    monkeypatch.setenv("LFM2CPP_CACHE_DIR", str(cache))
    [file] = files(cache)
    shutil.copy(file, file.with_name("lfm2cpp.kernels.ops-rms_norm.o"))
    assert KernelCache().read("lfm2cpp.kernels.ops:rms_norm") is None
    monkeypatch.setattr(cache_module, "sources_digest", lambda: "0" * 24)
    shutil.copytree(file.parent, file.parent.with_name("0" * 24))
    assert KernelCache().read(KERNEL) is None


def test_one_warning_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LFM2CPP_CACHE_DIR", "/dev/null/cache")
    monkeypatch.setattr(KernelCache, "_warned", False)
    with pytest.warns(RuntimeWarning, match="set LFM2CPP_CACHE_DIR to a folder of your own"):
        KernelCache().write(KERNEL, Compiled("symbol", (), b""))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KernelCache().write(KERNEL, Compiled("symbol", (), b""))


# F4: many at once


def test_eight_cold_starts_together_compile_once(tmp_path: Path) -> None:
    results = [finish(process) for process in [start(tmp_path) for _ in range(8)]]
    assert sorted(n for n, _, _ in results) == [0] * 7 + [1]
    assert sum(n_warnings for _, _, n_warnings in results) == 0
    assert len(files(tmp_path)) == 1 and not list(tmp_path.rglob("*.partial"))


def test_a_killed_compiler_holds_nobody_up(tmp_path: Path) -> None:
    process = start(tmp_path, before="import os", after="")
    lock = None
    while lock is None and process.poll() is None:
        lock = next(tmp_path.rglob(".lock"), None)
    process.kill()
    process.communicate()
    assert finish(start(tmp_path))[0] in (0, 1)


# F5: another version


def test_a_changed_callee_is_compiled(cache: Path, tmp_path: Path) -> None:
    """A helper in another file than the kernel's: `add` stores through scalar.py."""
    install = tmp_path / "install"
    for package in ("lfm2cpp", "quant"):
        shutil.copytree(ROOT / package, install / package, ignore=shutil.ignore_patterns("__pycache__", "demo"))
    assert finish(start(cache, root=install)) == (0, False, 0), "the same sources elsewhere are the same kernels"
    portable = install / "lfm2cpp" / "kernels" / "ops.py"
    source = portable.read_text()
    changed = source.replace(
        "load_scalar(a + 4 * i) + load_scalar(b + 4 * i)", "load_scalar(b + 4 * i) * np.float32(1.1)"
    )
    assert changed != source
    portable.write_text(changed)
    process = start(cache, root=install)
    out, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    found = np.array(eval(out.splitlines()[-1].rsplit(" ", 3)[0]), np.float32)  # noqa: S307 - our own list of numbers
    assert np.array_equal(found, np.float32([10, 20, 30]) * np.float32(1.1))
    assert finish(start(cache)) == (0, False, 0), "the old ones are still there for the old version"


@pytest.mark.parametrize("path", ["lfm2cpp/kernels/portable.py", "lfm2cpp/kernels/simd/lanes.py", "quant/legacy.py"])
def test_every_source_counts(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("lfm2cpp/kernels", "quant"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.setattr(cache_module, "PACKAGES", tmp_path)
    digest = cache_module.sources_digest.__wrapped__
    before = digest()
    assert before == digest() == cache_module.sources_digest()
    with (tmp_path / path).open("a") as file:
        file.write("\n# a comment\n")
    assert digest() != before


@pytest.mark.parametrize("name", ["NUMBA_OPT", "NUMBA_LOOP_VECTORIZE", "NUMBA_SLP_VECTORIZE"])
def test_the_compilers_switches_count(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cache_module.sources_digest.__wrapped__()
    monkeypatch.setenv(name, "0")
    assert cache_module.sources_digest.__wrapped__() != before


def test_without_sources_nothing_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an archive nothing would tell the code of one version from that of the next."""
    monkeypatch.setattr(cache_module, "PACKAGES", tmp_path / "nowhere")
    digest = cache_module.sources_digest.__wrapped__()
    assert digest == ""
    monkeypatch.setattr(cache_module, "sources_digest", lambda: digest)
    monkeypatch.setattr(KernelCache, "_warned", False)
    monkeypatch.setenv("LFM2CPP_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.warns(RuntimeWarning, match="sources of the kernels cannot be read"):
        KernelCache().write(KERNEL, Compiled("symbol", (), b""))
    assert KernelCache().read(KERNEL) is None and files(tmp_path) == []


# F6, F11: other people's settings


@pytest.mark.parametrize(
    "environment",
    [
        {"NUMBA_DISABLE_JIT": "1", "NUMBA_ENABLE_AVX": "0", "NUMBA_NUM_THREADS": "1", "NUMBA_THREADING_LAYER": "tbb"},
        {"NUMBA_BOUNDSCHECK": "1", "NUMBA_DEBUGINFO": "1"},
    ],
)
def test_numbas_environment(tmp_path: Path, environment: dict[str, str]) -> None:
    assert finish(start(tmp_path, **environment)) == (1, True, 0)


def test_a_host_that_has_used_numba_before(tmp_path: Path) -> None:
    """With settings of its own, which it keeps."""
    before = "import numba; numba.config.ENABLE_AVX = 0; numba.config.DISABLE_JIT = 0\n"
    before += "f = numba.njit(lambda x: max(x, 2) + 1); assert f(3) == 4"
    after = "assert f(3.5) == 4.5 and numba.config.ENABLE_AVX == 0\n"
    after += "g = numba.njit(lambda x: max((x, 7))); assert g(3) == 7"
    assert finish(start(tmp_path, before=before, after=after)) == (1, True, 0)


@pytest.mark.parametrize("flags", [("-O",), ("-OO",), ("-I",), ("-s", "-E")])
def test_python_flags(cache: Path, flags: tuple[str, ...]) -> None:
    where = f"import os; os.environ['LFM2CPP_CACHE_DIR'] = {str(cache)!r}"  # -I and -E ignore only Python's variables
    assert finish(start(cache, flags=flags, before=where)) == (0, False, 0)


def test_kernels_of_versions_long_unused_are_removed(tmp_path: Path) -> None:
    """When something is compiled; what was used lately, and what is not ours by its name, stays."""
    root = tmp_path / "kernels"
    old, recent, foreign = root / ("0" * 24), root / ("1" * 24), root / "notes"
    for folder in (old, recent, foreign):
        folder.mkdir(parents=True, mode=0o700)
        (folder / "x.o").write_bytes(b"")
    long_ago = time.time() - cache_module.KEEP_SECONDS - 60
    for folder in (old, foreign):
        os.utime(folder, (long_ago, long_ago))
    for path in (tmp_path, root):
        path.chmod(0o700)
    assert finish(start(tmp_path))[0] == 1
    assert sorted(p.name for p in root.iterdir() if p not in (recent, foreign)) == [cache_module.sources_digest()]
    assert recent.exists() and foreign.exists()
    current = root / cache_module.sources_digest()
    os.utime(current, (long_ago, long_ago))
    finish(start(tmp_path))
    assert time.time() - current.stat().st_mtime < 600  # a warm start says that it is in use
