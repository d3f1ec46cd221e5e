"""Makes the demonstration model's questions and chats, and says which are held out.

Everything comes from a random.Random, so a seed is a text. What is held out is decided by a
hash of what a question is about (the two numbers, the words, the fact and its phrasing, the
name, the number to remember), never by chance: training text cannot contain it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from bench import demo_words as words

Message = dict[str, str]

HELD_OUT_ONE_IN = 10


def is_held_out(*about: object) -> bool:
    """True for about one in HELD_OUT_ONE_IN subjects; depends on the subject alone."""
    key = "|".join(str(part) for part in about)
    return zlib.crc32(key.encode()) % HELD_OUT_ONE_IN == 0


@dataclass(frozen=True)
class Turn:
    """A question, its only right answer, and the subject that decides whether it is held out."""

    skill: str
    question: str
    answer: str
    about: tuple[object, ...]  # empty: never held out

    @property
    def held_out(self) -> bool:
        return bool(self.about) and is_held_out(*self.about)


def _number(rng: Random) -> int:
    return rng.randrange(10, 100) if rng.random() < 0.9 else rng.randrange(0, 10)


def addition(rng: Random) -> Turn:
    a, b = _number(rng), _number(rng)
    question = rng.choice(words.ADDITION).format(a=a, b=b)
    return Turn("addition", question, str(a + b), ("addition", min(a, b), max(a, b)))


def subtraction(rng: Random) -> Turn:
    a, b = _number(rng), _number(rng)
    phrasings = words.SUBTRACTION
    if a < b and rng.random() < 0.6:
        a, b = b, a
    if a >= b and rng.random() < 0.08:
        phrasings = words.SUBTRACTION_LARGER_FIRST
    question = rng.choice(phrasings).format(a=a, b=b)
    return Turn("subtraction", question, str(a - b), ("subtraction", a, b))


def _fact_table() -> dict[str, list[tuple[str, str]]]:
    """Question kind -> (entity, answer)."""
    legs = [(animal, n) for animal, (n, _) in words.ANIMALS.items()]
    successors = [
        pair
        for ring in (words.DAYS, words.MONTHS)
        for pair in zip(ring, ring[1:] + ring[:1], strict=True)
    ]
    return {
        "capital": list(words.CAPITALS.items()),
        "country": [(city, country) for country, city in words.CAPITALS.items()],
        "continent": [(c, name) for name, text in words.CONTINENTS.items() for c in text.split()],
        "legs": legs + list(words.MORE_LEGS.items()),
        "young": [(animal, young) for animal, (_, young) in words.ANIMALS.items()],
        "colour": list(words.COLOURS.items()),
        "opposite": words.OPPOSITES + [(b, a) for a, b in words.OPPOSITES],
        "after": successors,
        "before": [(b, a) for a, b in successors],
        "planet": list(zip(words.ORDINALS, words.PLANETS, strict=True)),
    }


FACTS = _fact_table()
_FACT_KINDS = [kind for kind, rows in FACTS.items() for _ in rows]


def fact(rng: Random) -> Turn:
    kind = rng.choice(_FACT_KINDS)
    entity, answer = rng.choice(FACTS[kind])
    phrasing = rng.choice(words.FACT_QUESTIONS[kind])
    question = phrasing.format(entity)
    question = question.replace(" a a", " an a").replace(" a e", " an e").replace(" a o", " an o")
    question = question.replace("A a", "An a").replace("A e", "An e").replace("A o", "An o")
    question = question[0].upper() + question[1:]
    return Turn("facts", question, answer, ("facts", kind, entity, phrasing))


def _word_list(rng: Random) -> tuple[list[str], str]:
    """Two to five different words, and one way to write them down."""
    chosen = rng.sample(words.WORDS, rng.choice((2, 3, 3, 3, 4, 4, 4, 5)))
    style = rng.random()
    if style < 0.65:
        return chosen, ", ".join(chosen)
    if style < 0.8:
        return chosen, " ".join(chosen)
    if style < 0.95:
        return chosen, ", ".join(chosen[:-1]) + " and " + chosen[-1]
    return chosen, ",".join(chosen)


def _word_task(rng: Random, phrasings: list[str]) -> tuple[str, list[str], tuple[object, ...]]:
    chosen, text = _word_list(rng)
    question = rng.choice(phrasings).format(text)
    if rng.random() < 0.1:
        question = question.replace(": ", ":\n")
    elif rng.random() < 0.15:
        question += "."
    return question, chosen, ("words", *sorted(chosen))


def alphabetical(rng: Random) -> Turn:
    question, chosen, about = _word_task(rng, words.SORT)
    return Turn("alphabetical", question, ", ".join(sorted(chosen)), about)


def descending(rng: Random) -> Turn:
    question, chosen, about = _word_task(rng, words.SORT_DOWN)
    return Turn("descending", question, ", ".join(sorted(chosen, reverse=True)), about)


def reverse(rng: Random) -> Turn:
    question, chosen, about = _word_task(rng, words.REVERSE)
    return Turn("reverse", question, ", ".join(reversed(chosen)), about)


def small_talk(rng: Random) -> Turn:
    answer = rng.choice(list(words.SMALL_TALK))
    question = rng.choice(words.SMALL_TALK[answer])
    return Turn("small_talk", question, answer, ())


def unknown(rng: Random) -> Turn:
    question = rng.choice(words.UNKNOWN).format(
        a=rng.randrange(100), b=rng.randrange(100), word=rng.choice(words.WORDS),
        name=rng.choice(words.NAMES), thing=rng.choice(words.THINGS).strip(),
        place=rng.choice(words.PLACES).strip(), country=rng.choice(list(words.CAPITALS)),
        city=rng.choice(list(words.CAPITALS.values())),
    )  # fmt: skip
    return Turn("unknown", question, words.UNKNOWN_ANSWER, ())


def _any_name(rng: Random) -> str:
    """A common name, or an invented one, so that copying is learnt and not a list of names."""
    if rng.random() < 0.5:
        return rng.choice(words.NAMES)
    parts = [rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.choice((2, 2, 3)))]
    return "".join(parts).capitalize() + rng.choice(("", "", "n", "s", "r", "l", "t"))


def _any_number(rng: Random) -> str:
    return str(rng.randrange(100, 1000) if rng.random() < 0.4 else rng.randrange(100))


@dataclass
class Memory:
    """What the user has told in this chat, and the turns that tell it or ask for it back."""

    told: dict[str, str] = field(default_factory=dict)

    def tell(self, rng: Random, kind: str, held_out: bool = False) -> Turn:
        value = RECALL[kind].any_value(rng)
        while kind != "colour" and is_held_out(kind, value) != held_out:
            value = RECALL[kind].any_value(rng)
        self.told[kind] = value
        question = rng.choice(RECALL[kind].tell).format(value)
        return Turn("tell_" + kind, question, RECALL[kind].noted.format(value), (kind, value))

    def ask(self, rng: Random, kind: str) -> Turn:
        question = rng.choice(RECALL[kind].ask)
        if kind not in self.told:
            return Turn("recall_nothing", question, RECALL[kind].unknown, ())
        value = self.told[kind]
        return Turn("recall_" + kind, question, RECALL[kind].answer.format(value), (kind, value))


@dataclass(frozen=True)
class Recall:
    """One thing to be remembered: how it is told, acknowledged, asked for and answered."""

    any_value: Callable[[Random], str]
    tell: list[str]
    noted: str
    ask: list[str]
    answer: str
    unknown: str


RECALL = {
    "name": Recall(
        _any_name, words.TELL_NAME, "Nice to meet you, {}.",
        words.ASK_NAME, "Your name is {}.", "You have not told me your name.",
    ),
    "number": Recall(
        _any_number, words.TELL_NUMBER, "I will remember the number {}.",
        words.ASK_NUMBER, "Your number is {}.", "You have not told me a number.",
    ),
    "colour": Recall(
        lambda rng: rng.choice(words.FAVOURITES), words.TELL_COLOUR, "I will remember that you like {}.",
        words.ASK_COLOUR, "You like {}.", "You have not told me a colour.",
    ),
}  # fmt: skip

MAKERS: dict[str, Callable[[Random], Turn]] = {
    "addition": addition, "subtraction": subtraction, "facts": fact, "alphabetical": alphabetical,
    "descending": descending, "reverse": reverse, "small_talk": small_talk, "unknown": unknown,
}  # fmt: skip
# How often each kind of turn stands in the training text.
WEIGHTS = {
    "addition": 14, "subtraction": 19, "facts": 13, "alphabetical": 11, "descending": 10,
    "reverse": 6, "small_talk": 3, "unknown": 4, "tell": 9, "ask": 11,
}  # fmt: skip


def make(rng: Random, skill: str, held_out: bool) -> Turn:
    """A turn of one of MAKERS, from the training side or from the held-out side."""
    turn = MAKERS[skill](rng)
    while turn.held_out != held_out:
        turn = MAKERS[skill](rng)
    return turn


def roughen(rng: Random, turn: Turn) -> str:
    """The question as people type it: without capitals, without the full stop, with a please."""
    text, chance = turn.question, rng.random()
    if turn.skill.startswith("tell_"):
        return text.rstrip(".") if chance < 0.2 else text
    if chance < 0.12:
        text = text.lower()
    elif chance < 0.2:
        text = text[0].lower() + text[1:]
    elif chance < 0.26:
        text = rng.choice(("Please: ", "Now: ", "Next: ", "OK. ", "Thanks. ", "Another one: ")) + text
    if rng.random() < 0.12:
        text = text.rstrip("?.! ")
    return text


def training_turn(rng: Random, memory: Memory, weights: dict[str, int]) -> Turn:
    """One turn of a training chat, never a held-out one."""
    (what,) = rng.choices(list(weights), weights=list(weights.values()))
    if what in MAKERS:
        return make(rng, what, held_out=False)
    if what == "tell":
        return memory.tell(rng, rng.choice(("name", "name", "number", "number", "colour")))
    kinds = list(RECALL) if rng.random() < 0.15 else list(memory.told) or list(RECALL)
    return memory.ask(rng, rng.choice(kinds))


def system_message(rng: Random) -> Message:
    text = rng.choice(words.SYSTEM_PROMPTS)
    text = text.format(day=rng.choice(words.DAYS), word=rng.choice(words.WORDS))
    return {"role": "system", "content": text}


def as_messages(rng: Random, turn: Turn) -> list[Message]:
    return [
        {"role": "user", "content": roughen(rng, turn)},
        {"role": "assistant", "content": turn.answer},
    ]


def training_chat(rng: Random, n_turns: int, weights: dict[str, int] | None = None) -> list[Message]:
    """A chat of n_turns questions and answers, three in ten with a system message."""
    memory = Memory()
    chat = [system_message(rng)] if rng.random() < 0.3 else []
    for _ in range(n_turns):
        chat += as_messages(rng, training_turn(rng, memory, weights or WEIGHTS))
    return chat
