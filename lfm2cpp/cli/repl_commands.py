"""The commands of the chat: what begins with a slash. One function each; its first line is its help."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfm2cpp.errors import LFM2Error, UsageError
from lfm2cpp.files import atomic_output
from lfm2cpp.sampling import SamplingParams

from .loading import read_text
from .options import as_text, parse_logit_bias

if TYPE_CHECKING:
    from .repl import Repl

MAX_SESSION = 64 << 20  # bytes of a saved conversation
SESSION_KIND = "lfm2cpp-chat"

Command = Callable[["Repl", str], None]
COMMANDS: dict[str, Command] = {}
ALIASES = {"/?": "/help", "/bye": "/exit", "/quit": "/exit", "/q": "/exit"}


def command(function: Command) -> Command:
    COMMANDS["/" + function.__name__.rstrip("_").replace("_", "-")] = function
    return function


def run_command(repl: Repl, line: str) -> None:
    """Run `/name argument`; an unknown name says so and sends nothing."""
    name, _, argument = line.strip().partition(" ")
    function = COMMANDS.get(ALIASES.get(name, name))
    if function is None:
        raise UsageError(f"unknown command {ascii(name)[1:-1][:40]}; /help lists them, // begins a message with a /")
    function(repl, argument.strip())


@command
def help(repl: Repl, argument: str) -> None:
    """This list."""
    width = max(len(name) for name in COMMANDS)
    lines = [f"  {name:{width}}  {(f.__doc__ or '').splitlines()[0]}" for name, f in COMMANDS.items()]
    keys = 'Several lines: paste them, Alt-Enter, a \\ at the end of a line, or """ before and after.'
    repl.say("\n".join([*lines, keys, "Ctrl-C stops an answer; Ctrl-D leaves."]))


@command
def exit(repl: Repl, argument: str) -> None:
    """Leave (also /bye, /quit, Ctrl-D)."""
    from .repl import Leave

    raise Leave(0)


@command
def clear(repl: Repl, argument: str) -> None:
    """Forget the conversation; the system message stays."""
    repl.messages, repl.attached, repl.last = [], [], None
    repl.say("the conversation is empty")


@command
def regen(repl: Repl, argument: str) -> None:
    """Answer the last question again."""
    messages = repl.without_last_answer()
    if not messages:
        raise UsageError("there is no question to answer again")
    repl.answer(messages)


@command
def undo(repl: Repl, argument: str) -> None:
    """Forget the last question and its answer."""
    messages = repl.without_last_answer()
    if not messages:
        raise UsageError("there is nothing to undo")
    repl.messages = messages[:-1]
    repl.say(f"forgotten: {_one_line(messages[-1]['content'])}")


@command
def system(repl: Repl, argument: str) -> None:
    """/system TEXT sets the system message, /system - removes it, /system shows it."""
    if argument:
        repl.system = None if argument == "-" else argument
    repl.say("no system message" if repl.system is None else f"system: {repl.system}")


@command
def set_(repl: Repl, argument: str) -> None:
    """/set NAME VALUE changes a setting (temp, top_k, seed, max_tokens, stop, timings ...); /set shows them."""
    name, _, value = argument.partition(" ")
    name, value = name.lstrip("-").replace("-", "_"), value.strip()
    if not name:
        return show(repl, "settings")
    if not value:
        raise UsageError(f"/set {name} needs a value, or 'default'")
    if name == "timings":
        repl.timings = _switch(value)
    else:
        changed = {**repl.settings, name: None if value == "default" else _setting(name, value)}
        repl.llm.check_options(changed)
        repl.settings = {k: v for k, v in changed.items() if v is not None}
    repl.say(f"{name} = {value}")


@command
def show(repl: Repl, argument: str) -> None:
    """/show settings, history, system, template or model."""
    what = {"settings": _show_settings, "history": _show_history, "model": _show_model, "system": _show_system,
            "template": lambda repl: repl.llm.template_source()}  # fmt: skip
    if (argument or "settings") not in what:
        raise UsageError(f"/show {ascii(argument)[1:-1]}: expected one of {', '.join(what)}")
    repl.say(what[argument or "settings"](repl))


@command
def save(repl: Repl, argument: str) -> None:
    """/save FILE keeps the conversation; /save! FILE also over an existing one."""
    _save(repl, argument, force=False)


def _save_over(repl: Repl, argument: str) -> None:
    """As /save, over an existing file."""
    _save(repl, argument, force=True)


COMMANDS["/save!"] = _save_over


@command
def load(repl: Repl, argument: str) -> None:
    """/load FILE goes on with a saved conversation."""
    path = _path(argument, "/load")
    session = _parse_session(read_text(str(path), "/load", limit=MAX_SESSION), path)
    repl.system, repl.messages = session["system"], session["messages"]
    repl.attached, repl.last = [], None
    repl.say(f"{len(repl.messages)} messages of {path}")


@command
def read(repl: Repl, argument: str) -> None:
    """/read FILE puts a text file before your next message."""
    path = _path(argument, "/read")
    text = read_text(str(path), "/read")
    repl.attached.append(text)
    repl.say(f"{len(text)} characters of {path} go with your next message")


