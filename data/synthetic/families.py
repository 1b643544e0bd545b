r"""Read exercise families: families.txt, and with --concepts also concepts.txt and programs.txt.

A family is a block of lines:

    digit_powers = <digit_power_sum|sum_of_digit_powers>_K(nat)
    K: 2..5
    "Return the sum of the digits of $a, each raised to the power K."
    "Raise each digit of $a to the power K and add up the results."
    return sum(int(d) ** K for d in str($a))
    = reduce(lambda total, c: total + (ord(c) - 48) ** K, str(a), 0)

Lines of a block, in order:

    label = name(kinds)   family label, function name, argument kinds (kinds.txt)
    label = as OTHER      copy name, wordings, body and oracle from another family
    K: 2..5; 9            parameter and values; each combination makes a task
    OP WORD: + ~ sum; * ~ product      parameters that change together
    K | A B: 1 ~ x ~ y    parameters after the bar are not in the task label
    T: ALL; TESTS         all rows of tables (tables.txt)
    where CONDITION       keep only combinations that satisfy it
    limit 60              sample at most this many tasks
    never VALUES          drop a task that HumanEval or MBPP asks for
    "..."                 wordings; one is chosen
    code                  the body; $f is the function itself
    = expression          the oracle over a, b and c, computed another way

`<this|that>` is a choice of wording; $a, $b and $c are the arguments, under varying names. A
parameter is replaced wherever it is a word, or part of a name between "_". Text in braces is
evaluated, except in concepts.txt; table rows are a Piece or a Source. A leading ";" continues the
line above. In code, " \ " starts a new line, " \> " an indented one, and "\#" a comment; empty
lines are dropped. exercises.py runs each body against its oracle.
"""

import bisect  # noqa: F401, used by oracles, as are the imports below with this mark
import calendar  # noqa: F401
import datetime  # noqa: F401
import fractions  # noqa: F401
import functools
import heapq  # noqa: F401
import itertools
import math
import operator  # noqa: F401
import random
import re
import statistics  # noqa: F401
import textwrap  # noqa: F401
from collections import Counter, deque  # noqa: F401
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce  # noqa: F401
from itertools import islice  # noqa: F401

from data.synthetic.kinds import LETTERS
from data.synthetic.texts import blocks


@dataclass(frozen=True, eq=False)
class Task:
    """An exercise before choosing wording and names."""

    args: str  # argument kinds, space-separated
    name: str
    doc: str
    body: str
    oracle: Callable
    family: str = ""
    params: tuple = ()

    def __str__(self) -> str:
        return f"{self.family}({', '.join(map(str, self.params))})"


OPPOSITES = {"==": "!=", "!=": "==", "<": ">=", ">": "<=", "in": "not in", "not in": "in"}


@dataclass(frozen=True, eq=False)
class Piece:
    """A table row: test, change or key of one element `x`, or a reduction of many."""

    code: str
    fn: Callable  # oracle
    label: str  # for function names
    phrase: str  # test: "even {}"; change: "double {}"; reduction: "return the sum of {}"
    other: str = ""  # "is even"; "the doubles of {}"; "return the sum"

    def on(self, name: str) -> str:
        return re.sub(r"\bx\b", name, self.code)

    def no(self, name: str) -> str:
        """Return the code of the negated test."""
        code = self.on(name)
        if m := re.fullmatch("(.+?) (==|!=|<|>|not in|in) ([^<>=]+)", code):
            return f"{m[1]} {OPPOSITES[m[2]]} {m[3]}"
        return f"not {code}"

    def __str__(self) -> str:
        return self.code or "all"


@dataclass(frozen=True, eq=False)
class Source:
    """An iterable to loop over: `x` is the loop variable, `one` and `many` name its elements."""

    code: str
    items: Callable  # oracle
    name: str
    args: str
    x: str
    one: str
    many: str
    tail: str = ""  # location of the elements
    condition: str = ""

    def each(self, test: Piece) -> str:
        return f"{test.phrase.format(self.one, s='')} {self.tail}".strip()

    def all(self, test: Piece) -> str:
        return f"{test.phrase.format(self.many, s='s')} {self.tail}".strip()

    def of(self, test: Piece, change: Piece) -> str:
        return change.other.format("the " + self.all(test))

    def do(self, test: Piece, change: Piece) -> str:
        return change.phrase.format("each " + self.each(test))

    def told(self, test: Piece, change: Piece, gather: Piece) -> str:
        """Describe the task in one sentence; with a change, maybe step by step."""
        told = gather.phrase.format(self.of(test, change))
        if change.code == "x":
            return told
        return f"<{told}|{self.do(test, change)} and {gather.other}>"

    def passing(self, test: Piece, argument) -> list:
        return [x for x in self.items(argument) if test.fn(x)]

    def loop(self, test: Piece) -> str:
        """Return the `for ... in ... if ...` clause of a comprehension."""
        conditions = [c for c in (self.condition, test.on(self.x)) if c]
        return f"for {self.x} in {self.code}" + " if " * bool(conditions) + " and ".join(conditions)

    def __str__(self) -> str:
        return self.name


