"""`lfm2cpp imatrix`: measure on a text which columns of a model's matrices matter, for `quantize --imatrix`."""

from __future__ import annotations

import time
from typing import Any

import click

from lfm2cpp.terminal import Progress

from .corpus import corpus_options, open_corpus
from .loading import model_path


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@corpus_options
@click.option("-o", "--output-file", "--output", "output", metavar="FILE", default="imatrix.gguf", show_default=True,
              help="The importance matrix to write.")
@click.option("--force", is_flag=True,
              help="Replace the output if it exists; load the model even if the memory does not suffice.")
def imatrix(output: str, force: bool, **options: Any) -> None:
    """Run a model over a text and write an importance matrix, as llama-imatrix does.

    The model is best an F32, F16 or BF16 one, the text some hundred kilobytes of what the model will be used for. Then:

    \b
      lfm2cpp quantize --imatrix imatrix.gguf IN.gguf Q4_0
    """
    from lfm2cpp.files import check_destination
    from lfm2cpp.gguf.imatrix import write_imatrix
    from lfm2cpp.importance import measure_importances

    started = time.monotonic()
    path, text_file, n_ctx = model_path(options), options["text_file"], options["ctx_size"]
    check_destination(output, size=0, force=force, inputs=[path, text_file])
    with open_corpus(path, sum_squares=True, force=force, **options) as corpus:
        with Progress("measuring", total=corpus.n_tokens, unit=" tokens") as bar:
            sums = measure_importances(corpus.engine, corpus.chunks, bar.update)
    n_chunks = len(corpus.chunks)
    write_imatrix(
        output, sums, dataset=text_file, n_chunks=n_chunks, chunk_size=n_ctx, force=force, inputs=[path, text_file],
    )  # fmt: skip
    click.echo(
        f"{click.format_filename(output)}: {len(sums)} matrices, {n_chunks} chunks of {n_ctx} tokens, "
        f"{time.monotonic() - started:.1f} s"
    )
