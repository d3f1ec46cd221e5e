"""Prompt lookup: drafts are what a plain search of the text finds, and as long as pays for what was right and what it took."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm2cpp.lookup import DRAFT_MAX, MATCH_MAX, N_GRAM, PLACES_MAX, TOKEN_COST, PromptLookup

STEP = 0.01  # seconds


def lookup_of(text: list[int], most: int = DRAFT_MAX, token_cost: float = 0.01) -> PromptLookup:
    """One that has timed steps, with drafts that cost next to nothing unless said otherwise."""
    lookup = PromptLookup(most)
    lookup.extend(text)
    lookup.took(0, STEP)
    for _ in range(200):
        lookup.took(1, STEP * (1 + token_cost))
    return lookup


def places(text: list[int]) -> list[int]:
    """Where the last N_GRAM tokens were followed by something, the latest first."""
    n_gram = text[-N_GRAM:]
    return [i for i in range(len(text) - 1, N_GRAM - 1, -1) if text[i - N_GRAM : i] == n_gram]


def match_before(text: list[int], place: int) -> int:
    """How many tokens before place are also at the end of the text."""
    return next((m for m in range(place) if text[place - 1 - m] != text[-1 - m]), place)


def continued(text: list[int], place: int, n: int) -> list[int]:
    """n tokens from place on, of a text that goes on as it did from there."""
    text = list(text)
    for i in range(n):
        text.append(text[place + i])
    return text[-n:] if n else []


texts = st.one_of(
    st.lists(st.integers(0, 2), max_size=120),
    st.lists(st.integers(0, 65535), max_size=30).flatmap(
        lambda part: st.lists(st.sampled_from([part, part[:7], part[3:], [5], [6]]), max_size=8).map(
            lambda parts: [token for part in parts for token in part]
        )
    ),
)


@settings(max_examples=400, deadline=None)
@given(text=texts, room=st.integers(0, 40), pieces=st.integers(1, 5))
def test_a_draft_is_what_followed_the_longest_match(text: list[int], room: int, pieces: int) -> None:
    lookup = lookup_of([])
    for i in range(pieces):  # in pieces or at once
        lookup.extend(text[i * len(text) // pieces : (i + 1) * len(text) // pieces])
    draft, found = lookup.draft(room), places(text)[:PLACES_MAX]
    if not found or room == 0:
        assert draft == []
        return
    assert 1 <= len(draft) <= min(room, DRAFT_MAX)
    longest = max(min(MATCH_MAX, match_before(text, place)) for place in found)
    best = next(place for place in found if min(MATCH_MAX, match_before(text, place)) == longest)
    assert draft == continued(text, best, len(draft))


@pytest.mark.parametrize("most", [0, 1, 2, 5, 6, DRAFT_MAX])
def test_no_draft_is_longer_than_asked_for(most: int) -> None:
    lookup = lookup_of(list(range(100)) * 2, most)
    assert len(lookup.draft(1000)) == most and len(lookup.draft(4)) <= 4


def test_nothing_is_drafted_before_a_step_was_timed() -> None:
    lookup = PromptLookup()
    lookup.extend([1, 2, 3, 4] * 5)
    assert lookup.draft(10) == []
    lookup.took(0, STEP)
    assert lookup.draft(10) != []


def drafts_of(lookup: PromptLookup, text: list[int], share_right: float, n: int) -> list[int]:
    """Lengths of n drafts for a text that goes round and round, the same share of each being right."""
    lengths = []
    for _ in range(n):
        draft = lookup.draft(DRAFT_MAX)
        lengths.append(len(draft))
        if draft:
            lookup.was_right(round(share_right * len(draft)), len(draft))
        lookup.took(len(draft), STEP * (1 + TOKEN_COST * len(draft)))
    return lengths


def test_drafts_that_are_wrong_end() -> None:
    """Each costs part of a step: the odds are learned from few of them, and hardly any is tried after that."""
    lengths = drafts_of(lookup_of([1, 2, 3, 4] * 20, token_cost=TOKEN_COST), [], 0.0, 1000)
    assert lengths[0] > 1 and sum(map(bool, lengths[:40])) <= 12 and sum(lengths[40:]) <= 30


def test_drafts_are_tried_again_some_time() -> None:
    lookup = lookup_of([1, 2, 3, 4] * 20, token_cost=TOKEN_COST)
    drafts_of(lookup, [], 0.0, 40)
    assert sum(map(bool, drafts_of(lookup, [], 1.0, 600))) > 300


def test_thousands_of_right_drafts() -> None:
    """The odds are one then, and not more."""
    assert drafts_of(lookup_of([1, 2, 3, 4] * 20), [], 1.0, 3000)[-1] == DRAFT_MAX


def test_drafts_that_are_right_stay_long() -> None:
    lengths = drafts_of(lookup_of([1, 2, 3, 4] * 20, token_cost=TOKEN_COST), [], 1.0, 40)
    assert lengths[-1] == DRAFT_MAX and 0 not in lengths


@pytest.mark.parametrize("token_cost", [0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.74, 0.76, 0.95])
def test_a_draft_is_as_long_as_pays(token_cost: float) -> None:
    """At odds of 0.75 (a match of N_GRAM tokens, nothing known yet): 1 + 0.75 + ... tokens in 1 + n token_cost steps."""
    text = [9, 1, 2, 3, *range(10, 40), 8, 1, 2, 3]
    draft = lookup_of(text, token_cost=token_cost).draft(DRAFT_MAX)
    gains = {n: sum(0.75**i for i in range(n + 1)) / (1 + n * token_cost) for n in (0, 1, 3, 5, 7, 11, DRAFT_MAX)}
    assert len(draft) == max(gains, key=gains.__getitem__)
    assert bool(draft) == (token_cost < 0.75)


def test_one_slow_step_does_not_end_drafting() -> None:
    """Something else ran on the machine: a hundred times the usual time."""
    lookup = lookup_of([1, 2, 3, 4] * 20, token_cost=TOKEN_COST)
    lookup.took(5, 100 * STEP)
    assert lookup.draft(DRAFT_MAX)
