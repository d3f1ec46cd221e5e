"""OpenAI's completion dicts around LLM.stream and LLM.chat_stream, so that code ports by changing an import."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .errors import UsageError
from .generate import Generation, Piece

if TYPE_CHECKING:
    from .llm import LLM, Prompt
    from .worker import Stream

# OpenAI's names -> ours.
_RENAMED = {"temperature": "temp", "max_completion_tokens": "max_tokens"}
# Accepted when they ask for nothing, because clients send them always.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1), "best_of": (None, 1), "logprobs": (None, False), "top_logprobs": (None, 0), "suffix": (None, ""),
    "tool_choice": (None, "auto", "none"), "response_format": (None, {"type": "text"}), "user": (), "model": (),
}  # fmt: skip


def create_completion(llm: LLM, prompt: Prompt, *, stream: bool = False, echo: bool = False, **options: Any) -> Any:
    """The dict of a text completion, or an iterator of its chunks."""
    events = llm.stream(prompt, **our_options(options))
    start = "" if not echo else prompt if isinstance(prompt, str) else llm.detokenize(prompt)
    if stream:
        return _completion_chunks(_head("cmpl", "text_completion", llm), start, events)
    return completion(llm, events.result(), start)


def completion(llm: LLM, result: Generation, start: str = "") -> dict[str, Any]:
    """The dict of a text completion that has ended; `start` comes before its text."""
    choice = {"text": start + result.text, "index": 0, "logprobs": None, "finish_reason": _reason(result)}
    return {**_head("cmpl", "text_completion", llm), "choices": [choice], "usage": _usage(result)}


def create_chat_completion(
    llm: LLM, messages: Sequence[Mapping[str, Any]], *, stream: bool = False, stream_options: Any = None, **options: Any
) -> Any:
    """The dict of a chat completion, or an iterator of its chunks."""
    events = llm.chat_stream(messages, **our_options(options))
    if stream:
        head = _head("chatcmpl", "chat.completion.chunk", llm)
        return _chat_chunks(head, events, bool((stream_options or {}).get("include_usage")))
    return chat_completion(llm, events.result())


def chat_completion(llm: LLM, result: Generation) -> dict[str, Any]:
    """The dict of a chat completion that has ended."""
    message = {"role": "assistant", "content": result.text}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _reason(result)}
    return {**_head("chatcmpl", "chat.completion", llm), "choices": [choice], "usage": _usage(result)}


def our_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options under our names, less those that are None, which clients send for what was not given; UsageError for one
    that asks for something that does not exist here."""
    renamed: dict[str, Any] = {}
    for name, value in options.items():
        if value is None:
            continue
        if name in _NEUTRAL:
            if _NEUTRAL[name] and value not in _NEUTRAL[name]:
                raise UsageError(f"{name}={ascii(value)[:60]} is not supported")
        elif name == "logit_bias":
            renamed[name] = _bias(value)
        else:
            renamed[_RENAMED.get(name, name)] = value
    return renamed


def _bias(bias: Any) -> dict[int, float]:
    """JSON has only text keys: {"42": -100}."""
    try:
        return {int(token_id): value for token_id, value in bias.items()}
    except (AttributeError, TypeError, ValueError):
        raise UsageError(f"logit_bias is {ascii(bias)[:60]}, expected token ids with numbers") from None


def _head(prefix: str, kind: str, llm: LLM) -> dict[str, Any]:
    return {"id": f"{prefix}-{uuid.uuid4()}", "object": kind, "created": int(time.time()), "model": str(llm.path)}


def _reason(result: Generation) -> str:
    """OpenAI knows no interruption: an answer that was cut is one of limited length."""
    return "length" if result.finish_reason == "interrupted" else result.finish_reason


def _usage(result: Generation) -> dict[str, Any]:
    n_prompt, n_answer = len(result.prompt_ids), len(result.token_ids)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_answer,
        "total_tokens": n_prompt + n_answer,
        "prompt_tokens_details": {"cached_tokens": result.timings.cache_n},
    }


def _completion_chunks(head: dict[str, Any], start: str, events: Stream) -> Iterator[dict[str, Any]]:
    def chunk(text: str, reason: str | None) -> dict[str, Any]:
        return {**head, "choices": [{"text": text, "index": 0, "logprobs": None, "finish_reason": reason}]}

    with events:
        if start:
            yield chunk(start, None)
        for event in events:
            if isinstance(event, Piece) and event.text:
                yield chunk(event.text, None)
            elif isinstance(event, Generation):
                yield chunk("", _reason(event))


def _chat_chunks(head: dict[str, Any], events: Stream, include_usage: bool) -> Iterator[dict[str, Any]]:
    """The role first, then content, then an empty delta with the reason; the usage after it, if asked for."""

    def chunk(delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return {**head, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]}

    with events:
        yield chunk({"role": "assistant"}, None)
        for event in events:
            if isinstance(event, Piece) and event.text:
                yield chunk({"content": event.text}, None)
            elif isinstance(event, Generation):
                yield chunk({}, _reason(event))
                if include_usage:
                    yield {**head, "choices": [], "usage": _usage(event)}
