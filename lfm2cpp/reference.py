"""LFM2 in plain NumPy and float64: the model as a lesson, and the oracle that everything faster is tested against.

    x = token_embd[tokens]
    for each layer:
        x = x + mix(rms_norm(x))           # a few layers: attention; the others: short convolution
        x = x + swiglu_ffn(rms_norm(x))
    logits = output @ rms_norm(x)

Everything is (n_tokens, width): the tokens of one sequence, no padding, no batch. `State` is what the model remembers
of the tokens before, so a prompt may come at once, in pieces or token by token. `note(name, x)` returns x after
showing it to whoever wants to see the intermediates; their names are the ones that `lfm2cpp parity` compares.

    model, trace = load_model("LFM2-350M-F32.gguf"), {}
    logits = forward(model, [1, 708, 356], note=recorder(trace))       # (3, n_vocab); trace["conv-0"], ...
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from lfm2cpp.arch.lfm2 import HParams, layer_tensors
from lfm2cpp.arch.validate import validate_model
from lfm2cpp.gguf.dequantize import dequantize
from lfm2cpp.gguf.header import TensorInfo
from lfm2cpp.gguf.reader import GGUFFile, read_gguf

F64 = NDArray[np.float64]
Trace = dict[str, F64]
Note = Callable[[str, F64], F64]


@dataclass(frozen=True)
class Model:
    """Hyper-parameters and weights by GGUF name, float64; a matrix is (n_out, n_in)."""

    hparams: HParams
    weights: Mapping[str, F64]

    def layer(self, il: int) -> dict[str, F64]:
        """The weights of one layer by their name inside it: "attn_norm.weight", ..."""
        return {spec.name: self.weights[f"blk.{il}.{spec.name}"] for spec in layer_tensors(self.hparams, il)}

    @property
    def output(self) -> F64:
        """The output head; a tied model has none of its own and uses the embedding."""
        return self.weights["output.weight" if "output.weight" in self.weights else "token_embd.weight"]


@dataclass
class State:
    """What a sequence keeps of its `n_past` tokens; dictionaries by layer."""

    n_past: int = 0
    conv: dict[int, F64] = field(default_factory=dict)  # the last l_cache - 1 rows of B*X: (d_conv, n_embd)
    k: dict[int, F64] = field(default_factory=dict)  # rotated keys: (n_past, n_head_kv, n_embd_head)
    v: dict[int, F64] = field(default_factory=dict)  # values: (n_past, n_head_kv, n_embd_head)

    @classmethod
    def empty(cls, hp: HParams) -> State:
        """Before the first token: the convolution sees zeros, attention sees nothing."""
        state = cls()
        for il in hp.conv_layers:
            state.conv[il] = np.zeros((hp.d_conv, hp.n_embd))
        for il in hp.attention_layers:
            state.k[il] = np.zeros((0, hp.n_head_kv[il], hp.n_embd_head))
            state.v[il] = np.zeros((0, hp.n_head_kv[il], hp.n_embd_head))
        return state

    def copy(self) -> State:
        # The arrays are replaced, never written into, so sharing them is safe.
        return State(self.n_past, dict(self.conv), dict(self.k), dict(self.v))


def unnoticed(name: str, x: F64) -> F64:
    return x


def recorder(trace: Trace) -> Note:
    """A note that keeps every intermediate in `trace` as (n_tokens, width), heads side by side."""

    def note(name: str, x: F64) -> F64:
        trace[name] = x.reshape(len(x), -1)
        return x

    return note


def forward(model: Model, tokens: Sequence[int], state: State | None = None, note: Note = unnoticed) -> F64:
    """Logits of every token: (n_tokens,) -> (n_tokens, n_vocab). Appends the tokens to `state`."""
    hp = model.hparams
    state = State.empty(hp) if state is None else state
    x = note("inp_embd", model.weights["token_embd.weight"][np.asarray(tokens)])    # -> (n_tokens, n_embd)
    for il in range(hp.n_layer):
        in_layer = partial(_note_in_layer, note, il)
        x = block(x, model.layer(il), il, hp, state, in_layer)                      # -> (n_tokens, n_embd)
    state.n_past += len(x)
    # The final norm is called token_embd_norm, but has nothing to do with the embedding.
    x = note("result_norm", rms_norm(x, model.weights["token_embd_norm.weight"], hp.norm_rms_eps))
    return note("result_output", linear(x, model.output))                           # -> (n_tokens, n_vocab)


def block(x: F64, w: dict[str, F64], il: int, hp: HParams, state: State, note: Note) -> F64:
    """One layer, pre-norm with two residuals: (n_tokens, n_embd) -> (n_tokens, n_embd)"""
    h = note("attn_norm", rms_norm(x, w["attn_norm.weight"], hp.norm_rms_eps))
    mix = short_conv if hp.is_conv(il) else attention
    x = note("ffn_inp", x + mix(h, w, il, hp, state, note))
    h = note("ffn_norm", rms_norm(x, w["ffn_norm.weight"], hp.norm_rms_eps))
    return note("l_out", x + swiglu_ffn(h, w, note))


def short_conv(h: F64, w: dict[str, F64], il: int, hp: HParams, state: State, note: Note) -> F64:
    """Double-gated short convolution: out_proj(C * conv(B * X)), with B, C, X = in_proj(h); no activation, no bias.

    The convolution is depthwise (each channel on its own) and causal: tap j looks l_cache-1-j tokens back.
    """
    n_tokens = len(h)
    bcx = note("conv_in", linear(h, w["shortconv.in_proj.weight"]))                 # -> (n_tokens, 3 * n_embd)
    b, c, x = np.split(bcx, 3, axis=1)                                              # -> (n_tokens, n_embd) each
    bx = note("bx", b * x)
    taps = w["shortconv.conv.weight"]                                               # (n_embd, l_cache)
    past = np.concatenate([state.conv[il], bx])                                     # -> (d_conv + n_tokens, n_embd)
    conv = note("conv", sum(past[j : j + n_tokens] * taps[:, j] for j in range(hp.l_cache)))
    state.conv[il] = past[n_tokens:]                                                # -> (d_conv, n_embd)
    y = note("conv_out_gated", c * conv)
    return note("conv_out", linear(y, w["shortconv.out_proj.weight"]))              # -> (n_tokens, n_embd)


def attention(h: F64, w: dict[str, F64], il: int, hp: HParams, state: State, note: Note) -> F64:
    """Causal attention in which n_gqa query heads share a KV head: (n_tokens, n_embd) -> (n_tokens, n_embd)

    q and k are normalized per head before they are rotated.
    """
    n_tokens, n_gqa = len(h), hp.n_head // hp.n_head_kv[il]
    heads = (n_tokens, -1, hp.n_embd_head)
    q = note("q", linear(h, w["attn_q.weight"])).reshape(heads)                     # -> (n_tokens, n_head, n_embd_head)
    k = note("k", linear(h, w["attn_k.weight"])).reshape(heads)                     # -> (n_tokens, n_head_kv, ...)
    v = note("v", linear(h, w["attn_v.weight"])).reshape(heads)
    q = note("q_norm", rms_norm(q, w["attn_q_norm.weight"], hp.norm_rms_eps))
    k = note("k_norm", rms_norm(k, w["attn_k_norm.weight"], hp.norm_rms_eps))
    positions = state.n_past + np.arange(n_tokens)
    q = note("q_rope", rope(q, positions, hp.rope_freq_base))
    k = note("k_rope", rope(k, positions, hp.rope_freq_base))
    state.k[il] = k = np.concatenate([state.k[il], k])                              # -> (n_kv, n_head_kv, n_embd_head)
    state.v[il] = v = np.concatenate([state.v[il], v])
    k, v = np.repeat(k, n_gqa, axis=1), np.repeat(v, n_gqa, axis=1)                 # -> (n_kv, n_head, n_embd_head)
    scores = q.transpose(1, 0, 2) @ k.transpose(1, 2, 0) / np.sqrt(hp.n_embd_head)  # -> (n_head, n_tokens, n_kv)
    future = np.arange(len(k)) > positions[:, None]                                 # (n_tokens, n_kv)
    weights = softmax(np.where(future, -np.inf, scores))
    out = note("attn", (weights @ v.transpose(1, 0, 2)).transpose(1, 0, 2).reshape(n_tokens, -1))
    return note("attn_out", linear(out, w["attn_output.weight"]))                   # -> (n_tokens, n_embd)


def swiglu_ffn(h: F64, w: dict[str, F64], note: Note) -> F64:
    """down(silu(gate(h)) * up(h)): (n_tokens, n_embd) -> (n_tokens, n_ff) -> (n_tokens, n_embd)"""
    gate = note("ffn_gate", linear(h, w["ffn_gate.weight"]))
    up = note("ffn_up", linear(h, w["ffn_up.weight"]))
    return note("ffn_out", linear(note("ffn_swiglu", silu(gate) * up), w["ffn_down.weight"]))


def linear(x: F64, w: F64) -> F64:
    """(n_tokens, n_in), (n_out, n_in) -> (n_tokens, n_out)"""
    return x @ w.T


def rms_norm(x: F64, weight: F64, eps: float) -> F64:
    """weight * x / sqrt(mean(x^2) + eps), over the last dimension"""
    return weight * (x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps))


def rope(x: F64, positions: NDArray[np.int64], freq_base: float) -> F64:
    """Rotate each pair (x[i], x[i + half]) of a head by its angle: NeoX pairs, not neighbours.

    x: (n_tokens, n_head, n_embd_head)
    """
    half = x.shape[-1] // 2
    angle = rope_angles(positions, half, freq_base)                                 # -> (n_tokens, half)
    cos, sin = np.cos(angle)[:, None, :], np.sin(angle)[:, None, :]                 # -> (n_tokens, 1, half)
    x1, x2 = x[..., :half], x[..., half:]
    return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


def rope_angles(positions: NDArray[np.int64], half: int, freq_base: float) -> F64:
    """position * freq_base^(-i / half): (n_tokens,) -> (n_tokens, half)

    Rounded to float32 step by step as transformers does: at position 4000 these roundings turn a head by 1e-4,
    more than all other float32 roundings of a model together.
    """
    exponent = np.arange(half, dtype=np.float32) / np.float32(half)
    freq = np.float32(1) / (freq_base ** exponent.astype(np.float64)).astype(np.float32)
    return (positions.astype(np.float32)[:, None] * freq).astype(np.float64)


def silu(x: F64) -> F64:
    """x * sigmoid(x); written with tanh, which cannot overflow"""
    return x * (0.5 + 0.5 * np.tanh(0.5 * x))


def softmax(x: F64) -> F64:
    """exp(x) / sum(exp(x)) over the last dimension, shifted so that the largest exponent is 0"""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _note_in_layer(note: Note, il: int, name: str, x: F64) -> F64:
    return note(f"{name}-{il}", x)


class FileWeights(Mapping[str, F64]):
    """The weights of a GGUF file by canonical name, unpacked when asked for; kept only if `keep`."""

    def __init__(self, gguf: GGUFFile, tensors: Mapping[str, TensorInfo], *, keep: bool) -> None:
        self._gguf, self._tensors = gguf, tensors
        self._kept: dict[str, F64] | None = {} if keep else None

    def __getitem__(self, name: str) -> F64:
        if self._kept is not None and name in self._kept:
            return self._kept[name]
        info = self._tensors[name]
        w = dequantize(self._gguf.data(info.name), info.ggml_type, info.shape).astype(np.float64)
        if self._kept is not None:
            self._kept[name] = w
        return w

    def __contains__(self, name: object) -> bool:
        return name in self._tensors  # without unpacking it

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def load_model(path: str | os.PathLike[str], *, keep: bool = True) -> Model:
    """The model of a GGUF file of any mixture of types.

    With `keep` its weights stay in memory as float64, 8 bytes each; without, a weight is unpacked on each use and
    only one layer is in memory at a time. Raises ModelFormatError.
    """
    gguf = read_gguf(path)
    facts = validate_model(gguf)
    return Model(facts.hparams, FileWeights(gguf, facts.tensors, keep=keep))
