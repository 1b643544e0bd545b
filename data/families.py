"""The families of exercises that data/exercises.py sets: docstring, body and oracle of every task.

A family is a function from its parameters to a Task, under `@family` with the values of each
parameter. Every combination is a task of its own (None: skip it), or a sample of `limit` of them.
To add a family, add such a function: exercises.py runs every body against its oracle.

In names and docstrings `<this|that>` is a choice of wording; there and in bodies `$a` and `$b` are
the arguments, whose names vary. An oracle computes the same by other means than the body.
"""

import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce


@dataclass(frozen=True)
class Kind:
    """A kind of argument."""

    names: str  # what to call it: no builtin, no local name of a body that takes this kind
    sample: Callable[[random.Random], object]
    edges: tuple  # values that every pool of test inputs holds; their type is the kind's type
    low: float = -math.inf  # below it a loop over an int might not end


@dataclass(frozen=True)
class Task:
    args: str  # kinds, separated by spaces
    name: str
    doc: str
    body: str
    oracle: Callable
    family: str = ""
    params: tuple = ()

    def __str__(self) -> str:
        return f"{self.family}({', '.join(map(str, self.params))})"


@dataclass(frozen=True)
class Piece:
    """A test or a change of one element, written over `x`."""

    code: str
    fn: Callable
    label: str  # for function names
    phrase: str  # of a test: "even {}"; of a change: "double {}"
    other: str  # of a test: "is even"; of a change: "the doubles of {}"

    def on(self, name: str) -> str:
        return re.sub(r"\bx\b", name, self.code)

    def __str__(self) -> str:
        return self.code or "all"


@dataclass(frozen=True)
class Source:
    """Where elements come from: `code` is looped over, `one` and `many` name what `x` is."""

    name: str
    args: str
    x: str
    code: str
    one: str
    many: str
    tail: str
    items: Callable = list
    condition: str = ""  # of the source itself

    def each(self, test: Piece) -> str:
        return test.phrase.format(self.one, s="") + self.tail

    def all(self, test: Piece) -> str:
        return test.phrase.format(self.many, s="s") + self.tail

    def loop(self, test: Piece) -> str:
        """The `for ... in ... if ...` of a comprehension."""
        conditions = " and ".join(filter(None, [self.condition, test.on(self.x)]))
        return f"for {self.x} in {self.code}" + f" if {conditions}" * bool(conditions)

    def block(self, test: Piece, *lines: str) -> str:
        """A `for` statement with `lines` for the elements that pass."""
        if test.code:
            lines = (f"if {test.on(self.x)}:", *(f"    {line}" for line in lines))
        return "\n    ".join([f"for {self.x} in {self.code}:", *lines]) + "\n"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Gather:
    """What to make of all elements: `code` over the element `{e}` and its `{loop}`."""

    code: str
    fn: Callable[[list], object]
    label: str
    of: str  # "Return <of>."
    then: str  # "... and return <then>."

    def __str__(self) -> str:
        return self.code


FAMILIES: dict[str, list[Task]] = {}


def family(*axes, limit: int = 0, name: str = ""):
    """Decorator: register a function as a family, one Task for each combination of parameters."""

    def register(make):
        label = name or make.__name__
        grid = list(itertools.product(*axes))
        if 0 < limit < len(grid):
            grid = random.Random(label).sample(grid, limit)
        made = [(make(*values), values) for values in grid]
        FAMILIES[label] = [replace(t, family=label, params=v) for t, v in made if t]
        return make

    return register


# Kinds of arguments ----------------------------------------------------------------------------

WORDS = """apple banana cherry kiwi lemon mango olive fig pear plum quince grape dog cat fox owl zebra
yak wolf eel iguana newt rabbit tiger urchin viper jackal hen level noon radar civic kayak pop tent
trumpet drum harp jazz oboe quiz box vex hello world sun sky sea red blue green yellow orange violet
ink up go a i it be tea egg zoo python code loop list stack queue graph tree byte xylem""".split()
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def some_word(rng: random.Random) -> str:
    word = rng.choice(WORDS)
    if rng.random() < 0.4:
        word = "".join(rng.choices(LETTERS, k=rng.randint(1, 9)))
    return rng.choice([str, str, str, str.title, str.upper])(word)


