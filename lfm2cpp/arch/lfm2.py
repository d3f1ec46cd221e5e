"""LFM2 facts: hyper-parameters, metadata keys and the one tensor table.

The converter maps names with the table, the quantizer chooses types with it, the runtime validates with it.
Authority: transformers' modular_lfm2.py for the architecture, llama.cpp for the file.
"""

from __future__ import annotations

from dataclasses import dataclass

from .table import TensorSpec

NAME = "lfm2"


@dataclass(frozen=True)
class HParams:
    """Hyper-parameters of an LFM2 stack. `n_head_kv[il] == 0` marks a short-convolution layer."""

    n_vocab: int
    n_ctx_train: int
    n_embd: int
    n_layer: int
    n_ff: int
    n_head: int
    n_head_kv: tuple[int, ...]
    l_cache: int  # taps of the short convolution
    norm_rms_eps: float
    rope_freq_base: float

    @property
    def n_embd_head(self) -> int:
        return self.n_embd // self.n_head

    @property
    def d_conv(self) -> int:
        """Columns of B*X that the convolution keeps between tokens."""
        return self.l_cache - 1

    def is_conv(self, il: int) -> bool:
        return self.n_head_kv[il] == 0

    @property
    def attention_layers(self) -> tuple[int, ...]:
        return tuple(il for il in range(self.n_layer) if not self.is_conv(il))

    @property
    def conv_layers(self) -> tuple[int, ...]:
        return tuple(il for il in range(self.n_layer) if self.is_conv(il))


def _kv_width(hp: HParams, il: int) -> int:
    return hp.n_head_kv[il] * hp.n_embd_head


GLOBAL_TENSORS = (
    TensorSpec("token_embd.weight", "model.embed_tokens.weight", lambda hp, il: (hp.n_vocab, hp.n_embd)),
    # The final norm, in spite of its name; files of other writers call it output_norm.
    TensorSpec("token_embd_norm.weight", "model.embedding_norm.weight", lambda hp, il: (hp.n_embd,),
               aliases=("output_norm.weight",)),
    TensorSpec("output.weight", "lm_head.weight", lambda hp, il: (hp.n_vocab, hp.n_embd), optional=True),
)  # fmt: skip

_NORM_AND_FFN = (
    TensorSpec("attn_norm.weight", "operator_norm.weight", lambda hp, il: (hp.n_embd,)),
    TensorSpec("ffn_norm.weight", "ffn_norm.weight", lambda hp, il: (hp.n_embd,)),
    TensorSpec("ffn_gate.weight", "feed_forward.w1.weight", lambda hp, il: (hp.n_ff, hp.n_embd)),
    TensorSpec("ffn_down.weight", "feed_forward.w2.weight", lambda hp, il: (hp.n_embd, hp.n_ff)),
    TensorSpec("ffn_up.weight", "feed_forward.w3.weight", lambda hp, il: (hp.n_ff, hp.n_embd)),
)

ATTENTION_TENSORS = _NORM_AND_FFN + (
    TensorSpec("attn_q.weight", "self_attn.q_proj.weight", lambda hp, il: (hp.n_embd, hp.n_embd)),
    TensorSpec("attn_k.weight", "self_attn.k_proj.weight", lambda hp, il: (_kv_width(hp, il), hp.n_embd)),
    TensorSpec("attn_v.weight", "self_attn.v_proj.weight", lambda hp, il: (_kv_width(hp, il), hp.n_embd)),
    TensorSpec("attn_output.weight", "self_attn.out_proj.weight", lambda hp, il: (hp.n_embd, hp.n_embd)),
    TensorSpec("attn_q_norm.weight", "self_attn.q_layernorm.weight", lambda hp, il: (hp.n_embd_head,)),
    TensorSpec("attn_k_norm.weight", "self_attn.k_layernorm.weight", lambda hp, il: (hp.n_embd_head,)),
)  # fmt: skip

CONV_TENSORS = _NORM_AND_FFN + (
    TensorSpec("shortconv.in_proj.weight", "conv.in_proj.weight", lambda hp, il: (3 * hp.n_embd, hp.n_embd)),
    # HF keeps (n_embd, 1, l_cache); the file drops the middle 1. Always F32.
    TensorSpec("shortconv.conv.weight", "conv.conv.weight", lambda hp, il: (hp.n_embd, hp.l_cache),
               quantizable=False),
    TensorSpec("shortconv.out_proj.weight", "conv.out_proj.weight", lambda hp, il: (hp.n_embd, hp.n_embd)),
)  # fmt: skip


def layer_tensors(hp: HParams, il: int) -> tuple[TensorSpec, ...]:
    return CONV_TENSORS if hp.is_conv(il) else ATTENTION_TENSORS
