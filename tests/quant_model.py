"""Small LFM2 GGUF files whose weights are hard to quantize, the same on every machine and with every NumPy.

No random generator: values come from an integer hash. Rows cycle through what an encoder can get wrong: zeros of both
signs, ties, lone outliers, subnormals, scales that are tiny or huge. llama-quantize was run on each of CASES once, and
the sha256 of what it wrote is kept in data/quant_llama.json. To do that again:

    python tests/quant_model.py LLAMA_QUANTIZE > tests/data/quant_llama.json
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import zlib
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfm2cpp.arch import iter_tensors, lfm2
from lfm2cpp.ggml import GGMLType
from lfm2cpp.gguf import Metadata, TensorToWrite, Value, ValueType, write_gguf

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    """A source model and one run of llama-quantize on it. `source` is the matrices' type, F32, F16 or BF16, or a file
    type that the F32 model is quantized to first (and then again, with --allow-requantize)."""

    shape: str
    source: str
    target: str
    pure: bool = False
    imatrix: bool = False

    @property
    def key(self) -> str:
        flags = f"{' pure' if self.pure else ''}{' imatrix' if self.imatrix else ''}"
        return f"{self.shape} {self.source} -> {self.target}{flags}"


@dataclass(frozen=True)
class Shape:
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: tuple[int, ...]
    n_vocab: int = 64
    tied: bool = True
    extra: dict[str, tuple[int, ...]] = field(default_factory=dict, hash=False)  # tensors outside the table


SHAPES = {
    "plain": Shape(256, 512, 4, (0, 2, 0)),
    "untied": Shape(256, 512, 4, (0, 2), tied=False),
    "narrow": Shape(96, 160, 3, (0, 1, 0)),  # whole blocks of 32, not of 256
    "odd": Shape(48, 80, 4, (2, 0)),  # neither: F16
    "one_row": Shape(64, 1, 2, (0, 1)),  # ffn_gate and ffn_up have one row, ffn_down rows of one element
    "deep": Shape(64, 96, 2, (0,) * 11 + (1, 0)),  # layers 10, 11, 12 sort behind 9
    "layers": Shape(256, 256, 4, (0, 2) * 6),  # of which some get more bits in the K-quants
    "extra": Shape(64, 96, 2, (0, 1), extra={"adapter.weight": (32, 64), "blk.1.adapter_norm.weight": (2, 64)}),
}
K_FILES = ("Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M")
ENCODED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", *K_FILES, "Q6_K", "Q8_0")
OTHER_SHAPES = [shape for shape in SHAPES if shape not in ("plain", "layers")]
CASES = [
    *(Case("plain", "F32", target) for target in (*ENCODED, "F16", "BF16", "F32", "COPY")),
    *(Case("plain", "F32", target, pure=True) for target in ENCODED),
    *(Case("plain", source, target) for source in ("F16", "BF16") for target in ("Q4_0", "Q8_0", "F32", "F16", "BF16")),
    *(Case("plain", source, target) for source in ENCODED for target in ("Q4_0", "Q6_K", "F16")),
    *(Case(shape, "F32", target) for shape in OTHER_SHAPES for target in ("Q4_0", "Q8_0", "Q6_K", "Q4_K_M", "IQ4_NL", "F16")),
    *(Case("layers", "F32", target) for target in (*K_FILES, "IQ4_NL")),
    Case("untied", "F32", "Q4_0", pure=True),
    *(Case("plain", "F32", target, imatrix=True) for target in (*ENCODED, "F16")),
    *(Case("plain", "F32", target, pure=True, imatrix=True) for target in ENCODED),
    *(Case("plain", source, "Q4_0", imatrix=True) for source in ("BF16", "Q5_1")),
    *(Case("layers", "F32", target, imatrix=True) for target in ("Q4_0", "Q5_0", "Q4_K_M", "IQ4_NL")),
    *(Case(shape, "F32", target, imatrix=True) for shape in ("untied", "narrow", "deep") for target in ("Q4_1", "Q4_K_M")),
]


def hard_model(path: Path, shape: str, ggml_type: str = "F32", **changes: Any) -> Path:
    """Write the model of this shape with matrices of type F32, F16 or BF16. `changes` are tensors by name."""
    hp, shapes = table(shape)
    tensors = []
    for name, tensor_shape in shapes.items():
        w = changes.get(name, hard_values(name, tensor_shape))
        stored = GGMLType[ggml_type] if is_matrix(name, tensor_shape) else GGMLType.F32
        tensors.append(TensorToWrite(name, w.shape, stored, lambda w=w, stored=stored: [store(w, stored)]))
    write_gguf(path, _metadata(hp), tensors, force=True)
    return path


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and not name.endswith(("_norm.weight", "shortconv.conv.weight"))


def table(shape: str) -> tuple[lfm2.HParams, dict[str, tuple[int, ...]]]:
    """The hyper-parameters, and the shape of every tensor by name."""
    s = SHAPES[shape]
    hp = lfm2.HParams(
        n_vocab=s.n_vocab, n_ctx_train=512, n_embd=s.n_embd, n_layer=len(s.n_head_kv), n_ff=s.n_ff, n_head=s.n_head,
        n_head_kv=s.n_head_kv, l_cache=3, norm_rms_eps=1e-5, rope_freq_base=1e6,
    )  # fmt: skip
    shapes = {e.name: e.shape for e in iter_tensors(lfm2, hp) if not (e.spec.optional and s.tied)}
    return hp, {**shapes, **s.extra}


IMATRIX = "model.imatrix.gguf"


def hard_imatrix(path: Path, shape: str, changes: dict[str, F32] | None = None, **metadata: Value) -> Path:
    """Write importances for the model of this shape, of every matrix in the layers: some huge, some zero. `changes` are
    tensors by name, `metadata` keys by name with _ for their dots, which replace what would be there."""
    tensors = {}
    for name, (_, n) in ((name, s) for name, s in table(shape)[1].items() if name.startswith("blk") and is_matrix(name, s)):
        seed = zlib.crc32(name.encode())
        sums = np.ldexp(np.abs(bell(n, seed)), (hashed(n, seed + 4) % 12).astype(np.int32))
        pick = hashed(n, seed + 5)
        sums[pick % 17 == 0] = 0
        if seed % 3 == 0:  # nearly all columns dead: sub-blocks with one that counts, or none
            sums[pick % 97 > 2] = 0
        if seed % 3 == 1:  # a few that count for everything
            sums[pick % 61 == 0] *= np.float32(1e4)
        tensors[name + ".in_sum2"] = sums.astype(np.float32)
        tensors[name + ".counts"] = np.array([391], np.float32)
    tensors |= changes or {}
    keys = {
        "general.type": Value.string("imatrix"),
        "imatrix.datasets": Value.strings(["text.txt", "other.txt"]),
        "imatrix.chunk_count": Value.u32(3),
        "imatrix.chunk_size": Value.u32(128),
    }
    keys |= {key: metadata[key.replace(".", "_")] for key in keys if key.replace(".", "_") in metadata}
    to_write = [TensorToWrite(n, w.shape, GGMLType.F32, lambda w=w: [w.tobytes()]) for n, w in tensors.items()]
    write_gguf(path, keys, to_write, force=True)
    return path


def store(w: F32, ggml_type: GGMLType) -> bytes:
    if ggml_type == GGMLType.F32:
        return w.tobytes()
    if ggml_type == GGMLType.F16:
        return w.astype(np.float16).tobytes()
    return (w.view(np.uint32) >> 16).astype(np.uint16).tobytes()  # BF16, cut off


def _metadata(hp: lfm2.HParams) -> Metadata:
    return {
        "general.architecture": Value.string("lfm2"),
        "general.file_type": Value.u32(0),
        "general.name": Value.string("h\u00e4rd"),
        "lfm2.block_count": Value.u32(hp.n_layer),
        "lfm2.context_length": Value.u32(hp.n_ctx_train),
        "lfm2.embedding_length": Value.u32(hp.n_embd),
        "lfm2.feed_forward_length": Value.u32(hp.n_ff),
        "lfm2.attention.head_count": Value.u32(hp.n_head),
        "general.quantization_version": Value.u32(1),
        "lfm2.attention.head_count_kv": Value.array(ValueType.INT32, hp.n_head_kv),
        "lfm2.rope.freq_base": Value.f32(hp.rope_freq_base),
        "lfm2.attention.layer_norm_rms_epsilon": Value.f32(hp.norm_rms_eps),
        "lfm2.vocab_size": Value.u32(hp.n_vocab),
        "lfm2.shortconv.l_cache": Value.u32(hp.l_cache),
        "test.strings": Value.strings(["a", "", "\u00e4"]),
    }


# --- the weights


def hashed(n: int, seed: int) -> NDArray[np.uint32]:
    """n scattered 32-bit words (the finalizer of MurmurHash3)."""
    x = np.arange(n, dtype=np.uint64) + np.uint64(seed << 32)
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x ^= x >> np.uint64(33)
        x *= np.uint64(multiplier)
    return (x >> np.uint64(32)).astype(np.uint32)


def uniform(n: int, seed: int) -> F32:
    """Multiples of 2^-23 in [-1, 1)."""
    return (hashed(n, seed) >> 8).astype(np.float32) * np.float32(2**-23) - np.float32(1)


def bell(n: int, seed: int) -> F32:
    """Sums of four uniform values: near to normal."""
    return (uniform(n, seed) + uniform(n, seed + 1)) + (uniform(n, seed + 2) + uniform(n, seed + 3))


@lru_cache(maxsize=256)
def hard_values(name: str, shape: tuple[int, ...]) -> F32:
    """Weights of a tensor (shared: not to be changed); each row of a matrix is of another kind. Norms are near 1."""
    seed = zlib.crc32(name.encode())
    if len(shape) == 1:
        return np.float32(1) + np.float32(0.1) * uniform(shape[0], seed)
    rows = [hard_row(i % N_KINDS, shape[1], seed + 16 * i) for i in range(shape[0])]
    return np.stack(rows)


N_KINDS = 20


def hard_row(kind: int, n: int, seed: int) -> F32:
    """One row of a kind 0 .. N_KINDS - 1."""
    w, pick, sign = bell(n, seed), hashed(n, seed + 4), np.where(hashed(n, seed + 5) & 1, -1, 1).astype(np.float32)
    group = np.arange(n) // 16  # a sub-block of Q6_K, half a block of the others
    decade = np.ldexp(np.float32(1), -(hashed(group.max() + 1, seed + 6) % 50).astype(np.int32))[group]
    rows = [
        lambda: w * np.float32(0.02),
        lambda: (w.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32),  # what a BF16 checkpoint gives
        lambda: np.zeros(n, np.float32),
        lambda: np.zeros(n, np.float32) * sign,
        lambda: np.full(n, 0.37, np.float32),
        lambda: np.full(n, -0.37, np.float32) * np.where(pick % 7, 1, -1).astype(np.float32),
        lambda: np.where(np.arange(n) % 64 == 13, np.float32(-5), w * np.float32(1e-4)),  # lone outliers
        lambda: np.round(w * 8) / np.float32(16),  # ties everywhere
        lambda: sign * (pick % 17).astype(np.float32) / np.float32(16),
        lambda: w * np.float32(1e-8),
        lambda: w * np.float32(1e4),
        lambda: np.ldexp(sign, -(pick % 24).astype(np.int32)),
        lambda: np.abs(w),
        lambda: -np.abs(w) - np.float32(1),
        lambda: (pick % 0x400000).astype(np.uint32).view(np.float32) * sign,  # subnormals
        lambda: w * np.float32(3e-6),  # scales that are subnormal as halves
        lambda: np.where(pick % 3 == 0, sign, w * np.float32(0.25)),  # many elements of the largest magnitude
        lambda: w * decade,
        lambda: np.where(pick % 29 == 0, w, np.float32(0) * sign),
        lambda: w * np.float32(2e-15),  # around the threshold below which a sub-block of Q6_K is zero
    ]
    assert len(rows) == N_KINDS
    return rows[kind]().astype(np.float32)


# --- what llama-quantize makes of them


def run(command: list[Any], folder: str = ".") -> None:
    subprocess.run([str(part) for part in command], check=True, capture_output=True, cwd=folder)


def hashes(llama_quantize: Path) -> dict[str, dict[str, str]]:
    """For each case: sha256 of the source and of the result."""
    found = {}
    llama_quantize = llama_quantize.resolve()
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            source, target = Path(folder) / "source.gguf", Path(folder) / "target.gguf"
            if case.source in ENCODED:
                run([llama_quantize, hard_model(target, case.shape), source, case.source])
            else:
                hard_model(source, case.shape, case.source)
            flags = ["--allow-requantize", *(["--pure"] if case.pure else [])]
            if case.imatrix:  # its name goes into the file
                hard_imatrix(Path(folder) / IMATRIX, case.shape)
                flags += ["--imatrix", IMATRIX]
            run([llama_quantize, *flags, source, target, case.target], folder)
            found[case.key] = {"source": sha256(source), "target": sha256(target)}
    return found


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    json.dump(hashes(Path(sys.argv[1])), sys.stdout, indent=1)
    print()
