"""Atomic output: whatever goes wrong, the target is the old file or the complete new one, and nothing else is left.

The ids (C1, C2, ...) are those of the project's case list. Faults are injected at the system calls; killing and
signals are in test_files_signals.py.
"""

from __future__ import annotations

import errno
import gc
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from gguf_builder import RawGGUF

import lfm2cpp.files as files
from lfm2cpp.errors import LFM2Error, ModelFormatError, OutputError, UsageError
from lfm2cpp.files import atomic_output, check_destination
from lfm2cpp.ggml import GGMLType
from lfm2cpp.gguf import TensorToWrite, Value, gguf_size, read_gguf, write_gguf
from lfm2cpp.gguf.writer import encode_header


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """A directory that holds one old file, `old.bin`."""
    (tmp_path / "old.bin").write_bytes(b"old")
    return tmp_path


def assert_untouched(room: Path) -> None:
    assert [p.name for p in room.iterdir()] == ["old.bin"]
    assert (room / "old.bin").read_bytes() == b"old"


def write(path: Path | str, data: bytes = b"new", **options: object) -> None:
    with atomic_output(path, **options) as out:  # type: ignore[arg-type]
        out.write(data)


# --- what works


@pytest.mark.parametrize("size", [None, 3])
def test_a_new_file(room: Path, size: int | None) -> None:
    write(room / "new.bin", size=size)
    assert (room / "new.bin").read_bytes() == b"new"
    assert len(list(room.iterdir())) == 2


def test_c3_an_old_file_is_replaced_only_with_force_and_only_at_the_end(room: Path) -> None:
    target = room / "old.bin"
    with pytest.raises(OutputError, match="old.bin: exists already; use --force to replace it"):
        write(target)
    assert_untouched(room)
    with atomic_output(target, force=True) as out:
        out.write(b"new")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new" and len(list(room.iterdir())) == 1


def test_skip_and_write_at(room: Path) -> None:
    with atomic_output(room / "new.bin", size=9) as out:
        out.skip(4)
        out.write(b"tail")
        out.write_at(0, b"head")
        out.write(b"!")
    assert (room / "new.bin").read_bytes() == b"headtail!"


def test_many_chunks(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "WRITE_CHUNK", 7)
    data = bytes(range(256)) * 3
    write(room / "new.bin", data, size=len(data))
    assert (room / "new.bin").read_bytes() == data


def test_a_link_keeps_pointing_at_the_replaced_file(room: Path) -> None:
    (room / "link").symlink_to("old.bin")
    write(room / "link", force=True)
    assert (room / "link").is_symlink() and (room / "old.bin").read_bytes() == b"new"


def test_the_longest_name(room: Path) -> None:
    for name in ("n" * 255, "\u00e9" * 127):
        write(room / name)
        assert (room / name).read_bytes() == b"new"
    with pytest.raises(OutputError, match="longer than 255 bytes|File name too long"):
        write(room / ("n" * 256))


def test_c16_devnull_is_allowed_and_stdout_is_not(room: Path) -> None:
    write(os.devnull, size=3)
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    with pytest.raises(UsageError, match="'-' is not supported as output"):
        write("-")
    os.mkfifo(room / "fifo")
    with pytest.raises(UsageError, match="fifo: is not a regular file"):
        write(room / "fifo", force=True)
    assert not list(room.glob(".*"))


