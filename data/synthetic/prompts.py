"""Prompts for an endpoint, and parsers for its replies: see data/synthesize.py.

PAPER: the paper's prompts, topics and names are undisclosed; ours are in prompts.txt. Parsers drop
text around a lesson or exercise, such as "Sure, here is", and take the rest unchanged or not at
all.
"""

import ast
import contextlib
import re
import textwrap
from collections import Counter

from data.base.syntax import FENCE, docstring, is_pair, parse_python
from data.synthetic import texts

MIN_ASSERTS = 3  # per exercise
MIN_PROSE_CHARS = 400  # per lesson, outside the code
MOST_REPEATS = 4  # per line of 20 characters or more, outside the code
BLOCK = re.compile(
    r"^[ \t]*```(?:python3?|py)[ \t]*\n(.*?)^[ \t]*```[ \t]*$", re.M | re.S | re.IGNORECASE
)
MARKDOWN = re.compile(  # a fence around the whole lesson
    r"\A(?:(?!^#|^```).)*^```(?:markdown|md)?[ \t]*\n\s*(#.*)^```", re.M | re.S | re.IGNORECASE
)
HEADING = re.compile(r"^(?:#{1,6} |\*\*[^*\n]+\*\*$)", re.MULTILINE)
CHAT = re.compile(
    r"(?:(?:\n+|(?<=[.!?]) )(?:---+|[*_> ]{0,3}(?:I hope|I'd be happy|Let me know|Feel free|Happy "
    r"coding|Would you like|If you(?:'d like| have| need) (?:any|more|further|help|me))[^\n]*))"
    r"+\s*\Z",
    re.IGNORECASE,
)

TEXTS = texts.sections("prompts.txt")
TEXTBOOK_PROMPT, EXERCISE_PROMPT = TEXTS["textbook_prompt"] + "\n", TEXTS["exercise_prompt"] + "\n"
VERBS, NOUNS, TAILS, WORDS = (TEXTS[k].split() for k in ("verbs", "nouns", "tails", "words"))


# ---- Lessons


def read_lesson(reply: str) -> tuple[str, str]:
    """Return the lesson in a reply, from its first heading, and "" or a reason to reject it."""
    text = reply.replace("\r\n", "\n") + "\n"
    whole = MARKDOWN.search(text)
    text = whole[1] if whole else text
    start = HEADING.search(text)
    if not start or "```" in text[: start.start()]:
        return "", "no heading first"
    return CHAT.sub("", text[start.start() :]).strip() + "\n", ""


def lesson_program(text: str) -> tuple[str, str]:
    """Return all code of a lesson, and "" or a reason to reject it."""
    blocks, prose, others = BLOCK.findall(text), FENCE.sub("", text), BLOCK.sub("", text)
    program = "\n".join(map(textwrap.dedent, blocks))
    lines = Counter(line for line in map(str.strip, others.split("\n")) if len(line) >= 20)
    words = prose.split()
    if not blocks:
        return "", "no code"
    if len(prose) < MIN_PROSE_CHARS:
        return "", "no prose"
    if re.search("^[ \t]*```", prose, re.MULTILINE):
        return "", "an open fence"
    if max(lines.values(), default=0) > MOST_REPEATS or len(set(words)) < len(words) / 5:
        return "", "repeats itself"
    try:
        tree = parse_python(program)
    except SyntaxError:
        return "", "syntax"
    return (program, "") if has_check(tree) else ("", "no check that runs")


def has_check(tree: ast.Module) -> bool:
    """Return whether running a module reaches an assert that uses a name.

    Of functions, only test... and check... count, if the module calls them.
    """
    hidden = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    functions = {n.name: n.body for n in tree.body if isinstance(n, ast.FunctionDef)}
    tests = {name: functions[name] for name in functions if name.startswith(("test", "check"))}
    nodes = [n for n in tree.body if not isinstance(n, hidden)]
    for node in nodes:  # grows in the loop
        if isinstance(node, ast.Assert) and any(isinstance(n, ast.Name) for n in ast.walk(node)):
            return True
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            nodes += tests.pop(node.func.id, [])
        nodes += [n for n in ast.iter_child_nodes(node) if not isinstance(n, hidden)]
    return False


# ---- Exercises

Claim = tuple[str, str, bool]  # call, expression that should be true, is it from the docstring
EXAMPLES = (  # true if a docstring's examples hold
    "not __import__('doctest').DocTestRunner(verbose=False).run(__import__('doctest')"
    ".DocTestParser().get_doctest({!r}, globals(), 'examples', None, 0), out=len).failed"
)


def read_exercise(reply: str, name: str) -> tuple[dict, list[Claim], str]:
    """Return the exercise in a reply, its claims, and "" or a reason to reject it.

    An exercise is {"prompt", "solution", "entry_point"}: prompt + solution is the function `name`
    below the imports of its block. Claims are the asserts that call it, anywhere in the reply, and
    its doctests. Code is read from all fences, or from the whole reply without fences.
    """
    reply, nodes, why_not = reply.replace("\r\n", "\n"), [], "not the function asked for"
    for block in map(textwrap.dedent, FENCE.findall(reply) or [reply]):
        try:
            nodes += [(block, node) for node in parse_python(block).body]
        except SyntaxError:
            why_not = "syntax"
    functions = [x for x in nodes if isinstance(x[1], ast.FunctionDef) and x[1].name == name]
    if not functions:
        return {}, [], why_not
    whole, function = max(functions, key=lambda x: docstring(x[1]) is not None)
    doc, lines = docstring(function), whole.split("\n")
    if not doc or not doc.value.strip():
        return {}, [], "no docstring"
    first = min(n.lineno for n in (function, *function.decorator_list)) - 1
    prompt = "\n".join(lines[first : doc.end_lineno]) + "\n"
    solution = "\n".join(lines[doc.end_lineno : function.end_lineno]) + "\n"
    if not is_pair(prompt, solution):
        return {}, [], "no solution below the docstring"
    imports = [ast.unparse(node) + "\n" for block, node in nodes
               if block is whole and isinstance(node, (ast.Import, ast.ImportFrom))]  # fmt: skip
    prompt = "".join([*imports, "\n\n" * bool(imports), prompt])
    claims = [(call, ast.get_source_segment(block, n.test), False)
              for block, node in nodes for n in ast.walk(node)
              if isinstance(n, ast.Assert) and (call := called(n.test, name, block))]  # fmt: skip
    if len(claims) < MIN_ASSERTS:
        return {}, [], "no tests"
    if ">>>" in doc.value:
        claims.append(("None", EXAMPLES.format(doc.value), True))
    return {"prompt": prompt, "solution": solution, "entry_point": name}, claims, ""


def called(node: ast.AST, name: str, source: str) -> str:
    """Return the source of the first outermost call of `name` in `node`, "" if there is none."""
    calls = [n for n in ast.walk(node) if isinstance(n, ast.Call)]
    named = [n for n in calls if isinstance(n.func, ast.Name) and n.func.id == name]
    return ast.get_source_segment(source, named[0]) if named else ""


def is_plain(text: str) -> bool:
    """Return whether `text` is a plain-data literal, such as the repr of a list."""
    with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        ast.literal_eval(text.strip())
        return True
    return False


def asserted(call: str, result: str) -> str:
    """Return an assert that a call or comparison has this result, given as repr."""
    compared = isinstance(ast.parse(call, mode="eval").body, ast.Compare)
    wrong = call.replace(" == ", " != ") if compared and " == " in call else f"not {call}"
    ways = {"True": call, "False": wrong, "None": f"{call} is None"}
    return f"assert {ways.get(result, f'{call} == {result}')}"
