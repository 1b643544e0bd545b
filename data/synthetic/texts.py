"""Read this folder's content files and choose among their wordings."""

import random
import re
from pathlib import Path


def read(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def blocks(name: str) -> list[str]:
    """Return a file's blocks, separated by blank lines, without comments."""
    return re.split(r"\n\n+", re.sub("^# .*\n", "", read(name), flags=re.M).strip())


def sections(name: str) -> dict[str, str]:
    """Return {name: section} of a file; each section starts with a line `== name`."""
    _, *parts = re.split(r"^== (\w+)\n", read(name), flags=re.MULTILINE)
    return {kind: body.strip("\n") for kind, body in zip(parts[::2], parts[1::2])}


def lines(text: str) -> list[str]:
    """Return the lines of a section; "3 x LINE" repeats LINE three times."""
    found = []
    for line in text.split("\n"):
        m = re.fullmatch(r"(\d+) x (.*)", line)
        found += [m[2]] * int(m[1]) if m else [line]
    return found


def lists(text: str, mark: str | None = None) -> dict[str, list[str]]:
    """Parse lines such as "name: a b c" to {name: [a, b, c]}, split at `mark`."""
    pairs = (line.split(": ", 1) for line in text.split("\n"))
    return {key: values.split(mark) for key, values in pairs}


def choose(text: str, rng: random.Random) -> str:
    """Replace each `<this|that>` by a random choice, inner ones first."""
    while m := re.search(r"<([^<>`]*\|[^<>`]*)>", text):
        text = text[: m.start()] + rng.choice(m[1].split("|")) + text[m.end() :]
    return text
