"""Ids -> text while they come: whole characters only, and never the text of a stop string.

Laws: what `push` and `finish` return in all is what decoding everything at once gives; the text that StopStrings
lets through never contains a stop string.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from .vocab import Vocab


class Detokenizer:
    """Incremental UTF-8: bytes that may yet become a character wait; a broken character becomes U+FFFD."""

    def __init__(self, vocab: Vocab, *, special: bool = False) -> None:
        self._vocab = vocab
        self._special = special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes."""
        return self._decoder.decode(self._vocab.token_bytes(token_id, special=self._special))

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed, else nothing."""
        return self._decoder.decode(b"", True)


class StopStrings:
    """Ends a text before the first stop string, which may come in pieces. Empty stop strings are ignored."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""  # a possible beginning of a stop string
        self.found: str | None = None

    def push(self, text: str) -> str:
        """The text that can be shown by now; once `found` is set nothing more comes."""
        if self.found is not None:
            return ""
        self._held += text
        # The one that is complete first wins, so that the answer does not depend on how the text was cut.
        hits = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if hits:
            _, at, self.found = min(hits)
            shown, self._held = self._held[:at], ""
            return shown
        at = self._hold_from()
        shown, self._held = self._held[:at], self._held[at:]
        return shown

    def finish(self) -> str:
        """What was held back, now that no stop string can be completed."""
        shown, self._held = self._held, ""
        return shown

    def _hold_from(self) -> int:
        """Where the longest tail begins that is the beginning of a stop string."""
        held = self._held
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for at in range(max(0, len(held) - longest), len(held)):
            if any(stop.startswith(held[at:]) for stop in self._stops):
                return at
        return len(held)
