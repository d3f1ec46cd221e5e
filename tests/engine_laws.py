"""What the tests of the engine share: tiny models of several shapes, an oracle, comparison to the bit, pool audits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as ListLike
from pathlib import Path
from typing import Any

import numpy as np
from tiny_model import tiny_gguf

from lfm2cpp.engine.engine import Engine
from lfm2cpp.engine.sequence import Sequence

# Each differs from the others in everything that a law could depend on.
SHAPES: dict[str, dict[str, Any]] = {
    "q8_0": {"types": "Q8_0"},
    "f32-attention-first": {
        "types": "F32", "n_embd": 96, "n_head": 3, "n_head_kv": 1, "n_ff": 160, "l_cache": 2, "attention": (0, 2, 3),
    },
    "q4_0-mixed": {
        "types": {"token_embd|^output": "Q6_K", "ffn_down": "Q4_1", "attn_v": "F16", "attn_q": "Q4_K", "out_proj": "Q5_K", ".": "Q4_0"},
        "n_head": 2, "l_cache": 5, "tied": False, "attention": (1,),
    },
    "bf16-gqa8": {
        "types": "BF16", "n_embd": 128, "n_head": 8, "n_head_kv": 1, "n_ff": 200, "l_cache": 4, "attention": (1, 3),
    },
}  # fmt: skip
KV_TYPES = {"f32-attention-first": "f32", "q4_0-mixed": "q8_0"}  # f16 elsewhere
FIRST_ID, LAST_ID = 14, 300


def make_model(folder: Path, name: str, **changes: Any) -> Path:
    """The GGUF file of one of SHAPES."""
    return tiny_gguf(folder / f"{name}.gguf", **{**SHAPES[name], **changes})


def open_engine(folder: Path, name: str, **options: Any) -> Engine:
    path = folder / f"{name}.gguf"
    if not path.exists():
        make_model(folder, name)
    return Engine(path, **{"n_ctx": 1024, "n_threads": 1, "kv_type": KV_TYPES.get(name, "f16"), **options})


def random_ids(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(FIRST_ID, LAST_ID, n).tolist()


def run(engine: Engine, sequence: Sequence, ids: ListLike[int], chunks: Iterable[int] = ()) -> np.ndarray:
    """Logits (len(ids), n_vocab) of ids, evaluated in chunks of these sizes and the rest at once."""
    rows, done = [], 0
    for size in [*chunks, len(ids)]:
        if part := list(ids[done : done + size]):
            rows.append(engine.evaluate([(sequence, part)], logits="all")[0])
        done += len(part)
    return np.concatenate(rows)


def fresh(engine: Engine, ids: ListLike[int]) -> np.ndarray:
    """What a new sequence that shares nothing makes of ids, all at once."""
    with engine.sequence() as sequence:
        return engine.evaluate([(sequence, list(ids))], logits="all")[0]


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype == np.float32
    different = np.flatnonzero((found.view(np.int32) != expected.view(np.int32)).any(axis=1))
    assert not len(different), f"rows {different[:10]} of {len(found)} differ, by {np.abs(found - expected).max()}"


def audit(engine: Engine, sequences: Iterable[Sequence]) -> None:
    """Every page of the pool is either free or held exactly as often as it is counted."""
    pool = engine.pool
    pool.collect()
    held = Counter(pool.prefixes.values())
    for sequence in sequences:
        state = sequence.state
        held.update(state.pages)
        assert len(state.keys) == state.n_past // 64 <= len(state.pages)
        assert state.n_past <= len(state.tokens)
    free = Counter(pool._free)
    assert max(free.values(), default=1) == 1 and not free.keys() & held.keys()
    assert {page: n for page, n in enumerate(pool._references) if n} == dict(held)
    assert len(free) + len(held) == len(pool._references)


class TokenCounter:
    """Counts the tokens that an engine really evaluates, between `reset` and `count`."""

    def __init__(self, engine: Engine, monkeypatch: Any) -> None:
        self.count = 0
        step = engine._step

        def counted(parts: Any, stop: Any) -> None:
            self.count += sum(len(part.ids) for part in parts)
            step(parts, stop)

        monkeypatch.setattr(engine, "_step", counted)

    def reset(self) -> None:
        self.count = 0
