"""Rewrite a problem's prompt without changing its task, for eval/robustness.py.

A perturbation is deterministic. It returns the problem with a new prompt and matching reference,
test and entry point, or None where it does not apply. It edits code token by token and docstrings
as source text, so everything else stays as it was.
"""

import ast
import builtins
import functools
import io
import keyword
import random
import re
import tokenize
from collections.abc import Callable
from dataclasses import dataclass, replace

from data.base.syntax import FUNCTIONS

LITERAL = re.compile(r"([a-zA-Z]*)(\"\"\"|'''|\"|')(.*)\2", re.DOTALL)
QUOTED = re.compile(r"\"[^\"\n]*\"|'[^'\n]*'|`[^`\n]*`|\S*[_(\[{<>=]\S*")  # not prose
HEADER = re.compile(r"(for )?(an )?(examples?|instances?)\W*\d*\W*", re.IGNORECASE)
# {pattern: synonym in any docstring}. No synonym matches a pattern.
SYNONYMS = {
    r"return(?! it\b| them\b)": "give back", r"returns(?! it\b| them\b)": "gives back",
    "compute|calculate": "work out", r"count(?! of\b)": "tally", "create": "construct",
    "largest": "biggest", "smallest": "lowest", "given": "provided",
    r"find|check(?= if\b| whether\b)": "determine", "remove": "take away", "begins": "starts",
    "contains": "includes", "containing": "that includes", "function": "routine",
    "otherwise": "in any other case", "result": "outcome", "decreasing": "descending",
    "increasing": "ascending", "keep": "retain", "sort": "arrange", "first": "initial",
    "last": "final",
}  # fmt: skip
ARGUMENT = r"(?<![\w.\\])(?!a\b){}\b"  # an argument named in prose; "a" is a word
OLD = re.compile(rf"\b(?:({')|('.join(SYNONYMS)}))\b", re.IGNORECASE)
TYPO_FRAC = 1 / 6  # of the eligible words
PERTURBATIONS: dict[str, Callable[[dict], dict | None]] = {}


@dataclass(frozen=True)
class Parts:
    """A prompt split at its docstring: head + quote + doc + quote + tail."""

    head: str  # up to the opening quotes
    quote: str
    doc: str  # as source text, escapes included
    tail: str
    arguments: list[str]

    def join(self, **changes: str) -> dict:
        """Return {"prompt": the prompt with another doc or quote}."""
        p = replace(self, **changes)
        return {"prompt": f"{p.head}{p.quote}{p.doc}{p.quote}{p.tail}"}


def split(problem: dict) -> Parts | None:
    """Split the prompt. Return None if it has no docstring on lines of its own, or if the problem
    does not parse, which the self-check reports."""
    prompt, source = problem["prompt"], problem["prompt"] + problem["canonical_solution"]
    try:
        tree = ast.parse(source)
        ast.parse(problem["test"])  # perturbations tokenize the test, too
    except SyntaxError:
        return None
    functions = [n for n in ast.walk(tree) if isinstance(n, FUNCTIONS)]
    named = [n for n in functions if n.name == problem["entry_point"]]
    if not named or not prompt.endswith("\n"):
        return None
    # One HumanEval problem has an import before its docstring.
    values = [n.value for n in named[-1].body if isinstance(n, ast.Expr)]
    strings = [v for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)]
    if not strings:
        return None
    literal, lines = ast.get_source_segment(source, strings[0]), prompt.splitlines(keepends=True)
    above = "".join(lines[: strings[0].lineno - 1])
    indent, _, tail = prompt[len(above) :].partition(literal)
    found = LITERAL.fullmatch(literal)
    if not found or indent.strip() or strings[0].end_lineno > len(lines):
        return None
    a = named[-1].args
    arguments = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    prefix, quote, doc = found.groups()
    return Parts(above + indent + prefix, quote, doc, tail, arguments)


def perturbation(change: Callable[[dict, Parts], dict | None]) -> None:
    """Register `change`; it returns the fields to replace, or nothing where it does not apply."""

    @functools.wraps(change)
    def perturbed(problem: dict) -> dict | None:
        parts = split(problem)
        changes = parts and change(problem, parts)
        return {**problem, **changes} if changes else None

    PERTURBATIONS[change.__name__] = perturbed


# ---- Names


def rename(problem: dict, parts: Parts, names: dict[str, str], mention: str) -> dict | None:
    """Rename `names` in prompt and reference, and in the docstring where `mention` matches (its {}
    holds the name). Return None if a new name is already in use."""
    source = problem["prompt"] + problem["canonical_solution"]
    if {t.string for t in tokens(source)} & set(names.values()):
        return None
    doc = parts.doc
    for old, new in names.items():
        doc = re.sub(mention.format(re.escape(old)), new, doc)
    renamed = rename_tokens(source, names).splitlines(keepends=True)
    n = len(problem["prompt"].splitlines())
    prompt = "".join(renamed[:n]).replace(parts.doc, doc, 1)
    return {"prompt": prompt, "canonical_solution": "".join(renamed[n:])}


