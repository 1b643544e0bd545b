"""More families of exercises, from concepts.txt: the breadth of what short functions do.

The families of families.txt compose filters, changes and gathers. These have one idea each, or
two in a row, told in several wordings. Importing this module adds them to FAMILIES.
"""

import datetime
import itertools
import random
from pathlib import Path

from data.synthetic import families
from data.synthetic.families import KINDS, LETTERS, LISTS, WORDS, Kind, read_families, up_to

# ---- Kinds of arguments


def some_pairs(rng: random.Random) -> list[tuple[int, int]]:
    return [(rng.randint(-9, 20), rng.randint(-9, 20)) for _ in range(rng.randint(1, 6))]


def some_items(rng: random.Random) -> list[tuple[str, int]]:
    return [(rng.choice(WORDS), rng.randint(0, 12)) for _ in range(rng.randint(1, 6))]


def some_lists(rng: random.Random) -> list[list[int]]:
    return [families.some_ints(rng)[: rng.randint(0, 5)] for _ in range(rng.randint(1, 5))]


def some_square(rng: random.Random) -> list[list[int]]:
    size = rng.randint(2, 4)
    return [[rng.randint(-5, 20) for _ in range(size)] for _ in range(size)]


def some_numbered(rng: random.Random) -> str:
    """Return a line with numbers among its words."""
    words = [
        str(rng.randint(0, 120)) if rng.random() < 0.5 else rng.choice(WORDS)
        for _ in range(rng.randint(1, 7))
    ]
    return rng.choice([" ", " ", ", ", "-"]).join(words)


def some_settings(rng: random.Random) -> str:
    return ";".join(f"{rng.choice(WORDS)}={rng.randint(0, 40)}" for _ in range(rng.randint(1, 5)))


def some_mixed(rng: random.Random) -> list:
    values = [
        rng.choice(WORDS),
        rng.randint(-9, 30),
        "",
        None,
        rng.randint(0, 9),
        str(rng.randint(0, 99)),
    ]
    return [rng.choice(values) for _ in range(rng.randint(1, 7))]


def some_nested(rng: random.Random, depth: int = 0) -> list:
    return [
        some_nested(rng, depth + 1) if rng.random() < 0.35 and depth < 3 else rng.randint(-5, 20)
        for _ in range(rng.randint(0 if depth else 1, 4))
    ]


def some_floats(rng: random.Random) -> list[float]:
    return [rng.randint(-80, 400) / rng.choice([2, 4, 8, 10]) for _ in range(rng.randint(1, 7))]


def some_date(rng: random.Random) -> str:
    day = datetime.date(1999, 1, 1) + datetime.timedelta(rng.randint(0, 12_000))
    return day.isoformat()


def some_line(rng: random.Random) -> str:
    return " ".join(families.some_words(rng)) + rng.choice(["", "", ".", "!", "?"])


def some_framed(rng: random.Random) -> str:
    """Often the same at both ends, but for the case."""
    end = rng.choice(WORDS)[: rng.randint(1, 4)]
    return end + families.some_letters(rng)[:3] + rng.choice([end, end, end.title(), end[1:], "s"])


def some_mirrored(rng: random.Random) -> str:
    """Return a palindrome, but for what stands in it or around it."""
    half = rng.choice(WORDS)[: rng.randint(1, 4)]
    text = half + rng.choice(["", half[-1], rng.choice(LETTERS)]) + half[::-1]
    marks = rng.choice(["", " ", "7", "e", "U", rng.choice(LETTERS)])
    at = rng.choice([0, rng.randint(0, len(text)), len(text)])
    return text[:at] + marks + text[at:]


def some_stock(rng: random.Random) -> dict[str, int]:
    """Of so few names that two of them have some in common."""
    names = rng.sample(["fig", "egg", "kiwi", "pear", "tea"], rng.randint(1, 4))
    return {name: rng.randint(-3, 9) for name in names}


def times(pattern: str, *limits: int):
    return lambda rng: pattern.format(*(rng.randint(0, limit) for limit in limits))


def letters_of(alphabet: str, low: int, high: int):
    return lambda rng: "".join(rng.choices(alphabet, k=rng.randint(low, high)))


