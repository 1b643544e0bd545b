"""The rubric of educational value, and its questions answered from the syntax tree alone.

Rules see structure, not sense: a docstring that tells of another task than the code does scores as
well as a true one. They stand in for a language model where there is none, so that all that follows
runs offline; tests/data/labels.jsonl, scores given by reading, says how far to trust them (LOG.md).
"""

import ast

from data.base.syntax import (
    COMMENT,
    FUNCTIONS,
    count_syntax,
    docstring,
    foreign_names,
    parse_python,
    root_name,
    strip_licence,
)

QUESTIONS = {
    "self_contained": "Can it be read without knowing the rest of a project or a special library?",
    "computes": "Does it do something with data: an algorithm, decisions, loops, arithmetic? "
    "Not only imports, settings, tables, wrappers, tests that compare.",
    "clear": "Are the pieces small, the names telling, the order of things easy to follow?",
    "explained": "Do docstrings and comments say what it does and why, with examples perhaps?",
    "basic": "Could a student of basic programming learn from it and use it again elsewhere?",
}


def rule_points(text: str) -> dict[str, float]:
    """Points from 0 to 2 for each of QUESTIONS, of what the syntax tree shows.

    The bounds of each ramp were set on half of the labels in tests/data/labels.jsonl, those whose
    sha256 ends in 0 to 7; the other half judges them (LOG.md). Raises SyntaxError if it is not
    Python.
    """
    tree = parse_python(text)
    c, nodes = count_syntax(tree), list(ast.walk(tree))
    functions = [node for node in nodes if isinstance(node, FUNCTIONS)]
    arguments = [[a.arg for a in (*f.args.args, *f.args.kwonlyargs)] for f in functions]
    calls = [root_name(node.func) for node in nodes if isinstance(node, ast.Call)]
    loops = sum(isinstance(node, (ast.For, ast.While, ast.comprehension)) for node in nodes)
    returns = sum(isinstance(node, ast.Return) and node.value is not None for node in nodes)
    names = foreign_names(tree)
    statements, chars, n = max(c["statements"], 1), max(len(text), 1), max(len(functions), 1)
    foreign = sum(name in names for name in calls) / max(len(calls), 1)
    doc = (c["docstring_chars"] + sum(map(len, COMMENT.findall(text)))) / chars
    lines = sum(map(_code_lines, functions)) / n
    plain = sum(a[:1] not in (["self"], ["cls"]) for a in arguments) / n
    many = max(map(len, arguments), default=9)
    points = {
        "self_contained": ramp(len(names), 12, 0) + ramp(foreign, 0.4, 0),
        "computes": ramp(c["computes"] / statements, 0.05, 0.45) + ramp(loops, 0, 3),
        "clear": ramp(lines, 25, 5) + ramp(chars, 40_000, 1_000),
        "explained": ramp(doc, 0.02, 0.25) + ramp(c["documented"] / n, 0.1, 0.9),
        "basic": ramp(plain, 0, 0.8) + (ramp(returns / statements, 0, 0.12) + ramp(many, 8, 2)) / 2,
    }
    # What is mostly imports, assignments or data teaches nothing, however short and well told.
    dead = max(c["imports"], c["assigns"] - c["computes"], 0) / statements
    lives = ramp(dead, 0.5, 0.1) * ramp(c["data"] / max(c["nodes"], 1), 0.15, 0.02)
    lives *= ramp(points["computes"], -0.5, 0.5) if functions else 0.1
    return {question: round(p * lives, 2) for question, p in points.items()}


def ramp(value: float, none: float, full: float) -> float:
    """0 at `none` and beyond, 1 at `full` and beyond, a straight line between."""
    return min(max((value - none) / (full - none), 0.0), 1.0)


def _code_lines(function) -> int:
    doc = docstring(function)
    return function.end_lineno - (doc.end_lineno if doc else function.lineno)


def by_rules(text: str) -> dict:
    """The label of `text` by rules: a score of 0 for what is not Python."""
    try:
        points = rule_points(strip_licence(text))
    except SyntaxError:
        points = dict.fromkeys(QUESTIONS, 0.0)
    weakest = min(points, key=points.get)
    told = "all is there" if points[weakest] > 1.5 else f"{weakest} {points[weakest]:g} of 2"
    return label(points, told, "rules")


def label(points: dict, reason: str, labeller: str) -> dict:
    score = round(sum(points.values()), 2)
    return {"score": score, "points": points, "reason": reason, "labeller": labeller}
