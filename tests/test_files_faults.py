"""Atomic output on a failing disk and with failing work: the target stays, nothing else is left (C5 to C12)."""

from __future__ import annotations

import errno
import gc
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from output_room import assert_untouched, raiser, room, write

import lfm2cpp.files as files
from lfm2cpp.errors import ModelFormatError, OutputError
from lfm2cpp.files import atomic_output
from lfm2cpp.ggml import GGMLType
from lfm2cpp.gguf import TensorToWrite, Value, gguf_size, read_gguf, write_gguf
from lfm2cpp.gguf.writer import encode_header

__all__ = ["room"]  # the fixture


def model_parts() -> tuple[dict[str, Value], list[TensorToWrite]]:
    metadata = {"general.architecture": Value.string("lfm2"), "n": Value.u32(7)}
    shapes = [(5,), (3, 4), (8,), (1,)]
    tensors = [
        TensorToWrite(
            f"t{i}", s, GGMLType.F32, lambda i=i, s=s: [bytes([i + 1]) * (4 * s[0] * (s[1] if len(s) > 1 else 1))]
        )
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
    code = (
        "import sys; from lfm2cpp.files import atomic_output\n"
        "m = atomic_output(sys.argv[1]); m.__enter__(); keep = [m]; keep.append(keep)"
    )
    subprocess.run([sys.executable, "-c", code, room / "new.bin"], check=True)
    assert_untouched(room)


def test_a_target_that_appears_meanwhile_is_not_replaced(room: Path) -> None:
    with (
        pytest.raises(OutputError, match="appeared while it was being written"),
        atomic_output(room / "new.bin") as out,
    ):
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
