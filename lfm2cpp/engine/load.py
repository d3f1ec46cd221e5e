"""From a validated file to weights that a plan can record: addresses in the map, and the few tables made at load."""

from __future__ import annotations

from typing import Any

import numpy as np

from lfm2cpp.arch.lfm2 import HParams
from lfm2cpp.arch.validate import ModelFacts
from lfm2cpp.ggml import row_nbytes
from lfm2cpp.gguf.reader import GGUFFile

from .memory import ConvLayer, PageLayout, zeroed
from .model import Attention, FeedForward, ShortConv, Weights
from .plan import Weight

ROPE_STEP = 1024  # positions that are added to the table at a time


class RopeTable:
    """cos and sin of every position: (n_ctx, n_embd_head) float32, computed as the context grows.

    HF's arithmetic: frequencies and angles in float32, so that long contexts agree with it.
    """

    def __init__(self, hp: HParams, n_ctx: int) -> None:
        self.n_ready, self.n_ctx = 0, n_ctx
        size = hp.n_embd_head
        self._bytes = zeroed(4 * size * n_ctx)
        self.table = self._bytes.view(np.float32).reshape(n_ctx, size)
        exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
        self._frequencies = np.float32(1.0) / np.float32(hp.rope_freq_base) ** exponents

    @property
    def address(self) -> int:
        return self.table.ctypes.data

    def grow(self, n_positions: int) -> None:
        """Make the first n_positions ready."""
        while self.n_ready < n_positions:
            last = min(self.n_ready + ROPE_STEP, self.n_ctx)
            positions = np.arange(self.n_ready, last, dtype=np.float32)
            angles = positions[:, None] * self._frequencies[None, :]
            self.table[self.n_ready : last] = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
            self.n_ready = last


def load_weights(gguf: GGUFFile, facts: ModelFacts, layout: PageLayout, rope: RopeTable) -> tuple[Weights, list[Any]]:
    """The model's weights, and what must be kept alive beside the file: the transposed convolution taps."""
    hp: HParams = facts.hparams
    keep: list[Any] = []

    def weight(name: str) -> Weight:
        info = facts.tensors[name]
        address = gguf.locate(info.name)
        return Weight(name, address, info.shape, info.ggml_type, row_nbytes(info.ggml_type, info.shape[-1]))

    def conv_layer(il: int) -> ConvLayer:
        info = facts.tensors[f"blk.{il}.shortconv.conv.weight"]
        taps = gguf.data(info.name).view(np.float32).reshape(info.shape)  # (n_embd, l_cache)
        transposed = np.ascontiguousarray(taps.T)
        keep.append(transposed)
        base = layout.conv[il]
        return ConvLayer(base.l_cache, base.state_offset, base.snapshot_offset, transposed.ctypes.data)

    def layer(il: int) -> ShortConv | Attention:
        def part(name: str) -> Weight:
            return weight(f"blk.{il}.{name}.weight")

        ffn = FeedForward(part("ffn_norm"), part("ffn_gate"), part("ffn_up"), part("ffn_down"))
        if hp.is_conv(il):
            in_proj, out_proj = part("shortconv.in_proj"), part("shortconv.out_proj")
            return ShortConv(part("attn_norm"), in_proj, out_proj, conv_layer(il), ffn)
        return Attention(
            part("attn_norm"), part("attn_q"), part("attn_k"), part("attn_v"), part("attn_output"),
            part("attn_q_norm"), part("attn_k_norm"), layout.kv[il], ffn,
        )  # fmt: skip

    token_embd = weight("token_embd.weight")
    output = weight("output.weight") if "output.weight" in facts.tensors else token_embd
    layers = tuple(layer(il) for il in range(hp.n_layer))
    norm = weight("token_embd_norm.weight")
    return Weights(token_embd, layers, norm, output, rope.address), keep
