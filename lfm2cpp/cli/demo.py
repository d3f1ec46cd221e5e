"""`lfm2cpp demo`: the whole chain on a small model that comes with the package, then a chat with it."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .loading import CompileProgress, stdin_is_tty
from .output import AnswerOutput

if TYPE_CHECKING:
    from lfm2cpp.demo.demo import Judged
    from lfm2cpp.llm import LLM

HEADER = ("file", "size", "bits/weight", "tok/s", "error vs HF", "limit", "exact answers")


@click.command()
@click.option("--dir", "folder", type=click.Path(path_type=Path, file_okay=False), metavar="FOLDER",
              help="Where to put the GGUF files. Default: the user's cache folder.")
@click.option("-t", "--threads", type=click.IntRange(min=-1, max=1024), default=-1, metavar="N",
              help="CPU threads; -1: one a core.", show_default=True)
@click.option("--chat/--no-chat", "wants_chat", default=None,
              help="Chat at the end, or ask a few prepared questions. Default: chat on a terminal.")
def demo(folder: Path | None, threads: int, wants_chat: bool | None) -> int:
    """Convert, quantize, check and chat with the model that comes along.

    It adds and subtracts numbers below 100, knows a few facts, sorts and reverses words, and remembers a name and
    a number. Exit code 3: a file's logits are too far from transformers'.
    """
    from lfm2cpp.demo import demo as chain

    output = AnswerOutput()
    with ExitStack() as cleanup:
        folder = _writable_folder(folder, cleanup)
        paths = chain.make_files(folder, _say)
        _compile_for(list(paths.values()))
        rows = []
        for file_type, path in paths.items():
            _say(f"checking {path.name} against transformers, and asking it what it has never seen")
            with _load(path, threads) as llm:
                rows.append(chain.judge(llm, file_type))
        output.write("\n".join(table(rows)) + "\n\n")
        chain.check(rows)
        _say(f"the files are in {folder}; talk to one: lfm2cpp chat -m {paths[chain.CHAT_TYPE]}")
        with _load(paths[chain.CHAT_TYPE], threads) as llm:
            if stdin_is_tty() if wants_chat is None else wants_chat:
                return _chat(llm, output)
            _ask_prepared(llm, output)
    return 0


def _say(text: str) -> None:
    click.echo(text, err=True)


def _writable_folder(folder: Path | None, cleanup: ExitStack) -> Path:
    """The folder asked for, or the cache, or one that goes away at the end when the cache cannot be written."""
    from lfm2cpp.kernels.cache import cache_root

    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    folder = cache_root() / "demo"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="lfm2cpp-demo-")))


def _compile_for(paths: list[Path]) -> None:
    """All kernels of all files together: the more there are, the better the cores share them."""
    from lfm2cpp.benchmark.kernel_names import file_kernels
    from lfm2cpp.demo.demo import KV_TYPE
    from lfm2cpp.kernels.library import library

    with CompileProgress() as progress:
        library().load([name for path in paths for name in file_kernels(path, KV_TYPE)], progress)


def _load(path: Path, threads: int) -> LLM:
    from lfm2cpp.demo.demo import KV_TYPE
    from lfm2cpp.llm import LLM

    with CompileProgress() as progress:
        return LLM(path, None, None if threads < 1 else threads, KV_TYPE, progress=progress)


def table(rows: list[Judged]) -> list[str]:
    """The table's lines, columns aligned."""
    from lfm2cpp.terminal import format_size

    cells = [HEADER] + [
        (
            row.path.name, format_size(row.nbytes), f"{row.bits_per_weight:.2f}", f"{row.tokens_per_second:.0f}",
            f"{row.error:.1e}", f"{row.limit:.1e}", f"{row.n_exact} of {row.n_questions}",
        )
        for row in rows
    ]  # fmt: skip
    widths = [max(len(line[i]) for line in cells) for i in range(len(HEADER))]
    return ["  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
            for line in cells]  # fmt: skip


def _ask_prepared(llm: LLM, output: AnswerOutput) -> None:
    """One chat of prepared questions, each answer shown while it comes."""
    from lfm2cpp.demo.demo import GREEDY, SCRIPT

    from .run import show

    messages: list[dict[str, str]] = []
    for question in SCRIPT:
        output.write(f"> {question}\n")
        messages.append({"role": "user", "content": question})
        answer = show(llm.chat_stream(messages, **GREEDY), output)
        messages.append({"role": "assistant", "content": answer.text})


def _chat(llm: LLM, output: AnswerOutput) -> int:
    from lfm2cpp.demo.demo import GREEDY

    from .repl import Repl
    from .repl_commands import ALIASES, COMMANDS
    from .repl_input import open_input

    repl = Repl(llm, open_input([*COMMANDS, *ALIASES], history=False, simple=False), output, settings=dict(GREEDY))
    repl.say("Ask it: What can you do? /help lists the commands, /exit or Ctrl-D leaves.")
    return repl.run()
