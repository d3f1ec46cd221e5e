"""Which kernels a model needs, found by recording its plan without loading anything.

The recorder decides which kernels there are; a list kept by hand would be a second place that knows.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from lfm2cpp import sampling
from lfm2cpp.arch.lfm2 import HParams
from lfm2cpp.arch.validate import WEIGHT_TYPES, validate_model
from lfm2cpp.engine import team
from lfm2cpp.engine.load import RopeTable, load_weights
from lfm2cpp.engine.memory import PageLayout
from lfm2cpp.engine.model import Attention, FeedForward, ShortConv, Weights, record_lfm2
from lfm2cpp.engine.plan import Plan, Weight
from lfm2cpp.ggml import GGMLType, row_nbytes
from lfm2cpp.gguf import read_gguf

from .limits import KERNELS as PROBES

N_EMBD, N_FF, N_HEAD, N_VOCAB, N_CTX = 256, 512, 4, 512, 64  # whole blocks of every type


def all_kernels(kv_types: Iterable[str]) -> list[str]:
    """Every kernel that files of any supported type need, and those that measure the machine."""
    names = [name for ggml_type in sorted(WEIGHT_TYPES) for name in type_kernels(ggml_type, "f16")]
    names += [name for kv_type in kv_types for name in type_kernels(GGMLType.Q4_0, kv_type)]
    return list(dict.fromkeys([*names, *PROBES]))


def file_kernels(path: str | os.PathLike[str], kv_type: str) -> list[str]:
    """What this file needs. ModelFormatError when it cannot be run."""
    with read_gguf(path) as gguf:
        facts = validate_model(gguf)
        layout = PageLayout.of(facts.hparams, kv_type)
        weights, _ = load_weights(gguf, facts, layout, RopeTable(facts.hparams, N_CTX))
        return _recorded(weights, facts.hparams)


def type_kernels(ggml_type: GGMLType, kv_type: str) -> list[str]:
    """What a model needs whose matrices are all of this type."""
    hp = HParams(
        n_vocab=N_VOCAB, n_ctx_train=N_CTX, n_embd=N_EMBD, n_layer=2, n_ff=N_FF, n_head=N_HEAD,
        n_head_kv=(0, N_HEAD), l_cache=3, norm_rms_eps=1e-5, rope_freq_base=1e6,
    )  # fmt: skip
    return _recorded(_weights(hp, ggml_type, kv_type), hp)


def _recorded(weights: Weights, hp: HParams) -> list[str]:
    plan = Plan(n_batch=1, n_threads=1, n_ctx=N_CTX)
    record_lfm2(plan, weights, hp)
    return list(dict.fromkeys([*(op.kernel for op in plan.ops), *team.KERNELS, *sampling.KERNELS]))


def _weights(hp: HParams, ggml_type: GGMLType, kv_type: str) -> Weights:
    """Shapes and types without data: a recorded plan that is never run reads nothing."""

    def matrix(n_rows: int, n: int) -> Weight:
        return Weight("", 0, (n_rows, n), ggml_type, row_nbytes(ggml_type, n))

    def vector(n: int) -> Weight:
        return Weight("", 0, (n,), GGMLType.F32, 4 * n)

    layout = PageLayout.of(hp, kv_type)
    ffn = FeedForward(vector(N_EMBD), matrix(N_FF, N_EMBD), matrix(N_FF, N_EMBD), matrix(N_EMBD, N_FF))
    square, head = matrix(N_EMBD, N_EMBD), vector(hp.n_embd_head)
    conv = ShortConv(vector(N_EMBD), matrix(3 * N_EMBD, N_EMBD), square, layout.conv[0], ffn)
    attention = Attention(vector(N_EMBD), square, square, square, square, head, head, layout.kv[1], ffn)
    embedding = matrix(N_VOCAB, N_EMBD)
    return Weights(embedding, (conv, attention), vector(N_EMBD), embedding, 0)
