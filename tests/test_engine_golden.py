"""The engine's numbers: against transformers and llama.cpp (stored), on odd shapes against the float64 reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_golden import FILES, GOLDEN, GREEDY_FROM, N_GREEDY, golden_file, golden_ids, mean_kl, relative_rms, top_1
from engine_laws import assert_same_bits, random_ids, run
from tiny_model import tiny_gguf

from lfm2cpp.engine.engine import Engine
from lfm2cpp.errors import ModelFormatError
from lfm2cpp.kernels import widths
from lfm2cpp.reference import forward, load_model

STORED = dict(np.load(GOLDEN))
HF = STORED["logits"]
# The numeric contract: relative RMS of the logits against transformers in float32.
MAX_RMS_F32_KV, MAX_RMS_F16_KV = 1e-5, 2e-4
MAX_RMS_Q8_KV = 2e-2  # K and V in 8 bits cost about as much as a Q8_0 file
# Where the CPU multiplies BF16 faster, activations are rounded to BF16 as well: what llama.cpp's logits cost, at most.
MAX_RMS_BF16 = float(STORED["llama_cpp BF16"][0]) if widths.BF16_PAIRS else MAX_RMS_F32_KV
# Against the float64 reference on the same stored weights: rounding for floats, 8-bit activations for blocks.
MAX_RMS_REFERENCE = {
    "F32": 3e-6, "F16": 3e-6, "BF16": 0.02 if widths.BF16_PAIRS else 3e-6,
    "Q8_0": 0.05, "Q4_0": 0.05, "Q4_1": 0.05, "Q5_0": 0.05, "Q5_1": 0.05, "IQ4_NL": 0.05, "Q4_K": 0.05, "Q5_K": 0.05, "Q6_K": 0.05,
}  # fmt: skip
IDS = golden_ids()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("golden")


def logits_of(path: Path, ids: list[int] = IDS, **options: Any) -> np.ndarray:
    with Engine(path, **{"n_ctx": 1024, "n_threads": 1, **options}) as engine, engine.sequence() as sequence:
        return engine.evaluate([(sequence, ids)], logits="all")[0]


@pytest.mark.parametrize(
    ("name", "kv_type", "limit"),
    [
        ("F32", "f32", MAX_RMS_F32_KV),
        ("F32", "f16", MAX_RMS_F16_KV),
        ("F32", "q8_0", MAX_RMS_Q8_KV),
        ("BF16", "f32", MAX_RMS_BF16),
        ("F16", "f16", MAX_RMS_F16_KV),
    ],
)
def test_float_files_against_transformers(folder: Path, name: str, kv_type: str, limit: float) -> None:
    """The weights are BF16-exact, so a BF16 file holds the same model as the F32 file."""
    found = logits_of(golden_file(folder, name), kv_type=kv_type)
    assert relative_rms(found, HF) < limit
    assert top_1(found, HF) == 1


@pytest.mark.parametrize("name", FILES)
def test_no_file_is_further_from_transformers_than_in_llama_cpp(folder: Path, name: str) -> None:
    rms, kl, _ = STORED[f"llama_cpp {name}"]
    found = logits_of(golden_file(folder, name))
    assert relative_rms(found, HF) < rms
    assert mean_kl(found, HF) < 1.01 * kl


def test_greedy_continuation_equals_transformers(folder: Path) -> None:
    ids = IDS[:GREEDY_FROM]
    with Engine(golden_file(folder, "F32"), kv_type="f32", n_threads=2) as engine, engine.sequence() as sequence:
        found: list[int] = []
        for _ in range(N_GREEDY):
            found.append(int(engine.evaluate([(sequence, ids)])[0].argmax()))
            ids = found[-1:]
    assert found == STORED["greedy"].tolist()


@pytest.mark.parametrize("name", ["F32", "BF16", "Q8_0", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K"])
def test_decode_and_threads_give_the_same_bits(folder: Path, name: str) -> None:
    expected = logits_of(golden_file(folder, name))
    with Engine(golden_file(folder, name), n_threads=2, n_ctx=256) as engine, engine.sequence() as sequence:
        assert_same_bits(run(engine, sequence, IDS, [1] * 20), expected)


# Shapes that no shipped model has


ODD_SHAPES: dict[str, dict[str, Any]] = {
    "two taps": {"l_cache": 2},
    "four taps": {"l_cache": 4, "n_layer": 3},
    "five taps, attention first": {"l_cache": 5, "attention": (0, 1), "n_layer": 3},
    "attention only": {"attention": (0, 1), "n_layer": 2},
    "attention last": {"attention": (3,)},
    "heads of 16": {"n_embd": 128, "n_head": 8, "n_head_kv": 2},
    "heads of 32, 3 a kv head": {"n_embd": 192, "n_head": 6, "n_head_kv": 2},
    "heads of 96": {"n_embd": 192, "n_head": 2, "n_head_kv": 1},
    "heads of 128": {"n_head": 2, "n_head_kv": 2},
    "8 queries a kv head": {"n_head": 8, "n_head_kv": 1},
    "heads of 256": {"n_head": 1, "n_head_kv": 1},
    "own head, other base and eps": {"tied": False, "rope_freq_base": 1e4, "norm_rms_eps": 1e-3},
    "odd widths": {"n_embd": 90, "n_head": 5, "n_head_kv": 5, "n_ff": 77, "n_vocab": 303},
    "narrow": {"n_embd": 6, "n_head": 3, "n_head_kv": 1, "n_ff": 5},
    "ff as wide as the rest": {"n_embd": 128, "n_head": 4, "n_head_kv": 2, "n_ff": 128},
    "ff of 32": {"n_embd": 96, "n_head": 3, "n_head_kv": 1, "n_ff": 32},
}


def reference_logits(path: Path, ids: list[int]) -> np.ndarray:
    return forward(load_model(path), ids)


@pytest.mark.parametrize("shape", ODD_SHAPES)
@pytest.mark.parametrize("name", ["F32", "BF16"])
def test_float_files_of_any_shape(tmp_path: Path, shape: str, name: str) -> None:
    path, ids = tiny_gguf(tmp_path / "m.gguf", types=name, **ODD_SHAPES[shape]), random_ids(70)
    found = logits_of(path, ids, kv_type="f32", n_threads=2)
    assert relative_rms(found, reference_logits(path, ids)) < MAX_RMS_REFERENCE[name]


@pytest.mark.parametrize("shape", [s for s, c in ODD_SHAPES.items() if c.get("n_embd", 256) % 32 == 0])
@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL"])
def test_block_files_of_any_shape(tmp_path: Path, shape: str, name: str) -> None:
    """Widths are multiples of 32, not of what a vector holds."""
    path, ids = tiny_gguf(tmp_path / "m.gguf", types=name, **ODD_SHAPES[shape]), random_ids(70)
    found = logits_of(path, ids, kv_type="f32")
    assert relative_rms(found, reference_logits(path, ids)) < MAX_RMS_REFERENCE[name]
    with Engine(path, kv_type="f32", n_threads=2, n_ctx=256) as engine, engine.sequence() as sequence:
        assert_same_bits(run(engine, sequence, ids, [1] * 3 + [13]), found)


@pytest.mark.parametrize("norm_name", ["token_embd_norm", "output_norm"])
def test_types_may_differ_from_tensor_to_tensor(tmp_path: Path, norm_name: str) -> None:
    types = {
        r"token_embd": "Q6_K", r"^output\.": "Q8_0", r"blk\.0.*ffn_gate": "Q4_0", r"blk\.0.*ffn_up": "Q4_1",
        r"ffn_down": "F16", r"attn_q\.": "BF16", r"attn_k": "IQ4_NL", r"attn_v": "F32", r"in_proj": "Q6_K",
        r"out_proj": "Q5_1", r"attn_output": "Q5_0", r"blk\.1.*ffn_gate": "Q4_K", r"blk\.1.*ffn_up": "Q5_K", r".": "Q8_0",
    }  # fmt: skip
    path = tiny_gguf(tmp_path / "m.gguf", types=types, tied=False, norm_name=norm_name)
    ids = random_ids(70)
    found = logits_of(path, ids, kv_type="f32", n_threads=2)
    assert relative_rms(found, reference_logits(path, ids)) < MAX_RMS_REFERENCE["Q8_0"]
    with Engine(path, kv_type="f32", n_ctx=256) as engine, engine.sequence() as sequence:
        assert_same_bits(run(engine, sequence, ids, [1] * 3 + [13]), found)


def test_a_long_context(tmp_path: Path) -> None:
    """Past the first chunks of attention, and far along the rotation."""
    path, ids = (
        tiny_gguf(tmp_path / "m.gguf", n_embd=64, n_head=2, n_head_kv=1, n_ff=64, n_layer=2, attention=(0,)),
        random_ids(1300),
    )
    expected = reference_logits(path, ids)
    found = logits_of(path, ids, kv_type="f32", n_ctx=2048, n_threads=2)
    assert relative_rms(found[-50:], expected[-50:]) < MAX_RMS_REFERENCE["F32"]


def test_a_model_without_attention_is_refused(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "m.gguf", attention=())
    with pytest.raises(ModelFormatError, match="at least one attention layer"):
        Engine(path)


@pytest.mark.parametrize("fault", ["swapped", "nudged", "kv"])
def test_these_limits_notice_faults(tmp_path: Path, fault: str) -> None:
    """A test that cannot fail says nothing: one wrong tensor moves the logits far beyond the limit."""

    def edit(weights: dict[str, np.ndarray]) -> None:
        if fault == "swapped":
            bcx = weights["blk.0.shortconv.in_proj.weight"]
            n = len(bcx) // 3
            bcx[:n], bcx[n : 2 * n] = bcx[n : 2 * n].copy(), bcx[:n].copy()
        elif fault == "nudged":
            weights["blk.1.ffn_up.weight"] *= np.float32(1.01)
        else:
            weights["blk.2.attn_k_norm.weight"] *= np.float32(1.05)

    good, bad = tiny_gguf(tmp_path / "good.gguf"), tiny_gguf(tmp_path / "bad.gguf", edit=edit)
    ids = random_ids(70)
    assert relative_rms(logits_of(bad, ids, kv_type="f32"), reference_logits(good, ids)) > 5 * MAX_RMS_REFERENCE["F32"]
