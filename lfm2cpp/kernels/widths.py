"""Sizes that both the recorder (without Numba) and the kernels must agree on."""

from __future__ import annotations

from . import level

_TARGET = level.target()
_LEVEL = _TARGET.level
W = _LEVEL.lanes
REGISTERS = 32 if _LEVEL.bits in (128, 512) and _LEVEL.name != "generic" else 16  # vectors: NEON and AVX-512, others
BF16_PAIRS = _TARGET.has_bf16_products  # BF16 weights meet activations rounded to BF16, two columns at a time
BIT_MATRICES = _TARGET.has_bit_matrices  # an instruction takes any bits out of every byte (simd/arithmetic.py)
MATRICES = _LEVEL.has_matrices  # its product takes W rows by 16 tokens at a time, from memory (dot_matrix.py)
PAIRS = _LEVEL.name == "neon-i8mm"  # its product takes 2 rows by 2 tokens at a time (dot_tile.py)
PAIR_SUMS = _LEVEL.name == "avx2"  # its products of bytes come as sums of two in 16 bits, which are widened after that
FLOATS_IN_MEMORY = PAIR_SUMS  # where a quantized product's float sums lie from block to block (dot_tile.py)
# Tokens of a tile of activations, and of the widest tile of a panel's product: the integer sums must fit the registers,
# and the float sums unless they lie in memory. With matrices the integer ones do, and a product takes 16 tokens.
TILE_TOKENS = 16 if MATRICES else 6 if REGISTERS == 32 else 4 if FLOATS_IN_MEMORY else 3
# Of the tiles for what is left over; with matrices only what is done with the sums is narrower.
MEDIUM_TILE_TOKENS = 8 if MATRICES else 4 if REGISTERS == 32 else 2
SMALL_TILE_TOKENS = 4 if MATRICES else 2
# Of the tiles of rows in registers, for a few tokens more; and up to how many tokens, in turn, they beat panels.
ROW_TILE_TOKENS = (2, 4, 6, 8, 12) if REGISTERS == 32 else (2, 4, 6, 8) if FLOATS_IN_MEMORY else (2, 4, 6)
FEW_TOKENS = 24 if REGISTERS == 32 and not MATRICES else ROW_TILE_TOKENS[-1]
MATRIX_BLOCKS = 8  # of a panel that are multiplied together, where that is by matrices
PANEL_SUMS = 8 * W * TILE_TOKENS  # bytes of the integer sums of a panel's rows by a tile of tokens
SLICED_TOKENS = 4 * TILE_TOKENS  # up to which a panel is unpacked and used slice by slice
FLOAT_STREAMED_TOKENS = 3  # up to which a float product streams its rows from the file, each token in turn
FLOAT_TILE_TOKENS, FLOAT_SMALL_TILE_TOKENS = 6, 2  # of the tiles of a float product: one sum a value

# Which of a group's blocks share a vector of activations of one token: blocks side by side, which come with few whole
# loads where any words of two vectors go into one, or every fourth, whose sums then need not be put in order.
_SIDE_BY_SIDE = _LEVEL.bits == 512


