"""Stored results of transformers and of llama.cpp on one tiny model, which the engine is judged by.

As a script it makes them anew; that needs torch, transformers and llama-cpp-python:

    python tests/engine_golden.py          # rewrites tests/data/engine_golden.npz

For each file type: llama.cpp's relative RMS error of the logits against transformers in float32, its mean KL divergence
in nats, and the share of tokens that are most likely in both.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tiny_model import tiny_gguf, tiny_hf

GOLDEN = Path(__file__).parent / "data" / "engine_golden.npz"
# The model and the prompt behind GOLDEN; changing anything here means running this file again.
SHAPE = dict(n_embd=256, n_layer=6, attention=(2, 4), n_head=4, n_head_kv=2, n_ff=512, n_vocab=512, n_pad=8, seed=11)
N_TOKENS, N_GREEDY, GREEDY_FROM = 48, 32, 16
# Name of a test case -> (file type, pure), as lfm2cpp quantize takes them.
FILES = {
    "F32": ("F32", False),
    "F16": ("F16", False),
    "BF16": ("BF16", False),
    "Q8_0": ("Q8_0", False),
    "Q4_0": ("Q4_0", False),  # with its Q6_K embedding
    "Q4_0-pure": ("Q4_0", True),
    "Q4_K_M": ("Q4_K_M", False),
    "Q5_K_M": ("Q5_K_M", False),
    "Q6_K": ("Q6_K", True),
}


def golden_ids() -> list[int]:
    return np.random.default_rng(2024).integers(14, 500, N_TOKENS).tolist()


def golden_file(folder: Path, name: str) -> Path:
    """The model in one of FILES, byte for byte as llama-quantize writes it."""
    from quant.quantize import quantize_file

    source = folder / "f32.gguf"
    if not source.exists():
        tiny_gguf(source, **SHAPE)
    kind, pure = FILES[name]
    if kind == "F32":
        return source
    target = folder / f"{name}.gguf"
    if not target.exists():
        quantize_file(source, target, kind, pure=pure)
    return target


def relative_rms(found: NDArray, expected: NDArray) -> float:
    return float(
        np.sqrt(
            np.mean((np.asarray(found, np.float64) - expected) ** 2) / np.mean(np.square(expected, dtype=np.float64))
        )
    )


def log_softmax(x: NDArray) -> NDArray[np.float64]:
    x = x.astype(np.float64) - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def mean_kl(found: NDArray, expected: NDArray) -> float:
    """KL(expected || found) in nats, averaged over the tokens."""
    p, q = log_softmax(expected), log_softmax(found)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def top_1(found: NDArray, expected: NDArray) -> float:
    return float((found.argmax(-1) == expected.argmax(-1)).mean())


def llama_cpp_logits(path: Path, ids: list[int]) -> NDArray[np.float32]:
    import llama_cpp

    llm = llama_cpp.Llama(str(path), n_ctx=256, logits_all=True, n_threads=2, verbose=False)
    llm.eval(ids)
    return np.array(llm.scores[: len(ids)], np.float32)


def make_golden(path: Path) -> None:
    from hf_model import load_hf

    ids, results = golden_ids(), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hf = load_hf(tiny_hf(folder / "hf", **SHAPE))
        logits = hf.logits(ids)
        for file in FILES:
            found = llama_cpp_logits(golden_file(folder, file), ids)
            results[f"llama_cpp {file}"] = np.array(
                [relative_rms(found, logits), mean_kl(found, logits), top_1(found, logits)]
            )
            print(file, results[f"llama_cpp {file}"], file=sys.stderr)
        greedy = hf.greedy(ids[:GREEDY_FROM], N_GREEDY)
    np.savez_compressed(path, logits=logits, greedy=greedy, **results)


if __name__ == "__main__":
    make_golden(GOLDEN)
