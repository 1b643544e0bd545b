"""Two texts next to each other, for a person who judges whether they are the same."""

from itertools import zip_longest

WIDTH = 78  # characters of each side


def side_by_side(left: str, right: str) -> str:
    """The lines of both in two columns; longer lines go on below."""
    columns = [[part for line in text.split("\n") for part in _cut(line)] for text in (left, right)]
    rows = zip_longest(*columns, fillvalue="")
    return "".join(f"{a:{WIDTH}} | {b}".rstrip() + "\n" for a, b in rows)


def _cut(line: str) -> list[str]:
    line = line.expandtabs(4)
    return [line[i : i + WIDTH] for i in range(0, max(len(line), 1), WIDTH)]
