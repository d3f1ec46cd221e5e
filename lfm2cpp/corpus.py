"""A text as chunks of one length, each of which a model reads from the beginning: for what is measured on a text."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import LFM2Error


def text_chunks(tokens: Sequence[int], n_ctx: int, *, bos: int | None, n_chunks: int | None = None) -> list[list[int]]:
    """Chunks of n_ctx tokens, n_chunks at most; what is left over of the text is not used.

    `bos` takes the place of every chunk's first token, unless it is None, as in llama-imatrix and llama-perplexity.
    LFM2Error for a text of less than a chunk.
    """
    chunks = [list(tokens[i : i + n_ctx]) for i in range(0, len(tokens) - n_ctx + 1, n_ctx)][:n_chunks]
    if not chunks:
        raise LFM2Error(f"the text has {len(tokens)} tokens, expected a chunk of {n_ctx} or many; give a longer text")
    if bos is not None:
        for chunk in chunks:
            chunk[0] = bos
    return chunks
