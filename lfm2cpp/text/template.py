"""Chat templates: messages -> text, with the markers the template writes kept apart from what people wrote.

A special piece such as `<|im_end|>` becomes its token only where the template itself wrote it. Every special piece
inside the messages is wrapped in two signs before rendering, and recognised by them afterwards. Text without special
pieces reaches the template unchanged, so trimming, splitting and searching it work as in transformers. The signs are
two characters that neither the template nor any message contains, and that repr() leaves alone; where a template
escapes them (JSON in ASCII, say), they are known in that form too.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from jinja2 import TemplateSyntaxError
from jinja2.exceptions import SecurityError

from lfm2cpp.errors import LFM2Error, ModelFormatError, UsageError

from .deadline import OutOfTime, with_deadline
from .sandbox import Refusal, TemplateDict, TemplateEnvironment, TemplateNamespace
from .vocab import VISIBLE_PIECES, Segment, well_formed

MAX_SOURCE = 1 << 20  # characters
MAX_DEPTH = 64  # of messages and tools, as JSON
DEADLINE = 5.0  # seconds, compiling included

CHATML = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

Message = Mapping[str, Any]
T = TypeVar("T")

# transformers gives a message's reasoning to the template under each of these names.
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_SIGNS = range(0x2A000, 0x2A6D0)  # rare ideographs


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation: plain text and the special pieces that the template wrote, in turn."""

    segments: tuple[Segment, ...]

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.segments)


class ChatTemplate:
    """One compiled chat template. `label` (the file) starts its error messages.

    Raises ModelFormatError for a template that is too long or no Jinja. Safe from several threads.
    """

    def __init__(
        self, source: str, *, label: str, special_pieces: Sequence[str], token_names: Mapping[str, str] | None = None
    ) -> None:
        if len(source) > MAX_SOURCE:
            found = f"{len(source)} characters, expected at most {MAX_SOURCE}"
            raise ModelFormatError(f"{label}: the chat template has {found}; use --chat-template chatml")
        self.source = source
        self._label = label
        self._names = dict(token_names or {})  # bos_token, eos_token, ...
        self._pieces = special_pieces
        self._lock = threading.Lock()
        self._environment = _environment()
        self._template = self._guarded("compile", lambda: self._environment.from_string(source))

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        **variables: Any,
    ) -> Rendered:
        """The conversation as the model is to read it.

        Raises UsageError for messages that are none, or that the template refuses; ModelFormatError when the
        template fails, asks for something the sandbox denies, or takes too long.
        """
        chat = [_with_reasoning(message) for message in _checked_messages(messages)]
        inputs = {"messages": chat, "tools": _plain(tools), "documents": None, **_plain(variables)}
        start, end = _absent_signs([self.source, *_strings(inputs)])
        # The model's own calls of tools come back as part of an assistant's message: those two markers stay markers.
        user = _marker(self._pieces, start, end)
        model = _marker([p for p in self._pieces if p not in VISIBLE_PIECES], start, end)
        marked = {name: _map_strings(value, user) for name, value in inputs.items()}
        marked["messages"] = [_map_strings(m, model if m.get("role") == "assistant" else user) for m in chat]
        context = {**self._names, **marked, "add_generation_prompt": add_generation_prompt}
        with self._lock:
            self._environment.refill()
            text = self._guarded("render", lambda: self._template.render(context))
        return Rendered(tuple(_separate(text, self._pieces, start, end)))

    def _guarded(self, verb: str, work: Callable[[], T]) -> T:
        """`work()` under the deadline, its failures as one-line errors."""
        try:
            return with_deadline(work, DEADLINE)
        except Refusal as error:
            raise UsageError(f"{self._label}: the chat template refuses these messages: {_short(error)}") from None
        except TemplateSyntaxError as error:
            problem = f"is no Jinja: line {error.lineno}: {_short(error)}"
        except SecurityError as error:
            problem = f"was stopped: {_short(error)}"
        except OutOfTime:
            problem = f"did not {verb} within {DEADLINE:g} s"
        except LFM2Error:
            raise
        except Exception as error:  # whatever a stranger's program may raise
            problem = f"failed to {verb}: {type(error).__name__}: {_short(error)}"
        hint = "use --chat-template chatml, or --raw for none"
        raise ModelFormatError(f"{self._label}: the chat template {problem}; {hint}") from None


def _short(error: Exception, limit: int = 200) -> str:
    text = " ".join(str(error).split())
    return ascii(text[:limit])[1:-1]


def _environment() -> TemplateEnvironment:
    """The globals and filters that transformers gives a template."""
    environment = TemplateEnvironment()
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=TemplateDict(), namespace=TemplateNamespace
    )
    environment.add_filter("tojson", _tojson)
    return environment


