"""Bad GGUF files: every one is refused with one line that says what is wrong, quickly, and nothing is left behind.

The ids (A1, A2, ...) are those of the project's case list.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf_builder import (
    ARRAY,
    BOOL,
    INT32,
    Q6_K,
    Q8_0,
    STRING,
    UINT8,
    UINT32,
    RawGGUF,
    RawTensor,
    array,
    run_cli,
    string,
    u32,
    u64,
)

from lfm2cpp.errors import ModelFormatError
from lfm2cpp.gguf import read_gguf

Mutate = Callable[[RawGGUF], object]


def header_only(n_tensors: int = 0, n_kv: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + u32(3) + u64(n_tensors) + u64(n_kv) + rest


# id -> (the whole file, a part of the message)
BYTES: dict[str, tuple[bytes, str]] = {
    "A2-empty": (b"", "it is empty"),
    "A2-3-bytes": (b"GGU", "truncated header, only 3 bytes"),
    "A2-magic-only": (b"GGUF", "truncated header"),
    "A2-23-bytes": (header_only()[:23], "truncated header"),
    "A3-safetensors": (u64(2) + b"{}", "a safetensors file; convert its directory first"),
    "A3-zip": (b"PK\x03\x04" + bytes(60), "a zip archive"),
    "A3-pickle": (b"\x80\x04\x95" + bytes(60), "a Python pickle"),
    "A3-html": (b"<!DOCTYPE html><html>Not found</html>", "a web page"),
    "A3-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "run 'git lfs pull'"),
    "A4-FUGG": (b"FUGG" + bytes(60), "'FUGG', a byte-swapped"),
    "A4-GGML": (b"lmgg" + bytes(60), "'lmgg', the GGML format"),
    "A4-ggjt": (b"tjgg" + bytes(60), "'tjgg', the GGJT format"),
    "A4-ascii-ggjt": (b"ggjt" + bytes(60), "'ggjt'"),
    "A4-unknown": (b"\x1b]2;" + bytes(60), "starts with '?]2;' (1b 5d 32 3b)"),
    "A5-version-0": (RawGGUF(version=0).encode(), "version 0 does not exist"),
    "A5-version-1": (RawGGUF(version=1).encode(), "version 1 is no longer supported"),
    "A5-version-4": (RawGGUF(version=4).encode(), "version 4 is newer"),
    "A5-swapped": (RawGGUF(version=0x03000000).encode(), "0x3000000: a big-endian file?"),
    "A6-tensors-minus-1": (RawGGUF(n_tensors=-1).encode(), "claims 18446744073709551615 tensors"),
    "A6-tensors-2^63": (RawGGUF(n_tensors=2**63).encode(), "claims 9223372036854775808 tensors"),
    "A6-tensors-2^40": (RawGGUF(n_tensors=2**40).encode(), "claims 1099511627776 tensors"),
    "A6-kv-minus-1": (RawGGUF(n_kv=-1).encode(), "claims 18446744073709551615 metadata entries"),
    "A6-kv-2^63": (RawGGUF(n_kv=2**63).encode(), "claims 9223372036854775808 metadata entries"),
    "A6-kv-2^40": (RawGGUF(n_kv=2**40).encode(), "claims 1099511627776 metadata entries"),
    "A6-tensors-65537": (RawGGUF(n_tensors=65537, trailing=bytes(65537 * 33)).encode(), "at most 65536"),
    "A6-kv-65537": (RawGGUF(n_kv=65537, trailing=bytes(65537 * 14)).encode(), "at most 65536"),
    "A7-array-2^63": (header_only(0, 1, string("a") + u32(ARRAY) + array(UINT8, 2**63, b"")), "claims 92233720368547"),
    "A7-array-2^30": (header_only(0, 1, string("a") + u32(ARRAY) + array(UINT8, 2**30, b"")), "claims 1073741824"),
    "A7-strings-2^30": (header_only(0, 1, string("a") + u32(ARRAY) + array(STRING, 2**30, b"")), "claims 1073741824"),
    "A8-string-2^64-1": (header_only(0, 1, string("a") + u32(STRING) + u64(-1) + bytes(9)),
                         "at byte 37 claims 18446744073709551615 bytes, but only 9 remain"),
    "A8-string-crosses-end": (header_only(0, 1, string("a") + u32(STRING) + u64(10) + bytes(9)),
                              "at byte 37 claims 10 bytes, but only 9 remain"),
    "A8-piece-crosses-end": (header_only(0, 1, string("a") + u32(ARRAY) + array(STRING, 2, string("x") + u64(99))),
                             "item 1 of metadata key 'a' at byte 58 claims 99 bytes, but only 0 remain"),
    "A8-key-crosses-end": (header_only(0, 1, u64(100) + bytes(20)), "metadata key 0 at byte 24 claims 100 bytes"),
    "A8-value-cut": (header_only(0, 1, string("abcde") + u32(UINT32) + b"\0"), "cut short"),
}  # fmt: skip


def add_kv(key: str | bytes, value_type: int, data: bytes) -> Mutate:
    return lambda raw: raw.kv.append((key, value_type, data))


def set_alignment(value_type: int, data: bytes) -> Mutate:
    return add_kv("general.alignment", value_type, data)


def set_tensor(**fields: object) -> Mutate:
    def mutate(raw: RawGGUF) -> None:
        for name, value in fields.items():
            setattr(raw.tensors[1], name, value)

    return mutate


def set_raw(**fields: object) -> Mutate:
    def mutate(raw: RawGGUF) -> None:
        for name, value in fields.items():
            setattr(raw, name, value)

    return mutate


# id -> (what is done to a good file, a part of the message)
MUTATIONS: dict[str, tuple[Mutate, str]] = {
    "A9-empty-key": (add_kv("", UINT32, u32(1)), "metadata key 5 at byte"),
    "A9-duplicate-key": (add_kv("some.number", UINT32, u32(1)), "'some.number' appears twice"),
    "A9-zero-in-key": (add_kv("a\0b", UINT32, u32(1)), "'a\\x00b' holds a zero byte"),
    "A9-not-utf8-key": (add_kv(b"a\xff", UINT32, u32(1)), "is not UTF-8"),
    "A9-long-key": (add_kv("k" * 65536, UINT32, u32(1)), "has 65536 bytes; at most 65535"),
    "A9-not-utf8-text": (add_kv("text", STRING, string(b"\xc3\x28")), "metadata key 'text' at byte"),
    "A10-type-13": (add_kv("odd", 13, u32(1)), "'odd' has the unknown value type 13"),
    "A10-type-2^32-1": (add_kv("odd", 2**32 - 1, u32(1)), "unknown value type 4294967295"),
    "A10-item-type-13": (add_kv("odd", ARRAY, array(13, 1, u32(1))), "unknown value type 13"),
    "A10-nested-array": (add_kv("odd", ARRAY, array(ARRAY, 1, array(INT32, 1, u32(1)))), "nested arrays"),
    "A10-bool-7": (add_kv("odd", BOOL, b"\7"), "is the bool 7"),
    "A10-bool-array": (add_kv("odd", ARRAY, array(BOOL, 2, b"\1\2")), "holds the bool 2"),
    "A11-alignment-0": (set_alignment(UINT32, u32(0)), "general.alignment is 0; expected a power of two"),
    "A11-alignment-3": (set_alignment(UINT32, u32(3)), "general.alignment is 3"),
    "A11-alignment-4": (set_alignment(UINT32, u32(4)), "general.alignment is 4"),
    "A11-alignment-48": (set_alignment(UINT32, u32(48)), "general.alignment is 48"),
    "A11-alignment-2^31": (set_alignment(UINT32, u32(2**31)), "general.alignment is 2147483648"),
    "A11-alignment-i32": (set_alignment(INT32, u32(32)), "general.alignment has type INT32, expected UINT32"),
    "A11-alignment-array": (set_alignment(ARRAY, array(UINT32, 1, u32(32))), "has type ARRAY of UINT32"),
    "A12-dims-0": (set_tensor(n_dims=0, ne=[]), "has 0 dimensions; expected 1 to 4"),
    "A12-dims-5": (set_tensor(n_dims=5, ne=[1] * 5), "has 5 dimensions"),
    "A12-dims-10^6": (set_tensor(n_dims=10**6), "has 1000000 dimensions"),
    "A13-ne-0": (set_tensor(ne=[0]), "has the shape [0]; every dimension must be from 1"),
    "A13-ne-negative": (set_tensor(ne=[-32]), "has the shape [18446744073709551584]"),
    "A13-ne-2^62": (set_tensor(ne=[2**62]), "has the shape [4611686018427387904]"),
    # 2^62+1 times 4 is 4 in 64 bits.
    "A13-product-wraps": (set_tensor(ne=[2**62 + 1, 4], nbytes=16), "every dimension must be from 1 to 2147483647"),
    # 2^64 elements are 0 in 64 bits, so the tensor after it would lie at the same place.
    "A13-product-wraps-in-range": (set_tensor(ne=[2**30, 2**30, 2**4], nbytes=16), "(overlapping the one before)"),
    "A13-product-wraps-last": (set_raw(tensors=[RawTensor("t", [2**30, 2**30, 2**4], nbytes=16)]), "bytes are missing"),
    "A14-not-whole-blocks": (set_tensor(ne=[48], type=Q8_0), "rows of 48 elements; Q8_0 stores whole blocks of 32"),
    "A14-not-whole-superblocks": (set_tensor(ne=[128], type=Q6_K), "Q6_K stores whole blocks of 256"),
    "A14-unknown-type": (set_tensor(type=1000), "unknown tensor type 1000"),
    "A14-removed-4": (set_tensor(type=4), "type 4 (Q4_2), which was removed"),
    "A14-removed-5": (set_tensor(type=5), "type 5 (Q4_3)"),
    "A14-removed-31": (set_tensor(type=31), "type 31 (Q4_0_4_4)"),
    "A14-removed-33": (set_tensor(type=33), "type 33 (Q4_0_8_8)"),
    "A14-removed-36": (set_tensor(type=36), "type 36 (IQ4_NL_4_4)"),
    "A14-removed-38": (set_tensor(type=38), "type 38 (IQ4_NL_8_8)"),
    # 2^64 - 16 bytes, which padding makes 2^64.
    "A15-pad-wraps": (set_tensor(ne=[4, 2**30 - 1, 2**30 + 1], nbytes=16), "(overlapping the one before)"),
    "A15-pad-wraps-last": (set_raw(tensors=[RawTensor("t", [4, 2**30 - 1, 2**30 + 1], nbytes=16)]), "are missing"),
    # Twice 2^63 - 64: the running sum is -128 in 64 bits.
    "A15-two-of-2^63-64": (
        set_raw(
            tensors=[RawTensor(name, [16 * 7, 32377, 524287, 1212847], nbytes=64) for name in "xy"]
            + [RawTensor("z", [40]), RawTensor("z2", [8])]
        ),
        "(overlapping the one before)",
    ),
    "A16-misaligned": (set_tensor(offset=129), "offset 129 (not a multiple of the alignment 32), expected 128"),
    "A16-overlapping": (set_tensor(offset=96), "offset 96 (overlapping the one before), expected 128"),
    "A16-gap": (set_tensor(offset=160), "offset 160 (a gap after the one before), expected 128"),
    "A16-out-of-order": (lambda raw: raw.tensors.reverse() or set_tensor(offset=0)(raw), "expected"),
    "A16-beyond-the-end": (set_tensor(offset=2**63), "offset 9223372036854775808"),
    "A16-larger-than-file": (set_tensor(ne=[2**20], nbytes=0), "bytes are missing; download it again"),
    "A17-cut-by-1": (set_raw(tensors=[RawTensor("t", [8])], cut=1), "1 bytes are missing; download it again"),
    "A17-cut-by-half": (set_raw(tensors=[RawTensor("t", [32])], cut=64), "64 bytes are missing"),
    "A17-cut-in-the-table": (lambda raw: setattr(raw, "cut", len(raw.encode()) - len(raw.header()) + 4), "cut short"),
    "A18-duplicate-name": (set_tensor(name="a.weight"), "'a.weight' appears twice"),
    "A18-64-bytes": (set_tensor(name="n" * 64), "has 64 bytes; at most 63"),
    "A18-empty": (set_tensor(name=""), "tensor 1 at byte"),
    "A18-zero-byte": (set_tensor(name="a\0b"), "'a\\x00b'"),
    "A18-not-utf8": (set_tensor(name=b"\xff"), "is not UTF-8"),
    "A28-template-10-MB": (add_kv("tokenizer.chat_template", STRING, string("x" * 10**7)), "at most 1048576"),
    "control-characters-are-escaped": (set_tensor(name="\x1b[31m", n_dims=9), "tensor '\\x1b[31m' has 9 dimensions"),
    "too-many-items": (add_kv("many", ARRAY, array(UINT8, 2**22 + 1, bytes(2**22 + 1))), "may hold 4194304 in all"),
}  # fmt: skip


def write_case(case: str, path: Path) -> str:
    """Write the bad file; the part of the message that it must give."""
    if case in BYTES:
        path.write_bytes(BYTES[case][0])
        return BYTES[case][1]
    mutate, expected = MUTATIONS[case]
    raw = RawGGUF()
    mutate(raw)
    path.write_bytes(raw.encode())
    return expected


@pytest.mark.parametrize("use_mmap", [True, False], ids=["mmap", "no-mmap"])
@pytest.mark.parametrize("case", [*BYTES, *MUTATIONS])
def test_bad_file_is_refused(case: str, use_mmap: bool, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    expected = write_case(case, path)
    start = time.process_time()
    with pytest.raises(ModelFormatError) as refused:
        read_gguf(path, use_mmap=use_mmap)
    seconds = time.process_time() - start
    message = str(refused.value)
    assert expected in message
    assert message.startswith(f"{path}: ")
    assert message.isprintable() and len(message) < 400
    assert seconds < 0.05


@pytest.mark.parametrize(
    "case", [c for c in [*BYTES, *MUTATIONS] if c.startswith(("A6", "A7", "A8", "A12", "A13", "A15"))]
)
def test_declared_sizes_are_not_allocated(case: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    write_case(case, path)
    tracemalloc.start()
    try:
        with pytest.raises(ModelFormatError):
            read_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_version_messages_differ(tmp_path: Path) -> None:
    texts = [BYTES[case][1] for case in BYTES if case.startswith("A5")]
    assert len(set(texts)) == len(texts) == 4


@pytest.mark.parametrize("n", [1, 1 << 20])
def test_a17_trailing_bytes_are_a_warning(n: int, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(RawGGUF(trailing=b"x" * n).encode())
    with read_gguf(path) as g:
        assert g.warnings == [f"{n} unused bytes after the end of the data"]


def test_a11_absent_alignment_is_32(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(RawGGUF().encode())
    with read_gguf(path) as g:
        assert g.alignment == 32


def test_a9_unusual_key_is_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(RawGGUF(kv=[("Some Key!", UINT32, u32(1))]).encode())
    with read_gguf(path) as g:
        assert g.warnings == ["1 metadata keys with unusual characters, such as 'Some Key!'"]


# --- A1: what a path can be


def make_missing(path: Path) -> None:
    pass


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(path))


def make_dangling(path: Path) -> None:
    path.symlink_to("nowhere")


PATHS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (make_missing, "cannot be opened: No such file or directory"),
    "dangling-link": (make_dangling, "cannot be opened: No such file or directory"),
    "directory": (Path.mkdir, "is a directory, expected a GGUF file"),
    "fifo": (os.mkfifo, "is a FIFO, expected a GGUF file"),
    "socket": (make_socket, "is a socket, expected a GGUF file"),
}


@pytest.mark.parametrize("case", PATHS)
def test_a1_no_regular_file(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    make, expected = PATHS[case]
    make(Path("m.gguf"))
    with pytest.raises(ModelFormatError) as refused:
        read_gguf("m.gguf")
    assert str(refused.value).startswith(f"m.gguf: {expected}")


def test_a1_device() -> None:
    with pytest.raises(ModelFormatError, match="is a character device"):
        read_gguf("/dev/zero")


def test_a1_no_permission(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(RawGGUF().encode())
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(ModelFormatError, match="cannot be opened: Permission denied"):
        read_gguf(path)


def test_a1_no_permission_by_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for root, who may read everything."""

    def refuse(*args: object) -> int:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "m.gguf"
    path.write_bytes(RawGGUF().encode())
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ModelFormatError, match="cannot be opened: Permission denied"):
        read_gguf(path)


