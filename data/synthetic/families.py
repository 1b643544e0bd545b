r"""Read the families of exercises: families.txt, and with --concepts also two more files.

A family is a block of lines, as this one:

    digit_powers = <digit_power_sum|sum_of_digit_powers>_K(nat)
    K: 2..5
    "Return the sum of the digits of $a, each raised to the power K."
    "Raise each digit of $a to the power K and add up the results."
    return sum(int(d) ** K for d in str($a))
    = reduce(lambda total, c: total + (ord(c) - 48) ** K, str(a), 0)

It holds, in this order:

    label = name(kinds)   the family, its function's name, and the arguments' kinds (kinds.txt)
    label = as OTHER      take name, wordings, body and oracle of another family
    K: 2..5; 9            a parameter and its values; there is a task for each combination
    OP WORD: + ~ sum; * ~ product      parameters that change together
    K | A B: 1 ~ x ~ y    those behind the bar are not part of the task's label
    T: ALL; TESTS         all rows of tables (tables.txt)
    where CONDITION       of the combinations that make a task
    limit 60              this many tasks at most, sampled
    never VALUES          leave out a task because HumanEval or MBPP asks for it
    "..."                 wordings, of which one is chosen
    code                  the body, where $f is the function itself
    = expression          the oracle over a, b and c: it computes the same by other means

`<this|that>` is a choice of wording; $a, $b and $c are the arguments, whose names vary. A parameter
is replaced wherever it stands as a word, or part of a name between "_". What stands in braces is
evaluated, but in concepts.txt: the rows of tables are a Piece or a Source. A line that begins with
";" continues the one above. In code, " \ " begins a line, " \> " one that is indented, and "\#" a
comment; lines left empty are dropped. exercises.py runs each body against its oracle.
"""

import bisect  # noqa: F401, as other imports here, for oracles
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
    """One exercise, before its wording and names are chosen."""

    args: str  # the kinds of the arguments, separated by spaces
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
    """A row of a table: a test, change or key of one element `x`, or what to make of many."""

    code: str
    fn: Callable  # its oracle
    label: str  # for function names
    phrase: str  # a test: "even {}"; a change: "double {}"; of many: "return the sum of {}"
    other: str = ""  # "is even"; "the doubles of {}"; "return the sum"

    def on(self, name: str) -> str:
        return re.sub(r"\bx\b", name, self.code)

    def no(self, name: str) -> str:
        """Return the opposite of a test."""
        code = self.on(name)
        if m := re.fullmatch("(.+?) (==|!=|<|>|not in|in) ([^<>=]+)", code):
            return f"{m[1]} {OPPOSITES[m[2]]} {m[3]}"
        return f"not {code}"

    def __str__(self) -> str:
        return self.code or "all"


@dataclass(frozen=True, eq=False)
class Source:
    """What to loop over: `x` is the loop variable; `one` and `many` name what it stands for."""

    code: str
    items: Callable  # the oracle
    name: str
    args: str
    x: str
    one: str
    many: str
    tail: str = ""  # where they are
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
        """Say it as one sentence, or step by step where there is a change."""
        told = gather.phrase.format(self.of(test, change))
        if change.code == "x":
            return told
        return f"<{told}|{self.do(test, change)} and {gather.other}>"

    def passing(self, test: Piece, argument) -> list:
        return [x for x in self.items(argument) if test.fn(x)]

    def loop(self, test: Piece) -> str:
        """Return the `for ... in ... if ...` of a comprehension."""
        conditions = [c for c in (self.condition, test.on(self.x)) if c]
        return f"for {self.x} in {self.code}" + " if " * bool(conditions) + " and ".join(conditions)

    def __str__(self) -> str:
        return self.name


# ---- Reading tables.txt


def rows_of(name: str, line: str) -> list:
    """Return the rows in a line of a table; see the head of tables.txt."""
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
    """Return the values of a parameter: "2..4" is 2, 3, 4; "a ~ b" is a tuple; a table, its rows.

    Where a column has several values, each is combined with each one of the others.
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
    """Return the tasks of each family in a file, by its label.

    Oracles and what is in braces are evaluated in `scope`; a family has `limit` tasks at most.
    """
    found, shared = {}, {}
    for block in blocks(name):
        label, head = block.split("\n")[0].split(" = ", 1)
        assert label not in found, f"two families {label}"
        try:
            found[label] = read_family(label, head, block, shared, scope, limit, braces)
        except Exception as e:
            raise ValueError(f"{name}: family {label} cannot be read: {e!r}") from e
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
            """Return `text` with the parameters' values."""
            if braces:
                text = evaluate(f'lambda {every}: rf"""{text}\n"""')(*values)[:-1]
            return fill(text, clean)

        def fill(text: str, clean: Callable = str) -> str:
            for _ in range(2 if words else 0):  # a value may have parameters in it
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
    """Return `code` with a line for each " \\ " in it, deeper by each ">", and no empty one."""
    found = []
    for line in code.split("\n"):
        indent, rest = re.fullmatch("( *)(.*)", line).groups()
        first, *others = re.split(r" \\(>*) ", rest)
        parts = [("", first), *zip(others[::2], others[1::2])]
        found += [indent + "    " * len(deeper) + part for deeper, part in parts if part]
    return "\n".join(found).replace("\\#", "#")


def singular(text: str) -> str:
    """ "1 place" where a wording has "K places"."""
    nouns = "bit|character|decimal|decimal place|digit|element|letter|place|step|time"
    return re.sub(rf"\b1 ({nouns})s\b", r"1 \1", text)


ONE_ROW = {name: rows[0] for name, rows in TABLES.items() if len(rows) == 1}
FAMILIES = read_families("families.txt", globals() | ONE_ROW, braces=True)


def read_concepts() -> dict[str, list[Task]]:
    """Return the families of concepts.txt and programs.txt.

    The families of families.txt compose filters, changes and gathers. Those of concepts.txt have
    one idea each, or two in a row: the breadth of what short functions do. Those of programs.txt
    compose the steps of a longer function: parse, filter, carry a state or pass twice, finish.
    """
    programs = read_families("programs.txt", globals() | ONE_ROW, braces=True)
    return read_families("concepts.txt", globals(), limit=60) | programs


# ---- Oracles of concepts.txt that are no one-liners


def primes_to(n: int) -> list[int]:
    return [i for i in range(2, n + 1) if all(i % j for j in range(2, math.isqrt(i) + 1))]


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
