"""Text while it comes: whole characters, no stop strings (cases E7, E8)."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vocab_model import golden_gguf

from lfm2cpp.gguf import read_gguf
from lfm2cpp.text.detokenize import Detokenizer, StopStrings
from lfm2cpp.text.vocab import Vocab


@pytest.fixture(scope="module")
def vocab(tmp_path_factory: pytest.TempPathFactory) -> Vocab:
    path: Path = tmp_path_factory.mktemp("vocab") / "v.gguf"
    return Vocab(read_gguf(golden_gguf(path)))


def decode(vocab: Vocab, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(vocab)
    return [*(detokenizer.push(i) for i in ids), detokenizer.finish()]


def stop(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    matcher = StopStrings(stops)
    shown = "".join(matcher.push(piece) for piece in pieces)
    return shown + ("" if matcher.found else matcher.finish()), matcher.found


@pytest.mark.parametrize("text", ["🙂", "👩\u200d👩\u200d👧", "é", "日本語", "a🙂b", "🇫🇷", "\x00", "ไทย"])
def test_characters_come_whole(vocab: Vocab, text: str) -> None:
    parts = decode(vocab, vocab.tokenize(text))
    assert "".join(parts) == text and "\ufffd" not in "".join(parts)
    assert all(part == "" or part in text for part in parts)


def test_an_unfinished_character_becomes_one_replacement_at_the_end(vocab: Vocab) -> None:
    ids = vocab.tokenize("a🙂")
    parts = decode(vocab, ids[:-1])
    assert "".join(parts[:-1]) == "a" and parts[-1] == "\ufffd"


def test_a_broken_character_is_replaced_as_soon_as_that_is_certain(vocab: Vocab) -> None:
    broken = vocab.tokenize("🙂")[:-1]
    assert decode(vocab, [*broken, *vocab.tokenize("x")])[-2] == "\ufffdx"


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_pieces_together_are_what_decoding_at_once_gives(vocab: Vocab, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, vocab.n_tokens - 1), max_size=30))
    assert "".join(decode(vocab, ids)) == vocab.detokenize(ids)


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "found"),
    [
        (["END"], ["on", "e E", "N", "D two"], "one ", "END"),
        (["END"], ["one EN"], "one EN", None),
        (["END"], ["E", "E", "N", "D"], "E", "END"),
        (["abc", "abd"], ["xa", "b", "d"], "x", "abd"),
        (["abcd", "bc"], ["a", "b", "c", "d"], "a", "bc"),
        (["abcd", "bc"], ["abcd"], "a", "bc"),
        (["", "x"], ["ab", "xc"], "ab", "x"),
        ([""], ["ab"], "ab", None),
        ([], ["ab", ""], "ab", None),
        (["aab"], ["aaab"], "a", "aab"),
        (["\n\n"], ["a\n", "b\n", "\nc"], "a\nb", "\n\n"),
        (["🙂"], ["a", "🙂b"], "a", "🙂"),
    ],
)
def test_stop_strings(stops: list[str], pieces: list[str], shown: str, found: str | None) -> None:
    assert stop(stops, pieces) == (shown, found)


def test_text_is_held_back_no_longer_than_needed() -> None:
    matcher = StopStrings(["stop here"])
    assert matcher.push("please sto") == "please "
    assert matcher.push("re it") == "store it"


def test_a_stop_string_of_ten_kilobytes() -> None:
    long = "ab" * 5000
    assert stop([long], [long[:9999], "x"]) == (long[:9999] + "x", None)
    assert stop([long], [*long, "x"]) == ("", long)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.text("ab", max_size=4), max_size=3), st.lists(st.text("ab", max_size=3), max_size=12))
def test_the_answer_does_not_depend_on_how_the_text_is_cut(stops: list[str], pieces: list[str]) -> None:
    shown, found = stop(stops, pieces)
    assert (shown, found) == stop(stops, list("".join(pieces)))
    assert not any(s in shown for s in stops if s)
    assert "".join(pieces).startswith(shown + (found or ""))