@perturbation
def rename_function(problem: dict, parts: Parts) -> dict | None:
    """Rename the function to func; in the docstring, replace a one-word name only in calls."""
    names = {problem["entry_point"]: "func"}
    mention = r"\b{}\b" if "_" in problem["entry_point"] else r"\b{}(?=\()"
    renamed = rename(problem, parts, names, mention)
    more = {"test": rename_tokens(problem["test"], names), "entry_point": "func"}
    return renamed and renamed | more


@perturbation
def rename_arguments(problem: dict, parts: Parts) -> dict | None:
    """Rename e.g. numbers to given_numbers in code and docstring: argument names are words of the
    prose, so new names must read well there. Leave "a" in the docstring alone."""
    names = {old: f"given_{old}" for old in parts.arguments}
    return rename(problem, parts, names, ARGUMENT) if names else None


def tokens(source: str) -> list[tokenize.TokenInfo]:
    return list(tokenize.generate_tokens(io.StringIO(source).readline))


def rename_tokens(source: str, names: dict[str, str]) -> str:
    """Replace names in `source`, except attributes and text in strings."""
    lines, found = source.splitlines(keepends=True), tokens(source)
    pairs = list(zip(found, [found[0], *found]))
    for token, before in reversed(pairs):  # backwards, to keep columns valid
        if token.type == tokenize.NAME and token.string in names and before.string != ".":
            (row, begin), (_, end) = token.start, token.end
            line = lines[row - 1]
            lines[row - 1] = line[:begin] + names[token.string] + line[end:]
    return "".join(lines)


# ---- Docstrings


def change_prose(problem: dict, parts: Parts, change: Callable[[str], str]) -> dict | None:
    """Apply `change` to the prose of each line. Return None if nothing changes.

    Examples are not prose: doctests up to a blank line, lines that call the function, and lines
    under a header such as "Example:" up to a blank line.
    """
    lines, inside = parts.doc.split("\n"), False
    call = re.compile(rf"\b{re.escape(problem['entry_point'])}\(")
    for i, line in enumerate(lines):
        text = line.strip()
        inside = bool(text) and (inside or text.startswith(">>>") or bool(HEADER.fullmatch(text)))
        if not inside and not call.search(line):
            pairs = zip(QUOTED.split(line), [*QUOTED.findall(line), ""], strict=True)
            lines[i] = "".join(change(prose) + quoted for prose, quoted in pairs)
    doc = "\n".join(lines)
    return parts.join(doc=doc) if doc != parts.doc else None


@perturbation
def reworded(problem: dict, parts: Parts) -> dict | None:
    """Replace words by synonyms, except words that are names."""
    names = {t.string for t in tokens(problem["prompt"]) if t.type == tokenize.NAME}
    names -= set(keyword.kwlist)

    def replacement(match: re.Match) -> str:
        new = [*SYNONYMS.values()][match.lastindex - 1]
        if match[0] in names:
            return match[0]
        return new.capitalize() if match[0][0].isupper() else new

    return change_prose(problem, parts, lambda text: OLD.sub(replacement, text))


@perturbation
def typos(problem: dict, parts: Parts) -> dict | None:
    """Swap two inner letters in one word of six, except in names."""
    rng = random.Random(f"typos {problem['prompt']}")
    code = "\n".join(problem[k] for k in ("prompt", "canonical_solution", "test"))
    names = {t.string for t in tokens(code) if t.type == tokenize.NAME} | set(dir(builtins))
    names |= set(keyword.kwlist) - {"return", "is", "in", "and", "or"}

    def mistype(match: re.Match) -> str:
        word = match[0]
        places = [i for i in range(1, len(word) - 2) if word[i] != word[i + 1]]
        if word in names or not places or rng.random() >= TYPO_FRAC:
            return word
        i = rng.choice(places)
        return word[:i] + word[i + 1] + word[i] + word[i + 2 :]

    def change(text: str) -> str:
        return re.sub(r"\b[A-Za-z]{5,}\b", mistype, text)

    tries = (change_prose(problem, parts, change) for _ in range(20))  # a try may change nothing
    return next(filter(None, tries), None)


# ---- Layout


@perturbation
def other_quotes(problem: dict, parts: Parts) -> dict | None:
    """Swap ''' and \"\"\"."""
    quote = "'''" if parts.quote[0] == '"' else '"""'
    clash = quote in parts.doc or quote[0] in (parts.doc[:1], parts.doc[-1:])
    return None if clash else parts.join(quote=quote)


@perturbation
def two_spaces(problem: dict, parts: Parts) -> dict | None:
    """Indent by 2 spaces instead of 4."""
    return {
        key: re.sub(r"^ +", lambda m: m[0][: len(m[0]) // 2], problem[key], flags=re.MULTILINE)
        for key in ("prompt", "canonical_solution")
    }