# ---- Reading tables.txt


def rows_of(name: str, line: str) -> list:
    """Parse the rows in a table line; tables.txt documents the format."""
    columns = re.split("  +", line)
    if len(columns) == 1:
        return values_of(line)
    repeats = values_of(columns.pop().replace(" ", "; ")) if len(columns) == 6 else [""]
    over = "x, y" if name in ("OPERATIONS", "RELATIONS") else "x"
    rows = []
    for k in repeats:
        code, oracle, *words = (c.replace("K", str(k)) if c != "-" else "" for c in columns)
        cls = Piece if len(words) < 4 else Source
        rows.append(cls(code, eval(f"lambda {over}: {oracle}"), *words))
    return rows


def values_of(text: str) -> list:
    """Parse parameter values: "2..4" is 2, 3, 4; "a ~ b" a tuple; a table name, its rows.

    Columns with several values form a Cartesian product.
    """
    values = []
    for value in text.split("; "):
        columns = [expand(column) for column in re.split(" +~ +", value.strip())]
        values += itertools.product(*columns) if len(columns) > 1 else columns[0]
    return values


def expand(text: str) -> list:
    if text in TABLES:
        return TABLES[text]
    if m := re.fullmatch(r"(-?\d+)\.\.(-?\d+)", text):
        return [*range(int(m[1]), int(m[2]) + 1)]
    if m := re.fullmatch(r"([a-z])\.\.([a-z])", text):
        return [*LETTERS[LETTERS.index(m[1]) : LETTERS.index(m[2]) + 1]]
    if text == "''":
        return [""]
    return [int(text) if re.fullmatch(r"0|-?[1-9]\d*", text) else text]


TABLES: dict[str, list] = {}
for block in blocks("tables.txt"):
    label, *lines = block.split("\n")
    TABLES[label] = [row for line in lines for row in rows_of(label, line)]

# ---- Reading families


def read_families(name: str, scope: dict, limit: int = 0, braces: bool = False) -> dict:
    """Read a file's families; return {label: tasks}.

    Evaluate oracles and braces in `scope`; take at most `limit` tasks per family (0: all).
    """
    found, shared = {}, {}
    for block in blocks(name):
        label, head = block.split("\n")[0].split(" = ", 1)
        assert label not in found, f"two families {label}"
        try:
            found[label] = read_family(label, head, block, shared, scope, limit, braces)
        except Exception as e:
            raise ValueError(f"{name}: cannot read family {label}: {e!r}") from e
    return found