def some_ints(rng: random.Random, length: int | None = None) -> list[int]:
    low, high = rng.choice([(-30, 30), (0, 9), (-4, 4), (0, 40)])
    length = rng.randint(1, 8) if length is None else length
    return [rng.randint(low, high) for _ in range(length)]


def some_words(rng: random.Random) -> list[str]:
    return [some_word(rng) for _ in range(rng.randint(1, 7))]


def some_text(rng: random.Random) -> str:
    text = rng.choice([" ", " ", "-", ", ", "_"]).join(some_words(rng)[:4])
    return "".join(rng.choice("0123456789aeiou.!? ") if rng.random() < 0.2 else c for c in text)


def some_scores(rng: random.Random) -> dict[str, int]:
    return {word.lower(): rng.randint(-9, 30) for word in some_words(rng)}


def some_grid(rng: random.Random) -> list[list[int]]:
    width = rng.randint(3, 4)
    return [some_ints(rng, width) for _ in range(rng.randint(1, 4))]


INT_EDGES = (0, 1, -1, 2, -2, 5, 7, 10, 12, 100)
LIST_EDGES = ([], [0], [1], [-3], [2, 2, 2], [1, 2, 3, 4], [5, 3, 8, 3], [-1, -2, -6], [10, 21, 7, 4])
KINDS = {
    "int": Kind("n num number", lambda r: r.randint(-60, 120), INT_EDGES),
    "nat": Kind("n num number", lambda r: r.randint(0, r.choice([9, 99, 999])), (0, 1, 2, 3, 10), 0),
    "pos": Kind("n num number", lambda r: r.randint(1, r.choice([9, 99, 400])), (1, 2, 3, 10, 12), 1),
    "few": Kind("n k times", lambda r: r.randint(0, 9), (0, 1, 2, 3, 4), 0),
    "ints": Kind("numbers nums values xs", some_ints, LIST_EDGES),
    "other": Kind("others ys", some_ints, LIST_EDGES[::-1]),
    "text": Kind("text s string", some_text, ("", "a", "B", "7", "ab ba", "Hello, World!", "a1b22")),
    "word": Kind("word s text", some_word, ("a", "noon", "Zebra", "eel", "TEA")),
    "letters": Kind(
        "word s text", lambda r: "".join(r.choices(LETTERS[:r.choice([2, 26])], k=r.randint(1, 9))),
        ("", "a", "z", "xyz", "aabbb"),
    ),
    "line": Kind(
        "sentence line text", lambda r: " ".join(some_words(r)), ("", "a", "go up", "Red egg RED egg")
    ),
    "words": Kind("words strings items", some_words, ([], ["a"], ["Tea"], ["egg", "egg"], ["sea", "up"])),
    "scores": Kind("scores prices data", some_scores, ({}, {"a": 1}, {"kiwi": 4, "fig": -2, "pear": 9})),
    "grid": Kind("grid matrix rows", some_grid, ([[0, 0, 0]], [[1, 2, 3]], [[1, 2, 3], [4, 5, 6]])),
    "square": Kind(
        "grid matrix", lambda r: (lambda n: [some_ints(r, n) for _ in range(n)])(r.randint(1, 4)),
        ([[7]], [[1, 2], [3, 4]]),
    ),
    "brackets": Kind(
        "text s string", lambda r: "".join(r.choices("()[]{}xy", r.choices([1, 6], k=4)*2, k=r.randint(1, 8)))
        , ("", "()", "[]", "{}", "(())", "[[]]", "{{}}", ")(", "][", "}{", "(", "[", "{"),
    ),
}

# Pieces ------------------------------------------------------------------------------------------

ALL = Piece("", lambda x: True, "", "{}", "")
SAME = Piece("x", lambda x: x, "", "", "{}")


def above(k: int) -> Piece:
    return Piece(
        f"x > {k}", lambda x: k < x, "large",
        f"{{}} <greater than|above> {k}", f"is <greater than|above> {k}",
    )
