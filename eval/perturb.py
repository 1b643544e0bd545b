"""Other ways to write a problem's prompt, each with the same task in it; for eval/robustness.py.

A perturbation takes a problem and returns the problem with another prompt, and reference, test and
entry point to match; or None where it does not apply. Code is changed token by token, a docstring
as the text that stands in the source, so that all that is not meant to change stays as it was.
The same problem is always perturbed in the same way.
"""

import ast
import builtins
import io
import keyword
import random
import re
import tokenize
from collections.abc import Callable
from dataclasses import dataclass

from data.base.syntax import FUNCTIONS

TYPO_FRAC = 1 / 6  # of the words that may get a typo
LITERAL = re.compile(r"([a-zA-Z]*)(\"\"\"|'''|\"|')(.*)\2", re.DOTALL)
QUOTED = re.compile(r"\"[^\"\n]*\"|'[^'\n]*'|`[^`\n]*`|\S*[_(\[{<>=]\S*")  # no prose inside
HEADER = re.compile(r"(for )?(an )?(examples?|instances?)\W*\d*\W*", re.IGNORECASE)
# Words, as patterns, and others that say the same wherever a docstring has them. No new word is an
# old one.
SYNONYMS = {
    r"return(?! it\b| them\b)": "give back",
    r"returns(?! it\b| them\b)": "gives back",
    r"compute|calculate": "work out",
    r"count(?! of\b)": "tally",
    r"create": "construct",
    r"largest": "biggest",
    r"smallest": "lowest",
    r"given": "provided",
    r"find|check(?= if\b| whether\b)": "determine",
    r"remove": "take away",
    r"begins": "starts",
    r"contains": "includes",
    r"containing": "that includes",
    r"function": "routine",
    r"otherwise": "in any other case",
    r"result": "outcome",
    r"decreasing": "descending",
    r"increasing": "ascending",
    r"keep": "retain",
    r"sort": "arrange",
    r"first": "initial",
    r"last": "final",
}


@dataclass(frozen=True)
class Parts:
    """A prompt, cut at its docstring: head + prefix + quote + doc + quote + tail."""

    head: str  # the code before, with the docstring's indentation
    prefix: str  # of the literal, such as r
    quote: str
    doc: str  # as it stands in the source, escapes and all
    tail: str
    arguments: tuple[str, ...]

    @property
    def indent(self) -> str:
        return self.head[self.head.rfind("\n") + 1 :]

    def join(self, doc: str | None = None, quote: str = "", head: str = "") -> str:
        """Return the prompt with another doc, quote or head."""
        quote, doc = quote or self.quote, self.doc if doc is None else doc
        return f"{head or self.head}{self.prefix}{quote}{doc}{quote}{self.tail}"


def split(problem: dict) -> Parts | None:
    """Split the problem's prompt; None if it has no docstring in lines of its own, or the
    problem is no Python, which the self-check reports."""
    prompt = problem["prompt"]
    try:
        tree = ast.parse(prompt + problem["canonical_solution"])
        ast.parse(problem["test"])  # which is tokenized, too
    except SyntaxError:
        return None
    named = [
        n for n in ast.walk(tree) if isinstance(n, FUNCTIONS) and n.name == problem["entry_point"]
    ]
    if not named or not prompt.endswith("\n"):
        return None
    for statement in named[-1].body:  # one of HumanEval's has an import before its docstring
        match statement:
            case ast.Expr(ast.Constant(value=str())):
                break
    else:
        return None
    lines = prompt.splitlines(keepends=True)
    if statement.end_lineno > len(lines):
        return None

    def offset(line: int, column: int) -> int:  # ast's columns are bytes
        before = lines[line - 1].encode()[:column].decode()
        return sum(map(len, lines[: line - 1])) + len(before)

    begin = offset(statement.lineno, statement.col_offset)
    end = offset(statement.end_lineno, statement.end_col_offset)
    found = LITERAL.fullmatch(prompt[begin:end])
    if not found or prompt[:begin].rpartition("\n")[2].strip():
        return None
    a = named[-1].args
    arguments = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    return Parts(prompt[:begin], *found.groups(), prompt[end:], tuple(arguments))


# ---- Names


