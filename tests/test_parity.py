"""`lfm2cpp parity`: passes what is equal on any shape and type, and names the layer of every fault."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from parity_checks import IDS, Q4_0, SHAPE, FaultyRunner, check, reference_runner, swap_b_and_c
from tiny_model import TinyShape, tiny_gguf, tiny_hf

from lfm2cpp import reference
from lfm2cpp.arch.validate import WEIGHT_TYPES
from lfm2cpp.parity import limits
from lfm2cpp.parity.intermediates import intermediates
from lfm2cpp.parity.rounding import activation_roundings
from lfm2cpp.parity.runners import EngineRunner

torch = pytest.importorskip("torch", reason="needs the parity extra: pip install 'lfm2cpp[parity]'")
torch.set_num_threads(1)  # on tiny matrices the threads of torch wait for each other longer than they compute


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_hf(tmp_path_factory.mktemp("hf"), **SHAPE)


RUNNERS = {"engine": EngineRunner, "reference": reference_runner}


@pytest.fixture(params=RUNNERS)
def runner(request):
    return RUNNERS[request.param]


# --- What is equal passes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        {},
        dict(l_cache=2, tied=False),
        dict(l_cache=4, n_head=8, n_head_kv=1),
        dict(n_embd=128, n_head=4, n_head_kv=4, n_layer=3, attention=(0, 2)),
        dict(n_embd=256, n_head=2, n_head_kv=1, n_layer=2, attention=(0, 1), rope_freq_base=1e4, norm_rms_eps=1e-3),
    ],
    ids=["usual", "two taps, own head", "four taps, gqa 8", "heads of 32, attention first", "heads of 128"],
)
def test_an_f32_file_is_equal_in_every_intermediate(shape, runner, tmp_path):
    report = check(tiny_hf(tmp_path / "hf", **shape), tiny_gguf(tmp_path / "m.gguf", **shape), runner)
    assert report.ok, report.failure()
    assert report.mode == "float32" and report.our_tokens == report.hf_tokens
    expected = [i.name for i in intermediates(TinyShape(**shape).hparams())]
    for phase in ("prefill", "decode"):
        assert [line.name for line in report.lines if line.phase == phase] == expected


@pytest.mark.parametrize("types", ["BF16", "F16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q5_1", "Q5_0", "IQ4_NL", "Q4_1", Q4_0], ids=str)
def test_another_file_is_as_good_as_it_can_be(types, checkpoint, runner, tmp_path):
    report = check(checkpoint, tiny_gguf(tmp_path / "m.gguf", types=types, **SHAPE), runner)
    assert report.ok, report.failure()
    assert report.mode == "rounded"


@pytest.mark.parametrize("types", ["F32", "Q8_0"])
def test_an_f16_kv_cache_of_the_engine_has_its_own_limit(types, checkpoint, tmp_path):
    report = check(checkpoint, tiny_gguf(tmp_path / "m.gguf", types=types, **SHAPE), EngineRunner, kv_type="f16")
    assert report.ok, report.failure()


def test_far_into_a_context_the_engine_is_still_equal(tmp_path):
    shape = dict(n_layer=2, attention=(1,), n_embd=128, n_head=2, n_head_kv=1, n_ff=256)
    ids = (np.arange(1500) * 7 % 250 + 14).tolist()
    report = check(tiny_hf(tmp_path / "hf", **shape), tiny_gguf(tmp_path / "m.gguf", **shape), ids=ids)
    assert report.ok, report.failure()


def test_without_a_file_the_checkpoint_is_converted(checkpoint, runner):
    report = check(checkpoint, None, runner, ids=None, prompt="hello world and 12 names")
    assert report.ok and report.mode == "float32", report.failure()
    assert report.tokens[0] == 1 and len(report.tokens) > 4
    assert [s.value for s in report.scores if s.phase == "prompt"] == [0]


def test_what_hooks_catch_is_what_transformers_returns(checkpoint):
    from hf_model import load_hf

    from lfm2cpp.parity.hf import HFRunner

    hf = HFRunner(checkpoint)
    trace = hf.evaluate(IDS)
    model = load_hf(checkpoint)
    hidden = model.hidden_states(IDS)
    for name, states in zip(["inp_embd", "l_out-0", "l_out-1", "l_out-2", "result_norm"], hidden, strict=True):
        np.testing.assert_allclose(trace[name], states, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(trace["result_output"], model.logits(IDS), rtol=1e-4, atol=1e-4)
    # each product is that of the intermediate before it with the weight of its name
    w = {name: p.detach().numpy() for name, p in hf.model.named_parameters()}
    layer = "model.layers.0."
    np.testing.assert_allclose(
        trace["conv_in-0"], trace["attn_norm-0"] @ w[layer + "conv.in_proj.weight"].T, rtol=1e-3, atol=1e-5
    )
    b, c, x = np.split(trace["conv_in-0"], 3, axis=1)
    np.testing.assert_array_equal(trace["bx-0"], b * x)
    np.testing.assert_array_equal(trace["conv_out_gated-0"], c * trace["conv-0"])


def test_every_type_that_runs_has_limits():
    hp = TinyShape().hparams()
    for ggml_type in WEIGHT_TYPES:
        assert 0 < limits.WEIGHT[ggml_type] < 0.3
        types = {f"blk.{il}.ffn_down.weight": ggml_type for il in range(hp.n_layer)} | {"token_embd.weight": ggml_type}
        assert "ffn_swiglu-0" in activation_roundings(hp, types)


# --- What is not equal is named ------------------------------------------------------------------------------------


def perturb(name, weights):
    weights[name].flat[:: max(1, weights[name].size // 50)] *= 1.05


def reverse_taps(name, weights):
    weights[name][:] = weights[name][:, ::-1].copy()


WEIGHT_FAULTS = [
    (perturb, "blk.0.attn_norm.weight", "attn_norm-0"),
    (perturb, "blk.1.shortconv.in_proj.weight", "conv_in-1"),
    (perturb, "blk.1.shortconv.conv.weight", "conv-1"),
    (perturb, "blk.3.shortconv.out_proj.weight", "conv_out-3"),
    (perturb, "blk.2.attn_q.weight", "q-2"),
    (perturb, "blk.2.attn_v.weight", "v-2"),
    (perturb, "blk.2.attn_k_norm.weight", "k_norm-2"),
    (perturb, "blk.2.attn_output.weight", "attn_out-2"),
    (perturb, "blk.3.ffn_norm.weight", "ffn_norm-3"),
    (perturb, "blk.0.ffn_gate.weight", "ffn_gate-0"),
    (perturb, "blk.2.ffn_up.weight", "ffn_up-2"),
    (perturb, "blk.1.ffn_down.weight", "ffn_out-1"),
    (perturb, "token_embd_norm.weight", "result_norm"),
    (swap_b_and_c, "blk.1.shortconv.in_proj.weight", "conv_in-1"),
    (reverse_taps, "blk.3.shortconv.conv.weight", "conv-3"),
]


@pytest.mark.parametrize(
    ("fault", "tensor", "first"), WEIGHT_FAULTS, ids=[f"{fault.__name__} {name}" for fault, name, _ in WEIGHT_FAULTS]
)
def test_a_wrong_weight_is_named_with_its_layer(fault, tensor, first, checkpoint, runner, tmp_path):
    gguf = tiny_gguf(tmp_path / "m.gguf", edit=partial(fault, tensor), **SHAPE)
    report = check(checkpoint, gguf, runner)
    assert not report.ok
    bad = [line for line in report.lines if not line.ok]
    assert [line.name for line in bad if line.phase == "weights"] == [tensor]
    assert next(line.name for line in bad if line.phase == "prefill") == first
    assert first in report.failure() and tensor in report.failure()
    if first[-1].isdigit():
        assert report.failure().startswith(f"layer {first[-1]} ")


@pytest.mark.parametrize("types", ["Q8_0", Q4_0], ids=str)
@pytest.mark.parametrize("fault", [swap_b_and_c, perturb])
def test_a_wrong_weight_in_a_quantized_file_is_named(fault, types, checkpoint, tmp_path):
    tensor = "blk.1.shortconv.in_proj.weight"

    def edit(weights):
        if fault is perturb:
            weights[tensor][17] *= 1.4  # one row of 768
        else:
            fault(tensor, weights)

    report = check(checkpoint, tiny_gguf(tmp_path / "m.gguf", types=types, edit=edit, **SHAPE), reference_runner)
    assert [line.name for line in report.lines if line.phase == "weights" and not line.ok] == [tensor]
    assert tensor in report.failure() and "layer 1 (conv)" in report.failure()
    if fault is perturb:
        assert "row 17" in report.failure()


def test_an_unused_row_of_the_embedding_is_found_too(checkpoint, tmp_path):
    def edit(weights):
        weights["token_embd.weight"][123] += 0.5

    report = check(checkpoint, tiny_gguf(tmp_path / "m.gguf", edit=edit, **SHAPE), reference_runner)
    assert "token_embd.weight" in report.failure() and "row 123" in report.failure()


rms_norm, short_conv, attention = reference.rms_norm, reference.short_conv, reference.attention


def b_and_c_swapped(h, w, il, hp, state, note):
    w = dict(w)
    rows = np.split(w["shortconv.in_proj.weight"], 3)

    def renamed(name, x):
        if name == "conv_in":  # shown in the right order, used in the wrong one
            c, b, x3 = np.split(x, 3, axis=1)
            note(name, np.concatenate([b, c, x3], axis=1))
            return x
        return note(name, x)

    w["shortconv.in_proj.weight"] = np.concatenate([rows[1], rows[0], rows[2]])
    return short_conv(h, w, il, hp, state, renamed)


def without_qk_norm(x, weight, eps):
    return x if x.ndim == 3 else rms_norm(x, weight, eps)


def not_causal_conv(h, w, il, hp, state, note):
    """Centred, as the bidirectional variant has it."""

    def shifted(name, x):
        return note(name, np.concatenate([x[1:], np.zeros_like(x[:1])]) if name == "conv" else x)

    return short_conv(h, w, il, hp, state, shifted)


def forgets_the_conv_state(h, w, il, hp, state, note):
    state.conv[il] = np.zeros_like(state.conv[il])
    return short_conv(h, w, il, hp, state, note)


def interleaved_rope(x, positions, freq_base):
    angle = reference.rope_angles(positions, x.shape[-1] // 2, freq_base)
    cos, sin = np.cos(angle)[:, None, :], np.sin(angle)[:, None, :]
    out = np.empty_like(x)
    out[..., ::2] = x[..., ::2] * cos - x[..., 1::2] * sin
    out[..., 1::2] = x[..., 1::2] * cos + x[..., ::2] * sin
    return out


def rope_from_zero(x, positions, freq_base):
    return rope(x, positions - positions[0], freq_base)


def sees_the_future(x):
    x = np.where(np.isinf(x), np.median(x[np.isfinite(x)]), x)
    return softmax(x)


def not_silu(x):
    return x / (1 + np.exp(-1.702 * x))


rope, softmax = reference.rope, reference.softmax

CODE_FAULTS = {
    "B and C swapped": (dict(short_conv=b_and_c_swapped), "prefill", "bx-0"),
    "no QK norm": (dict(rms_norm=without_qk_norm), "prefill", "q_norm-2"),
    "convolution not causal": (dict(short_conv=not_causal_conv), "prefill", "conv-0"),
    "conv state lost between tokens": (dict(short_conv=forgets_the_conv_state), "decode", "conv-0"),
    "interleaved RoPE": (dict(rope=interleaved_rope), "prefill", "q_rope-2"),
    "positions start again": (dict(rope=rope_from_zero), "decode", "q_rope-2"),
    "attention not causal": (dict(softmax=sees_the_future), "prefill", "attn-2"),
    "GELU instead of SiLU": (dict(silu=not_silu), "prefill", "ffn_swiglu-0"),
    "eps forgotten": (dict(rms_norm=lambda x, weight, eps: rms_norm(x, weight, 0.0)), "prefill", "attn_norm-0"),
}


@pytest.mark.parametrize("types", ["F32", "Q8_0", Q4_0], ids=["F32", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("name", CODE_FAULTS)
def test_wrong_code_is_named_with_its_layer(name, types, checkpoint, tmp_path):
    fault, phase, first = CODE_FAULTS[name]
    gguf = tiny_gguf(tmp_path / "m.gguf", types=types, **SHAPE)
    report = check(checkpoint, gguf, partial(reference_runner, fault=fault))
    bad = [line for line in report.lines if not line.ok]
    assert all(line.phase != "weights" for line in bad)
    if types == "F32":
        assert (bad[0].phase, bad[0].name) == (phase, first)
    else:
        assert [line.name for line in bad if line.phase == "arithmetic"][0] == first
    il = int(first[-1])
    assert report.failure().startswith(f"layer {il} ({report.kinds[il]}): {first}")


def test_rounding_where_none_is_allowed_is_named(checkpoint, tmp_path):
    """A matrix product whose activations are rounded twice as coarsely as 8 bits."""

    def coarse(x, w):
        d = np.abs(x).max(axis=1, keepdims=True) / 31
        return np.rint(x / d) * d @ w.T

    gguf = tiny_gguf(tmp_path / "m.gguf", types="Q8_0", **SHAPE)
    report = check(checkpoint, gguf, partial(reference_runner, fault=dict(linear=coarse)))
    assert "conv_in-0 is not what float64 makes" in report.failure()


@pytest.mark.parametrize("hide", ["conv-1", "q_rope-2", "result_output"])
@pytest.mark.parametrize("types", ["F32", "Q8_0"])
def test_an_intermediate_that_is_not_shown_or_not_finite_fails(hide, types, checkpoint, tmp_path):
    gguf = tiny_gguf(tmp_path / "m.gguf", types=types, **SHAPE)

    class Silent(FaultyRunner):
        def evaluate(self, tokens):
            return {name: x for name, x in self.runner.evaluate(tokens).items() if name != hide}

    class Broken(FaultyRunner):
        def evaluate(self, tokens):
            trace = self.runner.evaluate(tokens)
            trace[hide][-1, 0] = np.nan
            return trace

    # without logits there would be nothing to continue with
    for kind in (Broken, Silent) if hide != "result_output" else (Broken,):
        assert hide in check(checkpoint, gguf, partial(reference_runner, kind=kind)).failure()
