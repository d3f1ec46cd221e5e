"""The command group: names, one-line helps, lazy loading, and the one place where errors become exit codes."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import Any

import click

from lfm2cpp import __version__
from lfm2cpp.errors import LFM2Error

from .output import settle_stdout

# command -> (module:function, one line of help). Modules load on use, so that --help imports nothing heavy.
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("lfm2cpp.cli.demo:demo", "Convert, quantize, check and chat with the model that comes along."),
    "convert": ("convert.cli:convert", "Hugging Face checkpoint -> GGUF."),
    "quantize": ("quant.cli:quantize", "GGUF -> smaller GGUF."),
    "imatrix": ("lfm2cpp.cli.imatrix:imatrix", "Which weights matter on a text, for quantize --imatrix."),
    "perplexity": ("lfm2cpp.cli.perplexity:perplexity", "How surprised a model is by a text: what quantizing cost."),
    "run": ("lfm2cpp.cli.run:run", "Answer one prompt; stdout carries only the text."),
    "chat": ("lfm2cpp.cli.chat:chat", "Talk to a model in the terminal."),
    "batch": ("lfm2cpp.cli.batch:batch", "Answer a file of prompts, many at a time."),
    "parity": ("lfm2cpp.cli.parity:parity", "Compare with Hugging Face, layer by layer."),
    "inspect": ("lfm2cpp.cli.inspect:inspect", "What is in a GGUF file, and what would be refused."),
    "tokenize": ("lfm2cpp.cli.tokenize:tokenize", "Text -> token ids."),
    "bench": ("lfm2cpp.cli.bench:bench", "Tokens per second, in llama-bench's terms."),
    "doctor": ("lfm2cpp.cli.doctor:doctor", "CPU features, threads, kernel cache: for a bug report."),
    "warmup": ("lfm2cpp.cli.warmup:warmup", "Compile the kernels a model needs, ahead of time."),
}


class LazyGroup(click.Group):
    """A group whose commands are named in COMMANDS and imported when first asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, attribute = COMMANDS[name][0].split(":")
        return getattr(importlib.import_module(module), attribute)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_, help_line) in COMMANDS.items()])


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lfm2cpp")
def lfm2cpp() -> None:
    """Run Liquid AI's LFM2 and LFM2.5 models on this CPU."""


def invoke(command: click.Command, prog_name: str) -> None:
    """Run a click command; an LFM2Error becomes one line on stderr and its exit code."""
    if hasattr(signal, "pthread_sigmask"):  # who started us may have left them blocked, and we would inherit that
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    if hasattr(signal, "SIGTERM"):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup stays in force
        signal.signal(signal.SIGHUP, lambda *_: sys.exit(129))
    try:
        # Not command.main: that one answers a closed pipe itself, and not with 141.
        with command.make_context(prog_name, sys.argv[1:]) as context:
            code: Any = command.invoke(context)
        if sys.stdout is not None:  # closed by who started us
            sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done and said: too late to interrupt
    except click.exceptions.Exit as done:
        code = done.exit_code
    except LFM2Error as error:
        fail(str(error), error.exit_code)
    except click.ClickException as error:
        if isinstance(error, click.NoSuchOption):
            _hint_at_file_name(error)
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        fail("interrupted", 130)
    except BrokenPipeError:
        settle_stdout()  # the reader left (head -1): nobody to tell
        sys.exit(141)
    except OSError as error:
        lost = settle_stdout()
        fail(f"stdout cannot be written: {lost.strerror}" if lost is not None else str(error), 1)
    except MemoryError:
        fail("out of memory; try a smaller --ctx-size or a smaller model", 1)
    sys.exit(code if isinstance(code, int) else 0)


def _hint_at_file_name(error: click.NoSuchOption) -> None:
    """A file whose name begins with a dash looks like an option."""
    name = next((a for a in sys.argv[1:] if a.startswith("-") and os.path.exists(a)), None)
    if name is not None:
        error.message += f" If you mean the file {name!r}, write './{name}', or put '--' before it."


def fail(message: str, exit_code: int) -> None:
    """One line on stderr, whatever the message holds, then exit; a second Ctrl-C meanwhile changes nothing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    settle_stdout()
    click.echo("error: " + " ".join(message.split()), err=True)
    sys.exit(exit_code)


def main() -> None:
    invoke(lfm2cpp, "lfm2cpp")
