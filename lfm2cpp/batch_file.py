"""Files of a batch, in the shape of OpenAI's: a line of JSON for each prompt, and one for each answer.

    {"custom_id": "a", "body": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 100}}
    {"custom_id": "b", "prompt": "Once upon a time", "temperature": 0}
    ->
    {"id": ..., "custom_id": "b", "response": {"status_code": 200, "request_id": ..., "body": {...}}, "error": null}
    {"id": ..., "custom_id": "a", "response": null, "error": {"code": "context_length_exceeded", "message": ...}}

A prompt's fields may stand in a body or beside the custom_id, which is "line-N" when there is none. Answers are
appended as they come, each whole and on the disk before the next; so who was killed goes on where the file ends.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from .errors import ContextError, OutputError, UsageError
from .files import try_lock
from .generate import Generation, Outcome
from .openai_shapes import our_options

OF_BATCHES = ("custom_id", "method", "url", "body")  # what a line has beside the fields of a request
CODES = {ContextError: "context_length_exceeded", UsageError: "invalid_request"}


@dataclass(frozen=True)
class Record:
    """A line of prompts: what it asks for, or what is wrong with it."""

    custom_id: str
    prompt: Any = None  # text, token ids or messages
    options: dict[str, Any] = field(default_factory=dict)  # under LLM.stream's names
    error: UsageError | None = None

    @property
    def is_chat(self) -> bool:
        return isinstance(self.prompt, list) and all(isinstance(part, dict) for part in self.prompt)


def read_records(lines: Iterable[bytes]) -> list[Record]:
    """Lines of JSON as records; empty lines are none."""
    return [_record(line, number) for number, line in enumerate(lines, 1) if line.strip()]


def _record(line: bytes, number: int) -> Record:
    custom_id = f"line-{number}"
    try:
        fields = json.loads(line)
        if not isinstance(fields, dict):
            raise UsageError("it is no JSON object")
        custom_id = _text(fields, "custom_id", custom_id)
        if _text(fields, "method", "POST") != "POST":
            raise UsageError("method is not POST")
        body = fields.get("body", {key: value for key, value in fields.items() if key not in OF_BATCHES})
        if not isinstance(body, dict) or ("messages" in body) == ("prompt" in body):
            raise UsageError("expected one of messages and prompt")
        return Record(custom_id, *_request(dict(body)))
    except (ValueError, RecursionError) as error:
        return Record(custom_id, error=UsageError(f"line {number}: no JSON: {error}"))
    except UsageError as error:
        return Record(custom_id, error=UsageError(f"line {number}: {error}"))


def _text(fields: dict[str, Any], name: str, default: str) -> str:
    value = fields.get(name, default)
    if not isinstance(value, str) or not value:
        raise UsageError(f"{name} is {ascii(value)[:40]}, expected text")
    return value


def _request(body: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The prompt and the options of a request's fields."""
    messages, prompt = body.pop("messages", None), body.pop("prompt", None)
    if "sampling" in body:
        raise UsageError("sampling is no field of a request; give temperature, top_p, ... by name")
    if body.pop("stream", False):
        raise UsageError("stream is not supported in a batch")
    if messages is None and not isinstance(prompt, str):
        if not isinstance(prompt, list) or not prompt or not all(type(i) is int for i in prompt):
            raise UsageError(f"prompt is {ascii(prompt)[:40]}, expected text or token ids")
    elif messages is not None and (not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages)):
        raise UsageError(f"messages is {ascii(messages)[:40]}, expected a list of objects")
    return prompt if messages is None else messages, our_options(body)


def answer_line(custom_id: str, outcome: Outcome, body: dict[str, Any] | None) -> str:
    """The line of an answer; body: the completion, of one that is no error."""
    response = error = None
    if isinstance(outcome, Generation):
        response = {"status_code": 200, "request_id": str(uuid.uuid4()), "body": body}
    else:
        code = next((code for kind, code in CODES.items() if isinstance(outcome, kind)), "failed")
        error = {"code": code, "message": str(outcome)}
    answer = {"id": f"batch_req_{uuid.uuid4()}", "custom_id": custom_id, "response": response, "error": error}
    return json.dumps(answer) + "\n"  # in ASCII: it survives any terminal, and ids that are no valid text


class AnswerFile:
    """A file of answers that is added to. `done`: the custom_ids that it has already; `failed`: those of errors.

    Raises UsageError when it holds something else or is one of `inputs`, OutputError when it cannot be written or
    another process writes it.
    """

    def __init__(self, path: Path, inputs: Sequence[str] = ()) -> None:
        self.path = path
        self.done: set[str] = set()
        self.failed: set[str] = set()
        try:
            if any(path.exists() and os.path.exists(other) and path.samefile(other) for other in inputs):
                raise UsageError(f"{path} is the file of prompts; name another one for the answers")
            if path.exists() and not path.is_file():
                raise UsageError(f"{path} is no regular file; without a name the answers are printed")
            self._file: IO[bytes] = open(path, "a+b", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror}") from None
        try:
            if try_lock(self._file.fileno()) is False:
                raise OutputError(f"{path} is being written by another process")
            self._go_on()
        except BaseException:
            self._file.close()
            raise

    def _go_on(self) -> None:
        """Read what is there, and cut off a last line that was not written to its end."""
        self._file.seek(0)
        size = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                if not line.startswith(b"{"):
                    self._refuse(number)
                self._file.truncate(size)
                break
            try:
                answer = json.loads(line)
                self.done.add(answer["custom_id"])
                if answer["error"] is not None:
                    self.failed.add(answer["custom_id"])
            except (ValueError, KeyError, TypeError, RecursionError):
                self._refuse(number)
            size += len(line)

    def _refuse(self, number: int) -> None:
        raise UsageError(f"{self.path}: line {number} is no answer of a batch; name another file, or remove this one")

    def add(self, line: str) -> None:
        """Append a line; when this returns it is on the disk."""
        data = line.encode("ascii")
        try:
            while data:
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error.strerror}; what is in it stays") from None

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
