"""The reader on good files: equal to gguf-py's reader, and what a GGUFFile offers."""

from __future__ import annotations

import gc
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_builder import BOOL, FLOAT32, FLOAT64, INT64, STRING, UINT16, UINT64, RawGGUF, string, u32, u64
from tiny_model import tiny_gguf

from lfm2cpp.errors import ModelFormatError
from lfm2cpp.ggml import GGMLType
from lfm2cpp.gguf import GGUFFile, Value, ValueType, read_gguf

MIXTURE = {
    r"token_embd": "Q6_K",
    r"ffn_down": "Q4_1",
    r"attn": "Q8_0",
    r"ffn_up": "BF16",
    r"ffn_gate": "F16",
    r".": "Q4_0",
}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return tiny_gguf(tmp_path / "good.gguf", types=MIXTURE)


@pytest.mark.parametrize("use_mmap", [True, False])
def test_equals_gguf_py(good: Path, use_mmap: bool) -> None:
    oracle = gguf.GGUFReader(good)
    with read_gguf(good, use_mmap=use_mmap) as ours:
        assert [t.name for t in oracle.tensors] == list(ours.tensors)
        for t in oracle.tensors:
            info = ours.tensors[t.name]
            assert info.shape == tuple(int(n) for n in reversed(t.shape))
            assert int(info.ggml_type) == int(t.tensor_type)
            assert (info.offset, info.nbytes) == (int(t.data_offset), int(t.n_bytes))
            np.testing.assert_array_equal(ours.data(t.name), np.asarray(t.data).view(np.uint8).reshape(-1))
        fields = {key: f for key, f in oracle.fields.items() if not key.startswith("GGUF.")}
        assert list(fields) == list(ours.metadata)
        for key, f in fields.items():
            assert_same_value(ours.metadata[key], f)


def assert_same_value(value: Value, f: gguf.ReaderField) -> None:
    assert int(value.type) == int(f.types[0])
    expected = f.contents()
    if value.item_type == ValueType.STRING:
        assert [piece.decode() for piece in value.value] == expected
    else:
        assert value.value == expected


def test_scalars_of_every_type(tmp_path: Path) -> None:
    raw = RawGGUF()
    raw.kv += [
        ("f32", FLOAT32, struct.pack("<f", 0.5)),
        ("f64", FLOAT64, struct.pack("<d", 0.1)),
        ("u16", UINT16, struct.pack("<H", 65535)),
        ("u64", UINT64, u64(2**64 - 1)),
        ("i64", INT64, struct.pack("<q", -5)),
        ("text", STRING, string("h\u00e9\n")),
    ]
    path = tmp_path / "m.gguf"
    path.write_bytes(raw.encode())
    with read_gguf(path) as g:
        values = {key: value.value for key, value in g.metadata.items()}
    assert values == {
        "general.architecture": "lfm2", "some.number": 7, "some.flag": True, "some.list": [0, 2, 0],
        "some.pieces": [b"a", b"\xff\xfe"], "f32": 0.5, "f64": 0.1, "u16": 65535, "u64": 2**64 - 1, "i64": -5,
        "text": "h\u00e9\n",
    }  # fmt: skip


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [8, 32, 256])
def test_versions_and_alignments(tmp_path: Path, version: int, alignment: int) -> None:
    raw = RawGGUF(version=version, alignment=alignment)
    raw.kv.append(("general.alignment", 4, u32(alignment)))
    path = tmp_path / "m.gguf"
    path.write_bytes(raw.encode())
    with read_gguf(path) as g:
        assert (g.version, g.alignment) == (version, alignment)
        assert g.warnings == []
        assert [set(g.data(name).tolist()) for name in g.tensors] == [{1}, {2}, {3}]


def test_a_file_without_tensors(tmp_path: Path) -> None:
    path = tmp_path / "vocab.gguf"
    path.write_bytes(RawGGUF(tensors=[]).header())
    with read_gguf(path) as g:
        assert g.tensors == {} and g.warnings == []