@pytest.mark.parametrize("umask", [0o077, 0o022, 0o002])
def test_c17_mode_follows_the_umask(room: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write(room / "new.bin")
    finally:
        os.umask(before)
    assert stat.S_IMODE((room / "new.bin").stat().st_mode) == 0o666 & ~umask


def test_c17_setgid_directory_passes_its_group_on(room: Path) -> None:
    room.chmod(0o2755)
    write(room / "new.bin")
    assert (room / "new.bin").stat().st_gid == room.stat().st_gid


# --- C1, C2, C4: refused before the work


def fail_if_run() -> Iterator[bytes]:
    pytest.fail("the work began")
    yield b""


DESTINATIONS: dict[str, tuple[str, str]] = {
    "no-parent": ("missing/new.bin", "missing does not exist; create it first"),
    "parent-is-a-file": ("old.bin/new.bin", "old.bin is not a directory"),
    "directory": ("dir", "is a directory; name a file in it"),
    "trailing-slash": ("new/", "is a directory; name a file in it"),
    "link-loop": ("loop", "loop"),
    "zero-byte": ("a\0b", "is not a file name"),
}


@pytest.mark.parametrize("case", DESTINATIONS)
def test_c1_bad_destination(case: str, room: Path) -> None:
    (room / "dir").mkdir()
    (room / "loop").symlink_to("loop")
    before = sorted(room.iterdir())
    name, message = DESTINATIONS[case]
    tensors = [TensorToWrite("t", (8,), GGMLType.F32, fail_if_run)]
    with pytest.raises(LFM2Error, match=message):
        write_gguf(f"{room}/{name}", {}, tensors)
    assert sorted(room.iterdir()) == before


def test_c1_parent_not_writable(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.os, "access", lambda *args: False)  # root may write anywhere
    with pytest.raises(OutputError, match="is not writable"):
        write(room / "new.bin")
    assert_untouched(room)


def test_c1_read_only_file_system(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = os.open

    def read_only(path: object, flags: int, *args: object) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real_open(path, flags, *args)  # type: ignore[arg-type, call-overload]

    monkeypatch.setattr(files.os, "open", read_only)
    with pytest.raises(OutputError, match="new.bin: cannot be written: Read-only file system"):
        write(room / "new.bin")
    assert_untouched(room)


@pytest.mark.parametrize("alias", ["same", "symlink", "hardlink", "relative"])
def test_c2_output_is_the_input(alias: str, room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(room)
    source = room / "old.bin"
    output = {"same": source, "symlink": room / "s", "hardlink": room / "h", "relative": Path("../", room.name, "old.bin")}[alias]
    if alias == "symlink":
        output.symlink_to(source)
    if alias == "hardlink":
        output.hardlink_to(source)
    for force in (False, True):
        with pytest.raises(UsageError, match="is the input itself"):
            write(output, force=force, inputs=[room / "no such input", source])
    assert source.read_bytes() == b"old"


def test_c4_no_space_is_known_before_the_work(room: Path) -> None:
    with pytest.raises(OutputError, match=r"needs 1020\d*\.\d TB of disk space, but only .* are free"):
        write(room / "new.bin", size=10**15)
    assert_untouched(room)
    with pytest.raises(OutputError, match="of disk space"):
        check_destination(room / "new.bin", size=10**15)


def test_c4_reserving_fails_at_once(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.os, "posix_fallocate", raiser(errno.ENOSPC))
    with pytest.raises(OutputError, match="No space left on device; free some space"), atomic_output(room / "x", size=3):
        pytest.fail("the work began")
    assert_untouched(room)


def test_a_file_system_that_cannot_reserve_is_used_all_the_same(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.os, "posix_fallocate", raiser(errno.EOPNOTSUPP))
    write(room / "new.bin", size=3)
    assert (room / "new.bin").read_bytes() == b"new"


def test_a_wrong_size_is_not_kept(room: Path) -> None:
    with pytest.raises(OutputError, match="3 bytes were written where 4 were planned"):
        write(room / "new.bin", size=4)
    assert_untouched(room)


# --- C5, C6, C7: failing system calls


def raiser(number: int) -> Callable[..., None]:
    def fail(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def model_parts() -> tuple[dict[str, Value], list[TensorToWrite]]:
    metadata = {"general.architecture": Value.string("lfm2"), "n": Value.u32(7)}
    shapes = [(5,), (3, 4), (8,), (1,)]
    tensors = [
        TensorToWrite(f"t{i}", s, GGMLType.F32, lambda i=i, s=s: [bytes([i + 1]) * (4 * s[0] * (s[1] if len(s) > 1 else 1))])
        for i, s in enumerate(shapes)
    ]
    return metadata, tensors


def boundaries() -> list[int]:
    """Every place where a part of the file begins or ends, and a byte to either side."""
    metadata, tensors = model_parts()
    places = [0, len(encode_header(metadata, tensors))]
    for t in tensors:
        places += [places[-1] + t.nbytes, places[-1] + -(-t.nbytes // 32) * 32]
    assert places[-1] == gguf_size(metadata, tensors)
    return sorted({n for place in places for n in (place - 1, place, place + 1) if 0 <= n < places[-1]})


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG], ids=errno.errorcode.get)
@pytest.mark.parametrize("budget", boundaries())
def test_c5_c6_failure_after_any_number_of_bytes(
    number: int, budget: int, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk takes `budget` bytes (in a short write at last) and then fails."""
    left = [budget]
    real_write = os.write

    def failing_write(fd: int, data: memoryview) -> int:
        if left[0] == 0:
            raise OSError(number, os.strerror(number))
        n = real_write(fd, data[: left[0]])
        left[0] -= n
        return n

    monkeypatch.setattr(files.os, "write", failing_write)
    metadata, tensors = model_parts()
    with pytest.raises(OutputError) as failed:
        write_gguf(room / "old.bin", metadata, tensors, force=True)
    assert str(failed.value).startswith(f"{room}/old.bin: cannot be written: {os.strerror(number)}")
    assert_untouched(room)


@pytest.mark.parametrize("call", ["fsync", "close", "replace", "posix_fallocate", "lseek"])
def test_c6_failure_of_any_call(call: str, room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_close = os.close

    def failing_close(fd: int) -> None:
        real_close(fd)
        if armed:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    armed = False
    monkeypatch.setattr(files.os, call, failing_close if call == "close" else raiser(errno.EIO))
    with pytest.raises(OutputError, match="old.bin: cannot be written: Input/output error"):
        with atomic_output(room / "old.bin", size=6, force=True) as out:
            armed = True
            out.skip(3)
            out.write(b"new")
    monkeypatch.undo()
    assert_untouched(room)


def test_c6_failing_sync_of_the_directory_is_told(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_fsync = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real_fsync(fd)

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(OutputError, match="is complete, but its directory cannot be synced"):
        write(room / "new.bin")
    assert sorted(p.name for p in room.iterdir()) == ["new.bin", "old.bin"]


def test_c7_short_writes_are_continued(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write = os.write
    monkeypatch.setattr(files.os, "write", lambda fd, data: real_write(fd, data[:3]))
    metadata, tensors = model_parts()
    write_gguf(room / "new.gguf", metadata, tensors)
    with read_gguf(room / "new.gguf") as g:
        assert [g.data(f"t{i}")[-1] for i in range(4)] == [1, 2, 3, 4]


def test_c7_a_write_of_nothing_is_an_error(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.os, "write", lambda fd, data: 0)
    with pytest.raises(OutputError, match="nothing was written"):
        write(room / "new.bin")
    assert_untouched(room)


def test_c5_file_size_limit(room: Path) -> None:
    """RLIMIT_FSIZE, as set by `ulimit -f`."""
    code = (
        "import sys, resource, signal; from lfm2cpp.files import atomic_output\n"
        "from lfm2cpp.errors import OutputError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "try:\n"
        "    with atomic_output(sys.argv[1], size=eval(sys.argv[2]), force=True) as out:\n"
        "        for _ in range(32): out.write(bytes(1 << 16))\n"
        "except OutputError as error: sys.exit(str(error))"
    )
    for size in ("1 << 21", "None"):
        run = subprocess.run([sys.executable, "-c", code, room / "old.bin", size], capture_output=True, text=True)
        assert run.returncode == 1
        assert run.stderr.startswith(f"{room}/old.bin: cannot be written: File too large; ")
        assert_untouched(room)


# --- other failures


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, MemoryError, GeneratorExit])
def test_c11_c12_any_exception_in_the_work(error: type[BaseException], room: Path) -> None:
    with pytest.raises(error), atomic_output(room / "old.bin", force=True) as out:
        out.write(b"new")
        raise error
    assert_untouched(room)


def test_c12_real_lack_of_memory(room: Path) -> None:
    code = (
        "import sys, resource; from lfm2cpp.files import atomic_output\n"
        "try:\n"
        "    with atomic_output(sys.argv[1], force=True) as out:\n"
        "        resource.setrlimit(resource.RLIMIT_AS, (1 << 28, 1 << 28))\n"
        "        out.write(bytes(1 << 30))\n"
        "except MemoryError: sys.exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, room / "old.bin"]).returncode == 9
    assert_untouched(room)


def test_an_abandoned_output_is_cleaned(room: Path) -> None:
    """A context that was entered and then lost, as by Ctrl-C between two instructions."""
    manager = atomic_output(room / "old.bin", force=True)
    manager.__enter__().write(b"new")
    assert len(list(room.iterdir())) == 2
    del manager
    gc.collect()
    assert_untouched(room)


def test_an_output_still_open_at_exit_is_cleaned(room: Path) -> None:
    code = "import sys; from lfm2cpp.files import atomic_output as a; m = a(sys.argv[1]); m.__enter__(); keep = [m]; keep.append(keep)"
    subprocess.run([sys.executable, "-c", code, room / "new.bin"], check=True)
    assert_untouched(room)


def test_a_target_that_appears_meanwhile_is_not_replaced(room: Path) -> None:
    with pytest.raises(OutputError, match="appeared while it was being written"), atomic_output(room / "new.bin") as out:
        out.write(b"new")
        (room / "new.bin").write_bytes(b"other")
    assert (room / "new.bin").read_bytes() == b"other" and len(list(room.iterdir())) == 2


def test_a_check_that_refuses(room: Path) -> None:
    def refuse(partial: Path) -> None:
        assert partial.read_bytes() == b"new" and partial.parent == room
        raise ModelFormatError("no good")

    with pytest.raises(ModelFormatError, match="no good"):
        write(room / "old.bin", force=True, check=refuse)
    assert_untouched(room)


def test_no_descriptor_leaks(room: Path) -> None:
    def open_descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = open_descriptors()
    for _ in range(5):
        write(room / "new.bin", force=True)
        with pytest.raises(RuntimeError), atomic_output(room / "new.bin", force=True):
            raise RuntimeError
        with pytest.raises(ModelFormatError):
            read_gguf(room / "new.bin")
    assert open_descriptors() == before


# --- C13, C14: other writers, dead or alive


def test_c13_a_second_writer_is_refused(room: Path) -> None:
    with atomic_output(room / "new.bin") as first:
        for force in (False, True):
            with pytest.raises(OutputError, match="new.bin: in use: another process is writing .new.bin"):
                write(room / "new.bin", b"second", force=force)
        write(room / "other.bin")
        first.write(b"first")
    assert (room / "new.bin").read_bytes() == b"first"
    assert sorted(p.name for p in room.iterdir()) == ["new.bin", "old.bin", "other.bin"]


def test_c13_many_writers_at_once(room: Path) -> None:
    """Of 8 threads that start together and overlap, exactly one writes; the others are told."""
    barrier, done, results = threading.Barrier(8), threading.Barrier(8), []

    def attempt(i: int) -> None:
        barrier.wait()
        try:
            with atomic_output(room / "new.bin") as out:
                done.wait()
                out.write(bytes([i]) * 1000)
            results.append("wrote")
        except OutputError as error:
            results.append(str(error).split(": ")[1])
            done.wait()

    threads = [threading.Thread(target=attempt, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(results) == ["in use"] * 7 + ["wrote"]
    assert len(set((room / "new.bin").read_bytes())) == 1
    assert sorted(p.name for p in room.iterdir()) == ["new.bin", "old.bin"]


def test_c14_what_a_dead_writer_left_is_removed_with_a_note(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stale = room / ".new.bin.0123456789abcdef.partial"
    stale.write_bytes(b"half")
    kept = [room / ".new.bin.partial", room / ".new.bin.backup.partial", room / ".other.bin.0123456789abcdef.partial"]
    for path in kept:
        path.write_bytes(b"not ours")
    write(room / "new.bin")
    assert capsys.readouterr().err == f"note: removed {stale}, left by a writer that was killed\n"
    assert sorted(room.iterdir()) == sorted([room / "old.bin", room / "new.bin", *kept])


def test_c14_a_link_named_like_a_partial_file_is_not_followed(room: Path) -> None:
    (room / ".new.bin.0123456789abcdef.partial").symlink_to("old.bin")
    with pytest.raises(OutputError, match="in use"):
        write(room / "new.bin")
    assert (room / "old.bin").read_bytes() == b"old"


def test_without_locks_a_partial_file_counts_as_in_use(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert files.fcntl is not None
    monkeypatch.setattr(files.fcntl, "flock", raiser(errno.ENOLCK))
    write(room / "new.bin")
    (room / ".new.bin.0123456789abcdef.partial").write_bytes(b"whose?")
    with pytest.raises(OutputError, match="in use"):
        write(room / "new.bin", force=True)
    assert (room / "new.bin").read_bytes() == b"new"


# --- C19, C20: the same bytes in every environment


def test_c19_c20_bytes_do_not_depend_on_the_environment(room: Path) -> None:
    (room / "in.gguf").write_bytes(RawGGUF().encode())
    code = (
        "import sys; from lfm2cpp.gguf import *\n"
        "g = read_gguf(sys.argv[1])\n"
        "ts = [TensorToWrite(i.name, i.shape, i.ggml_type, lambda n=n: [g.data(n)]) for n, i in g.tensors.items()]\n"
        "write_gguf(sys.argv[2], {**g.metadata, 'x': Value.f32(0.1), 'y': Value.strings(['\u00e9'])}, ts)"
    )
    environments = [
        {}, {"TZ": "Asia/Kathmandu"}, {"LC_ALL": "de_DE.UTF-8"}, {"LC_ALL": "C"}, {"PYTHONHASHSEED": "1"}, {"PYTHONUTF8": "0"},
    ]  # fmt: skip
    results = set()
    for i, changes in enumerate(environments):
        target = room / f"{i}.gguf"
        env = {**os.environ, "PYTHONHASHSEED": "0", **changes}
        subprocess.run([sys.executable, "-c", code, room / "in.gguf", target], check=True, env=env)
        results.add(target.read_bytes())
    assert len(results) == 1

