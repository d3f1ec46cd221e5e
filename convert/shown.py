"""Text of strangers inside a message: escaped when it is not printable, and cut when it is long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def shown(value: Any, limit: int = 100) -> str:
    """`value` as part of one line."""
    text = str(value)
    text = text if len(text) <= limit else text[:limit] + "..."
    return text if text.isprintable() else ascii(text)[1:-1]


def some(names: Sequence[Any], most: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(shown(name, 120) for name in names[:most]) + more
