"""llama-bench's lists of numbers: `1,2,4`, `64-512*2` (64 128 256 512), `128-512+128`, and mixtures."""

from __future__ import annotations

import re

_ITEM = re.compile(r"(\d+)(?:-(\d+)(?:([+*])(\d+))?)?")
MAX_DIGITS = 9
MAX_NUMBERS = 10_000


def parse_range(text: str) -> list[int]:
    """The numbers that `text` lists, in its order. ValueError says what is wrong with it."""
    numbers: list[int] = []
    for item in text.split(","):
        match = _ITEM.fullmatch(item.strip())
        if match is None:
            raise ValueError(f"{item!r} is no number, range first-last, first-last+step or first-last*factor")
        if max(map(len, (digits for digits in match.groups() if digits))) > MAX_DIGITS:
            raise ValueError(f"{item!r} holds a number of more than {MAX_DIGITS} digits")
        numbers += _expand(item, *match.groups())
        if len(numbers) > MAX_NUMBERS:
            raise ValueError(f"{text!r} lists more than {MAX_NUMBERS} numbers")
    return numbers


def _expand(item: str, begin: str, end: str | None, operator: str | None, increment: str | None) -> list[int]:
    first = int(begin)
    last = first if end is None else int(end)
    step = 1 if increment is None else int(increment)
    if last < first:
        raise ValueError(f"{item!r} ends before it begins")
    if operator == "*":
        if step < 2 or first < 1:
            raise ValueError(f"{item!r} never ends: expected a factor of 2 or more and a first number of 1 or more")
        numbers = []
        while first <= last:
            numbers.append(first)
            first *= step
        return numbers
    if step < 1:
        raise ValueError(f"{item!r} never ends: expected a step of 1 or more")
    return list(range(first, min(last, first + step * MAX_NUMBERS) + 1, step))
