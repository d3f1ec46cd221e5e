"""The same file as llama.cpp's converter, for every spelling of a checkpoint; and the same file every time."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from convert_variants import GOLDEN, VARIANTS

from convert.hf_to_gguf import ConvertOptions, convert_hf_to_gguf
from lfm2cpp.arch.validate import validate_model
from lfm2cpp.gguf import read_gguf
from quant.quantize import quantize_file

LLAMA: dict[str, dict[str, list[str]]] = json.loads(GOLDEN.read_text(encoding="utf-8"))
PAIRS = [(name, outtype) for name, variant in VARIANTS.items() for outtype in variant.outtypes]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: v.make(tmp_path_factory.mktemp(name)) for name, v in VARIANTS.items()}


def options(name: str, outtype: str, out: Path) -> ConvertOptions:
    variant = VARIANTS[name]
    result = ConvertOptions(
        outtype=outtype, outfile=out, vocab_only=variant.vocab_only, model_name=variant.model_name, allow_f16_overflow=True
    )
    if variant.override is None:
        return result
    file = out / "override.json"
    file.write_text(json.dumps(variant.override))
    return replace(result, metadata=file)


@pytest.mark.parametrize("name, outtype", PAIRS, ids=[f"{n}-{t}" for n, t in PAIRS])
def test_same_file_as_llama_cpp(name, outtype, checkpoints, tmp_path):
    result = convert_hf_to_gguf(checkpoints[name], options(name, outtype, tmp_path))
    assert [result.path.name, sha256(result.path)] == LLAMA[name][outtype]
    assert result.path.stat().st_size == result.nbytes
    with read_gguf(result.path) as gguf:
        assert not gguf.warnings


def test_every_frozen_hash_is_compared():
    assert {(name, outtype) for name, files in LLAMA.items() for outtype in files} == set(PAIRS)


@pytest.mark.parametrize("name", ["bf16", "odd_shape", "untied", "shards", "old_config"])
def test_the_runtime_accepts_the_file(name, checkpoints, tmp_path):
    result = convert_hf_to_gguf(checkpoints[name], options(name, "bf16", tmp_path))
    with read_gguf(result.path) as gguf:
        validate_model(gguf)


@pytest.mark.parametrize("name", ["wide", "odd_shape", "untied", "tokenizer"])
def test_q4_0_is_quantized_f32(name, checkpoints, tmp_path):
    direct = convert_hf_to_gguf(checkpoints[name], options(name, "q4_0", tmp_path)).path
    source = convert_hf_to_gguf(checkpoints[name], options(name, "f32", tmp_path)).path
    quantize_file(source, tmp_path / "q4_0.gguf", "Q4_0")
    assert direct.read_bytes() == (tmp_path / "q4_0.gguf").read_bytes()


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "2", "TZ": "Asia/Tokyo"}, {"LC_ALL": "de_DE.UTF-8"}, {"LC_ALL": "C"}],
    ids=lambda e: "-".join(e.values()),
)
def test_surroundings_do_not_change_the_file(environment, checkpoints, tmp_path):  # C19, C20
    out = tmp_path / "out.gguf"
    command = [sys.executable, "-m", "convert", checkpoints["card"], "--outtype", "bf16", "--outfile", out]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, **environment}, cwd=Path(__file__).parents[1])
    assert sha256(out) == LLAMA["card"]["bf16"][1]


def test_again_over_the_old_file(checkpoints, tmp_path):
    again = replace(options("f16", "f16", tmp_path), force=True)
    first = sha256(convert_hf_to_gguf(checkpoints["f16"], again).path)
    assert sha256(convert_hf_to_gguf(checkpoints["f16"], again).path) == first == LLAMA["f16"]["f16"][1]


GOLDENS = os.environ.get("LFM2CPP_GOLDENS")  # the folder with tiny.gguf.json, tiny-lfm2-hf/ and so on


@pytest.mark.skipif(not GOLDENS, reason="LFM2CPP_GOLDENS does not name the folder of the golden checkpoints")
@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("model", ["tiny", "edge"])
def test_goldens(model, outtype, tmp_path):
    assert GOLDENS is not None
    expected = json.loads(Path(GOLDENS, f"{model}.gguf.json").read_text())
    key = "quantize:Q4_0" if outtype == "q4_0" else f"convert:{outtype}"
    result = convert_hf_to_gguf(Path(GOLDENS, f"{model}-lfm2-hf"), ConvertOptions(outtype=outtype, outfile=tmp_path))
    assert sha256(result.path) == expected[key]["file_sha256"]