def rename(problem: dict, names: dict[str, str], mention: str) -> dict | None:
    """Rename `names` in prompt and reference, and in the docstring where {} of the pattern
    `mention` stands for one; None if a new name is there already."""
    parts = split(problem)
    source = problem["prompt"] + problem["canonical_solution"]
    if parts is None or {t.string for t in _tokens(source)} & set(names.values()):
        return None
    doc = parts.doc
    for old, new in names.items():
        doc = re.sub(mention.format(re.escape(old)), new, doc)
    renamed = _rename_tokens(source, names).splitlines(keepends=True)
    lines = len(problem["prompt"].splitlines())
    return {
        **problem,
        "prompt": "".join(renamed[:lines]).replace(parts.doc, doc, 1),
        "canonical_solution": "".join(renamed[lines:]),
    }


def rename_function(problem: dict) -> dict | None:
    """Use a name that says nothing; in the docstring, replace one of one word only in calls."""
    old = problem["entry_point"]
    renamed = rename(problem, {old: "func"}, r"\b{}\b" if "_" in old else r"\b{}(?=\()")
    if renamed:
        renamed["test"] = _rename_tokens(problem["test"], {old: "func"})
        renamed["entry_point"] = "func"
    return renamed


def rename_arguments(problem: dict) -> dict | None:
    """Turn numbers into given_numbers in code and docstring: as names are words of the prose, a new
    one has to make sense where the old one did. Only "a" stays in the docstring."""
    parts = split(problem)
    if not parts or not parts.arguments:
        return None
    names = {old: f"given_{old}" for old in parts.arguments}
    return rename(problem, names, r"(?<![\w.\\])(?!a\b){}\b")


def _tokens(source: str) -> list[tokenize.TokenInfo]:
    return list(tokenize.generate_tokens(io.StringIO(source).readline))


def _rename_tokens(source: str, names: dict[str, str]) -> str:
    """Replace the names in `source`, but for attributes and what is in strings."""
    lines, before = source.splitlines(keepends=True), ""
    found = []
    for token in _tokens(source):
        if token.type == tokenize.NAME and token.string in names and before != ".":
            found.append(token)
        before = token.string
    for token in reversed(found):  # from the end, so that columns stay right
        (row, begin), (_, end) = token.start, token.end
        line = lines[row - 1]
        lines[row - 1] = line[:begin] + names[token.string] + line[end:]
    return "".join(lines)


# ---- Docstrings


def example_lines(problem: dict, doc: str) -> list[bool]:
    """Return for each line of a docstring whether it belongs to an example.

    Examples are doctests up to a blank line, lines with a call of the function, and what stands
    under a header such as "Example:" up to a blank line.
    """
    marks, inside = [], False
    for line in doc.split("\n"):
        text = line.strip()
        call = re.search(rf"\b{re.escape(problem['entry_point'])}\(", text)
        if text.startswith(">>>") or (text and HEADER.fullmatch(text)):
            inside = True
        elif not text:
            inside = False
        marks.append(inside or bool(call))
    return marks


def _split_examples(problem: dict, parts: Parts) -> tuple[list[str], list[str]] | None:
    """Return the lines of prose and of examples, without blank ends; None if there are not both."""
    lines, marks = parts.doc.split("\n"), example_lines(problem, parts.doc)
    if marks[0]:
        return None  # its line has no indentation to keep
    prose = _tidy([line for line, mark in zip(lines, marks) if not mark])
    examples = _tidy([line for line, mark in zip(lines, marks) if mark])
    return (prose, examples) if prose and examples else None


def _tidy(lines: list[str]) -> list[str]:
    """Remove blank lines at the end, and keep one blank line of several."""
    blank = [not line.strip() for line in lines]
    kept = [line for i, line in enumerate(lines) if not (i and blank[i] and blank[i - 1])]
    while kept and not kept[-1].strip():
        kept.pop()
    return kept


def missing_examples(problem: dict) -> dict | None:
    parts = split(problem)
    found = parts and _split_examples(problem, parts)
    if not found:
        return None
    prose = "\n".join(found[0])
    return {**problem, "prompt": parts.join(prose + ("\n" + parts.indent) * ("\n" in prose))}


def examples_first(problem: dict) -> dict | None:
    parts = split(problem)
    found = parts and _split_examples(problem, parts)
    if not found:
        return None
    (first, *prose), examples = found
    prose = [parts.indent + first.strip(), *prose] if first.strip() else prose
    lines = ["", *examples, "", *prose, parts.indent]
    return {**problem, "prompt": parts.join("\n".join(lines))}


