"""What kernels need of a weight type: a module a block type, floats.py for F32, F16 and BF16; blocks.py, columns.py,
nibbles.py, fives.py and sub_blocks.py are what several block types share. For a block type a module says

    BLOCK, BLOCK_BYTES         elements (a multiple of 32) and bytes of a block in the file
    row_group(row, g)          address of group g (W blocks of 32 columns) of the row at `row`
    dot_group(acc, w, act, n_groups, g, far)
                               acc + the products of the group at w, which may be a copy completed with zeros, with
                               group g of the activation row at act (activation.py: one token), lane = block; between
                               its products it asks for what lies `far` bytes ahead (make_prefetches). Which blocks
                               meet which activations, widths.place_of says: make_gathers has them for blocks of 32,
                               sub_blocks.VECTORS for those of 256
    prepare_rows(w, row_bytes, n_blocks, room)
                               W rows of n_blocks * 32 elements as the next two take them: w, or the address of a copy
                               at `room`, of SCALES + N_SCALES * SUMS bytes (panel.py) for 32 columns at most
    block_columns(rows, row_bytes, b)
                               columns 32 b .. 32 b + 31 of W rows: a tuple of eight vectors of integers (columns.py),
                               of the range that sum_block's dot takes, signed ones through panel_i8
    OFFSET                     what these integers are larger by than signed ones, which fit int8
    N_SCALES, block_scales(rows, row_bytes, b)
                               their scales and minima: a tuple of N_SCALES (1 to 3) vectors of float32, one a row
    N_SUMS, sum_block(tile)    sums(q, a, tables, table_step, room): a tuple of N_SUMS (1 or 2) integer tiles over 32
                               columns (dot_tile.py). a: their activations; table X has their entry at
                               tables + table_step * ACT_X, and what belongs to the tile that follows lies
                               next_tile = table_step * ACT_GROUP further. It only hands tables on to the tile's
                               words, as z, which must be -OFFSET * the sum of a: with matrices there are none. Tiles
                               that lie in memory go to room, one PANEL_SUMS bytes behind the other
    finish_block(tile)         finish(f, sums, scales, tables, table_step): f + these sums, scaled; the same float
                               operations as dot_group's
    dequantize_block(w, out)   BLOCK float32

None of them reads beyond the row, group or block it is given. mul_mat.py, panel.py, few_tokens.py, swiglu.py and
get_rows.py do the rest for every type of BLOCK_TYPES. Beside its module and an entry there a new type needs

    arch/validate.py    an entry in WEIGHT_TYPES; with it the kernels' tests take it up, and what is missing fails
    ggml.py, gguf/      its block in NumPy (dequantize.py), for files, the reference and the tests
    parity/             how far from Hugging Face it may be (limits.py, rounding.py)
    benchmark/          files of random weights (random_blocks.py, random_model.py)
    quant/              an encoder and a recipe, to write such files; tests/tiny_model.py a plain one, if gguf has none
"""

from __future__ import annotations

from types import ModuleType

from . import iq4_nl, q4_0, q4_1, q4_K, q5_0, q5_1, q5_K, q6_K, q8_0

BLOCK_TYPES: dict[str, ModuleType] = {
    "q4_0": q4_0, "q4_1": q4_1, "q4_K": q4_K, "q5_0": q5_0, "q5_1": q5_1, "q5_K": q5_K, "q6_K": q6_K, "q8_0": q8_0,
    "iq4_nl": iq4_nl,
}  # as kernels are named  # fmt: skip