def read_family(
    label: str, head: str, block: str, shared: dict, scope: dict, limit: int, braces: bool
) -> list[Task]:
    names, axes, hidden, wordings, body = [], [], set(), [], []
    said = {"where": ["True"], "limit": [limit], "never": [], "=": [""]}
    for line in block.replace("\n; ", "; ").split("\n")[1:]:
        if m := re.fullmatch("([A-Z]+(?: [A-Z|]+)*): (.+)", line):
            shown, _, behind = m[1].partition(" | ")
            names += [*shown.split(), *behind.split()]
            hidden |= {*behind.split()}
            axes.append(values_of(m[2]))
        elif m := re.fullmatch("(where|limit|never|=) (.+)", line):
            said[m[1]].append(m[2])
        elif line.startswith('"'):
            wordings.append(line[1:-1])
        else:
            body.append(line)
    where, oracle, limit = said["where"][-1], said["="][-1], int(said["limit"][-1])
    if head.startswith("as "):
        head, doc, code, oracle, where = shared[head.removeprefix("as ")]
    else:
        doc = f"<{'|'.join(wordings)}>" if len(wordings) > 1 else wordings[0]
        code = "\n".join(body)
    shared[label] = head, doc, code, oracle, where
    name, args = re.fullmatch(r"(.+)\((.*)\)", head).groups()
    evaluate = functools.cache(lambda source: eval(source, scope))

    def make(values: tuple) -> Task | None:
        chosen = dict(zip(names, values, strict=True))
        every = ", ".join(names)
        if not evaluate(f"lambda {every}: {where}")(*values):
            return None
        words = {k: str(v) for k, v in chosen.items() if isinstance(v, (int, str))}
        pattern = re.compile(f"(?<![A-Za-z])({'|'.join(words)})(?![A-Za-z])")

        def put(text: str, clean: Callable = str) -> str:
            """Substitute the parameters' values into `text`."""
            if braces:
                text = evaluate(f'lambda {every}: rf"""{text}\n"""')(*values)[:-1]
            return fill(text, clean)

        def fill(text: str, clean: Callable = str) -> str:
            for _ in range(2 if words else 0):  # values may contain parameters
                text = pattern.sub(lambda m: clean(words[m[0]]), text)
            return text

        kinds = put(args)
        rows = {k: v for k, v in chosen.items() if k not in words}
        over = ", ".join("abc"[: len(kinds.split())])
        made = evaluate(f"lambda {', '.join(rows)}: lambda {over}: {fill(oracle)}")
        return Task(
            kinds,
            put(name, lambda value: re.sub(r"\W+", "_", value)),
            singular(put(doc)),
            laid_out(put(code)),
            made(*rows.values()),
            label,
            tuple(v for k, v in chosen.items() if k not in hidden),
        )

    grid = [*itertools.product(*axes)]
    if 0 < limit < len(grid):
        grid = random.Random(label).sample(grid, limit)
    flat = [sum((v if isinstance(v, tuple) else (v,) for v in values), ()) for values in grid]
    tasks = [task for values in flat if (task := make(values))]
    return [task for task in tasks if str(task) not in {f"{label}({v})" for v in said["never"]}]


def laid_out(code: str) -> str:
    """Start a line at each " \\ " in `code`, indented once per ">"; drop empty lines."""
    found = []
    for line in code.split("\n"):
        indent, rest = re.fullmatch("( *)(.*)", line).groups()
        first, *others = re.split(r" \\(>*) ", rest)
        parts = [("", first), *zip(others[::2], others[1::2])]
        found += [indent + "    " * len(deeper) + part for deeper, part in parts if part]
    return "\n".join(found).replace("\\#", "#")


def singular(text: str) -> str:
    """Turn "1 places" into "1 place", where a wording has "K places"."""
    nouns = "bit|character|decimal|decimal place|digit|element|letter|place|step|time"
    return re.sub(rf"\b1 ({nouns})s\b", r"1 \1", text)


ONE_ROW = {name: rows[0] for name, rows in TABLES.items() if len(rows) == 1}
FAMILIES = read_families("families.txt", globals() | ONE_ROW, braces=True)


def read_concepts() -> dict[str, list[Task]]:
    """Read the families of concepts.txt and programs.txt.

    families.txt composes filters, changes and reductions. concepts.txt covers the breadth of short
    functions, one idea or two in a row per family. programs.txt composes the steps of longer
    functions: parse, filter, carry a state or pass twice, finish.
    """
    programs = read_families("programs.txt", globals() | ONE_ROW, braces=True)
    return read_families("concepts.txt", globals(), limit=60) | programs


# ---- Longer oracles for concepts.txt


def primes_to(n: int) -> list[int]:
    return [i for i in range(2, n + 1) if all(i % j for j in range(2, math.isqrt(i) + 1))]


def in_base(n: int, base: int) -> list[int]:
    """Return the digits, most significant first."""
    return (in_base(n // base, base) if n >= base else []) + [n % base]


def runs_of(values) -> list[list]:
    return [[*group] for _, group in itertools.groupby(values)]


def unfold(start, step, n: int) -> list:
    """Return start, step(start), ...: n + 1 values."""
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
    """Merge intervals by marking their points in steps of a half."""
    covered = {i for x, y in pairs for i in range(2 * min(x, y), 2 * max(x, y) + 1)}
    starts = sorted(i for i in covered if i - 1 not in covered)
    ends = sorted(i for i in covered if i + 1 not in covered)
    return [(x // 2, y // 2) for x, y in zip(starts, ends)]
