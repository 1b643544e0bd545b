"""The families of exercises that data/exercises.py sets: docstring, body and oracle of every task.

A family is a function of its parameters that returns a Task, below a line that lists their values:
`@family(TESTS, CHANGES, limit=100)` makes a task of every combination (None: skip it), or of 100 of
them. To add a family, add such a function; exercises.py runs each body against its oracle.

In names and docstrings `<this|that>` is a choice of wording; there and in bodies `$a` and `$b` are
the arguments, whose names vary. An oracle computes the same by other means than the body.
"""

import heapq  # noqa: F401, for the oracles in tables
import itertools
import math
import operator
import random
import re
import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from itertools import islice


@dataclass(frozen=True)
class Kind:
    """A kind of argument."""

    names: str  # no builtin, and no local name of a body that takes this kind
    sample: Callable[[random.Random], object]
    edges: tuple  # values that are always tried; all of one type
    low: int = -1000  # outside low..high an int may make a loop long or endless
    high: int = 1000


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


@dataclass(frozen=True)
class Piece:
    """A test, change or key of one element, in code over `x`; `fn` is its oracle."""

    code: str
    fn: Callable
    label: str  # for function names
    phrase: str  # a test: "even {}"; a change: "double {}"
    other: str = ""  # a test: "is even"; a change: "the doubles of {}"

    def on(self, name: str) -> str:
        return re.sub(r"\bx\b", name, self.code)

    def __str__(self) -> str:
        return self.code or "all"


@dataclass(frozen=True)
class Gather:
    """What to make of many elements: `code` over an element `{e}` and its `{loop}`."""

    code: str
    fn: Callable[[list], object]
    label: str
    of: str  # "return the sum of {}"
    then: str  # "return the sum"

    def __str__(self) -> str:
        return self.code


@dataclass(frozen=True)
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

    def passing(self, test: Piece, argument) -> list:
        return [x for x in self.items(argument) if test.fn(x)]

    def loop(self, test: Piece) -> str:
        """Return the `for ... in ... if ...` of a comprehension."""
        conditions = [c for c in (self.condition, test.on(self.x)) if c]
        return f"for {self.x} in {self.code}" + " if " * bool(conditions) + " and ".join(conditions)

    def __str__(self) -> str:
        return self.name


LETTERS = "abcdefghijklmnopqrstuvwxyz"
FAMILIES: dict[str, list[Task]] = {}
# Tasks that do what a problem of HumanEval or MBPP asks for
NEVER = textwrap.dedent("""
    best_by(max, largest, words, len(x))
    check(all, every, text, x.isdigit())
    combine(neighbours, x * y, [{e} {loop}])
    combine(neighbours, x * y, max([{e} {loop}], default=0))
    combine(neighbours, x + y, [{e} {loop}])
    combine(neighbours, y - x, [{e} {loop}])
    combine(two lists, abs(x - y), [{e} {loop}])
    combine(two lists, x * y, [{e} {loop}])
    combine(two lists, x + y, [{e} {loop}])
    count(ints, x % 2 == 0)
    count(ints, x % 2 == 1)
    count(text, x.isdigit())
    count(text, x.islower())
    count(text, x.isupper())
    count(text, x.lower() in "aeiou")
    count_pairs(two lists, x == y)
    cut_text(x[::2], x)
    find(first, ints, x % 2 == 0)
    find(first, ints, x % 2 == 1)
    flip([row[::-1] for row in $a])
    ints_stream(ints, x > 0, abs(x), max([{e} {loop}], default=0))
    ints_stream(ints, x > 0, x, max([{e} {loop}], default=0))
    ints_stream(ints, x > 0, x, [{e} {loop}])
    lengths_stream(words, all, len(x), max([{e} {loop}], default=0))
    lengths_stream(words, all, len(x), min([{e} {loop}], default=0))
    order_and_cut(x, x[::2], x)
    text_stream(text, x != " ", x, "".join({e} {loop}))
    windows(sum(x), 2)
""").split("\n")


def family(*axes, limit: int = 0, name: str = ""):
    """Decorator: register a function as a family, with the values of each of its parameters.

    A value that is a tuple stands for several parameters.
    """

    def register(make):
        label = name or make.__name__
        grid = list(itertools.product(*axes))
        if 0 < limit < len(grid):
            grid = random.Random(label).sample(grid, limit)
        tasks = []
        for values in grid:
            flat = sum((v if isinstance(v, tuple) else (v,) for v in values), ())
            if task := make(*flat):
                tasks.append(replace(task, family=label, params=flat))
        FAMILIES[label] = [task for task in tasks if str(task) not in NEVER]
        return make

    return register


def exercise(text: str, oracle: Callable) -> Task:
    """Return the Task in `text`: a line "name(kinds)", a line of docstring, then the body."""
    head, doc, body = textwrap.dedent(text).strip().split("\n", 2)
    name, args = head.rstrip(")").split("(")
    return Task(args, re.sub("_+", "_", name).strip("_"), doc, body, oracle)


def table(text: str, cls=Piece, over: str = "x") -> list:
    """One `cls` per line of columns that stand two spaces apart: code, oracle (`over` x), words.

    "-" is an empty column. A sixth column, such as "2..9", "a..k" or "s ing ed", repeats its line
    with these values for K.
    """
    made = []
    for line in text.strip().splitlines():
        columns = re.split("  +", line.strip())
        values = columns.pop().split() if len(columns) == 6 else [""]
        if re.fullmatch("[a-z][.][.][a-z]", values[0]):
            values = LETTERS[LETTERS.index(values[0][0]) : LETTERS.index(values[0][-1]) + 1]
        elif ".." in values[0]:
            low, high = values[0].split("..")
            values = range(int(low), int(high) + 1)
        for k in values:
            code, oracle, *words = (c.replace("K", str(k)) if c != "-" else "" for c in columns)
            made.append(cls(code, eval(f"lambda {over}: {oracle}"), *words))
    return made


# ---- Kinds of arguments

WORDS = re.findall(
    "[a-z]+",
    """apple banana cherry kiwi lemon mango olive fig pear plum quince grape dog cat fox owl zebra
    yak wolf eel iguana newt rabbit tiger urchin viper jackal hen level noon radar civic kayak pop
    tent trumpet drum harp jazz oboe quiz box vex hello world sun sky sea red blue green yellow it
    ink up go a i be tea egg zoo python code loop list stack queue graph tree byte orange""",
)


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