def place_of(block: int) -> tuple[int, int]:
    """Where block 0 .. W - 1 of a group is in one token's activations: which of four pairs of vectors, which piece."""
    return (block // (W // 4), block % (W // 4)) if _SIDE_BY_SIDE else (block % 4, block // 4)


def block_of(pair: int, piece: int) -> int:
    """The block at this place"""
    return W // 4 * pair + piece if _SIDE_BY_SIDE else pair + 4 * piece


assert all(block_of(*place_of(block)) == block for block in range(W))


# Byte offsets of an activation row's tables, per group of W blocks: multiply by the number of groups, and for a tile of
# rows by TILE_TOKENS as well (activation.py).
ACT_D = 32 * W
ACT_DS = 36 * W
ACT_Z8 = 40 * W
ACT_Z128 = 44 * W
ACT_Z32_LOW = 48 * W
ACT_Z32_HIGH = 52 * W
ACT_GROUP = 56 * W
QUANTIZE_NBYTES = 4 * W + ACT_GROUP - ACT_D + 2 * 32 * 4 * W  # scratch of quantize_lanes (activation.py)

LOGITS_GROUP = 8 * W  # logits of which a sampler knows the largest
LOGITS_BINS = 512  # by which it finds where a share of all probability ends
PANEL_ROWS = 2 * W  # rows of weights that are unpacked together
PAGE_TOKENS = 64  # tokens of a KV page
KEPT_COLUMNS = 64  # of a convolution's input that a sequence keeps: a power of two, more than a kernel reaches back
LINE = 64  # bytes of a cache line
# Bytes of the sums of a panel's rows: those of some tokens, those of a chain of blocks by a tile, and, of matrices, the
# integer ones of MATRIX_BLOCKS blocks, two for each of them at most, with a line between two blocks.
TOTALS = (max(FEW_TOKENS, SLICED_TOKENS) + 2 * TILE_TOKENS) * 4 * PANEL_ROWS
TOTALS += MATRIX_BLOCKS * (2 * PANEL_SUMS + LINE) if MATRICES else 0
# How a stream from memory is asked for. Since Zen 5 once, early, straight into the first-level cache. Others ask early
# into the second-level cache and again soon before the use: a Xeon into the first; a Zen up to 4 into the second as
# well, for there a request that finds no place is forgotten.
ASKED_NEAR = _TARGET.zen >= 5
AGAIN_NEAR = _TARGET.zen == 0


def activation_nbytes(n: int) -> int:
    """Bytes of one quantized activation row of n elements."""
    return -(-(n // 32) // W) * ACT_GROUP


# Bytes of a page's PAGE_TOKENS tokens of one column of K or V, by type; a q8_0 column has its part of the scales.
KV_COLUMN_BYTES = {"f16": 2 * PAGE_TOKENS, "f32": 4 * PAGE_TOKENS, "q8_0": PAGE_TOKENS * 34 // 32}
CHUNK_PAGES = 8
CHUNK_TOKENS = CHUNK_PAGES * PAGE_TOKENS  # context that one softmax covers before results are merged
QUERY_TILE = 12 if REGISTERS == 32 else 6  # queries that use a key while it is in a register
QUERY_GROUP = 48  # tokens of a prefill unit of attention


def padded_head(n_embd_head: int) -> int:
    """Columns of a V row: whole pairs of vectors."""
    return -(-n_embd_head // PANEL_ROWS) * PANEL_ROWS


def panel_nbytes(n: int) -> int:
    """Scratch bytes that a product with rows of n needs at most: two panels of floats, a copy of rows, two sets of
    sums, and what quantizing its results needs. Panels of integers are smaller, and leave room for prepared rows.
    """
    runs = -(-n // PANEL_ROWS)
    return 2 * runs * PANEL_ROWS * 4 * PANEL_ROWS + 2 * TOTALS + 128 * W * W + 8192 + QUANTIZE_NBYTES


BLOCK_TABLE = 4096  # bytes of the list of blocks that a unit of attention reads
SMALL_TILE, MEDIUM_TILE = 2, 4  # query heads of one token that share K and V
SPLIT_ROWS = 32  # rows of scores that a unit of few tokens has at once: one a query head


def rows_of_group(n_gqa: int) -> int:
    """Rows that the query heads of one KV head take: whole tiles, or a small one (attention.py)."""
    return SMALL_TILE if n_gqa <= SMALL_TILE else -(-n_gqa // MEDIUM_TILE) * MEDIUM_TILE


def parts_nbytes(n_tokens: int, n_head_kv: int, n_gqa: int, n_padded: int, n_chunks: int) -> int:
    """Bytes of the results that attention leaves for few tokens: a part for each token, KV head and chunk."""
    return n_tokens * n_head_kv * n_chunks * rows_of_group(n_gqa) * 4 * (PANEL_ROWS + n_padded)


def attention_nbytes(n_padded: int, n_gqa: int) -> int:
    """Scratch bytes of attention: a list of blocks, and the scores of few tokens, or the scores and results of a tile
    and the states of a group of tokens. Quantizing takes what is over by then."""
    scores = max(SPLIT_ROWS, rows_of_group(n_gqa)) * 4 * CHUNK_TOKENS
    row = 4 * (PANEL_ROWS + n_padded)
    grouped = QUERY_TILE * 4 * CHUNK_TOKENS + (QUERY_TILE + QUERY_GROUP) * row
    return BLOCK_TABLE + max(grouped, scores, QUANTIZE_NBYTES) + 64
