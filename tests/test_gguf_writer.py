"""The writer: byte for byte what gguf-py and llama-quantize write, and nothing that the strict reader would refuse."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import tiny_gguf

from lfm2cpp.errors import OutputError
from lfm2cpp.ggml import GGMLType
from lfm2cpp.gguf import GGUFFile, Metadata, TensorToWrite, Value, ValueType, gguf_size, read_gguf, write_gguf

# Written by llama.cpp's llama-quantize from tiny_gguf(n_embd=32, n_layer=2, attention=(1,), n_head=2, n_head_kv=1,
# n_ff=64, n_vocab=288): Q4_0 with the fall-backs that rows of 32 need.
LLAMA_QUANTIZED = Path(__file__).parent / "data" / "llama-quantize-q4_0.gguf"


def copies(g: GGUFFile) -> list[TensorToWrite]:
    return [
        TensorToWrite(info.name, info.shape, info.ggml_type, lambda name=info.name: [g.data(name)])
        for info in g.tensors.values()
    ]


def rewrite(source: Path, target: Path) -> bytes:
    with read_gguf(source) as g:
        write_gguf(target, g.metadata, copies(g))
        assert gguf_size(g.metadata, copies(g)) == target.stat().st_size
    return target.read_bytes()


@pytest.mark.parametrize("types", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "Q4_K", "Q5_K", "Q6_K"])
def test_read_then_write_is_identity_for_gguf_py(types: str, tmp_path: Path) -> None:
    source = tiny_gguf(tmp_path / "m.gguf", types=types, n_layer=2, attention=(1,))
    assert rewrite(source, tmp_path / "copy.gguf") == source.read_bytes()


def test_read_then_write_is_identity_for_llama_quantize(tmp_path: Path) -> None:
    with read_gguf(LLAMA_QUANTIZED) as g:
        assert {info.ggml_type for info in g.tensors.values()} >= {GGMLType.F32, GGMLType.Q4_0, GGMLType.Q8_0}
        assert g.warnings == []
    assert rewrite(LLAMA_QUANTIZED, tmp_path / "copy.gguf") == LLAMA_QUANTIZED.read_bytes()


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_custom_alignment_equals_gguf_py(alignment: int, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "g.gguf", "x")
    writer.add_custom_alignment(alignment)
    writer.add_tensor("a", np.arange(5, dtype=np.float32))
    writer.add_tensor("b", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert rewrite(tmp_path / "g.gguf", tmp_path / "copy.gguf") == (tmp_path / "g.gguf").read_bytes()


def metadata_for_gguf_py(
    metadata: Metadata,
) -> Iterator[tuple[str, Any, gguf.GGUFValueType, gguf.GGUFValueType | None]]:
    for key, value in metadata.items():
        sub = None if value.item_type is None else gguf.GGUFValueType(value.item_type)
        yield key, value.value, gguf.GGUFValueType(value.type), sub


INTEGERS = {
    ValueType.UINT8: (0, 2**8 - 1), ValueType.INT8: (-(2**7), 2**7 - 1), ValueType.UINT16: (0, 2**16 - 1),
    ValueType.INT16: (-(2**15), 2**15 - 1), ValueType.UINT32: (0, 2**32 - 1), ValueType.INT32: (-(2**31), 2**31 - 1),
    ValueType.UINT64: (0, 2**64 - 1), ValueType.INT64: (-(2**63), 2**63 - 1),
}  # fmt: skip
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
scalars = {
    **{t: st.integers(low, high) for t, (low, high) in INTEGERS.items()},
    ValueType.FLOAT32: st.floats(width=32, allow_nan=False),
    ValueType.FLOAT64: st.floats(allow_nan=False),
    ValueType.BOOL: st.booleans(),
}
values = st.one_of(
    *[s.map(lambda v, t=t: Value(t, v)) for t, s in scalars.items()],
    text.map(Value.string),
    st.lists(st.binary(max_size=9), max_size=4).map(Value.strings),
    *[st.lists(s, max_size=4).map(lambda v, t=t: Value.array(t, v)) for t, s in scalars.items()],
)
keys = st.text("abcxyz0189._-", min_size=1, max_size=12).filter(lambda key: key != "general.alignment")
metadatas = st.dictionaries(keys, values, max_size=6)
shapes = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple), max_size=4)


def planned(shape_list: list[tuple[int, ...]]) -> tuple[list[np.ndarray], list[TensorToWrite]]:
    arrays = [np.arange(np.prod(shape), dtype=np.float32).reshape(shape) for shape in shape_list]
    # In two chunks, of which the first may be empty.
    return arrays, [
        TensorToWrite(f"t{i}", a.shape, GGMLType.F32, lambda a=a: np.array_split(a.reshape(-1), 2))
        for i, a in enumerate(arrays)
    ]


@settings(max_examples=100, deadline=None)
@given(metadata=metadatas, shape_list=shapes)
def test_write_then_read_is_identity(
    tmp_path_factory: pytest.TempPathFactory, metadata: Metadata, shape_list: Any
) -> None:
    path = tmp_path_factory.mktemp("w") / "m.gguf"
    arrays, tensors = planned(shape_list)
    write_gguf(path, metadata, tensors)
    with read_gguf(path) as g:
        assert g.metadata == metadata and list(g.metadata) == list(metadata)
        assert [t.shape for t in g.tensors.values()] == [a.shape for a in arrays]
        for i, a in enumerate(arrays):
            assert g.data(f"t{i}").tobytes() == a.tobytes()
        assert g.nbytes == gguf_size(metadata, tensors)


@settings(max_examples=100, deadline=None)
@given(metadata=metadatas, shape_list=shapes)
def test_bytes_equal_gguf_py(tmp_path_factory: pytest.TempPathFactory, metadata: Metadata, shape_list: Any) -> None:
    """gguf-py cannot write an empty array; everything else must be the same file."""
    metadata = {key: value for key, value in metadata.items() if value.type != ValueType.ARRAY or value.value}
    directory = tmp_path_factory.mktemp("w")
    writer = gguf.GGUFWriter(directory / "oracle.gguf", "")
    writer.kv_data = [{}]
    for key, value, value_type, sub_type in metadata_for_gguf_py(metadata):
        writer.add_key_value(key, value, value_type, sub_type)
    arrays, tensors = planned(shape_list)
    for i, a in enumerate(arrays):
        writer.add_tensor(f"t{i}", a)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    if arrays:  # gguf-py's converter leaves a vocabulary-only file without tensor table and padding
        writer.write_tensors_to_file()
    writer.close()
    write_gguf(directory / "ours.gguf", metadata, tensors)
    assert (directory / "ours.gguf").read_bytes() == (directory / "oracle.gguf").read_bytes()


# --- what is refused, and then leaves nothing behind


def one_tensor(chunks: Any, shape: tuple[int, ...] = (8,)) -> list[TensorToWrite]:
    return [TensorToWrite("t", shape, GGMLType.F32, chunks)]


@pytest.mark.parametrize("data", [b"", bytes(31), bytes(33)])
def test_byte_counts_are_checked(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=f"tensor 't' came as {len(data)} bytes where 32 were planned"):
        write_gguf(tmp_path / "m.gguf", {}, one_tensor(lambda: [data]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"n": Value(ValueType.UINT8, 256)}, "'n' does not fit UINT8"),
        ({"n": Value(ValueType.UINT32, -1)}, "'n' does not fit UINT32"),
        ({"n": Value(ValueType.FLOAT32, 1e300)}, "'n' does not fit FLOAT32"),
        ({"n": Value(ValueType.UINT32, "7")}, "'n' does not fit UINT32"),
        ({"n": Value.array(ValueType.INT32, [2**31])}, "'n' does not fit INT32"),
        ({"n": Value.string("\ud800")}, "'n' holds text that is not valid Unicode"),
    ],
)
def test_values_must_fit(metadata: Metadata, message: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=message):
        write_gguf(tmp_path / "m.gguf", metadata, [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("metadata", "name", "message"),
    [
        ({"": Value.u32(1)}, "t", "is empty"),
        ({}, "", "tensor 0 at byte"),
        ({}, "n" * 64, "at most 63"),
        ({"tokenizer.chat_template": Value.string("x" * (1 << 21))}, "t", "at most 1048576"),
    ],
)
def test_a_file_that_would_be_refused_is_never_begun(
    metadata: Metadata, name: str, message: str, tmp_path: Path
) -> None:
    target = tmp_path / "m.gguf"
    target.write_bytes(b"old")
    tensors = [TensorToWrite(name, (8,), GGMLType.F32, lambda: pytest.fail("no work should have begun"))]
    with pytest.raises(OutputError, match=message) as refused:
        write_gguf(target, metadata, tensors, force=True)
    assert str(refused.value).startswith(f"{target}: ")
    assert list(tmp_path.iterdir()) == [target] and target.read_bytes() == b"old"


def test_the_file_is_read_back_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte that changes on its way to the disk is noticed."""
    import lfm2cpp.files as files

    real_fsync = files.os.fsync

    def corrupting_fsync(fd: int) -> None:
        files.os.pwrite(fd, b"\xff", 0)
        real_fsync(fd)

    monkeypatch.setattr(files.os, "fsync", corrupting_fsync)
    with pytest.raises(OutputError, match="m.gguf: would not be a valid GGUF file: not a GGUF file"):
        write_gguf(tmp_path / "m.gguf", {}, one_tensor(lambda: [bytes(32)]))
    assert list(tmp_path.iterdir()) == []


def test_chunks_may_be_any_contiguous_buffer(tmp_path: Path) -> None:
    x = np.arange(8, dtype=np.float32)
    for i, chunk in enumerate(
        [x, x.tobytes(), memoryview(x), bytearray(x.tobytes()), x.reshape(2, 4), x.astype(">f4").astype("<f4")]
    ):
        write_gguf(tmp_path / f"{i}.gguf", {}, one_tensor(lambda c=chunk: [c]))
    assert len({hashlib.sha256(p.read_bytes()).hexdigest() for p in tmp_path.iterdir()}) == 1


def test_progress_counts_tensor_bytes(tmp_path: Path) -> None:
    seen: list[int] = []
    write_gguf(tmp_path / "m.gguf", {}, one_tensor(lambda: [bytes(16), bytes(16)]), progress=seen.append)
    assert seen == [16, 16]


def test_contradicting_alignment_is_a_programming_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="contradicts general.alignment 64"):
        write_gguf(tmp_path / "m.gguf", {"general.alignment": Value.u32(64)}, [], alignment=32)