def some_brackets(rng: random.Random) -> str:
    return "".join(rng.choices(rng.choice(["()", "[]", "{}"]) + "x", k=rng.randint(1, 8)))


def some_ints(rng: random.Random, length: int = 0) -> list[int]:
    low, high = rng.choice([(-30, 30), (0, 9), (-4, 4), (0, 40)])
    return [rng.randint(low, high) for _ in range(length or rng.randint(1, 8))]


def some_scores(rng: random.Random) -> dict[str, int]:
    return {word.lower(): rng.randint(-9, 30) for word in some_words(rng)}


def some_grid(rng: random.Random) -> list[list[int]]:
    width = rng.randint(3, 4)
    return [some_ints(rng, width) for _ in range(rng.randint(1, 4))]


def up_to(*limits: int, low: int = 0) -> Callable:
    return lambda rng: rng.randint(low, rng.choice(limits))


LISTS = ([], [0], [1], [-3], [2, 2, 2], [1, 2, 3, 4], [5, 3, 8, 3], [-1, -2, -6], [10, 21, 7, 4])
KINDS = {
    "int": Kind("n num number", up_to(30, 120, low=-40), (0, 1, -1, 2, -2, 5, 7, 10, 12, 100)),
    "nat": Kind("n num number", up_to(9, 99, 999), (0, 1, 2, 3, 10, 12), low=0),
    "pos": Kind("n num number", up_to(9, 60, 200, low=1), (1, 2, 3, 10, 12), low=1),
    "few": Kind("n k steps", up_to(9), (0, 1, 2, 3, 4), low=0, high=12),
    "ints": Kind("numbers nums values xs", some_ints, LISTS),
    "others": Kind("others ys", some_ints, LISTS[::-1]),
    "sorted": Kind("numbers nums values", lambda r: sorted(some_ints(r)), ([], [4], [1, 5, 9])),
    "text": Kind("text s string", some_text, ("", "a", "B", "7", "ab ba", "Hi, World!", "a1b22")),
    "word": Kind("word s text", some_word, ("a", "noon", "Zebra", "eel", "TEA")),
    "letters": Kind("word s text", some_letters, ("", "a", "z", "xyz", "aabbb")),
    "line": Kind("sentence line text", lambda r: " ".join(some_words(r)), ("", "a", "go up Up")),
    "words": Kind("words strings items", some_words, ([], ["a"], ["Tea"], ["egg", "up", "egg"])),
    "scores": Kind("scores prices data", some_scores, ({}, {"a": 1}, {"kiwi": 4, "fig": -2})),
    "grid": Kind("grid matrix rows", some_grid, ([[0, 0, 0]], [[1, 2, 3], [4, 5, 6]])),
    "brackets": Kind("text s string", some_brackets, ("", "()", "(())", "[[]]", "{}{}", "][", "{")),
}

# ---- Tests: code, oracle, label, behind a noun, as a verb

ALL = Piece("", lambda x: True, "", "{}")
UP_TO_TESTS = table("""
    x % 2 == 0  not x & 1         even       even {}            is even
    x % 2 == 1  x & 1             odd        odd {}             is odd
    x % K == 0  x // K * K == x   divisible  {} divisible by K  is divisible by K  3..9
    x > K       max(x, K) != K    large      {} greater than K  is greater than K  2..15
""")
TESTS = UP_TO_TESTS + table("""
    x < K             min(x, K) != K        small     {} less than K  is less than K  2..15
    abs(x) % 10 == K  str(x)[-1] == "K"     ending    {} ending in K  ends in K       0..9
    1 <= x <= K       x in range(1, K + 1)  middle    {} from 1 to K  is from 1 to K  8..12
    5 <= x <= K       x in range(5, K + 1)  middle    {} from 5 to K  is from 5 to K  9..20
    x > 0             x >= 1                positive  positive {}     is positive
    x < 0             x <= -1               negative  negative {}     is negative
    x != 0            bool(x)               nonzero   nonzero {}      is not zero
""")
DIGIT_TESTS = table("""
    x % 2 == 0  not x & 1       even   even {}            is even
    x % 2 == 1  x & 1           odd    odd {}             is odd
    x > K       max(x, K) != K  large  {} greater than K  is greater than K  1..8
    x < K       min(x, K) != K  small  {} less than K     is less than K     2..8
    x != K      not x == K      other  {} other than K    is not K           0..9
""")
WORD_TESTS = table("""
    len(x) > K  x[K:] != ""      long   {} longer than K letters   is longer than K letters   2..8
    len(x) < K  x[K-1:] == ""    short  {} shorter than K letters  is shorter than K letters  3..8
    len(x) == K        len([*x]) == K    sized     K-letter {}           has exactly K letters  2..8
    x.isupper()        x == x.upper()    upper     uppercase {}          is uppercase
    x.islower()        x == x.lower()    lower     lowercase {}          is lowercase
    x.startswith("K")  x[:1] == "K"      starting  {} starting with 'K'  starts with 'K'  a..t
    x.endswith("K")    x[-1:] == "K"     ending    {} ending with 'K'    ends with 'K'    a..t
    "K" in x           x.count("K") > 0  having    {} containing 'K'     contains 'K'     a..t
""")
CHAR_SET_TESTS = table("""
    x.isdigit()           x in "0123456789"     digit   digit{s}              is a digit
    x.isalpha()           x.lower() in LETTERS  letter  letter{s}             is a letter
    x.isupper()           x in LETTERS.upper()  upper   uppercase letter{s}   is uppercase
    x.islower()           x in LETTERS          lower   lowercase letter{s}   is lowercase
    x.lower() in "aeiou"  x in "aeiouAEIOU"     vowel   vowel{s}              is a vowel
    x != " "              not x.isspace()       other   {} other than spaces  is not a space
    x != "K"              "K".find(x) < 0       other   {} other than 'K'     is not 'K'     a..k
    x in "K"              "K".count(x) > 0      some    {} from 'K'           is in 'K' \
        abc xyz aeiou abcdef 02468 .,!?
    x not in "K"          "K".count(x) < 1      other   {} not from 'K'       is not in 'K' \
        abc xyz aeiou abcdef 02468
""")
CHAR_TESTS = CHAR_SET_TESTS + table("""
    x == " "  x.isspace()         space  space{s}  is a space
    x == "K"  "K".startswith(x)   same   'K'{s}    is 'K'  a..t
""")