FULL = ([0], [1], [-3], [2, 2, 2], [1, 2, 3, 4], [5, 3, 8, 3], [-1, -2, -6], [10, 21, 7, 4])
SIDES = up_to(5, 12, 40, low=1)
KINDS |= {
    "m": Kind("m k other", up_to(30, 9, low=-20), (3, 1, 0, -2, 5, 2, 12, -7)),
    "div": Kind("m k other", up_to(9, 40, low=1), (1, 2, 3, 6, 5, 4), low=1),
    "step": Kind("k size width", up_to(3, 6, low=1), (1, 2, 3, 4), low=1, high=40),
    "terms": Kind("n terms", up_to(9), (0, 1, 2, 3, 4), low=0, high=12),
    "index": Kind("i index pos", up_to(3, 8), (0, 1, 2, 3), low=0),
    "lst": Kind("lst arr nums numbers", families.some_ints, LISTS),
    "lst2": Kind("lst2 other others", families.some_ints, LISTS[::-1]),
    "full": Kind("lst arr nums values", families.some_ints, FULL),
    "nats": Kind(
        "lst nums counts sizes",
        lambda r: [*map(abs, families.some_ints(r))],
        ([], [0], [1], [3, 1, 2], [4, 4, 0, 7], [9, 12, 1]),
    ),
    "side": Kind("a side width", SIDES, (1, 3, 5, 2, 8, 7), low=1),
    "side2": Kind("b height", SIDES, (1, 4, 12, 2, 3, 7), low=1),
    "side3": Kind("c depth", SIDES, (1, 5, 13, 2, 6, 7), low=1),
    "i1": Kind("a first", up_to(9, 40, low=-20), (0, 1, 5, -3, 2, 7)),
    "i2": Kind("b second", up_to(9, 40, low=-20), (0, 2, 5, 4, -2, 3)),
    "i3": Kind("c third", up_to(9, 40, low=-20), (0, 3, 5, 1, 9, -4)),
    "amount": Kind("price amount cost", up_to(20, 300, 2000), (0, 1, 10, 99, 100, 250), low=0),
    "degrees": Kind("temp degrees temperature", up_to(50, 110, low=-40), (0, 32, 100, -40, 15)),
    "year": Kind(
        "year y", up_to(2400, 2050, low=1590), (1600, 1900, 2000, 2023, 2024), low=1, high=9999
    ),
    "seconds": Kind(
        "seconds secs t", up_to(99, 5000, 90000), (0, 1, 59, 60, 61, 3600, 3661), low=0, high=10**7
    ),
    "minutes": Kind(
        "minutes mins", up_to(59, 1500), (0, 1, 59, 60, 61, 720, 1440), low=0, high=10**6
    ),
    "floats": Kind("values readings xs", some_floats, ([], [0.5], [1.0, 2.5], [-1.5, 3.25, 3.25])),
    "pairs": Kind(
        "pairs points tuples", some_pairs, ([], [(1, 2)], [(3, 1), (1, 3)], [(0, 0), (2, 5)])
    ),
    "items": Kind(
        "items records entries",
        some_items,
        ([], [("fig", 3)], [("kiwi", 2), ("egg", 5), ("fig", 2)]),
    ),
    "point": Kind(
        "p point", lambda r: (r.randint(-9, 12), r.randint(-9, 12)), ((0, 0), (3, 4), (1, -2))
    ),
    "point2": Kind(
        "q target", lambda r: (r.randint(-9, 12), r.randint(-9, 12)), ((0, 0), (0, 1), (4, 2))
    ),
    "tup": Kind(
        "tup values t", lambda r: tuple(families.some_ints(r)), ((), (4,), (1, 2, 3), (5, 5, 0, -1))
    ),
    "lists": Kind("lists nested rows", some_lists, ([[]], [[1], [2, 3]], [[4, 5], [], [6]])),
    "square": Kind(
        "matrix grid square",
        some_square,
        ([[7]], [[1, 2], [3, 4]], [[1, 2, 3], [4, 5, 6], [7, 8, 9]]),
    ),
    "nested": Kind("nested tree data", some_nested, ([], [1, [2, [3]]], [[4], 5], [[[]]])),
    "mixed": Kind("items values data", some_mixed, ([], [1, "a"], ["", None, 3], ["12", 12])),
    "bools": Kind(
        "flags checks bits",
        lambda r: [r.random() < 0.6 for _ in range(r.randint(1, 8))],
        ([], [True], [False], [True, False, True]),
    ),
    "binary": Kind(
        "bits binary s",
        letters_of("01", 1, 9),
        ("0", "1", "10", "0110", "111"),
    ),
    "digits": Kind(
        "digits code s", letters_of("0123456789", 1, 9), ("0", "7", "10", "0420", "112233")
    ),
    "moves": Kind("moves path", letters_of("UDLR", 1, 9), ("", "U", "UD", "LLR", "URDL")),
    "numbered": Kind("text s line", some_numbered, ("", "7", "a1b22", "3 figs and 12 eggs")),
    "settings": Kind("text config s", some_settings, ("a=1", "fig=3;egg=12", "up=0;up=5")),
    "clock": Kind("time clock", times("{:02}:{:02}", 23, 59), ("00:00", "09:05", "12:30", "23:59")),
    "date": Kind("date day", some_date, ("2024-02-29", "1999-12-31", "2001-01-01")),
    "char": Kind("ch letter", lambda r: r.choice(LETTERS + "aeiou"), ("a", "e", "z", "t")),
    "word2": Kind("other pattern w", families.some_word, ("a", "no", "Eel", "tea")),
    "letters2": Kind("other pattern t", families.some_letters, ("", "a", "zz", "zyx", "abab")),
    "framed": Kind("text s word", some_framed, ("", "a", "Noon", "abcab", "xyxy", "Tart")),
    "mirrored": Kind("text s phrase", some_mirrored, ("", "a", "Noon", "xabay", "no on", "a1b22a")),
    "sentence": Kind("sentence text s", some_line, ("", "a", "go up Up.", "red sky, red sea")),
    "stock": Kind("stock prices first", some_stock, ({}, {"fig": 1}, {"kiwi": 4, "fig": -2})),
    "stock2": Kind("other new second", some_stock, ({"fig": 1}, {}, {"fig": 7, "egg": 1})),
}


