"""Whole files: the same bytes as llama-quantize wrote once for the same sources, whatever the threads."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from quant_model import CASES, ENCODED, IMATRIX, Case, hard_imatrix, hard_model, sha256

from lfm2cpp.errors import ModelFormatError, OutputError, UsageError
from lfm2cpp.ggml import FileType, GGMLType
from lfm2cpp.gguf import GGUFFile, TensorToWrite, Value, gguf_size, read_gguf, write_gguf
from quant import encode
from quant.encode import EncodingError
from quant.quantize import quantize_file

LLAMA = json.loads((Path(__file__).parent / "data/quant_llama.json").read_text())


def make_source(folder: Path, case: Case) -> Path:
    source = folder / f"{case.shape}.{case.source}.gguf"
    if source.exists():
        return source
    if case.source not in ENCODED:
        return hard_model(source, case.shape, case.source)
    quantize_file(make_source(folder, Case(case.shape, "F32", "")), source, case.source)
    return source


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sources")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.key)
def test_same_file_as_llama_quantize(case, sources, tmp_path, monkeypatch):
    source, target = make_source(sources, case), tmp_path / "out.gguf"
    assert sha256(source) == LLAMA[case.key]["source"]
    monkeypatch.chdir(tmp_path)  # the name of the importances goes into the file
    imatrix = hard_imatrix(Path(IMATRIX), case.shape) if case.imatrix else None
    quantize_file(source, target, case.target, pure=case.pure, allow_requantize=True, imatrix=imatrix)
    assert sha256(target) == LLAMA[case.key]["target"]


def test_every_frozen_hash_is_compared():
    assert {case.key for case in CASES} == set(LLAMA)


GOLDENS = os.environ.get("LFM2CPP_GOLDENS")  # the folder with tiny.gguf.json, tiny-lfm2-hf/ and so on


@pytest.mark.skipif(not GOLDENS, reason="LFM2CPP_GOLDENS does not name the folder of the golden checkpoints")
@pytest.mark.parametrize("flags", ["", " --pure", " --imatrix"])
@pytest.mark.parametrize("model", ["tiny", "edge"])
def test_goldens(model, flags, tmp_path, monkeypatch):
    from convert.hf_to_gguf import ConvertOptions, convert_hf_to_gguf

    expected = json.loads(Path(GOLDENS, f"{model}.gguf.json").read_text())
    source = tmp_path / "f32.gguf"
    convert_hf_to_gguf(Path(GOLDENS, f"{model}-lfm2-hf"), ConvertOptions(outtype="f32", outfile=source))
    assert sha256(source) == expected["convert:f32"]["file_sha256"]
    targets = [target for target in ENCODED if f"quantize{flags}:{target}" in expected]
    assert {"Q4_0", "Q6_K"} <= set(targets)
    monkeypatch.chdir(GOLDENS)
    imatrix = f"{model}.imatrix.gguf" if "imatrix" in flags else None
    for target in targets:
        quantize_file(source, tmp_path / "out.gguf", target, pure="pure" in flags, imatrix=imatrix, force=True)
        assert sha256(tmp_path / "out.gguf") == expected[f"quantize{flags}:{target}"]["file_sha256"], target


@pytest.mark.parametrize("target", ["Q4_0", "Q8_0"])
def test_threads_and_slabs_do_not_change_the_file(target, sources, tmp_path, monkeypatch):
    case = Case("plain", "F32", target)
    for n_threads, slab in ((1, 1 << 20), (2, 1000), (7, 256), (3, 1)):
        monkeypatch.setattr(encode, "SLAB_ELEMENTS", slab)
        quantize_file(make_source(sources, case), tmp_path / "out.gguf", target, n_threads=n_threads, force=True)
        assert sha256(tmp_path / "out.gguf") == LLAMA[case.key]["target"]


def test_running_it_again_gives_the_same_file(sources, tmp_path):  # C19
    source = make_source(sources, Case("plain", "F32", "Q4_0"))
    quantize_file(source, tmp_path / "1.gguf", "Q4_0")
    quantize_file(source, tmp_path / "2.gguf", FileType.Q4_0)
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "2.gguf").read_bytes()


def test_dry_run_tells_the_true_size_and_writes_nothing(sources, tmp_path):
    source, target = make_source(sources, Case("narrow", "F32", "Q4_0")), tmp_path / "out.gguf"
    planned = quantize_file(source, target, "Q4_0", dry_run=True)
    assert not any(tmp_path.iterdir())
    written = quantize_file(source, target, "Q4_0")
    assert planned.tensors == written.tensors
    assert planned.nbytes == written.nbytes == target.stat().st_size
    with read_gguf(target) as gguf:
        assert [(t.name, t.shape, t.target) for t in planned.tensors] == [
            (t.name, t.shape, t.ggml_type) for t in gguf.tensors.values()
        ]
        assert planned.data_nbytes == sum(t.nbytes for t in gguf.tensors.values())


def test_progress_adds_up(sources, tmp_path):
    done: list[int] = []
    plans = []
    source = make_source(sources, Case("plain", "F32", "Q4_0"))
    plan = quantize_file(source, tmp_path / "out.gguf", "Q4_0", progress=done.append, on_plan=plans.append)
    assert sum(done) == plan.data_nbytes
    assert plans == [plan]


def copies(gguf: GGUFFile) -> list[TensorToWrite]:
    """Every tensor as it is, to be written elsewhere."""
    return [
        TensorToWrite(t.name, t.shape, t.ggml_type, lambda name=t.name: [gguf.data(name)])
        for t in gguf.tensors.values()
    ]


# --- what is refused, leaving nothing behind


def refused(tmp_path: Path, source: Path, error: type[Exception], match: str, target="Q4_0", **options) -> None:
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(error, match=match):
        quantize_file(source, options.pop("dst", tmp_path / "out.gguf"), target, **options)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_unknown_type(sources, tmp_path):
    refused(tmp_path, make_source(sources, Case("plain", "F32", "")), UsageError, "Q4_0 Q4_1 .* F32 COPY", "Q9_9")


@pytest.mark.parametrize("n_threads", [0, -1, 10**6])  # D1
def test_absurd_threads(n_threads, sources, tmp_path):
    source = make_source(sources, Case("plain", "F32", ""))
    refused(tmp_path, source, UsageError, "expected 1 to 512", n_threads=n_threads)


@pytest.mark.parametrize("source", ENCODED)  # D2
def test_quantized_source(source, sources, tmp_path):
    path, target = make_source(sources, Case("plain", source, "")), "Q8_0" if source != "Q8_0" else "Q4_0"
    refused(tmp_path, path, ModelFormatError, rf"is (Q6_K|{source}) already.*--allow-requantize", target)


def test_type_that_cannot_be_unpacked(tmp_path):
    source = hard_model(tmp_path / "in.gguf", "plain")
    with read_gguf(source) as gguf:
        tensors = [
            replace(t, ggml_type=GGMLType.Q2_K, chunks=lambda n=t.shape[0]: [bytes(84 * n)])
            if "in_proj" in t.name
            else t
            for t in copies(gguf)
        ]
        write_gguf(source, gguf.metadata, tensors, force=True)
    refused(tmp_path, source, ModelFormatError, "in_proj.weight is Q2_K, which cannot", allow_requantize=True)


@pytest.mark.parametrize(("shape", "target", "becomes"), [("narrow", "Q6_K", "Q8_0"), ("odd", "Q8_0", "F16")])
def test_pure_does_not_fall_back(shape, target, becomes, sources, tmp_path):  # D3
    source = make_source(sources, Case(shape, "F32", target))
    refused(tmp_path, source, ModelFormatError, f"--pure wants {target}.*becomes {becomes}", target, pure=True)


@pytest.mark.parametrize("target", ["Q8_0", "Q4_0", "BF16", "F32", "COPY"])  # D4
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_weights(value, target, tmp_path):
    w = np.full((256, 512), 0.5, np.float32)
    w[201, 509] = value
    source = hard_model(tmp_path / "in.gguf", "plain", **{"blk.1.ffn_down.weight": w})
    refused(tmp_path, source, EncodingError, "blk.1.ffn_down.weight, row 201, holds", target)


def test_nonfinite_norm_and_scale(tmp_path):
    norm = np.ones(256, np.float32)
    norm[7] = np.nan
    source = hard_model(tmp_path / "in.gguf", "plain", **{"blk.2.ffn_norm.weight": norm})
    refused(tmp_path, source, EncodingError, "blk.2.ffn_norm.weight, row 0")
    quantized = tmp_path / "q8_0.gguf"
    quantize_file(hard_model(source, "plain"), quantized, "Q8_0")
    with read_gguf(quantized) as gguf:
        info = gguf.tensors["blk.1.attn_q.weight"]
    data = bytearray(quantized.read_bytes())
    at = info.offset + 3 * (info.nbytes // 256) + 34  # the second block of row 3
    data[at : at + 2] = b"\x00\x7c"
    quantized.write_bytes(data)
    refused(tmp_path, quantized, EncodingError, "blk.1.attn_q.weight, row 3", "COPY")
    refused(tmp_path, quantized, EncodingError, "blk.1.attn_q.weight, row 3", allow_requantize=True)


@pytest.mark.parametrize(("target", "value"), [("Q8_0", 1e7), ("Q4_0", -6e5), ("Q6_K", 1e12), ("F16", 70000.0)])
def test_values_beyond_a_half(target, value, tmp_path):
    w = np.zeros((256, 512), np.float32)
    w[9, 300] = value
    source = hard_model(tmp_path / "in.gguf", "plain", **{"blk.0.ffn_down.weight": w})
    refused(tmp_path, source, EncodingError, f"blk.0.ffn_down.weight, row 9, .*too large for {target}", target)


def test_existing_output(sources, tmp_path):  # C3
    (tmp_path / "out.gguf").write_bytes(b"precious")
    source = make_source(sources, Case("plain", "F32", "Q8_0"))
    refused(tmp_path, source, OutputError, "--force")
    quantize_file(source, tmp_path / "out.gguf", "Q8_0", force=True)
    assert sha256(tmp_path / "out.gguf") == LLAMA["plain F32 -> Q8_0"]["target"]


@pytest.mark.parametrize("link", ["itself", "symlink", "hard link"])  # C2
def test_output_is_the_input(link, tmp_path):
    source, dst = hard_model(tmp_path / "in.gguf", "plain"), tmp_path / "link.gguf"
    if link == "itself":
        dst = source
    elif link == "symlink":
        dst.symlink_to(source)
    else:
        dst.hardlink_to(source)
    refused(tmp_path, source, UsageError, "input itself", dst=dst, force=True)


def test_no_room(sources, tmp_path, monkeypatch):  # C4
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1000))
    refused(tmp_path, make_source(sources, Case("plain", "F32", "Q8_0")), OutputError, "disk space")


def test_other_architecture(tmp_path):
    write_gguf(tmp_path / "in.gguf", {"general.architecture": Value.string("llama")}, [])
    refused(tmp_path, tmp_path / "in.gguf", ModelFormatError, "llama")


def test_shards_are_joined(sources, tmp_path):
    case = Case("plain", "F32", "Q4_0")
    with read_gguf(make_source(sources, case)) as gguf:
        tensors = copies(gguf)
        split = {"split.count": Value.u16(2), "split.tensors.count": Value.i32(len(tensors))}
        for no, part in enumerate((tensors[:5], tensors[5:])):
            metadata = {"split.no": Value.u16(no), **(gguf.metadata if no == 0 else {}), **split}
            write_gguf(tmp_path / f"m-{no + 1:05d}-of-00002.gguf", metadata, part)
    quantize_file(tmp_path / "m-00001-of-00002.gguf", tmp_path / "out.gguf", "Q4_0")
    assert sha256(tmp_path / "out.gguf") == LLAMA[case.key]["target"]


def test_alignment_of_the_source_is_kept(sources, tmp_path):
    with read_gguf(make_source(sources, Case("plain", "F32", "Q8_0"))) as gguf:
        metadata = {**gguf.metadata, "general.alignment": Value.u32(128)}
        tensors = copies(gguf)
        write_gguf(tmp_path / "in.gguf", metadata, tensors)
        assert gguf_size(metadata, tensors) == (tmp_path / "in.gguf").stat().st_size
    quantize_file(tmp_path / "in.gguf", tmp_path / "out.gguf", "Q8_0")
    with read_gguf(tmp_path / "out.gguf") as gguf:
        assert gguf.alignment == 128
        assert all(t.offset % 128 == 0 for t in gguf.tensors.values())