# ---- Changes: code, oracle, label, as a command, of many

SAME = Piece("x", lambda x: x, "", "", "{}")
LINEAR = table("""
    x * 2   x + x             doubles  double {}             the doubles of {}
    x + K   sum([x, K])       plus     add K to {}           {}, each plus K              1..10
    x - K   -(K - x)          minus    subtract K from {}    {}, each minus K             1..10
    x * K   sum([x] * K)      times    multiply {} by K      {}, each multiplied by K     3..9
""")
STEPS = LINEAR + table("""
    x ** 2  x * x             squares  square {}             the squares of {}
    x ** 3  x * x * x         cubes    cube {}               the cubes of {}
    x % K   x - x // K * K    modulo   take {} modulo K      {}, each modulo K            3..9
    x // K  (x - x % K) // K  over     floor-divide {} by K  {}, each floor-divided by K  2..6
""")
ONE_STEPS = STEPS + table("""
    K - x   -(x - K)          rest     subtract {} from K    -                            10..20
""")
CHANGES = [SAME, *STEPS]
CHANGES += table("""
    -x      0 - x             negated  negate {}                      the negatives of {}
    abs(x)  max(x, -x)        sizes    take the absolute value of {}  the absolute values of {}
""")
WORD_CHANGES = [SAME]
WORD_CHANGES += table("""
    x.upper()  "".join(map(str.upper, x))  upper     convert {} to uppercase  {}, in uppercase
    x.lower()  "".join(map(str.lower, x))  lower     convert {} to lowercase  {}, in lowercase
    x[::-1]    "".join(reversed(x))        reversed  reverse {}               {}, each reversed
    x * 2      x + x    doubled   repeat {} twice           {}, each repeated twice
    x + "K"    f"{x}K"  extended  add 'K' to the end of {}  {}, each followed by 'K'  s ing ! ? ed
    "K" + x    f"K{x}"  prefixed  put 'K' before {}         {}, each preceded by 'K'  # un re @ my
    x[0]       x[:1]    initials  take the first letter of {}  the first letters of {}
    x[-1]      x[-1:]   finals    take the last letter of {}   the last letters of {}
    x[:K]  "".join([*x][:K])  starts  take the first K letters of {} \
        {}, each cut to its first K letters  2..4
    x[K:]  "".join([*x][K:])  rests   drop the first K letters of {} \
        {}, each without its first K letters  2..4
""")
LENGTH = Piece("len(x)", lambda x: sum(1 for _ in x), "lengths", "measure {}", "the lengths of {}")

# ---- Other pieces: keys of elements, and what to do with whole lists or with two elements

INT_KEYS = table("""
    abs(x)        max(x, -x)                 size       absolute value      -
    abs(x) % 10   int(str(x)[-1])            digit      last digit          -
    x % K         x - x // K * K             remainder  remainder modulo K  -  3..9
    abs(x - K)    max(x - K, K - x)          distance   distance to K       -  2..15
""")
WORD_KEYS = table("""
    len(x)        len([*x])                  length     length              -
    x[0]          x[:1]                      initial    first letter        -
    x[-1]         x[-1:]                     final      last letter         -
    x[::-1]       "".join(reversed(x))       reverse    reversed spelling   -
    x.lower()     "".join(map(str.lower, x))  lowercase  lowercase form     -
    x.count("K")  [*x].count("K")            count      number of 'K's      -  a e i o r s t
""")
CUTS = table("""
    x[:K]   [*islice(x, K)]                   first  the first K {}s           -  2..6
    x[-K:]  [*islice(reversed(x), K)][::-1]   last   the last K {}s            -  2..6
    x[K:]   [*islice(x, K, None)]             rest   all but the first K {}s   -  2..6
    x[:-K]  [*x][: max(0, len(x) - K)]        start  all but the last K {}s    -  2..6
    x[::2]  [*islice(x, 0, None, 2)]          every  every 2nd {} (from the first)  -
    x[::3]  [*islice(x, 0, None, 3)]          every  every 3rd {} (from the first)  -
    x[::K]  [*islice(x, 0, None, K)]          every  every Kth {} (from the first)  -  4..6
""")
ORDERS = table("""
    x          [*x]                        -         return              -
    x[::-1]    [*reversed(x)]              reversed  reverse $a and return  , in reverse order,
    sorted(x)  heapq.nsmallest(len(x), x)  sorted    sort $a and return     , in sorted order,
    sorted(x, reverse=True)  heapq.nlargest(len(x), x)  falling \
        sort $a in decreasing order and return  , in decreasing order,
""")
AGGREGATES = table("""
    x            [*x]                        list      {}                                   -
    sum(x)       reduce(operator.add, x, 0)  sum       the <sum|total> of {}                -
    len(set(x))  len(Counter(x))             distinct  the number of distinct values in {}  -
    max(x)       heapq.nlargest(1, x)[0]     largest   the largest of {}                    -
    min(x)       heapq.nsmallest(1, x)[0]    smallest  the smallest of {}                   -
""")
OPERATIONS = table(
    """
    x + y       operator.add(x, y)     sums         sum                              -
    x * y       operator.mul(x, y)     products     product                          -
    y - x       -(x - y)               differences  difference (second minus first)  -
    abs(x - y)  max(x, y) - min(x, y)  gaps         absolute difference              -
    max(x, y)   x if x > y else y      larger       larger                           -
    min(x, y)   x if x < y else y      smaller      smaller                          -
    """,
    over="x, y",
)
RELATIONS = table(
    """
    x < y           y > x                 rising   the first is smaller           -
    x > y           y < x                 falling  the first is larger            -
    x == y          not x - y             equal    both are equal                 -
    abs(x - y) > K  not -K <= x - y <= K  distant  they differ by more than K     -  1..9
    x + y > K       x > K - y             big      their sum is greater than K    -  2..15
    x * y < K       not x * y >= K        little   their product is less than K   -  2..15
    """,
    over="x, y",
)

