"""Atomic output: whatever goes wrong, the target is the old file or the complete new one, and nothing else is left.

The ids (C1, C2, ...) are those of the project's case list. Failing system calls are in test_files_faults.py, killing
and signals in test_files_signals.py.
"""

from __future__ import annotations

import errno
import os
import random
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import pytest
from gguf_builder import RawGGUF
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from output_room import assert_untouched, raiser, room, write

import lfm2cpp.files as files
import lfm2cpp.output_file as output_file
from lfm2cpp.errors import LFM2Error, OutputError, UsageError
from lfm2cpp.files import atomic_output, check_destination
from lfm2cpp.ggml import GGMLType
from lfm2cpp.gguf import TensorToWrite, write_gguf

__all__ = ["room"]  # the fixture


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


@pytest.fixture
def small_pages() -> Iterator[list[int]]:
    """LARGE_PAGE is 64 and WRITE_CHUNK 192; the sizes of the pieces that are handed to the system."""
    calls: list[int] = []
    write_all = output_file.OutputFile._write_all

    def recorded(out: output_file.OutputFile, view: memoryview) -> None:
        calls.append(len(view))
        write_all(out, view)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output_file, "LARGE_PAGE", 64)
        patch.setattr(output_file, "WRITE_CHUNK", 192)
        patch.setattr(output_file.OutputFile, "_write_all", recorded)
        yield calls


@given(sizes=st.lists(st.integers(0, 500), max_size=20))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_system_gets_whole_pages(room: Path, small_pages: list[int], sizes: list[int]) -> None:
    """Whatever the pieces that are appended: every write ends at a border of LARGE_PAGE, but for the last."""
    small_pages.clear()
    data = random.Random(len(sizes)).randbytes(sum(sizes))
    with atomic_output(room / "new.bin", size=len(data), force=True) as out:
        for size, end in zip(sizes, accumulate(sizes), strict=True):
            out.write(data[end - size : end])
            assert out.nbytes == end
    assert (room / "new.bin").read_bytes() == data
    assert max(small_pages) <= 192
    assert all(end % 64 == 0 or end == len(data) for end in accumulate(small_pages))


@given(steps=st.lists(st.one_of(st.integers(0, 200), st.sampled_from(["skip", "at"])), max_size=20))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_skipping_and_going_back_between_writes(room: Path, small_pages: list[int], steps: list[int | str]) -> None:
    expected = bytearray(b"head")
    with atomic_output(room / "new.bin", force=True) as out:
        out.write(b"head")
        for i, step in enumerate(steps):
            if step == "at":
                expected[1:3] = bytes([i, i])
                out.write_at(1, bytes([i, i]))
            elif step == "skip":
                expected += bytes(8)
                out.skip(8)
            else:
                expected += bytes([i]) * int(step)
                out.write(bytes([i]) * int(step))
        expected += b"!"
        out.write(b"!")
    assert (room / "new.bin").read_bytes() == bytes(expected)


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
    output = {
        "same": source,
        "symlink": room / "s",
        "hardlink": room / "h",
        "relative": Path("../", room.name, "old.bin"),
    }[alias]
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
    with (
        pytest.raises(OutputError, match="No space left on device; free some space"),
        atomic_output(room / "x", size=3),
    ):
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
        {}, {"TZ": "Asia/Kathmandu"}, {"LC_ALL": "de_DE.UTF-8"}, {"LC_ALL": "C"}, {"PYTHONHASHSEED": "1"},
        {"PYTHONUTF8": "0"},
    ]  # fmt: skip
    results = set()
    for i, changes in enumerate(environments):
        target = room / f"{i}.gguf"
        env = {**os.environ, "PYTHONHASHSEED": "0", **changes}
        subprocess.run([sys.executable, "-c", code, room / "in.gguf", target], check=True, env=env)
        results.add(target.read_bytes())
    assert len(results) == 1
