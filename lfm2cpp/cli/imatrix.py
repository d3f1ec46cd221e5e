"""`lfm2cpp imatrix`: measure on a text which columns of a model's matrices matter, for `quantize --imatrix`."""

from __future__ import annotations

import time
from typing import Any

import click

from lfm2cpp.errors import UsageError
from lfm2cpp.terminal import Progress

from .loading import CompileProgress, model_path, read_text, thread_count
from .options import file_options

MAX_TEXT = 64 << 20  # bytes


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@file_options
@click.option("-f", "--file", "text_file", metavar="FILE", required=True, help="The text to run the model over.")
@click.option("-o", "--output-file", "--output", "output", metavar="FILE", default="imatrix.gguf", show_default=True)
@click.option("-c", "--ctx-size", type=click.IntRange(16, 32768), default=512, metavar="N", show_default=True,
              help="Tokens of a chunk, which the model reads from the beginning.")
@click.option("--chunks", type=click.IntRange(-1), default=-1, metavar="N", help="Chunks at most; -1: the whole text.")
@click.option("-t", "--threads", type=int, default=-1, metavar="N", help="CPU threads; -1: one a core.")
@click.option("--parse-special", is_flag=True, help="Markers such as <|im_start|> in the text become their tokens.")
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
def imatrix(
    text_file: str, output: str, ctx_size: int, chunks: int, threads: int, parse_special: bool, force: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Run a model over a text and write an importance matrix, as llama-imatrix does.

    The model is best an F32, F16 or BF16 one, the text some hundred kilobytes of what the model will be used for. Then:
    lfm2cpp quantize --imatrix imatrix.gguf IN.gguf Q4_0
    """
    from lfm2cpp.engine.engine import Engine
    from lfm2cpp.files import check_destination
    from lfm2cpp.gguf.imatrix import write_imatrix
    from lfm2cpp.importance import measure_importances
    from lfm2cpp.text.vocab import Vocab

    if chunks == 0:
        raise UsageError("--chunks is 0, expected 1 or more, or -1 for the whole text")
    started = time.monotonic()
    text = read_text(text_file, "--file", limit=MAX_TEXT)
    path = model_path(options)
    check_destination(output, size=0, force=force, inputs=[path, text_file])
    with CompileProgress() as compiling:
        engine = Engine(path, n_ctx=ctx_size, n_threads=thread_count(threads), n_batch=min(ctx_size, 512),
                        sum_squares=True, progress=compiling)  # fmt: skip
    with engine:
        vocab = Vocab(engine.gguf)
        tokens = vocab.tokenize(text, add_bos=vocab.add_bos, parse_special=parse_special)
        n_chunks = len(tokens) // ctx_size if chunks < 0 else min(chunks, len(tokens) // ctx_size)
        with Progress("measuring", total=n_chunks * ctx_size, unit=" tokens") as bar:
            found = measure_importances(
                engine, tokens, bos=vocab.bos_id if vocab.add_bos else None, n_ctx=ctx_size, n_chunks=n_chunks,
                progress=bar.update,
            )  # fmt: skip
    write_imatrix(
        output, found.sums, found.n_inputs, dataset=text_file, n_chunks=found.n_chunks, chunk_size=ctx_size,
        force=force, inputs=[path, text_file],
    )  # fmt: skip
    click.echo(
        f"{click.format_filename(output)}: {len(found.sums)} matrices, {found.n_chunks} chunks of {ctx_size} tokens, "
        f"{time.monotonic() - started:.1f} s"
    )