def _change_prose(problem: dict, change: Callable[[str], str]) -> dict | None:
    """Apply `change` to each line's stretches of prose; None if it changes nothing."""
    parts = split(problem)
    if not parts:
        return None
    lines = parts.doc.split("\n")
    for i, example in enumerate(example_lines(problem, parts.doc)):
        if not example:
            quoted = [*QUOTED.findall(lines[i]), ""]
            prose = QUOTED.split(lines[i])
            lines[i] = "".join(change(p) + q for p, q in zip(prose, quoted, strict=True))
    doc = "\n".join(lines)
    return {**problem, "prompt": parts.join(doc)} if doc != parts.doc else None


def _names(problem: dict) -> set[str]:
    """Return the words that may be names of Python's or of the problem's."""
    code = "\n".join(problem[k] for k in ("prompt", "canonical_solution", "test"))
    names = {t.string for t in _tokens(code) if t.type == tokenize.NAME}
    return names | set(dir(builtins)) | set(keyword.kwlist) - {"return", "is", "in", "and", "or"}


def typos(problem: dict) -> dict | None:
    """Exchange two letters inside a word, in one word of six."""
    rng, names = random.Random(f"typos {problem['prompt']}"), _names(problem)

    def mistype(match: re.Match) -> str:
        word = match[0]
        places = [i for i in range(1, len(word) - 2) if word[i] != word[i + 1]]
        if word in names or not places or rng.random() >= TYPO_FRAC:
            return word
        i = rng.choice(places)
        return word[:i] + word[i + 1] + word[i] + word[i + 2 :]

    for _ in range(20):  # a short docstring may be spared by chance
        changed = _change_prose(problem, lambda text: re.sub(r"\b[A-Za-z]{5,}\b", mistype, text))
        if changed:
            return changed
    return None


def reworded(problem: dict) -> dict | None:
    """Replace words by others of the same meaning, but for those that are names."""
    names = {t.string for t in _tokens(problem["prompt"]) if t.type == tokenize.NAME}
    names -= set(keyword.kwlist)

    def reword(text: str) -> str:
        for old, new in SYNONYMS.items():

            def replacement(match: re.Match, new: str = new) -> str:
                if match[0] in names:
                    return match[0]
                return new[0].upper() + new[1:] if match[0][0].isupper() else new

            text = re.sub(rf"\b(?:{old})\b", replacement, text, flags=re.IGNORECASE)
        return text

    return _change_prose(problem, reword)


# ---- Layout


def other_quotes(problem: dict) -> dict | None:
    """Exchange ''' and \"\"\"."""
    parts = split(problem)
    if not parts:
        return None
    quote = "'''" if parts.quote[0] == '"' else '"""'
    if quote in parts.doc or parts.doc[:1] == quote[0] or parts.doc[-1:] == quote[0]:
        return None
    return {**problem, "prompt": parts.join(quote=quote)}


def other_spacing(problem: dict) -> dict | None:
    """Space the signature inside its brackets, not behind commas; put the docstring's text on lines
    of its own, or behind the quotes where it was on its own."""
    parts = split(problem)
    if not parts:
        return None
    define = list(re.finditer(rf"^\s*def {problem['entry_point']}\(", parts.head, re.MULTILINE))
    if not define:
        return None
    at = define[-1].end()
    inner, bracket, rest = parts.head[at:].rpartition(")")
    inner = f" {inner.strip().replace(', ', ',')} " if inner.strip() else " "
    head = parts.head[:at] + inner + bracket + rest
    text = parts.doc.lstrip()
    if "\n" in parts.doc[: -len(text)]:
        doc = parts.doc if text.startswith(parts.quote[0]) else text
    else:
        doc = f"\n{parts.indent}{text.rstrip()}\n{parts.indent}"
    return {**problem, "prompt": parts.join(doc, head=head)}


def two_spaces(problem: dict) -> dict | None:
    """Indent by 2 instead of 4."""
    if not split(problem):
        return None
    halved = {
        key: re.sub(r"^ +", lambda m: m[0][: len(m[0]) // 2], problem[key], flags=re.MULTILINE)
        for key in ("prompt", "canonical_solution")
    }
    return {**problem, **halved}


PERTURBATIONS: dict[str, Callable[[dict], dict | None]] = {
    "rename_function": rename_function,
    "rename_arguments": rename_arguments,
    "typos": typos,
    "reworded": reworded,
    "examples_first": examples_first,
    "missing_examples": missing_examples,
    "other_quotes": other_quotes,
    "other_spacing": other_spacing,
    "two_spaces": two_spaces,
}
