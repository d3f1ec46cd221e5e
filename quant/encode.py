"""float32 rows -> the bytes of any type that can be written, and stored rows -> float32.

The block types' encoders are kernels (legacy.py, iq4_nl.py, k_quants.py; legacy_weighted.py), loaded when first needed;
F32, F16 and BF16 are NumPy. Importances, one float32 for each column of a matrix, change what the searches of all but
Q8_0 find.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from lfm2cpp.errors import LFM2Error
from lfm2cpp.ggml import TRAITS, GGMLType, row_nbytes
from lfm2cpp.gguf.check import non_finite_blocks
from lfm2cpp.gguf.dequantize import dequantize
from lfm2cpp.terminal import note

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

KERNELS: dict[GGMLType, str] = {
    GGMLType.Q4_0: "quant.legacy:quantize_blocks_q4_0",
    GGMLType.Q4_1: "quant.legacy:quantize_blocks_q4_1",
    GGMLType.Q5_0: "quant.legacy:quantize_blocks_q5_0",
    GGMLType.Q5_1: "quant.legacy:quantize_blocks_q5_1",
    GGMLType.Q8_0: "quant.legacy:quantize_blocks_q8_0",
    GGMLType.IQ4_NL: "quant.iq4_nl:quantize_blocks_iq4_nl",
    GGMLType.Q4_K: "quant.k_quants:quantize_blocks_q4_K",
    GGMLType.Q5_K: "quant.k_quants:quantize_blocks_q5_K",
    GGMLType.Q6_K: "quant.k_quants:quantize_blocks_q6_K",
}
# Of the types that importances make a difference to; these encoders take them.
WEIGHTED_KERNELS: dict[GGMLType, str] = {
    GGMLType.Q4_0: "quant.legacy_weighted:quantize_blocks_q4_0",
    GGMLType.Q4_1: "quant.legacy_weighted:quantize_blocks_q4_1",
    GGMLType.Q5_0: "quant.legacy_weighted:quantize_blocks_q5_0",
    GGMLType.Q5_1: "quant.legacy_weighted:quantize_blocks_q5_1",
    **{t: KERNELS[t] for t in (GGMLType.IQ4_NL, GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K)},
}
FLOAT_TYPES = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
ENCODABLE = (*FLOAT_TYPES, *KERNELS)
SLAB_ELEMENTS = 1 << 20  # of a thread's unit of work: 4 MB of float32


class EncodingError(LFM2Error):
    """A weight that its new type cannot hold."""


def encode_rows(
    rows: F32,
    ggml_type: GGMLType,
    n_threads: int = 1,
    *,
    name: str = "tensor",
    first_row: int = 0,
    importance: F32 | None = None,
) -> U8:
    """Rows (n_rows, n_per_row) -> their stored bytes, uint8 (n_rows, row_nbytes).

    importance: contiguous float32 (n_per_row,), finite and not negative: how much an error in a column counts.
    The bytes do not depend on `n_threads`. Raises EncodingError for NaN, infinity, or a value too large for the type;
    it names the tensor by `name` and the row counted from `first_row`.
    """
    rows = np.ascontiguousarray(rows, np.float32)
    n_rows, n_per_row = rows.shape
    out = np.empty((n_rows, row_nbytes(ggml_type, n_per_row)), np.uint8)
    load_kernels([kernel_name(ggml_type, importance)])
    slabs = list(row_slabs(n_rows, n_per_row))
    if n_threads == 1 or len(slabs) < 2:
        for start, stop in slabs:
            encode_into(rows[start:stop], ggml_type, out[start:stop], name, first_row + start, importance)
        return out
    with ThreadPoolExecutor(n_threads) as pool:
        jobs = [
            pool.submit(encode_into, rows[start:stop], ggml_type, out[start:stop], name, first_row + start, importance)
            for start, stop in slabs
        ]
        for job in jobs:  # in order, so that of several errors the first row's is raised
            job.result()
    return out


def decode_rows(data: U8, ggml_type: GGMLType, n_per_row: int) -> F32:
    """Stored bytes of whole rows -> float32 (n_rows, n_per_row); of F32 a view, not a copy."""
    data = data.reshape(-1)
    shape = (data.size // row_nbytes(ggml_type, n_per_row), n_per_row)
    if ggml_type == GGMLType.F32:
        return data.view(np.float32).reshape(shape)
    return dequantize(data, ggml_type, shape)


def row_slabs(n_rows: int, n_per_row: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of consecutive slabs of rows, SLAB_ELEMENTS at most but one row at least."""
    step = max(1, SLAB_ELEMENTS // n_per_row)
    for start in range(0, n_rows, step):
        yield start, min(n_rows, start + step)


def kernel_name(ggml_type: GGMLType, importance: F32 | None = None) -> str | None:
    """Of the encoder, if it is a kernel."""
    weighted = WEIGHTED_KERNELS.get(ggml_type) if importance is not None else None
    return weighted or KERNELS.get(ggml_type)


def load_kernels(names: Iterable[str | None]) -> None:
    """Have these encoders ready; the first time on a machine they are compiled, which is noted."""
    wanted = sorted({name for name in names if name})
    if wanted:
        from lfm2cpp.kernels.library import library

        library().load(wanted, _note_compilation)


def _note_compilation(name: str, done: int, total: int) -> None:
    if done == 0:
        note(f"compiling {total} encoder{'s'[: total > 1]}; this happens once on a machine")


def encode_into(
    rows: F32, ggml_type: GGMLType, out: U8, name: str, first_row: int, importance: F32 | None = None
) -> None:
    """Encode contiguous rows into `out` (n_rows, row_nbytes), which belongs to this call alone."""
    kernel = kernel_name(ggml_type, importance)
    if kernel:
        block_index = _encode_blocks(kernel, rows, TRAITS[ggml_type].block_size, out, importance)
    else:
        _ENCODE_FLOATS[ggml_type](rows, out)
        bad = non_finite_blocks(out.reshape(-1, TRAITS[ggml_type].type_size), ggml_type)
        block_index = int(bad[0]) if len(bad) else -1
    if block_index >= 0:
        raise _refusal(rows, ggml_type, block_index, name, first_row)


def _encode_blocks(kernel: str, rows: F32, block_size: int, out: U8, importance: F32 | None) -> int:
    """-1, or the index of the first block that was refused."""
    from lfm2cpp.kernels.library import library

    bad, n_per_row = np.zeros(1, np.int64), rows.shape[1]
    if importance is not None:
        assert importance.dtype == np.float32 and importance.shape == (n_per_row,) and importance.flags.c_contiguous
    library().load([kernel])[kernel]({
        "src": rows.ctypes.data,
        "dst": out.ctypes.data,
        "n_blocks": rows.size // block_size,
        "row_blocks": n_per_row // block_size,
        "importance": 0 if importance is None else importance.ctypes.data,
        "bad": bad.ctypes.data,
    })
    return int(bad[0])


def _refusal(rows: F32, ggml_type: GGMLType, block_index: int, name: str, first_row: int) -> EncodingError:
    """What is wrong with the block of this index."""
    size = TRAITS[ggml_type].block_size
    block = rows.reshape(-1)[block_index * size : (block_index + 1) * size]
    row = first_row + block_index * size // rows.shape[1]
    if not np.isfinite(block).all():
        value = block[~np.isfinite(block)][0]
        return EncodingError(f"{name}, row {row}, holds {value}, expected finite weights; the source model is damaged")
    value = block[np.argmax(np.abs(block))]
    return EncodingError(
        f"{name}, row {row}, holds {value:g}, which is too large for {ggml_type.name}; F32 can hold it"
    )


def _to_f32(rows: F32, out: U8) -> None:
    out.view(np.float32)[...] = rows


def _to_f16(rows: F32, out: U8) -> None:
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        out.view(np.float16)[...] = rows


def _to_bf16(rows: F32, out: U8) -> None:
    """To nearest even: the upper half of a float32 after adding almost half of what is cut off."""
    words = rows.view(np.uint32)
    odd = (words >> 16) & 1
    odd += words
    odd += 0x7FFF
    odd >>= 16
    # NaN could be carried over to infinity or zero; any quiet NaN will do to have it found.
    np.copyto(odd, 0x7FC0, where=np.isnan(rows))
    out.view(np.uint16)[...] = odd


_ENCODE_FLOATS = {GGMLType.F32: _to_f32, GGMLType.F16: _to_f16, GGMLType.BF16: _to_bf16}