def test_the_last_padding_may_be_absent(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(RawGGUF(tensors=[RawGGUF().tensors[1]], cut=12).encode())
    with read_gguf(path) as g:
        assert g.warnings == []
        assert g.data("b.weight").tolist() == [1] * 20


def test_get_is_typed(good: Path) -> None:
    with read_gguf(good) as g:
        assert g.get("lfm2.block_count", ValueType.UINT32) == 4
        assert g.get("no.such.key", ValueType.UINT32, None) is None
        with pytest.raises(ModelFormatError, match="GGUF key 'no.such.key' is missing"):
            g.get("no.such.key", ValueType.UINT32)
        with pytest.raises(ModelFormatError, match="'lfm2.block_count' has type UINT32, expected STRING or BOOL"):
            g.get("lfm2.block_count", (ValueType.STRING, ValueType.BOOL))


def test_data_is_a_read_only_view_at_its_address(good: Path) -> None:
    g = read_gguf(good)
    data = g.data("blk.0.attn_norm.weight")
    assert not data.flags.writeable
    assert data.ctypes.data == g.locate("blk.0.attn_norm.weight")
    assert data.ctypes.data == g.address + g.tensors["blk.0.attn_norm.weight"].offset


def test_views_outlive_close(good: Path) -> None:
    g = read_gguf(good)
    data = g.data("blk.0.attn_norm.weight")
    before = data.copy()
    g.close()
    g.close()
    gc.collect()
    np.testing.assert_array_equal(data, before)
    with pytest.raises(ValueError, match="is closed"):
        g.data("blk.0.attn_norm.weight")


def test_released_pages_are_read_again(good: Path) -> None:
    with read_gguf(good) as g:
        before = g.data("token_embd.weight").copy()
        g.release("token_embd.weight")
        np.testing.assert_array_equal(g.data("token_embd.weight"), before)


def test_without_mmap_a_later_change_is_not_seen(good: Path) -> None:
    g = read_gguf(good, use_mmap=False)
    before = g.data("token_embd.weight").copy()
    with good.open("r+b") as f:
        f.truncate(1000)
    np.testing.assert_array_equal(g.data("token_embd.weight"), before)


def test_every_type_has_its_size(tmp_path: Path) -> None:
    """Block sizes against gguf-py. Q8_1 lives in memory only, and gguf-py has its size of long ago."""
    for ggml_type in set(GGMLType) - {GGMLType.Q8_1}:
        block, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(ggml_type)]
        raw = RawGGUF()
        raw.tensors = [type(raw.tensors[0])("t", [256, 2], int(ggml_type), nbytes=512 // block * width)]
        path = tmp_path / f"{ggml_type.name}.gguf"
        data = raw.header()
        path.write_bytes(data + bytes(-len(data) % 32) + bytes(512 // block * width))
        with read_gguf(path) as g:
            assert g.tensors["t"].nbytes == 512 // block * width


def test_header_of_a_large_vocabulary_is_read_within_a_second(tmp_path: Path) -> None:
    """65,536 tokens and as many merges: 0.03 s on the reference machine; the limit is for a loaded one."""
    import time

    pieces = b"".join(string(f"piece{i}") for i in range(65536))
    raw = RawGGUF()
    raw.kv += [(f"k{k}", 9, u32(8) + u64(65536) + pieces) for k in range(2)]
    path = tmp_path / "m.gguf"
    path.write_bytes(raw.encode())
    start = time.process_time()
    with read_gguf(path) as g:
        assert g.metadata["k1"].value[-1] == b"piece65535"
    assert time.process_time() - start < 1.0


def test_reading_does_not_import_numba(good: Path) -> None:
    code = "import sys, lfm2cpp.gguf; lfm2cpp.gguf.read_gguf(sys.argv[1]); sys.exit('numba' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(good)], check=True)


def split_in_three(source: Path, directory: Path) -> list[Path]:
    """The shards that gguf-py's writer makes of a model."""
    g = read_gguf(source)
    writer = gguf.GGUFWriter(directory / "m.gguf", "lfm2", split_max_tensors=-(-len(g.tensors) // 3))
    for key, value in g.metadata.items():
        if key != "general.architecture":
            plain = [item.decode() for item in value.value] if value.item_type == ValueType.STRING else value.value
            writer.add_key_value(key, plain, gguf.GGUFValueType(value.type))
    for name, info in g.tensors.items():
        data = np.array(g.data(name)).reshape(*info.shape[:-1], -1)
        if info.ggml_type == GGMLType.F32:
            data = data.view(np.float32)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType(info.ggml_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(directory.glob("m-0*.gguf"))


def test_shards_are_one_model(good: Path, tmp_path: Path) -> None:
    shards = split_in_three(good, tmp_path)
    assert len(shards) == 3
    with read_gguf(good) as whole, read_gguf(shards[0]) as joined:
        assert isinstance(joined, GGUFFile)
        assert list(joined.tensors) == list(whole.tensors)
        assert {info.file for info in joined.tensors.values()} == {0, 1, 2}
        for name in whole.tensors:
            np.testing.assert_array_equal(joined.data(name), whole.data(name))
            assert joined.data(name).ctypes.data == joined.locate(name)


def test_flag_type_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(RawGGUF(kv=[("flags", 9, u32(BOOL) + u64(2) + b"\0\1")]).encode())
    with read_gguf(path) as g:
        assert g.metadata["flags"].value == [False, True]