@command
def stats(repl: Repl, argument: str) -> None:
    """Tokens, speed and context of the last answer."""
    if repl.last is None:
        raise UsageError("nothing has been answered yet")
    t, n_ctx = repl.last.timings, repl.llm.n_ctx()
    used = len(repl.last.prompt_ids) + len(repl.last.token_ids)
    repl.say(
        f"prompt     {t.prompt_n} tokens evaluated, {t.cache_n} from before, {t.prompt_ms:.0f} ms, "
        f"{t.prompt_per_second:.1f} t/s\n"
        f"generation {t.predicted_n} tokens, {t.predicted_ms:.0f} ms, {t.predicted_per_second:.1f} t/s\n"
        f"context    {used} of {n_ctx} tokens\n"
        f"ended by   {repl.last.finish_reason}: {repl.last.detail} (seed {repl.last.seed})"
    )


@command
def tokens(repl: Repl, argument: str) -> None:
    """/tokens TEXT shows its tokens; /tokens those of the last answer."""
    if argument:
        ids = repl.llm.tokenize(argument, add_bos=False)
    elif repl.last is not None:
        ids = list(repl.last.token_ids)
    else:
        raise UsageError("nothing has been answered yet; /tokens TEXT shows the tokens of a text")
    shown = " ".join(f"{i}:{repl.llm.detokenize([i], special=True)!r}" for i in ids)
    repl.say(f"{len(ids)} tokens: {shown}")


# -- helpers ---------------------------------------------------------------------------------------------------


def _one_line(text: str, limit: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _path(argument: str, name: str) -> Path:
    if not argument:
        raise UsageError(f"{name} needs a file name")
    return Path(os.path.expanduser(argument))


def _switch(value: str) -> bool:
    if value not in ("on", "off"):
        raise UsageError(f"{ascii(value)[:40]} is neither on nor off")
    return value == "on"


def _setting(name: str, value: str) -> Any:
    """The value of a setting in its type. UsageError when it has no such form."""
    if name == "logit_bias":
        return parse_logit_bias(tuple(value.split()))
    if name == "stop":
        return (as_text(value, True),)
    if name == "ignore_eos":
        return _switch(value)
    kinds = {field.name: float if "float" in str(field.type) else int for field in fields(SamplingParams)}
    kinds |= {"max_tokens": int, "draft_max": int}
    if name not in kinds:
        raise UsageError(f"unknown setting {ascii(name)[1:-1][:40]}; /set lists them")
    try:
        return kinds[name](value)
    except ValueError:
        raise UsageError(f"{name} cannot be {ascii(value)[:40]}, expected a number") from None


def _show_settings(repl: Repl) -> str:
    names = [*(field.name for field in fields(SamplingParams)), "max_tokens", "draft_max", "stop", "ignore_eos"]
    lines = []
    for name in names:
        chosen = repl.settings.get(name)
        value = chosen if chosen is not None else getattr(repl.llm.sampling, name, None)
        lines.append(f"  {name:18} {'-' if value is None else value}{'' if chosen is None else '  (set)'}")
    return "\n".join([*lines, f"  {'timings':18} {'on' if repl.timings else 'off'}"])


def _show_history(repl: Repl) -> str:
    lines = [f"{m['role']}: {m['content']}" for m in [*repl.system_messages(), *repl.messages]]
    return "\n".join(lines) or "the conversation is empty"


def _show_model(repl: Repl) -> str:
    metadata = repl.llm.metadata
    name = metadata.get("general.name", "no name")
    return f"{name} ({repl.llm.path}), context {repl.llm.n_ctx()}, vocabulary {repl.llm.n_vocab()}"


def _show_system(repl: Repl) -> str:
    return "no system message" if repl.system is None else repl.system


def _save(repl: Repl, argument: str, *, force: bool) -> None:
    path = _path(argument, "/save")
    session = {"kind": SESSION_KIND, "version": 1, "model": repl.llm.path.name, "system": repl.system,
               "messages": repl.messages}  # fmt: skip
    data = (json.dumps(session, ensure_ascii=False, indent=1) + "\n").encode("utf-8", "replace")
    if path.exists() and not force:
        raise LFM2Error(f"{path} exists; /save! {path} replaces it")
    with atomic_output(path, size=len(data), force=force) as out:
        out.write(data)
    repl.say(f"{len(repl.messages)} messages saved in {path}")


def _parse_session(text: str, path: Path) -> dict[str, Any]:
    """A saved conversation, checked. LFM2Error when it is none."""
    try:
        session = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LFM2Error(f"{path} is no saved conversation: {' '.join(str(error).split())}") from None
    if not isinstance(session, dict) or session.get("kind") != SESSION_KIND or session.get("version") != 1:
        raise LFM2Error(f"{path} is no saved conversation of version 1; /save writes them")
    messages, system = session.get("messages"), session.get("system")
    good = isinstance(messages, list) and all(_is_message(m) for m in messages)
    if not good or not (system is None or isinstance(system, str)):
        raise LFM2Error(f"{path} is damaged: expected messages with a role and a content each")
    return {"system": system, "messages": [{"role": m["role"], "content": m["content"]} for m in messages]}


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and message.get("role") in ("user", "assistant")
        and isinstance(message.get("content"), str)
    )