# ---- Gathers: code, oracle, label, with the elements, without; and sources

NUMBER_GATHERS = table(
    """
    sum({e} {loop})  reduce(operator.add, x, 0)  <sum|total> \
        return the <sum|total> of {}  return the <sum|total>
    max([{e} {loop}], default=0)  heapq.nlargest(1, x or [0])[0]  <largest|max> \
        return the largest of {} (0 if none)  return the largest result (0 if none)
    min([{e} {loop}], default=0)  heapq.nsmallest(1, x or [0])[0]  <smallest|min> \
        return the smallest of {} (0 if none)  return the smallest result (0 if none)
    [{e} {loop}]        x                           <list|get>  list {}  list the results
    sorted({e} {loop})  heapq.nsmallest(len(x), x)  sorted      sort {}  sort the results
    sorted([{e} {loop}], reverse=True)  heapq.nlargest(len(x), x)  descending \
        sort {}, largest first  sort the results, largest first
    len({{{e} {loop}}})  len(Counter(x))  distinct \
        count the distinct values among {}  count the distinct results
    """,
    Gather,
)
TOTAL, LARGEST, SMALLEST, LIST, ASCENDING = NUMBER_GATHERS[:5]
NUMBER_JOINS = table(
    """
    " ".join(str({e}) {loop})  " ".join(map(str, x))  join  join with spaces {} \
        join the results with spaces
    "K".join(str({e}) {loop})  "K".join(map(str, x))  join  join with 'K' {} \
        join the results with 'K'  - / _ + :
    """,
    Gather,
)
WORD_JOINS = table(
    """
    "".join({e} {loop})   reduce(operator.add, x, "")  join  join {}  join the results
    " ".join({e} {loop})  " ".join([*x])  join  join with spaces {}  join the results with spaces
    "K".join({e} {loop})  "K".join([*x])  join  join with 'K' {} \
        join the results with 'K'  - / _ + :
    """,
    Gather,
)

INTS, SLOTS, RANGE, DIGITS, DIVISORS, VALUES, STRINGS, LINE, TEXT = table(
    """
    $a       x                         ints   ints  x  number  numbers  in $a
    $a[::2]  [*islice(x, 0, None, 2)]  slots  ints  x  number  numbers  at even indexes of $a
    range(1, $a + 1)   [*range(x + 1)][1:]            range   nat  i  number  numbers  from 1 to $a
    map(int, str($a))  [ord(c) - 48 for c in str(x)]  digits  nat  d  digit   digits   in $a
    range(1, $a + 1)   [k for k in range(1, x + 1) if math.gcd(k, x) == k]  divisors  pos  d \
        divisor of $a  divisors of $a  -  $a % d == 0
    $a.values()  [x[key] for key in x]      values  scores  v  value      values      in $a
    $a           x                          words   words   w  word       words       in $a
    $a.split()   re.findall("[^ ]+", x)     line    line    w  word       words       in $a
    $a           x                          text    text    c  character  characters  in $a
    """,
    Source,
)
LIST_PICKS = [(INTS, t) for t in TESTS] + [(STRINGS, t) for t in WORD_TESTS]
PICKS = LIST_PICKS + [(TEXT, t) for t in CHAR_TESTS]
SINGLES = [("int", t) for t in TESTS] + [("word", t) for t in WORD_TESTS]

# ---- Families that loop over the elements that pass a test, change and gather them


def stream(source, test, change, gather):
    if test is ALL and change is SAME:
        return None
    told = gather.of.format(change.other.format(f"the {source.all(test)}"))
    steps = change.phrase.format("each " + source.each(test))
    doc = told if change is SAME else f"<{told}|{steps} and {gather.then}>"
    return exercise(
        f"""
        {gather.label}_{test.label}_{change.label or source.name}({source.args})
        {doc}.
        return {gather.code.format(e=change.on(source.x), loop=source.loop(test))}
        """,
        lambda a: gather.fn([change.fn(x) for x in source.passing(test, a)]),
    )


ANY = [ALL, *TESTS]
ANY_WORD = [ALL, *WORD_TESTS]
SHORT_CHANGES = [SAME, *(c for c in WORD_CHANGES if c.code in ("x.upper()", "x * 2"))]
for source, tests, changes, gathers, limit in [
    (INTS, ANY, CHANGES, NUMBER_GATHERS, 1800),
    (RANGE, [ALL, *UP_TO_TESTS], STEPS, [TOTAL, LIST, *NUMBER_JOINS], 500),
    (DIGITS, [ALL, *DIGIT_TESTS], [SAME, *STEPS], NUMBER_GATHERS + NUMBER_JOINS, 500),
    (DIVISORS, UP_TO_TESTS, [SAME, *STEPS], [TOTAL, LIST, *NUMBER_JOINS], 250),
    (VALUES, ANY, CHANGES, NUMBER_GATHERS, 400),
    (SLOTS, ANY, CHANGES, NUMBER_GATHERS, 300),
    (STRINGS, ANY_WORD, WORD_CHANGES, [LIST, ASCENDING, *WORD_JOINS], 1000),
    (LINE, ANY_WORD, WORD_CHANGES, [LIST, ASCENDING, *WORD_JOINS], 500),
    (TEXT, CHAR_SET_TESTS, SHORT_CHANGES, [LIST, ASCENDING, *WORD_JOINS], 300),
]:
    family([source], tests, changes, gathers, limit=limit, name=f"{source}_stream")(stream)
family([STRINGS], ANY_WORD, [LENGTH], NUMBER_GATHERS, limit=200, name="lengths_stream")(stream)


@family(PICKS)
def count(s, t):
    return exercise(
        f"""
        count_{t.label}_{s.many}({s.args})
        <Count the|Return the count of> {s.all(t)}.
        return sum(1 {s.loop(t)})
        """,
        lambda a: len(s.passing(t, a)),
    )


