"""Perplexity: that of the float64 reference, of models where it is known, and what the command says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from cli_process import Cli
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import BOS, tiny_gguf

from lfm2cpp.corpus import text_chunks
from lfm2cpp.engine.engine import Engine
from lfm2cpp.errors import ModelFormatError
from lfm2cpp.perplexity import measure_perplexity, negative_log_likelihood
from lfm2cpp.reference import forward, load_model

CHUNKS = text_chunks([int(i) for i in np.random.default_rng(5).integers(14, 300, 150)], 48, bos=BOS)


def measure(path: Path, **options):
    with Engine(path, n_ctx=64, n_threads=2, **options) as engine:
        return measure_perplexity(engine, CHUNKS)


@given(st.integers(1, 70), st.integers(0, 1000), st.sampled_from([1e-3, 1.0, 100.0]))
def test_negative_log_likelihood(n, seed, scale):
    """In float64, and where the largest logit is far above the others."""
    rng = np.random.default_rng(seed)
    logits, ids = (scale * rng.standard_normal((n, 50))).astype(np.float32), rng.integers(0, 50, n)
    x = logits.astype(np.float64)
    expected = np.log(np.exp(x - x.max(1, keepdims=True)).sum(1)) + x.max(1) - x[np.arange(n), ids]
    np.testing.assert_allclose(negative_log_likelihood(logits, ids), expected, rtol=2e-6, atol=1e-6 * max(1, scale))


def test_equals_the_float64_reference(tmp_path):
    """The second half of each chunk, each token after all before it in its chunk."""
    path = tiny_gguf(tmp_path / "m.gguf", n_layer=3, attention=(1,))
    model, losses = load_model(path), []
    for chunk in CHUNKS:
        logits = forward(model, chunk)
        for i in range(24, 47):
            losses.append(np.log(np.exp(logits[i] - logits[i].max()).sum()) + logits[i].max() - logits[i][chunk[i + 1]])
    found = measure(path, kv_type="f32")
    assert found.n_tokens == len(losses) == 3 * 23
    assert found.value == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    assert found.error == pytest.approx(found.value * np.std(losses) / np.sqrt(len(losses) - 1), rel=1e-4)


def test_a_model_that_knows_nothing(tmp_path):
    """All logits are equal: as surprised as by one of n_vocab."""

    def forget(weights):
        weights["token_embd.weight"][:] = 0

    found = measure(tiny_gguf(tmp_path / "m.gguf", edit=forget))
    assert found.value == pytest.approx(320) and found.error == 0


def test_a_model_that_overflows_is_refused(tmp_path):
    def break_it(weights):
        weights["blk.1.ffn_norm.weight"][:] = 1e30

    with pytest.raises(ModelFormatError, match="logits are not finite"):
        measure(tiny_gguf(tmp_path / "m.gguf", edit=break_it))


def test_command(monkeypatch, capfd, tmp_path):
    cli, path = Cli(monkeypatch, capfd), tiny_gguf(tmp_path / "m.gguf")
    text = tmp_path / "text.txt"
    text.write_text("Words, and more words. " * 40)
    found = [cli("perplexity", "-m", path, "-f", text, "-c", 32, "--chunks", 2, "-t", t) for t in (1, 2)]
    pattern = r"PPL = (\d+\.\d{4}) \+/- \d+\.\d{4} \(30 tokens of 2 chunks of 32, \d+\.\d s\)\n"
    first, second = (re.fullmatch(pattern, done.out) for done in found)
    assert first and second and first[1] == second[1] and [done.code for done in found] == [0, 0]
    assert cli("perplexity", "-m", path, "-f", text, "-c", 4096).code == 1
    assert cli("perplexity", "-m", path).code == 2
    monkeypatch.setenv("LFM2_THREADS", "0")
    assert cli("perplexity", "-m", path, "-f", text).code == 2
    assert cli("perplexity", "-m", path, "-f", text, "-c", 32, "--chunks", 2, "-t", 1).code == 0
