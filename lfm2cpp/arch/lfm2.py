"""LFM2 facts: hyper-parameters, metadata keys and the one tensor table.

The converter maps names with the table, the quantizer chooses types with it, the runtime validates with it.
Authority: transformers' modular_lfm2.py for the architecture, llama.cpp for the file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .table import KeySpec, TensorSpec

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


# n_vocab has no row: it is the number of rows of token_embd. n_layer comes first: others are checked against it.
KEYS = (
    KeySpec("n_layer", "block_count", "UINT32", 1, 512),
    KeySpec("n_ctx_train", "context_length", "UINT32", 1, 2**30),
    KeySpec("n_embd", "embedding_length", "UINT32", 1, 2**20),
    KeySpec("n_ff", "feed_forward_length", "UINT32", 1, 2**24),
    KeySpec("n_head", "attention.head_count", "UINT32", 1, 2**16),
    KeySpec("n_head_kv", "attention.head_count_kv", "ARRAY", 0, 2**16),
    KeySpec("rope_freq_base", "rope.freq_base", "FLOAT32", 1e-3, 1e15),
    KeySpec("norm_rms_eps", "attention.layer_norm_rms_epsilon", "FLOAT32", 1e-20, 1.0),
    KeySpec("l_cache", "shortconv.l_cache", "UINT32", 2, 64),
)

# Keys of related models (sliding windows, encoders, other rotations) that change what has to be computed. A file may
# carry them with a value that changes nothing: the function is given the HParams and the value.
NEUTRAL_KEYS: dict[str, Callable[[HParams, Any], bool]] = {
    "attention.causal": lambda hp, v: v is True,
    "attention.sliding_window": lambda hp, v: v == 0,
    "attention.key_length": lambda hp, v: v == hp.n_embd_head,
    "attention.value_length": lambda hp, v: v == hp.n_embd_head,
    "rope.dimension_count": lambda hp, v: v == hp.n_embd_head,
    "rope.scaling.type": lambda hp, v: v == "none",
    "rope.scaling.factor": lambda hp, v: v in (0.0, 1.0),
    "rope.scale_linear": lambda hp, v: v in (0.0, 1.0),
    "pooling_type": lambda hp, v: v == 0,
    "expert_count": lambda hp, v: v == 0,
}


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
