"""The float64 reference: equal to Hugging Face, and true to the laws of a causal model with state."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hf_model import GOLDEN, GOLDEN_DECODE, GOLDEN_SHAPE, GOLDEN_TOKENS
from tiny_model import TinyShape, encode, tiny_gguf, tiny_hf, tiny_weights

from lfm2cpp import reference
from lfm2cpp.ggml import GGMLType
from lfm2cpp.reference import Model, State, forward, load_model, recorder

MAX_RMS_VS_FLOAT32 = 1e-5  # another order of float32 additions
MAX_RMS_SAME_SUM = 1e-12  # the same float64 sum in another order

# Everything that no shipped model has, or only some have.
SHAPES = {
    "usual": dict(n_embd=128, n_ff=256),
    "two taps": dict(n_embd=128, n_ff=256, l_cache=2),
    "four taps": dict(n_embd=64, n_ff=128, l_cache=4),
    "heads of 32": dict(n_embd=128, n_head=4, n_head_kv=4, n_ff=256),
    "heads of 128, one kv head": dict(n_embd=256, n_head=2, n_head_kv=1, n_layer=2, attention=(1,)),
    "eight queries a kv head": dict(n_embd=128, n_head=8, n_head_kv=1, n_ff=256),
    "attention first and last": dict(n_embd=128, n_layer=3, attention=(0, 2)),
    "attention only": dict(n_embd=128, n_layer=2, attention=(0, 1)),
    "convolution then attention": dict(n_layer=2, attention=(1,), n_ff=256),
    "own head, other base and eps": dict(n_embd=128, tied=False, rope_freq_base=1e4, norm_rms_eps=1e-3, n_vocab=300),
}
TOKENS = [1, 40, 41, 40, 270, 14, 99, 200, 41, 7, 63, 250]


def relative_rms(a, b):
    return np.sqrt(np.mean((a - b) ** 2) / np.mean(np.asarray(b) ** 2))


def model_of(shape) -> Model:
    tiny = TinyShape(**shape)
    return Model(tiny.hparams(), {name: w.astype(np.float64) for name, w in tiny_weights(tiny).items()})


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def model(request) -> Model:
    return model_of(request.param)


def test_equals_stored_results_of_transformers():
    golden, trace = np.load(GOLDEN), {}
    model = model_of(GOLDEN_SHAPE)
    logits = forward(model, GOLDEN_TOKENS, note=recorder(trace))
    assert relative_rms(logits, golden["logits"]) < MAX_RMS_VS_FLOAT32
    n_layer = model.hparams.n_layer
    names = ["inp_embd", *(f"l_out-{il}" for il in range(n_layer - 1)), "result_norm"]
    assert len(names) == len(golden["hidden"])
    for name, hidden in zip(names, golden["hidden"], strict=True):
        assert relative_rms(trace[name], hidden) < MAX_RMS_VS_FLOAT32, name


def test_greedy_continuation_equals_that_of_transformers():
    model, state, found = model_of(GOLDEN_SHAPE), State.empty(TinyShape(**GOLDEN_SHAPE).hparams()), []
    logits = forward(model, GOLDEN_TOKENS, state)
    for _ in range(GOLDEN_DECODE):
        found.append(int(logits[-1].argmax()))
        logits = forward(model, found[-1:], state)
    assert found == np.load(GOLDEN)["greedy"].tolist()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_equals_transformers_on_other_shapes(shape, tmp_path):
    pytest.importorskip("torch", reason="needs the parity extra")
    from hf_model import load_hf

    theirs = load_hf(tiny_hf(tmp_path, **shape)).logits(TOKENS)
    assert relative_rms(forward(model_of(shape), TOKENS), theirs) < MAX_RMS_VS_FLOAT32


def test_far_positions_equal_transformers(tmp_path):
    """RoPE angles are rounded as transformers rounds them: exact angles are 1e-4 off out there."""
    pytest.importorskip("torch", reason="needs the parity extra")
    from hf_model import load_hf

    shape = dict(n_layer=1, attention=(0,), n_embd=128, n_head=2, n_head_kv=1, n_ff=256)
    tokens = (np.arange(1800) * 7 % 250 + 14).tolist()
    theirs = load_hf(tiny_hf(tmp_path, **shape)).logits(tokens)
    assert relative_rms(forward(model_of(shape), tokens)[-64:], theirs[-64:]) < MAX_RMS_VS_FLOAT32


def test_decode_equals_prefill(model):
    state = State.empty(model.hparams)
    decoded = np.concatenate([forward(model, [token], state) for token in TOKENS])
    assert state.n_past == len(TOKENS)
    assert relative_rms(decoded, forward(model, TOKENS)) < MAX_RMS_SAME_SUM


def test_chunked_prefill_equals_one_shot(model):
    """Every way to cut the prompt in two, and in chunks shorter than the convolution."""
    whole = forward(model, TOKENS)
    cuts = [[n] for n in range(1, len(TOKENS))] + [[2, 4, 6, 8, 10], [1, 2, 3, 4, 5]]
    for cut in cuts:
        state = State.empty(model.hparams)
        chunks = [forward(model, chunk, state) for chunk in np.split(TOKENS, cut)]
        assert relative_rms(np.concatenate(chunks), whole) < MAX_RMS_SAME_SUM, cut


def test_a_copied_state_can_be_continued_twice(model):
    state = State.empty(model.hparams)
    forward(model, TOKENS[:5], state)
    fork = state.copy()
    first = forward(model, TOKENS[5:], state)
    forward(model, [3, 4, 5], fork)
    again = State.empty(model.hparams)
    forward(model, TOKENS[:5] + [3, 4, 5], again)
    assert all(relative_rms(fork.conv[il], again.conv[il]) < MAX_RMS_SAME_SUM for il in fork.conv if fork.conv[il].size)
    assert relative_rms(first, forward(model, TOKENS)[5:]) < MAX_RMS_SAME_SUM


@pytest.mark.parametrize("changed", [0, 4, len(TOKENS) - 1])
def test_a_token_changes_nothing_before_it_and_all_after(model, changed):
    other = list(TOKENS)
    other[changed] = 123
    before, after = forward(model, TOKENS), forward(model, other)
    assert relative_rms(before[:changed], after[:changed]) < MAX_RMS_SAME_SUM if changed else True
    difference = np.abs(before - after).max(axis=1)[changed:]
    reach = len(TOKENS) if model.hparams.attention_layers else 1 + model.hparams.d_conv * model.hparams.n_layer
    assert (difference[:reach] > 1e-6).all()


@pytest.mark.parametrize("l_cache", [1, 2, 3, 4, 7])
def test_short_conv_is_a_causal_convolution_with_zeros_before_the_start(l_cache):
    """Against np.convolve, channel by channel; the last tap belongs to the current token."""
    n_embd, n_tokens = 8, 6
    hp = TinyShape(n_embd=n_embd, n_head=2, n_layer=1, attention=(), l_cache=l_cache).hparams()
    rng = np.random.default_rng(l_cache)
    identity = np.eye(n_embd)
    w = {
        "shortconv.in_proj.weight": rng.standard_normal((3 * n_embd, n_embd)),
        "shortconv.conv.weight": rng.standard_normal((n_embd, l_cache)),
        "shortconv.out_proj.weight": identity,
    }
    h = rng.standard_normal((n_tokens, n_embd))
    out = reference.short_conv(h, w, 0, hp, State.empty(hp), reference.unnoticed)
    b, c, x = (h @ part.T for part in np.split(w["shortconv.in_proj.weight"], 3))
    taps = w["shortconv.conv.weight"][:, ::-1]
    conv = np.stack([np.convolve((b * x)[:, i], taps[i])[:n_tokens] for i in range(n_embd)], axis=1)
    np.testing.assert_allclose(out, c * conv, rtol=1e-12, atol=1e-12)


def test_attention_equals_loops_over_heads_and_tokens():
    n_tokens, hp = 5, TinyShape(n_embd=32, n_head=4, n_head_kv=2, n_layer=1, attention=(0,)).hparams()
    rng, d = np.random.default_rng(0), 8
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    w = {f"{name}.weight": rng.standard_normal(shape) for name, shape in shapes.items()}
    w |= {f"attn_{x}_norm.weight": 1 + rng.standard_normal(d) for x in "qk"}
    h, trace = rng.standard_normal((n_tokens, 32)), {}
    out = reference.attention(h, w, 0, hp, State.empty(hp), recorder(trace))
    q, k, v = (trace[name].reshape(n_tokens, -1, d) for name in ("q_rope", "k_rope", "v"))
    for t in range(n_tokens):
        for head in range(4):
            kv = head // 2
            e = [np.exp(np.dot(q[t, head], k[s, kv]) / np.sqrt(d)) for s in range(t + 1)]
            expected = sum(e[s] * v[s, kv] for s in range(t + 1)) / sum(e)
            np.testing.assert_allclose(trace["attn"][t, head * d : (head + 1) * d], expected, rtol=1e-12)
    np.testing.assert_allclose(out, trace["attn"] @ w["attn_output.weight"].T, rtol=1e-12, atol=1e-12)


def test_rope_pairs_the_halves_and_depends_on_distance_only():
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((2, 1, 1, 8))
    one = np.zeros((1, 1, 8))
    one[..., 1] = 1.0
    turned = reference.rope(one, np.array([3]), 1e4)
    assert set(np.flatnonzero(np.abs(turned) > 1e-9)) == {1, 5}
    np.testing.assert_allclose(turned[0, 0, [1, 5]], [np.cos(0.3), np.sin(0.3)], rtol=1e-6)

    def score(m, n):
        return np.vdot(reference.rope(q, np.array([m]), 1e6), reference.rope(k, np.array([n]), 1e6))

    assert np.isclose(score(3, 1), score(40, 38), rtol=1e-4) and not np.isclose(score(3, 1), score(4, 1), rtol=1e-2)
    assert np.isclose(score(0, 0), np.vdot(q, k))


def test_rms_norm_sets_the_rms_to_that_of_the_weight():
    x = np.random.default_rng(2).standard_normal((3, 64)) * 50
    out = reference.rms_norm(x, np.full(64, 2.0), 1e-12)
    np.testing.assert_allclose(np.sqrt(np.mean(out**2, axis=1)), 2.0)
    np.testing.assert_allclose(reference.rms_norm(np.zeros((1, 64)), np.ones(64), 1e-5), 0)


def test_silu_and_softmax_do_not_overflow():
    x = np.array([-1e4, -30.0, 0.0, 30.0, 1e4])
    np.testing.assert_allclose(reference.silu(x), [0, -30 * np.exp(-30) / (1 + np.exp(-30)), 0, 30, 1e4], atol=1e-14)
    np.testing.assert_allclose(reference.softmax(np.array([1e4, 1e4, -np.inf])), [0.5, 0.5, 0])


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("types", ["F32", "BF16", "Q8_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "Q5_K", {"token_embd": "Q6_K", "attn_v": "F16", ".": "Q4_0"}])
def test_a_file_is_the_model_of_its_stored_weights(types, keep, tmp_path):
    """Also under the other name of the final norm."""
    model = load_model(tiny_gguf(tmp_path / "m.gguf", types=types, norm_name="output_norm"), keep=keep)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    stored = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64) for t in reader.tensors}
    stored["token_embd_norm.weight"] = stored.pop("output_norm.weight")
    assert model.weights.keys() == stored.keys()
    expected = forward(Model(model.hparams, stored), TOKENS)
    assert relative_rms(forward(model, TOKENS), expected) < MAX_RMS_SAME_SUM


def test_types_lose_what_they_should(tmp_path):
    """The better the type, the nearer the logits; BF16 holds these weights exactly."""
    exact = forward(load_model(tiny_gguf(tmp_path / "m.gguf")), TOKENS)
    errors = {}
    for types in ("BF16", "F16", "Q8_0", "Q6_K", "Q5_K", "Q4_0"):
        errors[types] = relative_rms(forward(load_model(tiny_gguf(tmp_path / "m.gguf", types=types)), TOKENS), exact)
    assert errors["BF16"] == 0
    assert errors["F16"] < 1e-5 < errors["Q8_0"] < errors["Q6_K"] < errors["Q5_K"] < errors["Q4_0"] < 1


def test_q6_k_encoder_of_the_test_models_is_valid():
    w = np.zeros((2, 512), np.float32)
    w[1, :16] = 1e-3
    w[1, 300] = -5.0
    data = encode(w, GGMLType.Q6_K)
    back = gguf.quants.dequantize(data, gguf.GGMLQuantizationType.Q6_K)
    assert data.shape == (2, 2 * 210) and (back[0] == 0).all() and abs(back[1, 300] + 5) < 0.02
