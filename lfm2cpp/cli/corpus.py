"""Options of the commands that measure something on a text, and the model and chunks that they name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lfm2cpp.errors import UsageError

from .loading import CompileProgress, read_text, thread_count, without_last_newline
from .options import F, decorate, env_names, file_options

if TYPE_CHECKING:
    from lfm2cpp.engine.engine import Engine

MAX_TEXT = 64 << 20  # bytes
N_BATCH = 512


def corpus_options(function: F) -> F:
    return decorate(function, [
        file_options,
        click.option("-f", "--file", "text_file", metavar="FILE", required=True, help="The text."),
        click.option("-c", "--ctx-size", type=click.IntRange(16, 32768), default=512, metavar="N", show_default=True,
                     help="Tokens of a chunk, which the model reads from the beginning."),
        click.option("--chunks", type=click.IntRange(-1), default=-1, metavar="N",
                     help="Chunks at most; -1: the whole text."),
        click.option("-t", "--threads", type=int, default=-1, metavar="N", envvar=env_names("THREADS"),
                     help="CPU threads; -1: one a core.", show_default=True),
        click.option("--parse-special", is_flag=True, help="Markers such as <|im_start|> become their tokens."),
    ])  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    engine: Engine
    chunks: list[list[int]]

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.chunks))


@contextmanager
def open_corpus(
    path: Path, text_file: str, ctx_size: int, chunks: int, threads: int, parse_special: bool, **engine_options: bool
) -> Iterator[Corpus]:
    """The model at `path`, loaded to measure something, and the text's chunks. UsageError, LFM2Error."""
    from lfm2cpp.corpus import text_chunks
    from lfm2cpp.engine.engine import Engine
    from lfm2cpp.text.vocab import Vocab

    if chunks == 0:
        raise UsageError("--chunks is 0, expected 1 or more, or -1 for the whole text")
    text, n_threads = without_last_newline(read_text(text_file, "--file", limit=MAX_TEXT)), thread_count(threads)
    with CompileProgress() as compiling:
        engine = Engine(path, n_ctx=ctx_size, n_threads=n_threads, n_batch=min(ctx_size, N_BATCH), progress=compiling,
                        **engine_options)  # fmt: skip
    with engine:
        vocab = Vocab(engine.gguf)
        tokens = vocab.tokenize(text, add_bos=vocab.add_bos, parse_special=parse_special)
        bos = vocab.bos_id if vocab.add_bos else None
        yield Corpus(engine, text_chunks(tokens, ctx_size, bos=bos, n_chunks=chunks if chunks > 0 else None))