def _raise_exception(message: Any) -> None:
    raise Refusal(message if isinstance(message, str) else f"<{type(message).__name__}>")


def _strftime_now(format: str) -> str:
    if re.search(r"%[^a-zA-Z%]*\d", format):
        raise SecurityError("a date format with a width")
    return datetime.now().strftime(format)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """json.dumps without Jinja's HTML escaping, as in transformers."""
    if isinstance(indent, int) and indent > 16 or isinstance(indent, str) and len(indent) > 16:
        raise SecurityError("an indentation of more than 16")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


# -- what goes in ----------------------------------------------------------------------------------------------


def _checked_messages(messages: Any) -> list[dict[str, Any]]:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise UsageError(f"messages is {type(messages).__name__}, expected a list of {{'role': ..., 'content': ...}}")
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UsageError(f"message {i} is {ascii(message)[:80]}, expected {{'role': ..., 'content': ...}}")
        checked.append(_plain(message))
    if not checked:
        raise UsageError("messages is empty, expected at least one {'role': ..., 'content': ...}")
    return checked


def _plain(value: Any, depth: int = 0) -> Any:
    """`value` rebuilt of plain JSON types: a template gets nothing that has methods of its own."""
    if depth > MAX_DEPTH:
        raise UsageError(f"messages or tools are nested more than {MAX_DEPTH} deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return well_formed(str.__str__(value))
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key, depth + 1): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    if hasattr(value, "model_dump"):  # pydantic
        return _plain(value.model_dump(), depth + 1)
    raise UsageError(f"messages or tools hold a {type(value).__name__}, expected what JSON can hold")


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    for key in _REASONING_KEYS:
        if message.get(key) is not None:
            return {"thinking": message[key], **message, "reasoning_content": message[key]}
    return message


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _absent_signs(texts: Sequence[str]) -> tuple[str, str]:
    """Two characters that occur in none of `texts`, neither as they are nor escaped."""
    with_backslash = [text.lower() for text in texts if "\\" in text]
    free = (
        sign
        for sign in map(chr, _SIGNS)
        if not any(sign in text for text in texts)
        and not any(form in text for form in _escapes(sign) for text in with_backslash)
    )
    try:
        return next(free), next(free)
    except StopIteration:
        raise UsageError(f"the messages use all of U+{_SIGNS[0]:X} to U+{_SIGNS[-1]:X}; leave out some") from None


def _escapes(sign: str) -> tuple[str, str, str]:
    """How ascii(), JSON and the repr of bytes spell a character, in lower case."""
    high, low = divmod(ord(sign) - 0x10000, 0x400)
    utf8 = "".join(f"\\x{byte:02x}" for byte in sign.encode())
    return f"\\u{ord(sign):08x}", f"\\u{0xD800 + high:04x}\\u{0xDC00 + low:04x}", utf8


def _marker(pieces: Sequence[str], start: str, end: str) -> Callable[[str], str]:
    """A function that wraps each of `pieces` in a text, and cuts it off from what may follow."""
    heads = {piece[:n] for piece in pieces for n in range(1, len(piece))}
    longest = max(map(len, heads), default=0)

    def mark(text: str) -> str:
        present = sorted((p for p in pieces if p in text), key=len, reverse=True)
        if present:
            text = re.sub("|".join(map(re.escape, present)), lambda m: f"{start}{m[0]}{end}", text)
        # The next message may begin with the rest of a marker that this one begins: a lone sign keeps them apart.
        if any(text[-n:] in heads for n in range(1, min(longest, len(text)) + 1)):
            text += end
        return text

    return mark


def _map_strings(value: Any, function: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):
        return {_map_strings(k, function): _map_strings(v, function) for k, v in value.items()}
    if isinstance(value, list):
        return [_map_strings(item, function) for item in value]
    return value


# -- what comes out --------------------------------------------------------------------------------------------


def _separate(text: str, pieces: Sequence[str], start: str, end: str) -> Iterable[Segment]:
    """Rendered text -> segments; wrapped pieces are plain text again, and the signs are gone."""
    present = sorted((p for p in pieces if p in text), key=len, reverse=True)
    any_piece = "|".join(map(re.escape, present)) or "(?!)"
    start, end = (f"(?:{sign}|(?i:{'|'.join(map(re.escape, _escapes(sign)))}))" for sign in (start, end))
    plain: list[str] = []
    at = 0
    for match in re.finditer(f"{start}({any_piece}){end}|{start}|{end}|({any_piece})", text):
        plain.append(text[at : match.start()])
        at = match.end()
        if match[2] is None:
            plain.append(match[1] or "")
            continue
        if before := "".join(plain):
            yield before, False
        plain.clear()
        yield match[2], True
    if rest := "".join(plain) + text[at:]:
        yield rest, False