@family([("all", "every"), ("any", "any"), ("not any", "no")], PICKS, limit=400)
def check(code, how, s, t):
    wanted = {"every": lambda k, n: k == n, "any": lambda k, n: k > 0, "no": lambda k, n: k == 0}[
        how
    ]
    return exercise(
        f"""
        {how}_{t.label}({s.args})
        <Check if|Return True if> {how} {s.one} {s.tail} {t.other}.
        return {code}({t.on(s.x)} for {s.x} in $a)
        """,
        lambda a: wanted(len(s.passing(t, a)), len(a)),
    )


@family(["first", "last"], LIST_PICKS)
def find(end, s, t):
    code = {"first": "$a", "last": "reversed($a)"}[end]
    return exercise(
        f"""
        <find|get>_{end}_{t.label}({s.args})
        Return the {end} {s.each(t)} (None if none).
        for {s.x} in {code}:
            if {t.on(s.x)}:
                return {s.x}
        return None
        """,
        lambda a: ([*s.passing(t, a)] or [None])[0 if end == "first" else -1],
    )


@family(PICKS)
def first_index(s, t):
    return exercise(
        f"""
        <index_of|find>_{t.label}({s.args})
        Return the index of the first {s.each(t)} (-1 if none).
        for i, {s.x} in enumerate($a):
            if {t.on(s.x)}:
                return i
        return -1
        """,
        lambda a: [*map(bool, map(t.fn, a)), True].index(True) if s.passing(t, a) else -1,
    )


@family(PICKS)
def indexes(s, t):
    return exercise(
        f"""
        <indexes|positions>_of_{t.label}({s.args})
        <List|Return> the indexes of the {s.all(t)}.
        return [i for i, {s.x} in enumerate($a) if {t.on(s.x)}]
        """,
        lambda a: [*itertools.compress(range(len(a)), map(t.fn, a))],
    )


@family(LIST_PICKS)
def partition(s, t):
    return exercise(
        f"""
        <split|separate>_{t.label}({s.args})
        Return two lists: the {s.all(t)}, and the other {s.many}.
        yes, no = [], []
        for {s.x} in $a:
            if {t.on(s.x)}:
                yes.append({s.x})
            else:
                no.append({s.x})
        return yes, no
        """,
        lambda a: (s.passing(t, a), [*itertools.filterfalse(t.fn, a)]),
    )


@family(LIST_PICKS)
def before(s, t):
    return exercise(
        f"""
        <before|until>_{t.label}({s.args})
        List the {s.many} in $a before the first {t.phrase.format(s.one, s="")}.
        result = []
        for {s.x} in $a:
            if {t.on(s.x)}:
                break
            result.append({s.x})
        return result
        """,
        lambda a: [*itertools.takewhile(lambda x: not t.fn(x), a)],
    )


@family(PICKS)
def longest_run(s, t):
    def oracle(a):
        runs = itertools.groupby(a, lambda x: bool(t.fn(x)))
        return max([0, *(len([*group]) for passes, group in runs if passes)])

    return exercise(
        f"""
        longest_{t.label}_run({s.args})
        Return the length of the longest run of {s.all(t)}.
        best = run = 0
        for {s.x} in $a:
            run = run + 1 if {t.on(s.x)} else 0
            best = max(best, run)
        return best
        """,
        oracle,
    )


@family(LIST_PICKS + [(TEXT, t) for t in CHAR_SET_TESTS])
def tally(s, t):
    return exercise(
        f"""
        <tally|count_each>_{t.label}({s.args})
        Count each of the {s.all(t)} in a dict.
        counts = {{}}
        for {s.x} in $a:
            if {t.on(s.x)}:
                counts[{s.x}] = counts.get({s.x}, 0) + 1
        return counts
        """,
        lambda a: dict(Counter(s.passing(t, a))),
    )


@family(
    [(INTS, t, c) for t in TESTS for c in STEPS]
    + [(STRINGS, t, c) for t in WORD_TESTS for c in WORD_CHANGES[1:]],
    limit=600,
)
def change_some(s, t, c):
    return exercise(
        f"""
        <change|update>_{t.label}({s.args})
        Return a new list: {c.phrase.format("each " + s.each(t))}, <keep|leave> the other {s.many}.
        return [{c.on(s.x)} if {t.on(s.x)} else {s.x} for {s.x} in $a]
        """,
        lambda a: [c.fn(x) if x in s.passing(t, a) else x for x in a],
    )


@family(CHAR_TESTS, ["*", "-", "_", "#", ".", "?"], limit=150)
def mask(test, mark):
    return exercise(
        f"""
        <mask|replace>_{test.label}(text)
        Replace each {TEXT.each(test)} by '{mark}'.
        return "".join("{mark}" if {test.on("c")} else c for c in $a)
        """,
        lambda a: reduce(lambda done, c: done + (mark if test.fn(c) else c), a, ""),
    )


@family(TESTS, [SAME, *LINEAR], limit=300)
def product(test, change):
    return exercise(
        f"""
        product_of_{test.label}_{change.label}(ints)
        Return the product of {change.other.format("the " + INTS.all(test))} (1 if none).
        result = 1
        for x in $a:
            if {test.on("x")}:
                result *= {change.on("x")}
        return result
        """,
        lambda a: math.prod(map(change.fn, INTS.passing(test, a))),
    )


@family(TESTS, [SAME, *STEPS], limit=300)
def running_total(test, change):
    return exercise(
        f"""
        <running|cumulative>_{test.label}_{change.label}(ints)
        List the running totals of {change.other.format("the " + INTS.all(test))}.
        total, result = 0, []
        for x in $a:
            if {test.on("x")}:
                total += {change.on("x")}
                result.append(total)
        return result
        """,
        lambda a: [*itertools.accumulate(map(change.fn, INTS.passing(test, a)))],
    )


# ---- Families over one number or word


@family(ONE_STEPS, ONE_STEPS, limit=600)
def two_steps(first, second):
    if {first.label, second.label} <= {"plus", "minus", "rest"} or second.label == "over":
        return None
    inner = first.on("$a") if re.match(r"x [+-] ", second.code) else f"({first.on('$a')})"
    verbs = (step.phrase.split()[0].replace("-", "_") for step in (first, second))
    return exercise(
        f"""
        {"_then_".join(verbs)}(int)
        {first.phrase.format("$a")}<, then| and then> {second.phrase.format("the result")}.
        return {second.on(inner)}
        """,
        lambda a: second.fn(first.fn(a)),
    )


