"""`lfm2cpp chat`: talk to a model in the terminal, or answer line by line when there is none."""

from __future__ import annotations

from typing import Any

import click

from .loading import load_llm, stdin_is_tty
from .options import as_text, draft_option, generation_options, model_options, sampling_options
from .output import AnswerOutput
from .run import _system_text


@click.command()
@model_options
@click.option("-p", "--prompt", metavar="TEXT", help="The first message.")
@click.option("-sys", "--system-prompt", metavar="TEXT", help="A system message.")
@click.option("-sysf", "--system-prompt-file", metavar="FILE", help="A file with the system message.")
@click.option("-e/-no-e", "--escape/--no-escape", default=True,
              help=r"Read \n, \t, \\ ... in -p, -sys and -r as the characters they stand for, or not. Default: do.")
@click.option("--no-history", is_flag=True, help="Keep no history of what is typed.")
@click.option("--simple-io", is_flag=True, help="Plain lines instead of an editor.")
@click.option("--show-timings/--no-show-timings", default=None, help="Speed after each answer. Default: on a terminal.")
@click.option("-cnv", "--conversation", "ignored", is_flag=True, hidden=True)
@sampling_options
@draft_option  # fmt: skip
def chat(ignored: bool, **options: Any) -> int:
    """Talk to a model. /help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves.

    Without a terminal, every line of standard input is answered in turn, to the end of the input.
    """
    from .repl import Repl
    from .repl_commands import ALIASES, COMMANDS
    from .repl_input import open_input

    escape, first = options.pop("escape"), options.pop("prompt")
    system = _system_text(options, escape)
    history, simple, timings = (options.pop(name) for name in ("no_history", "simple_io", "show_timings"))
    for name in ("system_prompt", "system_prompt_file"):
        del options[name]
    settings = generation_options(options, escape=escape)
    output = AnswerOutput()
    with load_llm(options) as llm:
        source = open_input([*COMMANDS, *ALIASES], history=not history, simple=simple)
        on_terminal = stdin_is_tty()
        repl = Repl(
            llm, source, output, settings=settings, system=system, timings=on_terminal if timings is None else timings
        )
        if on_terminal:
            name = llm.metadata.get("general.name", llm.path.name)
            repl.say(f"{name}, context {llm.n_ctx()} tokens. /help lists the commands.")
        return repl.run(None if first is None else as_text(first, escape))
