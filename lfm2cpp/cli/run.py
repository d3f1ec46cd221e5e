"""`lfm2cpp run`: one answer, for scripts and pipes. stdout carries the text and nothing else."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from lfm2cpp.errors import UsageError
from lfm2cpp.signals import first_interrupt_calls
from lfm2cpp.terminal import format_size

from .loading import load_llm, read_stdin, read_text, stdin_is_tty, without_last_newline
from .options import as_text, draft_option, generation_options, model_options, sampling_options
from .output import AnswerOutput, StatusLine, dimmed

if TYPE_CHECKING:
    from lfm2cpp.generate import Event, Generation
    from lfm2cpp.llm import LLM
    from lfm2cpp.worker import Stream

NO_PROMPT = "no prompt: give -p TEXT, -f FILE or piped text (for a conversation: lfm2cpp chat)"


@click.command()
@model_options
@click.option("-p", "--prompt", "prompts", multiple=True, metavar="TEXT",
              help="The prompt; - is standard input. Several are put together, a newline between them.")
@click.option("-f", "--file", "prompt_file", metavar="FILE", help="A file with the prompt; it comes before -p.")
@click.option("-sys", "--system-prompt", metavar="TEXT", help="A system message.")
@click.option("-sysf", "--system-prompt-file", metavar="FILE", help="A file with the system message.")
@click.option("--raw", "-no-cnv", "--no-conversation", "raw", is_flag=True,
              help="Continue the text as it is, without the chat template.")
@click.option("--parse-special", is_flag=True, help="With --raw: markers such as <|im_start|> become their tokens.")
@click.option("--prompt-ids", metavar="1,2,3", help="Token ids instead of text, evaluated as they are.")
@click.option("-sp", "--special", is_flag=True, help="Show special tokens in the answer.")
@click.option("-e/-no-e", "--escape/--no-escape", default=True,
              help=r"Read \n, \t, \\ ... in -p, -sys and -r as the characters they stand for, or not. Default: do.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object with ids, text, timings and finish reason.")
@click.option("-cnv", "-st", "--conversation", "--single-turn", "--no-display-prompt", "ignored", is_flag=True,
              hidden=True, help="What this command does anyway; accepted for old scripts.")
@sampling_options
@draft_option  # fmt: skip
def run(as_json: bool, ignored: bool, **options: Any) -> int:
    """Answer one prompt and exit. Ctrl-C ends the answer (exit 130)."""
    ids = _parse_ids(options.pop("prompt_ids"))
    escape, raw = options.pop("escape"), options.pop("raw")
    parse_special = options.pop("parse_special")
    if parse_special and not raw:
        raise UsageError("--parse-special needs --raw: the chat template decides where markers stand")
    prompt = ids if ids is not None else _prompt_text(options, escape)
    system = _system_text(options, escape)
    _drop_prompt_options(options, ids is not None)
    generation = {**generation_options(options, escape=escape), "show_special": options.pop("special")}
    verbose = options["verbose"]
    output = AnswerOutput()
    with load_llm(options) as llm:
        if raw or ids is not None:
            if system is not None:
                raise UsageError("a system message needs the chat template; leave out --raw and --prompt-ids")
            stream = llm.stream(prompt, parse_special=parse_special, **generation)
        else:
            system_message = [] if system is None else [{"role": "system", "content": system}]
            stream = llm.chat_stream([*system_message, {"role": "user", "content": prompt}], **generation)
        result = show(stream, None if as_json else output)
        if as_json:
            output.write(json.dumps(as_dict(llm, result), ensure_ascii=output.tty) + "\n")
        report(result, llm.load_ms, verbose)
    return 130 if result.finish_reason == "interrupted" else 0


def show(stream: Stream, output: AnswerOutput | None) -> Generation:
    """Write an answer while it comes (not when `output` is None). Ctrl-C ends it; the Generation says so."""
    status = StatusLine()
    try:
        with first_interrupt_calls(stream.stop):
            result = _consume(stream, output, status)
    finally:
        status.clear()
    if output is not None:
        output.end_line()
    return result


def _consume(events: Iterable[Event], output: AnswerOutput | None, status: StatusLine) -> Generation:
    from lfm2cpp.generate import Generation, Piece

    for event in events:
        if isinstance(event, Generation):
            return event
        status.clear()
        if isinstance(event, Piece):
            if output is not None:
                output.write(event.text)
        elif event.done < event.total:
            status.show(f"reading the prompt: {event.done} of {event.total} tokens")
    raise AssertionError("a stream ends in a Generation")


def report(result: Generation, load_ms: float, verbose: bool) -> None:
    """What a person should know beside the text, on stderr."""
    notes = [result.detail] if "context" in result.detail or "forbidden" in result.detail else []
    if verbose:
        t = result.timings
        notes += [
            f"seed {result.seed}; {result.finish_reason}: {result.detail}",
            f"       load time = {load_ms:10.2f} ms",
            f"prompt eval time = {t.prompt_ms:10.2f} ms / {t.prompt_n:5d} tokens "
            f"({t.prompt_per_second:.2f} tokens per second)",
            f"       eval time = {t.predicted_ms:10.2f} ms / {t.predicted_n:5d} tokens "
            f"({t.predicted_per_second:.2f} tokens per second)",
            f"      total time = {t.prompt_ms + t.predicted_ms:10.2f} ms / {t.prompt_n + t.predicted_n:5d} tokens",
            *_drafts(result),
            *_peak_memory(),
        ]
    for note in notes:
        click.echo(dimmed(note), err=True)


def _drafts(result: Generation) -> list[str]:
    t = result.timings
    if not t.draft_n:
        return []
    return [f"draft acceptance = {t.draft_n_accepted / t.draft_n:.2f} ({t.draft_n_accepted} of {t.draft_n} tokens)"]


def _peak_memory() -> list[str]:
    try:
        import resource
    except ImportError:  # Windows
        return []
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return [f"     peak memory = {format_size(peak)}"]


def timings_line(result: Generation) -> str:
    """llama-cli's line."""
    t = result.timings
    return f"[ Prompt: {t.prompt_per_second:.1f} t/s | Generation: {t.predicted_per_second:.1f} t/s ]"


