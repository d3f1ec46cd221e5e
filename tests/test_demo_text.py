"""The training text of the demonstration model: one seed is one text, and nothing held out is in it."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from random import Random

import pytest

from bench import demo_words as words
from bench.demo_held_out import SKILLS, held_out_questions
from bench.demo_text import FACTS, HELD_OUT_ONE_IN, MAKERS, is_held_out, training_chat

DEMO = Path(__file__).resolve().parents[1] / "lfm2cpp" / "demo"
N_CHATS = 3000
TEXT_SHA256 = "107b3e7b82f7b4b3b931d31f0a4447e401b711fb4114751a4c4ce78c019d00b4"


@pytest.fixture(scope="module")
def training_questions() -> list[tuple[str, str]]:
    """(question, answer) of N_CHATS training chats."""
    rng = Random("a test's own seed")
    pairs = []
    for _ in range(N_CHATS):
        turns = [m for m in training_chat(rng, 10) if m["role"] != "system"]
        pairs += [(q["content"], a["content"]) for q, a in zip(turns[::2], turns[1::2], strict=True)]
    return pairs


@pytest.fixture(scope="module")
def held_out() -> dict[str, list[dict]]:
    return json.loads((DEMO / "held_out.json").read_text(encoding="utf-8"))


def test_a_seed_is_a_text() -> None:
    rng = Random("text-0-0")
    text = json.dumps([training_chat(rng, 10) for _ in range(200)])
    assert hashlib.sha256(text.encode()).hexdigest() == TEXT_SHA256


def test_the_shipped_questions_are_the_generator_s(held_out: dict[str, list[dict]]) -> None:
    assert set(held_out) == set(SKILLS)
    for skill, rows in held_out.items():
        assert rows == held_out_questions(skill, 100), skill


def _numbers(question: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", question))


def _is_sum(question: str) -> bool:
    return bool(re.search(r"\+|plus|add |sum of| more\.", question.lower()))


def test_no_sum_and_no_difference_is_in_both(
    training_questions: list[tuple[str, str]], held_out: dict[str, list[dict]]
) -> None:
    """Read from the text alone: the numbers of a question, in any order for a sum, and its answer."""
    trained = {(frozenset(_numbers(q)), a) for q, a in training_questions if len(_numbers(q)) == 2}
    assert len(trained) > 5000
    for skill in ("addition", "subtraction"):
        asked = [(row["messages"][-1]["content"], row["answer"]) for row in held_out[skill]]
        assert len({(frozenset(_numbers(q)), a) for q, a in asked}) == len(asked)
        for question, answer in asked:
            a, b = _numbers(question)
            assert 10 <= min(a, b) and max(a, b) <= 99
            assert (frozenset((a, b)), answer) not in trained, question
            assert int(answer) in ((a + b,) if _is_sum(question) else (a - b, b - a)), question


def _listed(answer: str) -> frozenset[str]:
    parts = answer.split(", ")
    return frozenset(parts) if len(parts) > 1 and set(parts) <= set(words.WORDS) else frozenset()


def test_no_set_of_words_is_in_both(
    training_questions: list[tuple[str, str]], held_out: dict[str, list[dict]]
) -> None:
    trained = {_listed(answer) for _, answer in training_questions}
    assert len(trained) > 3000
    for skill in ("alphabetical", "descending", "reverse"):
        for row in held_out[skill]:
            assert _listed(row["answer"]) not in trained
            parts = row["answer"].split(", ")
            if skill != "reverse":
                assert parts == sorted(parts, reverse=skill == "descending")
            else:
                places = [re.search(rf"\b{word}\b", row["messages"][-1]["content"]) for word in parts]
                starts = [place.start() for place in places if place]
                assert starts == sorted(starts, reverse=True) and len(starts) == len(parts)


def test_no_name_and_no_number_to_recall_is_in_both(
    training_questions: list[tuple[str, str]], held_out: dict[str, list[dict]]
) -> None:
    answers = {answer for _, answer in training_questions}
    assert sum(answer.startswith("Your name is") for answer in answers) > 100
    assert sum(answer.startswith("Your number is") for answer in answers) > 100
    for skill in ("recall_name", "recall_number"):
        for row in held_out[skill]:
            assert row["answer"] not in answers
            value = row["answer"].rstrip(".").split()[-1]
            told = [m["content"] for m in row["messages"][:-1] if m["role"] == "user"]
            assert any(re.search(rf"\b{value}\b", text) for text in told)


def test_no_question_about_a_fact_is_in_both(
    training_questions: list[tuple[str, str]], held_out: dict[str, list[dict]]
) -> None:
    """Every fact is known from other phrasings, so that a held-out one can be answered."""

    def bare(question: str) -> str:
        return re.sub(r"^(please|now|next|ok|thanks|another one)[:.] ", "", question.lower()).rstrip("?.! ")

    trained = {bare(question) for question, _ in training_questions}
    for row in held_out["facts"]:
        assert bare(row["messages"][-1]["content"]) not in trained
    for kind, rows in FACTS.items():
        for entity, _ in rows:
            phrasings = words.FACT_QUESTIONS[kind]
            known = [p for p in phrasings if not is_held_out("facts", kind, entity, p)]
            assert len(known) >= 2, (kind, entity)


def test_about_one_subject_in_ten_is_held_out() -> None:
    rng = Random(3)
    turns = [MAKERS["subtraction"](rng) for _ in range(4000)]
    share = sum(turn.held_out for turn in turns) / len(turns)
    assert 0.7 < share * HELD_OUT_ONE_IN < 1.3