@family(TESTS, ONE_STEPS, ONE_STEPS, limit=800)
def choose(test, change, other):
    if change is other:
        return None
    yes, no = change.phrase, other.phrase.format("it")
    doc = f"If $a {test.other}, {yes.format('it')}; otherwise {no}."
    return exercise(
        f"""
        <change|adjust>_if_{test.label}(int)
        <{doc}|{yes.format("$a")} if it {test.other}, otherwise {no}.>
        if {test.on("$a")}:
            return {change.on("$a")}
        return {other.on("$a")}
        """,
        lambda a: (change if test.fn(a) else other).fn(a),
    )


@family(["and", "or"], SINGLES, SINGLES, limit=1800)
def both(how, kind, t, other_kind, u):
    if kind != other_kind or t.label == u.label:
        return None
    return exercise(
        f"""
        {t.label}_{how}_{u.label}({kind})
        <Check if|Return True if> $a {t.other} {how} {u.other}.
        return {t.on("$a")} {how} {u.on("$a")}
        """,
        lambda a: {"and": all, "or": any}[how]([t.fn(a), u.fn(a)]),
    )


@family(SINGLES, [("yes", "no"), ("keep", "drop"), ("good", "bad"), ("A", "B")], limit=250)
def answer(kind, t, yes, no):
    return exercise(
        f"""
        <answer|grade>_{t.label}({kind})
        Return '{yes}' if $a {t.other}, otherwise '{no}'.
        return "{yes}" if {t.on("$a")} else "{no}"
        """,
        lambda a: [no, yes][bool(t.fn(a))],
    )


@family([1, 2, 3, 4, 5, 10], LINEAR)
def repeat(start, change):
    return exercise(
        f"""
        repeat_{change.label}(few)
        Start with {start} and repeat $a times: {change.phrase.format("it")}. Return the result.
        value = {start}
        for _ in range($a):
            value = {change.on("value")}
        return value
        """,
        lambda a: reduce(lambda value, _: change.fn(value), [0] * a, start),
    )


