"""Options that several commands share, with llama.cpp's spellings, declared once.

A sampling option that is not given stays None: the model's recommended value is used then.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

import click

from lfm2cpp.errors import UsageError
from lfm2cpp.lookup import DRAFT_MAX

F = TypeVar("F", bound=Callable[..., Any])

_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "'": "'", '"': '"', "\\": "\\"}
SAMPLING_HELP = "Default: what the model recommends."


def env_names(name: str) -> list[str]:
    """The environment variables of an option."""
    return [f"LFM2_{name}", f"LLAMA_ARG_{name}"]


def decorate(function: F, options: list[Callable[[F], F]]) -> F:
    for option in reversed(options):
        function = option(function)
    return function


def file_options(function: F) -> F:
    """-m, -hf: which file."""
    return decorate(function, [
        click.option("-m", "--model", metavar="FILE", envvar=env_names("MODEL"), help="GGUF file."),
        click.option("-hf", "--hf-repo", metavar="USER/REPO[:QUANT]", envvar=env_names("HF_REPO"),
                     help="A GGUF of the Hugging Face hub instead; downloaded once."),
        click.option("-hff", "--hf-file", metavar="NAME", envvar=env_names("HF_FILE"),
                     help="Which file of the repository."),
        click.option("--offline", is_flag=True, help="Use what was downloaded before; touch no network."),
    ])  # fmt: skip


def model_options(function: F) -> F:
    """Which file, and how to run it."""
    return decorate(function, [
        file_options,
        click.option("-c", "--ctx-size", type=int, default=0, metavar="N", envvar=env_names("CTX_SIZE"),
                     help="Tokens of context; 0: what the model was made for, at most 32768.", show_default=True),
        click.option("-t", "--threads", type=int, default=-1, metavar="N", envvar=env_names("THREADS"),
                     help="CPU threads; -1: one a core.", show_default=True),
        click.option("-ctk", "--cache-type-k", type=str, metavar="TYPE", help="KV cache: f16 (default), f32 or q8_0."),
        click.option("-ctv", "--cache-type-v", type=str, metavar="TYPE", help="The same: K and V are of one type."),
        click.option("--force", is_flag=True, help="Load it even if the memory does not suffice."),
        click.option("--chat-template", metavar="JINJA", help="Jinja source, or chatml, instead of the file's."),
        click.option("--chat-template-file", metavar="FILE", help="The same, from a file."),
        click.option("-v", "--verbose", is_flag=True, help="Model, seed and timings on stderr."),
    ])  # fmt: skip


def sampling_options(function: F) -> F:
    """How to choose a token, and when to stop."""
    return decorate(function, [
        click.option("--temp", "--temperature", "temp", type=float, metavar="N", help=f"0 is greedy. {SAMPLING_HELP}"),
        click.option("--top-k", type=int, metavar="N", help=f"0 is off. {SAMPLING_HELP}"),
        click.option("--top-p", type=float, metavar="N", help=f"1 is off. {SAMPLING_HELP}"),
        click.option("--min-p", type=float, metavar="N", help=f"0 is off. {SAMPLING_HELP}"),
        click.option("--repeat-penalty", type=float, metavar="N", help=f"1 is off. {SAMPLING_HELP}"),
        click.option("--repeat-last-n", type=int, metavar="N", help="Tokens penalties look at; -1: all. Default: 64."),
        click.option("--presence-penalty", type=float, metavar="N", help="0 is off, and the default."),
        click.option("--frequency-penalty", type=float, metavar="N", help="0 is off, and the default."),
        click.option("-s", "--seed", type=int, metavar="N", help="-1 is random, and the default."),
        click.option("-l", "--logit-bias", multiple=True, metavar="ID+BIAS",
                     help="Such as 42+1.5, 42-1 or 42-inf (never). May be repeated."),
        click.option("-n", "--n-predict", "--predict", "n_predict", type=int, metavar="N",
                     help="Tokens to generate at most; 0: only evaluate the prompt. Default: -1, to the end."),
        click.option("-r", "--reverse-prompt", "--stop", "stop", multiple=True, metavar="TEXT",
                     help="Stop before this text. May be repeated."),
        click.option("--ignore-eos", is_flag=True, help="Never choose an end token."),
    ])  # fmt: skip


def draft_option(function: F) -> F:
    """How far to guess."""
    return click.option(
        "--draft-max", "--draft", "draft_max", type=int, metavar="N",
        help="Tokens at most that are drafted from the text so far and checked in one step, which changes the speed "
             f"and not the answer; 0 is off. Default: {DRAFT_MAX}.",
    )(function)  # fmt: skip


def parse_logit_bias(entries: tuple[str, ...]) -> dict[int, float] | None:
    """("42+1.5", "7-inf") -> {42: 1.5, 7: -inf}. UsageError for anything else."""
    bias: dict[int, float] = {}
    for entry in entries:
        match = re.fullmatch(r"\s*(\d{1,10})\s*([+-].+)", entry)
        token_id, value = match.groups() if match else ("", "")
        try:
            bias[int(token_id)] = float(value)
        except ValueError:
            raise UsageError(f"--logit-bias {ascii(entry)[:60]} is not ID+BIAS, such as 42+1.5 or 42-inf") from None
    return bias or None


def as_text(argument: str, escape: bool) -> str:
    """A command-line argument as text: undecodable bytes become U+FFFD, backslash escapes characters."""
    text = argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if not escape:
        return text
    return re.sub(r"\\(x[0-9A-Fa-f]{2}|[nrt'\"\\])", lambda m: _ESCAPES.get(m[1]) or chr(int(m[1][1:], 16)), text)


def generation_options(options: dict[str, Any], *, escape: bool = True) -> dict[str, Any]:
    """The sampling options that a command line gave, taken out of `options`, as LLM.stream wants them."""
    from lfm2cpp.sampling import SamplingParams

    taken = {field.name: options.pop(field.name) for field in fields(SamplingParams)}
    taken["logit_bias"] = parse_logit_bias(taken["logit_bias"])
    taken["max_tokens"] = options.pop("n_predict")
    taken["draft_max"] = options.pop("draft_max", None)
    taken["stop"] = tuple(as_text(text, escape) for text in options.pop("stop")) or None
    taken["ignore_eos"] = options.pop("ignore_eos") or None
    return {name: value for name, value in taken.items() if value is not None}
