"""The text tasks of the tiny checkpoints: short questions with exactly one right answer.

A hash of its text decides whether a question is for training or held out, so what was trained on one split has never
seen a question of the other, whatever the seeds.
"""

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "held_out"]

# One question in ten is held out.
_HELD_OUT_ONE_IN = 10

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_WORDS = """
    apple bread cloud dance eagle flame grape house island jungle kitten lemon mango night ocean planet queen
    river stone table uncle violet water yellow zebra animal bridge candle dragon engine forest garden hammer
    insect jacket ladder magnet needle orange pencil rabbit silver tunnel valley window bottle castle desert
    flower guitar honey iron kite lamp moon nest owl pear rain ship tree wind book cat dog egg fish gold hat ink
    jar key leaf map nut oak pin ring sun toy van web boat crab drum frog goat hill jazz king lion milk nose
    park rose salt tent wolf yard
""".split()  # noqa: SIM905


@dataclass(frozen=True, slots=True)
class Question:
    """A question, the task it belongs to and its only right answer."""

    task: str
    text: str
    answer: str


def _word(rng: random.Random, longest: int) -> str:
    """A word of 3 to `longest` letters: one in four is English, the others are random letters."""
    if rng.random() < 0.25:
        return rng.choice([word for word in _WORDS if len(word) <= longest])
    return "".join(rng.choices(_LETTERS, k=rng.randint(3, longest)))


def _reverse(rng: random.Random, longest: int) -> tuple[str, str]:
    word = _word(rng, longest)
    return f"Reverse the word {word}.", word[::-1]


def _spell(rng: random.Random, longest: int) -> tuple[str, str]:
    word = _word(rng, longest)
    return f"Spell the word {word}.", "-".join(word)


def _repeat(rng: random.Random, longest: int) -> tuple[str, str]:
    word = _word(rng, longest)
    return f"Say {word} twice.", f"{word} {word}"


def _sort(rng: random.Random, longest: int) -> tuple[str, str]:
    digits = rng.choices("0123456789", k=rng.randint(3, max(3, longest - 2)))
    return f"Sort the digits {''.join(digits)}.", "".join(sorted(digits))


def _add(rng: random.Random, longest: int) -> tuple[str, str]:
    a, b = rng.randrange(10 * (longest - 1)), rng.randrange(10 * (longest - 1))
    return f"What is {a} plus {b}?", str(a + b)


_TASKS: dict[str, Callable[[random.Random, int], tuple[str, str]]] = {
    "reverse": _reverse,
    "spell": _spell,
    "repeat": _repeat,
    "sort": _sort,
    "add": _add,
}

NAMES = tuple(_TASKS)
LONGEST = 6  # letters of a word in training; it has digits to sort up to two less, sums up to ten times one less
ASKED = 5  # the same for what is asked


def split_of(text: str) -> Split:
    """The split that the question `text` belongs to."""
    return "held_out" if zlib.crc32(text.encode()) % _HELD_OUT_ONE_IN == 0 else "train"


def draw(rng: random.Random, split: Split, longest: int = LONGEST) -> Question:
    """A random question of the split, of a random task, about a word of at most `longest` letters."""
    if split not in ("train", "held_out"):
        raise ValueError(f'unknown split {split!r}; it is "train" or "held_out"')
    while True:
        task = rng.choice(NAMES)
        text, answer = _TASKS[task](rng, longest)
        if split_of(text) == split:
            return Question(task, text, answer)


def stream(split: Split, seed: int) -> Iterator[Question]:
    """Draws questions of the split without end, the same ones for the same seed; a question may recur."""
    rng = random.Random(seed)
    while True:
        yield draw(rng, split, ASKED)


def questions(split: Split, count: int, seed: int) -> list[Question]:
    """The first `count` different questions of `stream(split, seed)`."""
    found: dict[str, Question] = {}
    for question in stream(split, seed):
        if len(found) >= count:
            break
        found.setdefault(question.text, question)
    return list(found.values())