# ---- Oracles that are no one-liners


def primes_to(n: int) -> list[int]:
    """By the sieve."""
    sieve = [False, False] + [True] * (n - 1)
    for i in range(2, n + 1):
        if sieve[i]:
            sieve[2 * i :: i] = [False] * len(sieve[2 * i :: i])
    return [i for i in range(n + 1) if sieve[i]]


def in_base(n: int, base: int) -> list[int]:
    """Digits, highest first."""
    return (in_base(n // base, base) if n >= base else []) + [n % base]


def runs_of(values) -> list[list]:
    return [[*group] for _, group in itertools.groupby(values)]


def unfold(start, step, n: int) -> list:
    """start, step(start), ...: n + 1 values."""
    return [*itertools.accumulate(range(n), lambda x, _: step(x), initial=start)]


def flat(nested: list) -> list:
    return [y for x in nested for y in (flat(x) if isinstance(x, list) else [x])]


def common_start(a: str, b: str) -> str:
    return next(a[:n] for n in range(min(len(a), len(b)), -1, -1) if a[:n] == b[:n])


def mirror(nested):
    return [mirror(x) for x in reversed(nested)] if isinstance(nested, list) else nested


def keep_even(nested):
    if isinstance(nested, int):
        return nested
    return [keep_even(x) for x in nested if isinstance(x, list) or not x & 1]


def unite(pairs: list) -> list[tuple[int, int]]:
    """Intervals merged, by marking what they cover in steps of a half."""
    covered = {i for x, y in pairs for i in range(2 * min(x, y), 2 * max(x, y) + 1)}
    starts = sorted(i for i in covered if i - 1 not in covered)
    ends = sorted(i for i in covered if i + 1 not in covered)
    return [(x // 2, y // 2) for x, y in zip(starts, ends)]


CONCEPTS = read_families(Path(__file__).with_suffix(".txt"), vars(families) | globals(), limit=60)
