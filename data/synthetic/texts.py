"""Read texts that stand in sections, as in forms.txt: each below a line `== name`."""

import re
from pathlib import Path


def sections(name: str) -> dict[str, str]:
    """Return the sections of a file in this folder."""
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    _, *parts = re.split(r"^== (\w+)\n", text, flags=re.MULTILINE)
    return {kind: body.strip("\n") for kind, body in zip(parts[::2], parts[1::2])}


def lines(text: str) -> list[str]:
    """Return the lines of a section; "3 x LINE" is LINE three times."""
    found = []
    for line in text.split("\n"):
        m = re.fullmatch(r"(\d+) x (.*)", line)
        found += [m[2]] * int(m[1]) if m else [line]
    return found


def lists(text: str, mark: str | None = None) -> dict[str, list[str]]:
    """Return the lists in a section, of lines such as "name: a b c", split at `mark`."""
    pairs = (line.split(": ", 1) for line in text.split("\n"))
    return {key: values.split(mark) for key, values in pairs}
