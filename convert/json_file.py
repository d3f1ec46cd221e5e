"""JSON from strangers: bounded, UTF-8, no duplicate keys, no NaN; errors say where.

Python's own parser takes the last of two equal keys and reads NaN, and two programs that disagree about a file are
how a checkpoint comes to mean one thing to its checker and another to its user.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NoReturn

from lfm2cpp.errors import CheckpointError

MAX_BYTES = 16 << 20

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\],:]|-?Infinity|NaN', re.DOTALL)


class _Refused(Exception):
    """What a hook of the parser objects to; its place is found afterwards."""


def read_json(path: Path, *, max_bytes: int = MAX_BYTES) -> Any:
    """The value in a JSON file. Raises CheckpointError with file, line and column."""
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise CheckpointError(f"{path}: {size} bytes of JSON, more than the {max_bytes} that such a file may have")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    return parse_json(data, str(path))


def read_object(path: Path, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """As `read_json`, for a file that must hold an object."""
    value = read_json(path, max_bytes=max_bytes)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    return value


def parse_json(data: bytes, name: str) -> Any:
    """The value of JSON text; `name` is what errors call it."""
    text = _decode(data, name)
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        if _SURROGATE.search(text):  # pairs are one character; half of one is no Unicode, and no file could hold it
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except _Refused:
        problem, offset = _first_refused(text)
        raise CheckpointError(f"{name}: {problem} at {_place(text, offset)}") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise CheckpointError(f"{name}: invalid JSON at {place}: {error.msg}") from None
    except UnicodeEncodeError:
        raise CheckpointError(f"{name}: half a surrogate pair, not valid Unicode text") from None
    except RecursionError:
        raise CheckpointError(f"{name}: JSON nested too deeply at {_place(text, _deepest(text))}") from None
    except ValueError as error:
        raise CheckpointError(f"{name}: invalid JSON: {error}") from None


def _decode(data: bytes, name: str) -> str:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or (len(data) > 1 and 0 in data[:2]):
        raise CheckpointError(f"{name}: not UTF-8 at line 1 column 1 (UTF-16?); save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = data[: error.start]
        line, column = start.count(b"\n") + 1, error.start - start.rfind(b"\n")
        raise CheckpointError(f"{name}: not UTF-8 at line {line} column {column}; save it as UTF-8") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise _Refused
    return result


def _no_constant(text: str) -> NoReturn:
    raise _Refused


def _first_refused(text: str) -> tuple[str, int]:
    """The first duplicate key or non-finite number of valid JSON text, and its offset."""
    keys: list[set[str]] = []
    last: tuple[str, int] = ("", 0)
    for match in _TOKEN.finditer(text):
        token, offset = match.group(), match.start()
        if token in ("NaN", "Infinity", "-Infinity"):
            return f"{token} is not a JSON number", offset
        if token in "{[":
            keys.append(set())
        elif token in "}]" and keys:
            keys.pop()
        elif token == ":" and keys:
            key = json.loads(last[0])
            if key in keys[-1]:
                return f"duplicate key {key[:80]!r}", last[1]
            keys[-1].add(key)
        last = (token, offset)
    return "duplicate key", 0


def _deepest(text: str) -> int:
    """Where the nesting of brackets is at its deepest."""
    depth = most = place = 0
    for match in _TOKEN.finditer(text):
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(match.group(), 0)
        if depth > most:
            most, place = depth, match.start()
    return place


def _place(text: str, offset: int) -> str:
    line = text.count("\n", 0, offset) + 1
    return f"line {line} column {offset - text.rfind(chr(10), 0, offset)}"