def as_dict(llm: LLM, result: Generation) -> dict[str, Any]:
    """The JSON object of --json."""
    t = result.timings
    return {
        "model": str(llm.path),
        "prompt_ids": list(result.prompt_ids),
        "ids": list(result.token_ids),
        "text": result.text,
        "finish_reason": result.finish_reason,
        "detail": result.detail,
        "seed": result.seed,
        "timings": {
            "cache_n": t.cache_n,
            "prompt_n": t.prompt_n,
            "prompt_ms": round(t.prompt_ms, 3),
            "prompt_per_second": round(t.prompt_per_second, 3),
            "predicted_n": t.predicted_n,
            "predicted_ms": round(t.predicted_ms, 3),
            "predicted_per_second": round(t.predicted_per_second, 3),
            "draft_n": t.draft_n,
            "draft_n_accepted": t.draft_n_accepted,
        },
    }


# -- the prompt ------------------------------------------------------------------------------------------------


def _parse_ids(text: str | None) -> list[int] | None:
    if text is None:
        return None
    if not re.fullmatch(r"\s*\d{1,10}\s*(,\s*\d{1,10}\s*)*", text):
        raise UsageError(f"--prompt-ids {ascii(text)[:60]} is no list of token ids, such as 1,2,3")
    return [int(part) for part in text.split(",")]


def _prompt_text(options: dict[str, Any], escape: bool) -> str:
    """The prompt of -f, -p and standard input. UsageError when there is none; never waits at a terminal."""
    parts = []
    if options["prompt_file"] is not None:
        parts.append(without_last_newline(read_text(options["prompt_file"], "--file")))
    for prompt in options["prompts"]:
        parts.append(_piped() if prompt == "-" else as_text(prompt, escape))
    if not parts:
        parts.append(_piped())
        if not parts[0]:
            raise UsageError(NO_PROMPT)
    return "\n".join(parts)


def _piped() -> str:
    if stdin_is_tty():
        raise UsageError(NO_PROMPT)
    return without_last_newline(read_stdin())


def _system_text(options: dict[str, Any], escape: bool) -> str | None:
    text, path = options["system_prompt"], options["system_prompt_file"]
    if text is not None and path is not None:
        raise UsageError("give --system-prompt or --system-prompt-file, not both")
    if path is not None:
        return without_last_newline(read_text(path, "--system-prompt-file"))
    return None if text is None else as_text(text, escape)


def _drop_prompt_options(options: dict[str, Any], has_ids: bool) -> None:
    given = [name for name in ("prompts", "prompt_file") if options[name]]
    if has_ids and given:
        raise UsageError("give --prompt-ids or a prompt text, not both")
    for name in ("prompts", "prompt_file", "system_prompt", "system_prompt_file"):
        del options[name]


if sys.platform == "win32":  # a console that is not UTF-8 cannot show most of what models write
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
