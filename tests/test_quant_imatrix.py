"""Importance matrices: what a file of them must hold, and what a model must have that is quantized by them (D5)."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from cli_process import Cli
from quant_model import IMATRIX, hard_imatrix, hard_model

from lfm2cpp.errors import ModelFormatError, UsageError
from lfm2cpp.ggml import GGMLType
from lfm2cpp.gguf import TensorToWrite, Value, ValueType, read_gguf, write_gguf
from lfm2cpp.gguf.imatrix import read_imatrix
from quant.quantize import quantize_file

DOWN = "blk.1.ffn_down.weight"


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_columns_are_mean_squares(tmp_path):
    path = hard_imatrix(tmp_path / IMATRIX, "plain", {DOWN + ".counts": floats(8)})
    found = read_imatrix(path)
    with read_gguf(path) as gguf:
        sums = gguf.data(DOWN + ".in_sum2").view(np.float32)
        np.testing.assert_array_equal(found.columns[DOWN], sums / 8)
        assert set(found.columns) == {name.removesuffix(".counts") for name in gguf.tensors if name.endswith("counts")}
    assert (found.dataset, found.n_chunks) == (b"text.txt", 3)


@pytest.mark.parametrize(("changes", "match"), [
    ({DOWN + ".counts": floats(0)}, "ffn_down.weight.counts' is 0, expected 1 or more"),
    ({DOWN + ".counts": floats(-3)}, "counts' is -3, expected"),
    ({DOWN + ".counts": floats(np.nan)}, "counts' is nan, expected"),
    ({DOWN + ".counts": floats(1e30)}, "counts' is 1e.30, expected"),
    ({DOWN + ".counts": floats(1, 1)}, "counts' has 2 elements, expected 1"),
    ({DOWN + ".in_sum2": floats(*[1] * 511, np.nan)}, r"element 511 of .*in_sum2' is nan, expected a sum of squares"),
    ({DOWN + ".in_sum2": floats(*[1] * 511, np.inf)}, r"element 511 of .*in_sum2' is inf, expected a sum of squares"),
    ({DOWN + ".in_sum2": floats(-1, *[1] * 511)}, r"element 0 of .*in_sum2' is -1, expected a sum of squares"),
    ({DOWN + ".in_sum2": floats(*[3e38] * 512), DOWN + ".counts": floats(1)}, "is 3e.38, expected a sum of squares"),
    ({"\x1b[31m.in_sum2": floats(1)}, r"tensor '.x1b\[31m.counts' is missing"),
    ({"blk.9.ffn_up.weight.in_sum2": floats(1)}, "tensor 'blk.9.ffn_up.weight.counts' is missing"),
])  # fmt: skip
def test_impossible_numbers(changes, match, tmp_path):
    with pytest.raises(ModelFormatError, match=match):
        read_imatrix(hard_imatrix(tmp_path / IMATRIX, "plain", changes))


@pytest.mark.parametrize(("changes", "match"), [
    ({DOWN + ".in_sum2": np.ones(256, np.float32)}, "has 256 importances for 'blk.1.ffn_down.weight', whose rows have 512"),
    ({"blk.3.ffn_up.weight.in_sum2": floats(1), "blk.3.ffn_up.weight.counts": floats(1)}, "'blk.3.ffn_up.weight', which"),
    ({"blk.0.attn_norm.bias.in_sum2": floats(1), "blk.0.attn_norm.bias.counts": floats(1)}, "made for another model"),
])  # fmt: skip
def test_of_another_model(changes, match, tmp_path):
    source, imatrix = hard_model(tmp_path / "in.gguf", "plain"), hard_imatrix(tmp_path / IMATRIX, "plain", changes)
    for dry_run in (True, False):
        with pytest.raises(ModelFormatError, match=match):
            quantize_file(source, tmp_path / "out.gguf", "Q4_0", imatrix=imatrix, dry_run=dry_run)
    assert not (tmp_path / "out.gguf").exists()


def test_files_that_are_none(tmp_path):
    source, other = hard_model(tmp_path / "in.gguf", "plain"), tmp_path / IMATRIX

    def refused(match):
        with pytest.raises(ModelFormatError, match=match):
            quantize_file(source, tmp_path / "out.gguf", "Q4_0", imatrix=other)

    refused("imatrix.gguf: cannot be opened: No such file")
    other.write_bytes(struct.pack("<ii", 34, 26) + b"blk.0.shortconv.in_proj.we" + bytes(60))  # as the older format
    refused("older format; it becomes a GGUF file by: llama-imatrix --in-file OLD -o NEW.gguf")
    hard_imatrix(other, "plain")
    other.write_bytes(other.read_bytes()[:-100])
    refused("imatrix.gguf: .*truncated|imatrix.gguf: .*beyond|imatrix.gguf: .*bytes")
    hard_model(other, "plain")
    refused("is a GGUF file without 'imatrix.chunk_count'")
    hard_imatrix(other, "plain", imatrix_chunk_count=Value.string("3"))
    refused("'imatrix.chunk_count' has type STRING, expected UINT32")
    keys = {"imatrix.datasets": Value.strings([]), "imatrix.chunk_count": Value.u32(0)}
    write_gguf(other, keys, [], force=True)
    refused(r"holds no importances, expected tensors named \*.in_sum2")
    half = [TensorToWrite(name, (512,), GGMLType.F16, lambda: [bytes(1024)]) for name in (DOWN + ".in_sum2", DOWN + ".counts")]
    write_gguf(other, keys, half, force=True)
    refused("ffn_down.weight.in_sum2' is F16, expected F32")


def test_output_is_not_the_importances(tmp_path):
    source, imatrix = hard_model(tmp_path / "in.gguf", "plain"), hard_imatrix(tmp_path / IMATRIX, "plain")
    before = imatrix.read_bytes()
    with pytest.raises(UsageError, match="input itself"):
        quantize_file(source, imatrix, "Q4_0", imatrix=imatrix, force=True)
    assert imatrix.read_bytes() == before


def test_what_is_noted_in_the_file(tmp_path):
    """Without texts and chunks nothing of them; a long name is cut behind a whole character; an older note is replaced."""
    source = hard_model(tmp_path / "in.gguf", "plain")
    path = tmp_path / ("\u00e4" * 100 + ".gguf")
    hard_imatrix(path, "plain", imatrix_datasets=Value.strings([]), imatrix_chunk_count=Value.u32(0))
    with read_gguf(source) as gguf:
        tensors = [
            TensorToWrite(t.name, t.shape, t.ggml_type, lambda name=t.name: [gguf.data(name)])
            for t in gguf.tensors.values()
        ]
        metadata = {"quantize.imatrix.file": Value.string("older"), **gguf.metadata}
        write_gguf(tmp_path / "noted.gguf", metadata, tensors)
    quantize_file(tmp_path / "noted.gguf", tmp_path / "out.gguf", "Q4_0", imatrix=path)
    with read_gguf(tmp_path / "out.gguf") as gguf:
        noted = {key: value for key, value in gguf.metadata.items() if key.startswith("quantize.imatrix")}
        assert list(gguf.metadata)[-2:] == ["quantize.imatrix.file", "quantize.imatrix.entries_count"] == list(noted)
        name = noted["quantize.imatrix.file"].value
        assert noted["quantize.imatrix.entries_count"] == Value.u32(len(read_imatrix(path).columns))
    assert str(path).startswith(name) and 126 <= len(name.encode()) <= 127


def test_matrices_without_importances_are_told(tmp_path):
    source, imatrix = hard_model(tmp_path / "in.gguf", "plain"), hard_imatrix(tmp_path / IMATRIX, "plain")
    with read_gguf(imatrix) as gguf:
        kept = [t for t in gguf.tensors.values() if "ffn_gate" not in t.name]
        data = {t.name: gguf.data(t.name).tobytes() for t in kept}
        tensors = [TensorToWrite(t.name, t.shape, t.ggml_type, lambda name=t.name: [data[name]]) for t in kept]
        write_gguf(tmp_path / "part.gguf", gguf.metadata, tensors)
    assert quantize_file(source, "-", "Q4_0", imatrix=imatrix, dry_run=True).warnings == []  # token_embd never has any
    (warning,) = quantize_file(source, "-", "Q4_0", imatrix=tmp_path / "part.gguf", dry_run=True).warnings
    assert "no importances for 3 matrices, the first being blk.0.ffn_gate.weight" in warning


@pytest.fixture
def cli(monkeypatch, capfd) -> Cli:
    return Cli(monkeypatch, capfd)


def test_command(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hard_model(tmp_path / "in.gguf", "plain")
    hard_imatrix(tmp_path / IMATRIX, "plain")
    done = cli("quantize", "--imatrix", IMATRIX, "in.gguf", "out.gguf", "Q4_0")
    assert done.code == 0, done.err
    quantize_file(tmp_path / "in.gguf", tmp_path / "plain.gguf", "Q4_0")
    with read_gguf(tmp_path / "out.gguf") as gguf, read_gguf(tmp_path / "plain.gguf") as plain:
        assert gguf.get("quantize.imatrix.file", ValueType.STRING) == IMATRIX
        same = {name for name in gguf.tensors if gguf.data(name).tobytes() == plain.data(name).tobytes()}
    assert "token_embd.weight" in same and DOWN not in same
    done = cli("quantize", "--imatrix", "missing", "in.gguf", "new.gguf", "Q4_0")
    assert done.code == 1 and "missing: cannot be opened" in done.err
    assert not Path(tmp_path, "new.gguf").exists()
