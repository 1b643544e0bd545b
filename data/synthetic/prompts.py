"""What an endpoint is asked to write, and how its replies are read: see data/synthesize.py.

PAPER: the prompts, topics and names of the paper are undisclosed; ours are in prompts.txt. A reply
is taken if it is exactly what was asked for, or not at all: code without its tests cannot be
trusted, and a sentence such as "Sure, here is" would be learned with the rest.
"""

import ast
import re

from data.base.syntax import docstring, is_pair, parse_python
from data.synthetic import texts

MIN_ASSERTS = 3  # that come with an exercise
MIN_PROSE_CHARS = 400  # around the code of a lesson
BLOCK = re.compile(r"^```python[ \t]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)

TEXTS = texts.sections("prompts.txt")
TEXTBOOK_PROMPT, EXERCISE_PROMPT = TEXTS["textbook_prompt"] + "\n", TEXTS["exercise_prompt"] + "\n"
VERBS, NOUNS, TAILS, WORDS = (TEXTS[k].split() for k in ("verbs", "nouns", "tails", "words"))


def lesson_program(text: str) -> tuple[str, str]:
    """Return all code of a lesson, and why it is refused, "" if it is not."""
    blocks = BLOCK.findall(text)
    program = "\n".join(blocks)
    if not blocks:
        return "", "no code"
    if len(BLOCK.sub("", text)) < MIN_PROSE_CHARS:
        return "", "no prose"
    try:
        parse_python(program)
    except SyntaxError:
        return "", "syntax"
    return program, ""


def read_exercise(reply: str, name: str) -> tuple[dict, str]:
    """Return the exercise in a reply, and why it is refused, "" if it is not.

    An exercise is {"prompt", "solution", "entry_point", "tests"}: prompt + solution is the function
    called `name`, below its imports, and tests are assert statements that call it.
    """
    blocks = BLOCK.findall(reply.replace("\r\n", "\n"))
    if len(blocks) != 2 or BLOCK.sub("", reply.replace("\r\n", "\n")).strip():
        return {}, "not two blocks"
    code, tests = (block.strip("\n") + "\n" for block in blocks)
    try:
        body, asserts = parse_python(code).body, parse_python(tests).body
    except SyntaxError:
        return {}, "syntax"
    *imports, function = body or [None]
    named = isinstance(function, ast.FunctionDef) and function.name == name
    if not named or not all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in imports):
        return {}, "not the function asked for"
    doc = docstring(function)
    if not doc or not doc.value.strip():
        return {}, "no docstring"
    lines = code.split("\n")
    prompt, solution = ("\n".join(lines[: doc.end_lineno]), "\n".join(lines[doc.end_lineno :]))
    signature = "\n".join(lines[function.lineno - 1 : doc.end_lineno]) + "\n"
    if not is_pair(signature, solution):
        return {}, "no solution below the docstring"
    tests_it = [
        isinstance(node, ast.Assert)
        and any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(node))
        for node in asserts
    ]
    if len(asserts) < MIN_ASSERTS or not all(tests_it):
        return {}, "no tests"
    fields = {"prompt": prompt + "\n", "solution": solution, "entry_point": name, "tests": tests}
    return fields, ""
