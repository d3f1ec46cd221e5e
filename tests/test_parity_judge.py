"""The judges of `lfm2cpp parity` on made-up errors of known size; the float64 reference plays both sides, no torch."""

from __future__ import annotations

import json
import math
from functools import partial

import numpy as np
import pytest
from parity_checks import IDS, SHAPE
from tiny_model import tiny_gguf

from lfm2cpp import reference
from lfm2cpp.errors import CheckpointError
from lfm2cpp.ggml import GGMLType
from lfm2cpp.parity.check import File, judge, run_both
from lfm2cpp.parity.measure import checksum, first_row_above, kl_divergence, max_abs, relative_rms, top1_agreement
from lfm2cpp.parity.models import compare_weights
from lfm2cpp.parity.report import Line, Report, Score, table
from lfm2cpp.parity.rounding import round_bf16, round_f16, round_q8_0, round_q8_K
from lfm2cpp.parity.runners import ReferenceRunner


class Noisy(ReferenceRunner):
    """Exact arithmetic whose results are shown with a relative error."""

    def __init__(self, model, error, seed):
        super().__init__(model)
        self.error, self.rng = error, np.random.default_rng(seed)

    def evaluate(self, tokens):
        trace = super().evaluate(tokens)
        rms = {name: np.sqrt(np.mean(x**2)) for name, x in trace.items()}
        return {name: x + self.error * rms[name] * self.rng.standard_normal(x.shape) for name, x in trace.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return reference.load_model(tiny_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", **SHAPE))


@pytest.mark.parametrize(
    ("theirs", "ours", "ok"),
    [
        (0, 3e-6, True),
        (0, 2e-5, False),  # transformers is exact: ours has no excuse
        (9e-6, 9e-6, True),  # 1.3e-5 apart, but each as near to the truth as the other
        (3e-5, 3e-5, True),
        (3e-5, 2e-4, False),
        (5e-4, 0, False),  # not rounding: another function
    ],
)
def test_float32_is_judged_by_what_transformers_rounds_itself(model, theirs, ours, ok):
    file = File(model, dict.fromkeys(model.weights, GGMLType.F32))
    runs = run_both(Noisy(model, theirs, 1), Noisy(model, ours, 2), IDS, 3)
    lines, scores = judge(runs, file)
    assert all(line.ok for line in lines) == ok
    assert {score.name for score in scores} == {"relative RMS", "KL(HF || ours), nats", "top-1 agreement"}


@pytest.mark.parametrize("ours", [1e-6, 1e-4])
def test_an_operation_of_another_file_is_judged_by_itself(model, ours, tmp_path):
    """Q8_0 may be 1e-2 from transformers, but a norm of ours must still be exact on its own inputs."""
    quantized = reference.load_model(tiny_gguf(tmp_path / "q.gguf", types="Q8_0", **SHAPE))
    types = {name: GGMLType.Q8_0 if w.ndim == 2 and "conv.conv" not in name else GGMLType.F32
             for name, w in quantized.weights.items()}  # fmt: skip
    runs = run_both(ReferenceRunner(model), Noisy(quantized, ours, 3), IDS, 3)
    lines, _ = judge(runs, File(quantized, types))
    bad = {line.phase for line in lines if not line.ok}
    assert bad == (set() if ours == 1e-6 else {"arithmetic"})


class Checkpoint:
    def __init__(self, weights):
        self.weights = weights

    def has_tensor(self, name):
        return name in self.weights

    def tensor(self, name):
        return self.weights[name]


def hf_weights(model):
    from lfm2cpp.arch import iter_tensors, lfm2

    entries = [e for e in iter_tensors(lfm2, model.hparams) if e.name in model.weights]
    return {e.hf_name: model.weights[e.name].astype(np.float32) for e in entries}


def test_weights_are_judged_by_their_worst_row(model):
    types = dict.fromkeys(model.weights, GGMLType.F32)
    weights = hf_weights(model)
    assert all(line.ok and line.rel_rms == 0 for line in compare_weights(Checkpoint(weights), model, types))
    weights["model.layers.3.feed_forward.w1.weight"] = weights["model.layers.3.feed_forward.w1.weight"].copy()
    weights["model.layers.3.feed_forward.w1.weight"][211, 5] += 1e-4
    (bad,) = [line for line in compare_weights(Checkpoint(weights), model, types) if not line.ok]
    assert (bad.il, bad.name, bad.row) == (3, "blk.3.ffn_gate.weight", 211)
    del weights["model.layers.3.feed_forward.w1.weight"]
    with pytest.raises(CheckpointError, match=r"layers\.3\.feed_forward\.w1"):
        compare_weights(Checkpoint(weights), model, types)


def test_measures():
    a = np.array([[3.0, 4.0], [0.0, 5.0]])
    assert relative_rms(a, a) == 0 and relative_rms(2 * a, a) == 1
    assert relative_rms(a, 0 * a) == math.inf and relative_rms(0 * a, 0 * a) == 0
    assert relative_rms(a * np.nan, a) == math.inf and max_abs(a * np.nan, a) == math.inf
    assert max_abs(a + [[0, 0], [-0.5, 0]], a) == 0.5
    assert first_row_above(a + [[0, 0], [0, 1]], a, 0.1) == 1 and first_row_above(a, a, 0) is None
    p, q = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.5, 0.25]])
    assert np.isclose(kl_divergence(q, p), 0.5 * np.log(2) - 0.25 * np.log(2))
    assert kl_divergence(p + 100, p) < 1e-12 and kl_divergence(p * np.nan, p) == math.inf
    assert top1_agreement(p, q) == 0 and top1_agreement(p, p) == 1
    assert checksum(a) == checksum(a.astype(np.float32)) != checksum(np.nextafter(a.astype(np.float32), 9))


