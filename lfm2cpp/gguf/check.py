"""NaN and Inf in stored weights: in floats, and in the scales of block types, whose other bits are always fine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lfm2cpp.ggml import TRAITS, GGMLType

from .header import TensorInfo
from .reader import GGUFFile

CHUNK_BYTES = 4 << 20

# A float is NaN or Inf when its exponent is all ones: (stored as, exponent bits).
_F16, _BF16, _F32, _F64 = ("<u2", 0x7C00), ("<u2", 0x7F80), ("<u4", 0x7F800000), ("<u8", 0x7FF0 << 48)
_E8M0 = ("u1", 0xFF)  # one value of a bare exponent is NaN

# (byte in the block, kind) of every scale and minimum; ggml-common.h is the source.
_F16_AT_0, _F16_AT_0_2 = ((0, _F16),), ((0, _F16), (2, _F16))
FLOATS: dict[GGMLType, tuple[tuple[int, tuple[str, int]], ...]] = {
    GGMLType.F32: ((0, _F32),),
    GGMLType.F16: _F16_AT_0,
    GGMLType.BF16: ((0, _BF16),),
    GGMLType.F64: ((0, _F64),),
    GGMLType.Q4_0: _F16_AT_0,
    GGMLType.Q4_1: _F16_AT_0_2,
    GGMLType.Q5_0: _F16_AT_0,
    GGMLType.Q5_1: _F16_AT_0_2,
    GGMLType.Q8_0: _F16_AT_0,
    GGMLType.Q8_1: _F16_AT_0_2,
    GGMLType.Q2_K: ((80, _F16), (82, _F16)),
    GGMLType.Q3_K: ((108, _F16),),
    GGMLType.Q4_K: _F16_AT_0_2,
    GGMLType.Q5_K: _F16_AT_0_2,
    GGMLType.Q6_K: ((208, _F16),),
    GGMLType.Q8_K: ((0, _F32),),
    GGMLType.IQ2_XXS: _F16_AT_0,
    GGMLType.IQ2_XS: _F16_AT_0,
    GGMLType.IQ2_S: _F16_AT_0,
    GGMLType.IQ3_XXS: _F16_AT_0,
    GGMLType.IQ3_S: _F16_AT_0,
    GGMLType.IQ1_S: _F16_AT_0,
    GGMLType.IQ4_NL: _F16_AT_0,
    GGMLType.IQ4_XS: _F16_AT_0,
    GGMLType.TQ1_0: ((52, _F16),),
    GGMLType.TQ2_0: ((64, _F16),),
    GGMLType.MXFP4: ((0, _E8M0),),
}
# Where the table of dtypes knows a block, both must agree.
for _type, _floats in FLOATS.items():
    _dtype = TRAITS[_type].dtype
    if _dtype is not None and _dtype.fields:
        assert [at for at, _ in _floats] == [f[1] for f in _dtype.fields.values() if f[0] == np.dtype("<f2")]


@dataclass(frozen=True)
class NonFinite:
    """A tensor with NaN or Inf: the first row (all dimensions but the last counted as rows), and how many values."""

    name: str
    row: int
    count: int

    def __str__(self) -> str:
        return f"tensor {self.name} holds {self.count} NaN or Inf, the first in row {self.row}"


def find_non_finite(gguf: GGUFFile, *, progress: Callable[[int], None] | None = None) -> Iterator[NonFinite]:
    """Scan all tensors, a few megabytes at a time; `progress(n)` hears of every n bytes.

    Integer types, and IQ1_M whose scale is scattered over its block, are taken to be fine.
    """
    for info in gguf.tensors.values():
        found = _scan(gguf, info, progress)
        if found is not None:
            yield found


def non_finite_blocks(blocks: NDArray[np.uint8], ggml_type: GGMLType) -> NDArray[np.intp]:
    """Of blocks (n, type_size): the indices of those with NaN or Inf, ascending, once for each such float."""
    found = []
    for at, (dtype, exponent) in FLOATS.get(ggml_type, ()):
        width = np.dtype(dtype).itemsize
        bits = np.ascontiguousarray(blocks[:, at : at + width]).view(dtype)[:, 0]
        found.append(np.flatnonzero((bits & bits.dtype.type(exponent)) == exponent))
    return np.sort(np.concatenate(found)) if found else np.empty(0, np.intp)


def _scan(gguf: GGUFFile, info: TensorInfo, progress: Callable[[int], None] | None) -> NonFinite | None:
    traits = TRAITS[info.ggml_type]
    blocks = gguf.data(info.name).reshape(-1, traits.type_size)
    blocks_per_row = info.shape[-1] // traits.block_size
    step = max(1, CHUNK_BYTES // traits.type_size)
    first: int | None = None
    count = 0
    for start in range(0, len(blocks), step):
        chunk = blocks[start : start + step]
        bad = non_finite_blocks(chunk, info.ggml_type)
        if len(bad):
            first = start + int(bad[0]) if first is None else first
            count += len(bad)
        gguf.release(info.name)
        if progress is not None:
            progress(chunk.nbytes)
    return None if first is None else NonFinite(info.name, first // blocks_per_row, count)
