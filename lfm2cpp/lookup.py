"""Prompt lookup: the next tokens, drafted from the text itself, so that one step of the model can check several.

Where the last tokens have stood before, what followed them then is likely to follow again: in a file that is changed,
in a text that is quoted, in a list or a table. A decode step waits for the weights, so that tokens which it evaluates
along with its own cost a fraction of a step each; those that were drafted wrongly are taken back. The answer stays the
same to the bit, for logits do not depend on what else is in a batch.

Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding; Leviathan et al. 2023, arXiv:2211.17192.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

DRAFT_MAX = 15  # tokens of the longest draft: with the one before it 16, which attention takes together
LENGTHS = (1, 3, 5, 7, 11, DRAFT_MAX)  # of drafts: with the token before them they fill the tiles of a product
N_GRAM = 3  # tokens that must have stood before
MATCH_MAX = 32  # tokens compared to find out which of several places is most like the end of the text
PLACES_MAX = 8  # the latest of them that are looked at
TOKEN_COST = 0.25  # of a step, for each token drafted; assumed until some were timed
COST_RATE, STEP_RATE = 0.1, 0.1  # how fast what was timed replaces what was known
TRIALS = 4.0  # tokens drafted that the odds assumed at first count for
FORGET = 0.95  # what all trials so far count for at the next
FADE = 0.001  # of what is known that is forgotten each time when it says not to draft


class PromptLookup:
    """Drafts for one growing text. Their length is the one that gives most tokens a second, as far as can be known.

    Known are how often drafts were right after as long a match, and what a step with a draft has taken beside one
    without. `most` is the longest draft, at most DRAFT_MAX tokens; 0 never drafts.
    """

    def __init__(self, most: int = DRAFT_MAX) -> None:
        self._lengths = [n for n in LENGTHS if n < most] + ([most] if most else [])
        self._text = array("i")
        self._latest: dict[tuple[int, ...], int] = {}  # N_GRAM tokens -> where they were followed by something, lately
        self._before = array("i")  # of each such place the one before it, after the same tokens; 0: none
        # By the length of the match: tokens drafted that were right, and that were looked at. At first m of m + 1 are.
        self._assumed = [TRIALS * m / (m + 1) for m in range(MATCH_MAX + 1)]
        self._right, self._tried = list(self._assumed), [TRIALS] * (MATCH_MAX + 1)
        self._step_seconds, self._token_cost = 0.0, TOKEN_COST
        self._match = 0  # of the draft that is being checked

    def extend(self, token_ids: Iterable[int]) -> None:
        """These tokens follow in the text."""
        if not self._lengths:
            return
        text, latest, before = self._text, self._latest, self._before
        for token_id in token_ids:
            n_gram, place = tuple(text[-N_GRAM:]), len(text)
            before.append(latest.get(n_gram, 0))
            latest[n_gram] = place
            text.append(token_id)

    def draft(self, room: int) -> list[int]:
        """What may follow the text, at most `room` tokens; mostly nothing."""
        place = self._latest.get(tuple(self._text[-N_GRAM:]), 0)
        if place < N_GRAM or not self._step_seconds:
            return []
        place, m = self._best_place(place)
        text, n = self._text, self._best_length(self._right[m] / self._tried[m], room)
        if not n:  # what was learned fades, so that it is tried again some time
            self._right[m] += (self._assumed[m] - self._right[m]) * FADE
            self._tried[m] += (TRIALS - self._tried[m]) * FADE
        self._match = m
        period = len(text) - place  # what is drafted may reach into what is drafted
        return [text[place + i % period] for i in range(n)]

    def _best_place(self, place: int) -> tuple[int, int]:
        """Of the latest places after the same N_GRAM tokens the one with the longest match, and its length."""
        best, longest = place, 0
        for _ in range(PLACES_MAX):
            if (match := self._match_before(place)) > longest:
                best, longest = place, match
            if (place := self._before[place]) < N_GRAM:
                break
        return best, longest

    def _match_before(self, place: int) -> int:
        """How many tokens before this place are those that the text ends with; MATCH_MAX or more are MATCH_MAX."""
        text, match = self._text, N_GRAM
        while match < min(MATCH_MAX, place) and text[place - 1 - match] == text[-1 - match]:
            match += 1
        return match

    def _best_length(self, odds: float, room: int) -> int:
        """Of the draft that gives most tokens a second, each of its tokens being right at these odds after the others.

        A draft of n gives 1 + odds + ... + odds^n tokens (Leviathan et al., 3.1) in 1 + n * token_cost steps' time.
        """
        best, length = 1.0, 0
        for n in self._lengths:
            gain = sum(odds**i for i in range(n + 1)) / (1 + n * self._token_cost)
            if n <= room and gain > best:
                best, length = gain, n
        return length

    def took(self, n_drafted: int, seconds: float) -> None:
        """What a step with a draft of so many tokens has taken."""
        if not n_drafted:
            self._step_seconds += (seconds - self._step_seconds) * (STEP_RATE if self._step_seconds else 1)
        else:
            cost = (seconds / self._step_seconds - 1) / n_drafted
            self._token_cost += (min(max(cost, 0.0), 1.0) - self._token_cost) * COST_RATE

    def was_right(self, n_right: int, n_drafted: int) -> None:
        """How many tokens of the last draft the model has chosen; it was looked at up to the first that it has not."""
        m = self._match
        self._right[m] = FORGET * self._right[m] + n_right
        self._tried[m] = FORGET * self._tried[m] + n_right + (n_right < n_drafted)
