"""What differs between two configurations, and why: `python train.py --diff A.toml B.toml`.

The reasons are the comments that stand behind the keys in the files.
"""

import dataclasses
import re
from pathlib import Path

from common.config import UserError, parse


def show_differences(cls, files: list[str]) -> None:
    """Print the fields of `cls` whose values the two TOML files set differently."""
    if len(files) != 2:
        raise UserError("--diff wants two configurations: --diff A.toml B.toml")
    one, two = (parse(cls, [file], toml=True) for file in files)
    reasons = comments(Path(files[0])) | comments(Path(files[1]))
    rows = [("", *files, "")]
    for field in dataclasses.fields(cls):
        a, b = getattr(one, field.name), getattr(two, field.name)
        if a != b:
            rows.append((field.name, str(a), str(b), reasons.get(field.name, "")))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths))
        print(("  ".join(cells) + "  " + row[3]).rstrip())
    if len(rows) == 1:
        print("no difference")


def comments(path: Path) -> dict[str, str]:
    """{key: the comment behind it, with the comment lines right below that are indented}."""
    found, key = {}, None
    for line in path.read_text().splitlines():
        if m := re.match(r"(\w+)\s*=[^#]*#\s*(.*)", line):
            key = m[1]
            found[key] = m[2]
        elif key and (m := re.match(r"\s+#\s*(.*)", line)):
            found[key] += " " + m[1]
        else:
            key = None
    return found
