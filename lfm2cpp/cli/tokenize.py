"""`lfm2cpp tokenize`: text -> token ids, with nothing but the file's vocabulary."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from lfm2cpp.errors import UsageError
from lfm2cpp.terminal import printable

from .loading import model_path, read_stdin, read_text, stdin_is_tty
from .options import file_options


@click.command()
@file_options
@click.argument("text", required=False)
@click.option("-p", "--prompt", metavar="TEXT", help="The text, as llama-tokenize spells it.")
@click.option("-f", "--file", "text_file", metavar="FILE", help="A file with the text.")
@click.option("--stdin", "from_stdin", is_flag=True, help="Read standard input; so does no TEXT, or - for it.")
@click.option("--ids", "only_ids", is_flag=True, help="Only the ids, as a list.")
@click.option("--json", "as_json", is_flag=True, help="Ids and pieces as one JSON object.")
@click.option("--no-bos", is_flag=True, help="Put no BOS in front.")
@click.option("--parse-special", is_flag=True, help="Markers such as <|im_start|> become their tokens.")
@click.option("--show-count", is_flag=True, help="The number of tokens as well.")
def tokenize(
    only_ids: bool, as_json: bool, no_bos: bool, parse_special: bool, show_count: bool, **options: Any
) -> None:
    """Show the tokens of TEXT (or of a file, or of standard input)."""
    from lfm2cpp.gguf.reader import read_gguf
    from lfm2cpp.text.vocab import Vocab

    text = _text(*(options.pop(name) for name in ("text", "prompt", "text_file", "from_stdin")))
    with read_gguf(model_path(options)) as gguf:
        vocab = Vocab(gguf)
    ids = vocab.tokenize(text, add_bos=vocab.add_bos and not no_bos, parse_special=parse_special)
    if as_json:
        pieces = [vocab.detokenize([i], special=True) for i in ids]
        _echo(json.dumps({"ids": ids, "pieces": pieces, "n_tokens": len(ids)}))
    elif only_ids:
        _echo(json.dumps(ids))
    else:
        for token_id in ids:
            _echo(f"{token_id:6d} -> {_shown(vocab.token_bytes(token_id, special=True))}")
    if show_count and not as_json:
        _echo(f"Total number of tokens: {len(ids)}")


def _text(argument: str | None, prompt: str | None, path: str | None, from_stdin: bool) -> str:
    given = [t for t in (argument, prompt, path) if t is not None]
    if len(given) + from_stdin > 1:
        raise UsageError("give one text: TEXT, -p TEXT, -f FILE or standard input")
    if path is not None:
        return read_text(path, "--file")
    if given and given[0] != "-":
        return given[0].encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if stdin_is_tty() and not given and not from_stdin:
        raise UsageError("no text: give TEXT, -f FILE or piped text")
    return read_stdin()


def _shown(piece: bytes) -> str:
    """Text in quotes; part of a character as bytes."""
    try:
        return repr(piece.decode())
    except UnicodeDecodeError:
        return repr(piece)


def _echo(line: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    line = printable(line, tty=sys.stdout.isatty())
    click.echo(line.encode(encoding, "backslashreplace").decode(encoding))
