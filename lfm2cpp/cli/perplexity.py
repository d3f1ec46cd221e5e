"""`lfm2cpp perplexity`: how surprised a model is by a text."""

from __future__ import annotations

import time
from typing import Any

import click

from lfm2cpp.terminal import Progress

from .corpus import corpus_options, open_corpus
from .loading import model_path


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@corpus_options
@click.option("--force", is_flag=True, help="Load the model even if the memory does not suffice.")
def perplexity(**options: Any) -> None:
    """Measure how surprised a model is by a text, as llama-perplexity does: less is better.

    Only figures of the same text, chunk size and vocabulary can be compared: those of a model and of what quantizing
    has made of it.
    """
    from lfm2cpp.perplexity import measure_perplexity

    started, path = time.monotonic(), model_path(options)
    with open_corpus(path, **options) as corpus, Progress("reading", total=corpus.n_tokens, unit=" tokens") as bar:
        found = measure_perplexity(corpus.engine, corpus.chunks, bar.update)
    click.echo(
        f"PPL = {found.value:.4f} +/- {found.error:.4f} ({found.n_tokens} tokens of {len(corpus.chunks)} chunks of "
        f"{options['ctx_size']}, {time.monotonic() - started:.1f} s)"
    )
