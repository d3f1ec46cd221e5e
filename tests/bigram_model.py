"""A real LFM2 file whose answers are known: the layers add nothing, and each token has one successor.

    bigram_gguf(path, ["Hello", "!", "<|im_end|>"])      # answers every question with "Hello!"

The embeddings are orthogonal and the output row of a token is the embedding of the token before it, so that the next
token's logit is about 22 and all others are 0. Chains start at the newline that ends a chat template's prompt; what
has no successor is followed by <|im_end|>.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tiny_model import TinyShape, Weights, tiny_gguf, tiny_tokens

N_EMBD, N_VOCAB, N_PAD = 512, 400, 8
NEWLINE = "\u010a"
HELLO = ["H", "e", "l", "o", "!", "<|im_end|>"]  # a chain of its own: "Helo!"
SHAPE: dict[str, Any] = {
    "n_embd": N_EMBD, "n_layer": 2, "attention": (1,), "n_head": 8, "n_head_kv": 2, "n_ff": 256, "n_vocab": N_VOCAB,
    "n_pad": N_PAD, "n_ctx_train": 128000, "tied": False,
}  # fmt: skip


def piece_ids() -> dict[str, int]:
    """Piece -> id, pieces as the vocabulary spells them: \u0120 is a blank, \u010a a newline."""
    tokens, _ = tiny_tokens(TinyShape(**SHAPE))
    return {piece: i for i, piece in enumerate(tokens)}


def bigram_gguf(
    path: Path,
    *chains: Sequence[str],
    start: str = NEWLINE,
    metadata: Mapping[str, tuple[gguf.GGUFValueType, Any] | None] | None = None,
) -> Path:
    """Write the model. Each chain follows `start`; several chains leave a choice at equal odds."""
    ids = piece_ids()
    successors: list[tuple[int, int]] = []
    for chain in chains:
        pairs = zip([start, *chain], chain, strict=False)
        successors += [(ids[left], ids[right]) for left, right in pairs]

    def edit(weights: Weights) -> None:
        for name in weights:
            if name.endswith(("attn_output.weight", "shortconv.out_proj.weight", "ffn_down.weight")):
                weights[name][:] = 0
        weights["token_embd_norm.weight"][:] = 1
        rng = np.random.default_rng(0)
        orthogonal = np.linalg.qr(rng.standard_normal((N_EMBD, N_EMBD)))[0].astype(np.float32)
        weights["token_embd.weight"][:] = orthogonal[:N_VOCAB]
        output = weights["output.weight"]
        output[:] = 0
        followed = {left for left, _ in successors}
        for left, right in dict.fromkeys(successors):
            output[right] += orthogonal[left]
        for left in range(N_VOCAB):
            if left not in followed:
                output[ids["<|im_end|>"]] += orthogonal[left]

    return tiny_gguf(path, edit=edit, metadata=metadata, **SHAPE)


def endless_gguf(path: Path, **options: Any) -> Path:
    """A model that says "abababab..." until it is stopped."""
    return bigram_gguf(path, ["a", "b", "a"], **options)
