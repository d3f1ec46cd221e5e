"""The LFM2 forward pass, recorded as a plan. No I/O, no state, no text.

Authority for the architecture: transformers' modular_lfm2.py. Names of intermediates: llama.cpp's, and ours where it
has none.
"""

from __future__ import annotations

from dataclasses import dataclass

from lfm2cpp.arch.lfm2 import HParams

from .memory import ConvLayer, KVLayer
from .plan import Plan, Rows, Weight


@dataclass(frozen=True)
class FeedForward:
    norm: Weight
    gate: Weight
    up: Weight
    down: Weight


@dataclass(frozen=True)
class ShortConv:
    """A double-gated causal short convolution."""

    norm: Weight
    in_proj: Weight
    out_proj: Weight
    conv: ConvLayer
    ffn: FeedForward


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention with QK norm and NeoX RoPE."""

    norm: Weight
    q: Weight
    k: Weight
    v: Weight
    output: Weight
    q_norm: Weight
    k_norm: Weight
    kv: KVLayer
    ffn: FeedForward


@dataclass(frozen=True)
class Weights:
    token_embd: Weight
    layers: tuple[ShortConv | Attention, ...]
    output_norm: Weight
    output: Weight  # the embedding itself where the head is tied
    rope_table: int  # address of (n_ctx, n_embd_head) float32


def record_lfm2(plan: Plan, w: Weights, hp: HParams) -> Rows:
    """Record the forward pass; returns the logits' rows, (n_out, n_vocab)."""
    x = plan.get_rows(w.token_embd, "inp_embd")  # (n_tokens, n_embd)
    for il, layer in enumerate(w.layers):
        h = plan.rms_norm(x, layer.norm, hp.norm_rms_eps, f"attn_norm-{il}")
        if isinstance(layer, ShortConv):
            x = shortconv(plan, x, h, layer, il)
        else:
            x = attention(plan, x, h, layer, w, hp, il)
        x = swiglu_ffn(plan, x, layer.ffn, hp, il)
    x = plan.rms_norm(x, w.output_norm, hp.norm_rms_eps, "result_norm", wanted_only=True)
    return plan.mul_mat(w.output, x, "result_output")


def shortconv(plan: Plan, x: Rows, h: Rows, layer: ShortConv, il: int) -> Rows:
    """x + out_proj(C * conv(B * X)), where B, C, X = in_proj(h)."""
    bcx = plan.mul_mat(layer.in_proj, h, f"conv_in-{il}")  # (n_tokens, 3 n_embd)
    gated = plan.shortconv(bcx, layer.conv, il)
    return plan.mul_mat_add(layer.out_proj, gated, x, f"conv_out-{il}", f"ffn_inp-{il}")


def attention(plan: Plan, x: Rows, h: Rows, layer: Attention, w: Weights, hp: HParams, il: int) -> Rows:
    """x + out_proj(softmax(q k^T / sqrt(d)) v) with q and k normed per head, then rotated."""
    q = plan.mul_mat(layer.q, h, f"q-{il}", sync=False)
    k = plan.mul_mat(layer.k, h, f"k-{il}", sync=False)
    v = plan.mul_mat(layer.v, h, f"v-{il}")
    q = plan.norm_rope(q, layer.q_norm, hp.norm_rms_eps, hp.n_head, w.rope_table, f"q_rope-{il}")
    k = plan.norm_rope(k, layer.k_norm, hp.norm_rms_eps, layer.kv.n_head_kv, w.rope_table, f"k_rope-{il}")
    mixed = plan.attention(q, k, v, layer.kv, il)
    return plan.mul_mat_add(layer.output, mixed, x, f"attn_out-{il}", f"ffn_inp-{il}")


def swiglu_ffn(plan: Plan, x: Rows, ffn: FeedForward, hp: HParams, il: int) -> Rows:
    """x + down(silu(gate(n)) * up(n)), n = norm(x)."""
    n = plan.rms_norm(x, ffn.norm, hp.norm_rms_eps, f"ffn_norm-{il}")
    hidden = plan.swiglu_ffn(ffn.gate, ffn.up, n, il)
    return plan.mul_mat_add(ffn.down, hidden, x, f"ffn_out-{il}", f"l_out-{il}")
