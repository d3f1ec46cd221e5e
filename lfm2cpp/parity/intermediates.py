"""The named intermediates of a forward pass, in the order in which they are computed.

Each is an array (n_tokens, width), heads side by side. Inside layer `il` a name is written "name-il".
"""

from __future__ import annotations

from dataclasses import dataclass

from lfm2cpp.arch.lfm2 import HParams

BEFORE_LAYERS = ("inp_embd",)
CONV = ("attn_norm", "conv_in", "bx", "conv", "conv_out_gated", "conv_out")
ATTENTION = ("attn_norm", "q", "k", "v", "q_norm", "k_norm", "q_rope", "k_rope", "attn", "attn_out")
FFN = ("ffn_inp", "ffn_norm", "ffn_gate", "ffn_up", "ffn_swiglu", "ffn_out", "l_out")
AFTER_LAYERS = ("result_norm", "result_output")

LOGITS = "result_output"

# product of a matrix -> (its input, the matrix). The inputs feed nothing else than such products.
LINEAR = {
    "conv_in": ("attn_norm", "shortconv.in_proj.weight"),
    "conv_out": ("conv_out_gated", "shortconv.out_proj.weight"),
    "q": ("attn_norm", "attn_q.weight"),
    "k": ("attn_norm", "attn_k.weight"),
    "v": ("attn_norm", "attn_v.weight"),
    "attn_out": ("attn", "attn_output.weight"),
    "ffn_gate": ("ffn_norm", "ffn_gate.weight"),
    "ffn_up": ("ffn_norm", "ffn_up.weight"),
    "ffn_out": ("ffn_swiglu", "ffn_down.weight"),
}


@dataclass(frozen=True)
class Intermediate:
    """One intermediate of one model; `il` is -1 before and `n_layer` after the layers."""

    il: int
    part: str  # the name without the layer
    name: str


def intermediates(hp: HParams) -> list[Intermediate]:
    """All intermediates of a model in the order of computation."""
    found = [Intermediate(-1, part, part) for part in BEFORE_LAYERS]
    for il in range(hp.n_layer):
        parts = (CONV if hp.is_conv(il) else ATTENTION) + FFN
        found += [Intermediate(il, part, f"{part}-{il}") for part in parts]
    return found + [Intermediate(hp.n_layer, part, part) for part in AFTER_LAYERS]