def test_roundings_equal_the_types_they_stand_for():
    import gguf

    x = np.random.default_rng(0).standard_normal((4, 512)) * [[1e-3], [1], [30], [0]]
    x32 = x.astype(np.float32)
    for rounding, name, most in ((round_f16, "F16", 0), (round_bf16, "BF16", 0), (round_q8_0, "Q8_0", 2e-3)):
        stored = gguf.quants.quantize(x32, gguf.GGMLQuantizationType[name])
        expected = gguf.quants.dequantize(np.ascontiguousarray(stored), gguf.GGMLQuantizationType[name])
        # ggml divides by the unrounded scale in float32: a rare value falls to the neighbouring step
        assert relative_rms(rounding(x32.astype(np.float64)), expected) <= most
    step = np.abs(x.reshape(4, 2, 256)).max(-1, keepdims=True) / 127
    assert (np.abs(round_q8_K(x) - x).reshape(4, 2, 256) <= step / 2 + 1e-12).all()


def report(lines, scores=()):
    kinds = ["conv", "attention"]
    return Report("hf", "m.gguf", {"torch": "2"}, "rounded", kinds, [1], [5, 6], [5, 7], lines, list(scores))


def test_the_failure_named_is_the_one_that_tells_most():
    line = partial(Line, max_abs=1.0, rel_rms=0.5, limit=0.1)
    weight = line("weights", 0, "blk.0.ffn_up.weight", row=3)
    whole, own = line("prefill", 0, "conv-0"), line("arithmetic", 1, "q-1")
    assert report([weight, whole, own]).failure().startswith("layer 1 (attention): q-1 is not what float64 makes")
    assert report([weight, whole]).failure().startswith("layer 0 (conv): conv-0 diverges in prefill (relative RMS 5")
    assert "row 3" in report([weight, whole]).failure()
    assert "the embedding: inp_embd" in report([line("prefill", -1, "inp_embd")]).failure()
    assert "the output: result_norm" in report([line("decode", 2, "result_norm")]).failure()
    assert report([], [Score("decode", "KL", 3.0, 1.0)]).failure() == "decode: KL 3, limit 1"
    good = report([line("prefill", 0, "conv-0", rel_rms=0.1)], [Score("decode", "KL", 1.0, 1.0)])
    assert good.ok and good.failure() is None


def test_table_shows_the_worst_of_each_layer_and_json_everything():
    line = partial(Line, max_abs=1.0, limit=0.1)
    lines = [
        line("prefill", 0, "bx-0", rel_rms=0.01),
        line("prefill", 0, "conv-0", rel_rms=math.inf),
        line("prefill", 0, "l_out-0", rel_rms=0.02, checksum="abcd1234"),
    ]
    short, long = table(report(lines)), table(report(lines), verbose=True)
    assert "conv-0" in short and "FAILED" in short and "abcd1234" in short
    assert "bx-0" not in short and "bx-0" in long
    assert "1 of 2 tokens equal, then 7 instead of HF's 6" in short
    value = json.loads(json.dumps(report(lines).to_json(), allow_nan=False))
    assert value["lines"][1]["rel_rms"] is None and not value["ok"] and value["first_divergence"] == 1
