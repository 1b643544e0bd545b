"""Argument kinds of exercises, from kinds.txt: names and sample values."""

import datetime  # noqa: F401, for kinds.txt
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from data.synthetic.texts import blocks

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Kind:
    """A kind of argument."""

    names: str  # clash with no builtin and no local name in a body with this kind
    sample: Callable[[random.Random], object]
    edges: tuple  # always tried; all of one type
    low: int = -1000  # ints outside low..high may make loops long or endless
    high: int = 1000


ROWS, WORDS = blocks("kinds.txt")
WORDS = WORDS.split()
FOODS = ["fig", "egg", "kiwi", "pear", "tea"]


def some_word(rng: random.Random) -> str:
    random_word = "".join(rng.choices(LETTERS, k=rng.randint(1, 9)))
    word = rng.choice(WORDS) if rng.random() < 0.6 else random_word
    return rng.choice([str.lower, str.lower, str.lower, str.title, str.upper])(word)


def some_words(rng: random.Random) -> list[str]:
    return [some_word(rng) for _ in range(rng.randint(1, 6))]


def some_letters(rng: random.Random) -> str:
    return "".join(rng.choices(LETTERS[: rng.choice([2, 26])], k=rng.randint(1, 9)))


def some_text(rng: random.Random) -> str:
    text = rng.choice([" ", " ", "-", ",", "_"]).join(some_words(rng)[:3])
    return "".join(rng.choice("0123456789aeiou.!? ") if rng.random() < 0.2 else c for c in text)


def some_ints(rng: random.Random, length: int = 0) -> list[int]:
    low, high = rng.choice([(-30, 30), (0, 9), (-4, 4), (0, 40)])
    return [rng.randint(low, high) for _ in range(length or rng.randint(1, 8))]


def up_to(*limits: int, low: int = 0) -> Callable:
    return lambda rng: rng.randint(low, rng.choice(limits))


def some_numbered(rng: random.Random) -> str:
    """Return a line that mixes words and numbers."""
    words = [
        str(rng.randint(0, 120)) if rng.random() < 0.5 else rng.choice(WORDS)
        for _ in range(rng.randint(1, 7))
    ]
    return rng.choice([" ", " ", ", ", "-"]).join(words)


def some_mixed(rng: random.Random) -> list:
    values = [rng.choice(WORDS), rng.randint(-9, 30), "", None, rng.randint(0, 9)]
    values.append(str(rng.randint(0, 99)))
    return [rng.choice(values) for _ in range(rng.randint(1, 7))]


def some_nested(rng: random.Random, depth: int = 0) -> list:
    return [
        some_nested(rng, depth + 1) if rng.random() < 0.35 and depth < 3 else rng.randint(-5, 20)
        for _ in range(rng.randint(0 if depth else 1, 4))
    ]


def some_framed(rng: random.Random) -> str:
    """Return a text that often has equal ends, up to case."""
    end = rng.choice(WORDS)[: rng.randint(1, 4)]
    return end + some_letters(rng)[:3] + rng.choice([end, end, end.title(), end[1:], "s"])


def some_mirrored(rng: random.Random) -> str:
    """Return a palindrome, maybe with extra characters inside or around it."""
    half = rng.choice(WORDS)[: rng.randint(1, 4)]
    text = half + rng.choice(["", half[-1], rng.choice(LETTERS)]) + half[::-1]
    marks = rng.choice(["", " ", "7", "e", "U", rng.choice(LETTERS)])
    at = rng.choice([0, rng.randint(0, len(text)), len(text)])
    return text[:at] + marks + text[at:]


def letters_of(alphabet: str, low: int, high: int):
    return lambda rng: "".join(rng.choices(alphabet, k=rng.randint(low, high)))


LISTS = ([], [0], [1], [-3], [2, 2, 2], [1, 2, 3, 4], [5, 3, 8, 3], [-1, -2, -6], [10, 21, 7, 4])
KINDS: dict[str, Kind] = {}
for line in ROWS.split("\n"):
    label, names, sample, edges, *bounds = re.split("  +", line)
    KINDS[label] = eval(f"Kind({names!r}, {sample}, ({edges},), {''.join(bounds)})")
