"""More families of exercises, from concepts.txt: the breadth of what short functions do.

The families of families.txt compose filters, changes and gathers. These have one idea each, or
two in a row, told in several wordings.
"""

import itertools

from data.synthetic import families
from data.synthetic.families import read_families

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


CONCEPTS = read_families("concepts.txt", vars(families) | globals(), limit=60)
