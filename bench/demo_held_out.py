"""The held-out questions: chats that end in a question whose subject is not in the training text."""

from __future__ import annotations

from random import Random

from bench.demo_text import (
    MAKERS,
    WEIGHTS,
    Memory,
    Message,
    Turn,
    as_messages,
    make,
    roughen,
    system_message,
    training_turn,
)

HELD_OUT_SEED = 20251
RECALLED = ("name", "number")
STATELESS = ("addition", "subtraction", "facts", "alphabetical", "descending", "reverse")
SKILLS = (*STATELESS, *(f"recall_{kind}" for kind in RECALLED))
# Turns that stand between a question and what it refers to: anything but a new name or number.
_BETWEEN = {what: weight for what, weight in WEIGHTS.items() if what in MAKERS}


def _stateless_question(rng: Random, skill: str) -> tuple[list[Message], Turn]:
    """A question on its own, or after a few others."""
    memory = Memory()
    before: list[Message] = []
    for _ in range(rng.choice((0, 0, 1, 3))):
        before += as_messages(rng, training_turn(rng, memory, WEIGHTS))
    turn = make(rng, skill, held_out=True)
    if skill in ("addition", "subtraction"):
        while min(int(n) for n in turn.about[1:]) < 10:  # type: ignore[call-overload]
            turn = make(rng, skill, held_out=True)
    return before, turn


def _recall_question(rng: Random, kind: str) -> tuple[list[Message], Turn]:
    """The user tells a name and a number, talks about other things, then asks for one of them."""
    memory = Memory()
    order = rng.sample(RECALLED, 2)
    before: list[Message] = []
    for told in order:
        before += as_messages(rng, memory.tell(rng, told, held_out=told == kind))
        for _ in range(rng.randrange(0, 4)):
            before += as_messages(rng, training_turn(rng, memory, _BETWEEN))
    return before, memory.ask(rng, kind)


def held_out_questions(skill: str, n: int, seed: int = HELD_OUT_SEED) -> list[dict[str, object]]:
    """n different {"messages": [...], "answer": text} of one of SKILLS."""
    rng = Random(f"{seed}-{skill}")
    rows: list[dict[str, object]] = []
    seen: set[tuple[object, ...]] = set()
    while len(rows) < n:
        if skill in STATELESS:
            chat, turn = _stateless_question(rng, skill)
        else:
            chat, turn = _recall_question(rng, skill.removeprefix("recall_"))
        # There are only about a hundred numbers to hold out, so only a number may come again.
        subject = (turn.about, turn.question) if skill == "recall_number" else turn.about
        if subject in seen:
            continue
        seen.add(subject)
        if rng.random() < 0.3:
            chat = [system_message(rng), *chat]
        chat = [*chat, {"role": "user", "content": roughen(rng, turn)}]
        rows.append({"messages": chat, "answer": turn.answer})
    return rows
