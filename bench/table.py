"""Tables printed by the bench commands."""

import json
import math
import sys


class Table:
    """Row printer with column headers; with `as_json` the table goes to stderr, JSON to stdout."""

    def __init__(self, as_json: bool = False):
        self.as_json, self.columns = as_json, None

    def __call__(self, summary: bool = False, **row) -> None:
        """Print a row; ..._frac values show as percent. bench.gpu repeats rows with `summary`."""
        if list(row) != self.columns:
            self.columns = list(row)
            self.say("".join(cell(name, name, value) for name, value in row.items()))
        line = "".join(cell(name, text(name, value), value) for name, value in row.items())
        self.say(line)
        if self.as_json:
            row = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}
            row = {k: v for k, v in row.items() if v == v and v not in (math.inf, "")}
            print(json.dumps(row | ({"summary": line.strip()} if summary else {})), flush=True)

    def say(self, line: str) -> None:
        print(line.rstrip(), file=sys.stderr if self.as_json else sys.stdout, flush=True)


def cell(name: str, shown: str, value) -> str:
    return f"  {shown:<22}" if isinstance(value, str) else f"{shown:>{max(9, len(name)) + 1}}"


def text(name: str, value) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float) and name.endswith("_frac"):
        return f"{value:.1%}"
    return f"{value:,.4g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:,.0f}"