# --- A30: a file that shrinks between two looks


@pytest.mark.parametrize("use_mmap", [True, False], ids=["mmap", "no-mmap"])
def test_a30_a_file_that_became_shorter(use_mmap: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(RawGGUF().encode())
    real_fstat = os.fstat

    class Longer:
        def __init__(self, fd: int) -> None:
            self.st_mode, self.st_size = real_fstat(fd).st_mode, real_fstat(fd).st_size + 4096

    monkeypatch.setattr(os, "fstat", Longer)
    with pytest.raises(ModelFormatError, match="m.gguf: became shorter while it was read"):
        read_gguf(path, use_mmap=use_mmap)


@pytest.mark.parametrize("use_mmap", [True, False], ids=["mmap", "no-mmap"])
def test_memory_that_cannot_be_had(use_mmap: bool, tmp_path: Path) -> None:
    """A sparse file of 1 TB under a limit of memory."""
    path = tmp_path / "m.gguf"
    path.write_bytes(RawGGUF(tensors=[RawTensor("t", [2**30, 2**8], nbytes=0)]).encode())
    os.truncate(path, 1 << 41)
    code = (
        "import resource, sys; from lfm2cpp.gguf import read_gguf\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 32, 1 << 32))\n"
        "read_gguf(sys.argv[1], use_mmap=sys.argv[2] == 'True')"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    run = subprocess.run([sys.executable, "-c", code, path, str(use_mmap)], capture_output=True, text=True, env=env)
    assert "ModelFormatError: " in run.stderr
    assert run.stderr.endswith("m.gguf: its 2199023255552 bytes cannot be read: Cannot allocate memory\n")


# --- A31: names


@pytest.mark.parametrize(
    "name", ["with space.gguf", "\u96ea\u00e9.gguf", os.fsdecode(b"\xff\xfe.gguf"), "a" * 250 + ".gguf"]
)
def test_a31_names(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(RawGGUF().encode())
    with read_gguf(path) as g:
        assert g.metadata["some.number"].value == 7
    os.truncate(path, 40)
    with pytest.raises(ModelFormatError, match="claims 3 tensors"):
        read_gguf(path)


def test_a31_zero_byte_in_path() -> None:
    with pytest.raises(ModelFormatError, match="cannot hold a zero byte"):
        read_gguf("a\0b")


def test_a31_a_name_that_looks_like_an_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("-x.gguf").write_bytes(RawGGUF().encode())
    code, out, err = run_cli(monkeypatch, capsys, "inspect", "-x.gguf")
    assert (code, out) == (2, "") and "write './-x.gguf', or put '--' before it" in err
    for arguments in (["--", "-x.gguf"], ["./-x.gguf"]):
        assert run_cli(monkeypatch, capsys, "inspect", *arguments)[0] == 0


# --- through the command line: exit code 1, one line, no traceback

SAMPLE = [
    "A2-empty", "A3-lfs", "A3-pickle", "A4-unknown", "A5-version-1", "A6-tensors-2^63", "A7-array-2^63",
    "A8-string-2^64-1",
    "A9-duplicate-key", "A10-nested-array", "A11-alignment-3", "A12-dims-10^6", "A13-product-wraps", "A14-removed-31",
    "A15-pad-wraps", "A16-larger-than-file", "A17-cut-by-half", "A18-64-bytes", "control-characters-are-escaped",
]  # fmt: skip


@pytest.mark.parametrize("case", SAMPLE)
def test_command_line(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.gguf"
    expected = write_case(case, path)
    code, out, err = run_cli(monkeypatch, capsys, "inspect", path)
    assert (code, out) == (1, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and expected in err
    assert list(tmp_path.iterdir()) == [path]