@family(["divided", "reduced"], range(2, 10), [1, 5, 10, 20, 50])
def steps_below(how, k, limit):
    sign, verb = {"divided": ("//", "floor-divided"), "reduced": ("-", "reduced")}[how]
    return exercise(
        f"""
        <steps|times>_below_{limit}(nat)
        Count how often $a must be {verb} by {k} until it is less than {limit}.
        count = 0
        while $a >= {limit}:
            $a {sign}= {k}
            count += 1
        return count
        """,
        lambda a: next(
            i for i in itertools.count() if (a // k**i if sign == "//" else a - k * i) < limit
        ),
    )


BASE_RESULTS = {  # of the digits of a number in some base, lowest first
    "as a string": ('""', "result = str({}) + result", lambda v: "".join(map(str, v[::-1]))),
    "as a list of digits, lowest first": ("[]", "result.append({})", list),
    "and return the sum of its digits": ("0", "result += {}", sum),
    "and return its largest digit": ("0", "result = max(result, {})", max),
}


@family(range(3, 10), BASE_RESULTS)
def in_base(base, what):
    start, line, fn = BASE_RESULTS[what]
    return exercise(
        f"""
        <base_{base}|to_base_{base}>(pos)
        Write $a in base {base} {what}.
        result = {start}
        while $a > 0:
            {line.format(f"$a % {base}")}
            $a //= {base}
        return result
        """,
        lambda a: fn([a // base**i % base for i in range(10) if base**i <= a]),
    )


@family(range(4, 31))
def common_divisor(k):
    return exercise(
        f"""
        common_divisor_{k}(pos)
        Return the greatest common divisor of $a and {k}, by Euclid's algorithm.
        other = {k}
        while other:
            $a, other = other, $a % other
        return $a
        """,
        lambda a: math.gcd(a, k),
    )


@family(range(2, 13))
def multiplicity(k):
    return exercise(
        f"""
        count_factor_{k}(pos)
        Count how often $a can be divided by {k} without a remainder.
        count = 0
        while $a % {k} == 0:
            $a //= {k}
            count += 1
        return count
        """,
        lambda a: max(i for i in range(9) if a % k**i == 0),
    )


@family(range(1, 7), range(2, 8), [("+", "sum"), ("*", "product")])
def sequence(first, second, sign, noun):
    fn = {"+": operator.add, "*": operator.mul}[sign]
    return exercise(
        f"""
        sequence_{first}_{second}(few)
        Return term $a (from 0) of {first}, {second}, ... where each is the {noun} of the last two.
        x, y = {first}, {second}
        for _ in range($a):
            x, y = y, x {sign} y
        return x
        """,
        lambda a: reduce(lambda v, _: [*v, fn(v[-2], v[-1])], range(a), [first, second])[a],
    )


UNITS = [("weeks", "days", 7), ("days", "hours", 24), ("hours", "minutes", 60)]
UNITS += [("minutes", "seconds", 60), ("feet", "inches", 12), ("yards", "feet", 3)]
UNITS += [("years", "months", 12), ("meters", "centimeters", 100), ("gallons", "pints", 8)]


@family(UNITS, ["up", "down"])
def convert(big, small, k, way):
    old, new = (big, small) if way == "down" else (small, f"whole {big}")
    return exercise(
        f"""
        {old}_to_{new.split()[-1]}(nat)
        Convert $a {old} to {new}.
        return $a {"*" if way == "down" else "//"} {k}
        """,
        lambda a: sum([a] * k) if way == "down" else (a - a % k) // k,
    )


@family([-10, -5, 0, 1, 2, 5], [8, 10, 12, 20, 30, 50, 99])
def clamp(low, high):
    return exercise(
        f"""
        <clamp|limit>_to_{high}(int)
        Limit $a to the range from {low} to {high}.
        return max({low}, min($a, {high}))
        """,
        lambda a: sorted([low, a, high])[1],
    )


# ---- Families over text


@family(["forward", "backward"], [2, 3, *range(6, 14)])
def shift_letters(way, k):
    sign, step = {"forward": ("+", k), "backward": ("-", -k)}[way]
    return exercise(
        f"""
        <shift|move>_{way}(letters)
        Shift each lowercase letter of $a {way} by {k} in the alphabet, wrapping around.
        return "".join(chr((ord(c) - 97 {sign} {k}) % 26 + 97) for c in $a)
        """,
        lambda a: a.translate(str.maketrans(LETTERS, LETTERS[step:] + LETTERS[:step])),
    )


@family(CUTS, [c for c in WORD_CHANGES if c.code in ("x", "x.upper()", "x.lower()", "x[::-1]")])
def cut_text(cut, change):
    return exercise(
        f"""
        {cut.label}_characters(text)
        Return {cut.phrase.format("character")} of $a{change.other[2:].replace(" each", "")}.
        return {change.on(cut.on("$a"))}
        """,
        lambda a: change.fn("".join(cut.fn(a))),
    )


@family(["-", ",", "_", ".", "!"], ["-", "/", "_", "+", ""], ORDERS)
def rejoin(old, new, order):
    if old == new:
        return None
    how = f"with '{new}'" if new else "again"
    return exercise(
        f"""
        <join|rejoin>_{order.label}_parts(text)
        Split $a at each '{old}' and join the parts{order.other} {how}.
        return "{new}".join({order.on(f'$a.split("{old}")')})
        """,
        lambda a: new.join(order.fn(re.split(re.escape(old), a))),
    )


RUNS = {
    "(character, length) tuples": ("(c, n)", lambda c, n: (c, n)),
    "strings of character and length": ("c + str(n)", lambda c, n: f"{c}{n}"),
    "their lengths": ("n", lambda c, n: n),
}


@family(RUNS)
def runs(what):
    code, fn = RUNS[what]
    return exercise(
        f"""
        <list|get>_runs(letters)
        Find the runs of equal characters in $a and return a list of {what}.
        runs = []
        for c in $a:
            if runs and runs[-1][0] == c:
                runs[-1][1] += 1
            else:
                runs.append([c, 1])
        return [{code} for c, n in runs]
        """,
        lambda a: [fn(c, len([*group])) for c, group in itertools.groupby(a)],
    )


@family(["()", "[]", "{}"])
def unclosed(pair):
    def oracle(a):
        a = re.sub(f"[^{re.escape(pair)}]", "", a)
        while pair in a:
            a = a.replace(pair, "")
        return a.count(pair[0])

    return exercise(
        f"""
        <unclosed|still_open>(brackets)
        Count the '{pair[0]}' in $a that no later '{pair[1]}' closes.
        depth = 0
        for c in $a:
            if c == "{pair[0]}":
                depth += 1
            elif c == "{pair[1]}" and depth > 0:
                depth -= 1
        return depth
        """,
        oracle,
    )


# ---- Families over lists

KEYS = [(INTS, key) for key in INT_KEYS] + [(STRINGS, key) for key in WORD_KEYS]


@family(
    KEYS,
    ["smallest", "largest"],
    [("", 0), (", and return the first two", 2), (", and return the first three", 3)],
)
def sort_by(s, key, end, told, k):
    reverse = ", reverse=True" * (end == "largest")

    def oracle(a):
        values = sorted({key.fn(x) for x in a}, reverse=end == "largest")
        return [x for value in values for x in a if key.fn(x) == value][: k or None]

    return exercise(
        f"""
        <sort|order>_by_{key.label}({s.args})
        <Sort|Order> the {s.many} in $a by {key.phrase}, {end} first{told}.
        return sorted($a, key=lambda {s.x}: {key.on(s.x)}{reverse}){f"[:{k}]" * bool(k)}
        """,
        oracle,
    )


@family([("min", "smallest"), ("max", "largest")], KEYS)
def best_by(code, which, s, key):
    return exercise(
        f"""
        {which}_by_{key.label}({s.args})
        Return the first {s.one} in $a with the {which} {key.phrase} (None if $a is empty).
        return {code}($a, key=lambda {s.x}: {key.on(s.x)}, default=None)
        """,
        lambda a: next(iter(sorted(a, key=key.fn, reverse=code == "max")), None),
    )


GROUPS = {  # line of the body, docstring, oracle
    "list": (
        "groups.setdefault({0}, []).append({1})",
        "Group {} by {}: return a dict of lists",
        list,
    ),
    "count": ("groups[{0}] = groups.get({0}, 0) + 1", "Count {} by {}: return a dict", len),
}


@family(
    GROUPS,
    [(INTS, key, t) for key in INT_KEYS for t in TESTS]
    + [(STRINGS, key, t) for key in WORD_KEYS for t in WORD_TESTS],
    limit=600,
)
def group_by(how, s, key, t):
    line, doc, fn = GROUPS[how]
    return exercise(
        f"""
        {how}_by_{key.label}({s.args})
        {doc.format("the " + s.all(t), key.phrase)}.
        groups = {{}}
        for {s.x} in $a:
            if {t.on(s.x)}:
                {line.format(key.on(s.x), s.x)}
        return groups
        """,
        lambda a: {
            k: fn([x for x in s.passing(t, a) if key.fn(x) == k])
            for k in map(key.fn, s.passing(t, a))
        },
    )


@family(ORDERS, CUTS, AGGREGATES[:-2])
def order_and_cut(order, cut, aggregate):
    part = cut.phrase.format("number") + " of $a" * (order is SAME)
    return exercise(
        f"""
        {aggregate.label}_{order.label}_{cut.label}(ints)
        {order.phrase} {aggregate.phrase.format(part)}.
        return {aggregate.on(cut.on(order.on("$a")))}
        """,
        lambda a: aggregate.fn(cut.fn(order.fn(a))),
    )


@family(AGGREGATES, range(2, 9))
def chunks(aggregate, k):
    return exercise(
        f"""
        <chunks|blocks>_of_{k}(ints)
        List {aggregate.phrase.format(f"each chunk of {k} numbers")} in $a; the last may be shorter.
        return [{aggregate.on(f"$a[i:i + {k}]")} for i in range(0, len($a), {k})]
        """,
        lambda a: [
            aggregate.fn([x for _, x in group])
            for _, group in itertools.groupby(enumerate(a), lambda pair: pair[0] // k)
        ],
    )


@family(AGGREGATES, range(2, 9))
def windows(aggregate, k):
    return exercise(
        f"""
        <windows|spans>_of_{k}(ints)
        List {aggregate.phrase.format(f"every {k} neighbouring numbers")} in $a.
        return [{aggregate.on(f"$a[i:i + {k}]")} for i in range(len($a) - {k - 1})]
        """,
        lambda a: [aggregate.fn([*span]) for span in zip(*(islice(a, i, None) for i in range(k)))],
    )


PAIRS = {  # kinds, code, words, oracle
    "neighbours": (
        "ints",
        "zip($a, $a[1:])",
        "neighbours in $a",
        lambda a: [(a[i - 1], a[i]) for i in range(1, len(a))],
    ),
    "two lists": (
        "ints others",
        "zip($a, $b)",
        "numbers at the same index of $a and $b",
        lambda a, b: [(a[i], b[i]) for i in range(min(len(a), len(b)))],
    ),
}


@family(PAIRS, OPERATIONS, NUMBER_GATHERS)
def combine(where, operation, gather):
    args, code, told, pairs = PAIRS[where]
    return exercise(
        f"""
        {gather.label}_{operation.label}({args})
        Take the {operation.phrase} of each two {told} and {gather.then}.
        return {gather.code.format(e=operation.code, loop=f"for x, y in {code}")}
        """,
        lambda *a: gather.fn([operation.fn(x, y) for x, y in pairs(*a)]),
    )


@family(PAIRS, RELATIONS)
def count_pairs(where, relation):
    args, code, told, pairs = PAIRS[where]
    return exercise(
        f"""
        count_{relation.label}_pairs({args})
        Count the pairs of {told} where {relation.phrase}.
        return sum(1 for x, y in {code} if {relation.code})
        """,
        lambda *a: len([p for p in pairs(*a) if relation.fn(*p)]),
    )


@family(["in", "not in"], ANY, [SAME, *STEPS], limit=300)
def shared(how, test, change):
    told = change.other.format(f"the {INTS.all(test)} that are {how} $b")
    loop = INTS.loop(test) + (" and " if test.code else " if ") + f"x {how} $b"
    return exercise(
        f"""
        {"shared" if how == "in" else "missing"}_{test.label}_{change.label}(ints others)
        List {told}.
        return [{change.on("x")} {loop}]
        """,
        lambda a, b: [
            change.fn(x) for x in INTS.passing(test, a) if bool(b.count(x)) == (how == "in")
        ],
    )


@family([("<", "less than"), ("<=", "at most")], range(1, 21))
def bisect(sign, told, k):
    return exercise(
        f"""
        <bisect|binary_search>_{k}(sorted)
        By binary search, count the numbers {told} {k} in the sorted list $a.
        low, high = 0, len($a)
        while low < high:
            mid = (low + high) // 2
            if $a[mid] {sign} {k}:
                low = mid + 1
            else:
                high = mid
        return low
        """,
        lambda a: sum(x < k or (x == k and sign == "<=") for x in a),
    )


# ---- Families over dicts and grids


@family(TESTS, [SAME, *STEPS], limit=400)
def change_items(test, change):
    doc = f"Return a dict of the items in $a whose value {test.other}."
    if change is not SAME:
        each = "each " + VALUES.each(test)
        doc = f"{change.phrase.format(each)} and return a dict of these items."
    return exercise(
        f"""
        <select|items>_{test.label}_{change.label}(scores)
        {doc}
        return {{k: {change.on("v")} for k, v in $a.items() if {test.on("v")}}}
        """,
        lambda a: {key: change.fn(a[key]) for key in filter(lambda k: test.fn(a[k]), a)},
    )


@family(ANY, CHANGES, [LIST, TOTAL, LARGEST, SMALLEST], limit=350)
def each_row(test, change, gather):
    if test is ALL and change is SAME:
        return None
    row = replace(INTS, code="row", tail="in it")
    told = gather.of.format(change.other.format(f"the {row.all(test)}"))
    return exercise(
        f"""
        row_{gather.label}_{test.label}_{change.label}(grid)
        For each row of $a, {re.sub("^return", "list", told)}.
        return [{gather.code.format(e=change.on("x"), loop=row.loop(test))} for row in $a]
        """,
        lambda a: [gather.fn([change.fn(x) for x in row.passing(test, line)]) for line in a],
    )


@family(ANY, CHANGES, NUMBER_GATHERS, limit=350)
def all_rows(test, change, gather):
    if test is ALL and change is SAME:
        return None
    row = replace(INTS, code="row", tail="in all rows of $a")
    told = change.other.format(f"the {row.all(test)}")
    return exercise(
        f"""
        all_{gather.label}_{test.label}_{change.label}(grid)
        {gather.of.format(told)}.
        return {gather.code.format(e=change.on("x"), loop=f"for row in $a {row.loop(test)}")}
        """,
        lambda a: gather.fn([change.fn(x) for x in row.passing(test, itertools.chain(*a))]),
    )


@family([0, 1, 2], CHANGES, [LIST, TOTAL, ASCENDING], limit=150)
def column(index, change, gather):
    return exercise(
        f"""
        column_{gather.label}_{change.label or "numbers"}(grid)
        {gather.of.format(change.other.format(f"the numbers in column {index} of $a"))}.
        return {gather.code.format(e=change.on(f"row[{index}]"), loop="for row in $a")}
        """,
        lambda a: gather.fn([change.fn(x) for x in [*zip(*a)][index]]),
    )


FLIPS = {
    "[list(column) for column in zip(*$a)]": (
        "transpose_<grid|rows>",
        "Turn the rows of $a into columns.",
        lambda a: [[row[i] for row in a] for i in range(len(a[0]))],
    ),
    "[row[::-1] for row in $a]": (
        "mirror_<grid|rows>",
        "Reverse each row of $a.",
        lambda a: [[*reversed(row)] for row in a],
    ),
    "[list(column) for column in zip(*$a[::-1])]": (
        "turn_<grid|right>",
        "Rotate $a clockwise by 90 degrees.",
        lambda a: [[row[i] for row in reversed(a)] for i in range(len(a[0]))],
    ),
}


@family(FLIPS)
def flip(code):
    name, doc, oracle = FLIPS[code]
    return Task("grid", name, doc, f"return {code}", oracle)
