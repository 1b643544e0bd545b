"""What an endpoint is asked to write, and how its replies are read: see data/synthesize.py.

PAPER: the prompts, topics and names of the paper are undisclosed; these are ours. A reply is taken
if it is exactly what was asked for, or not at all: code without its tests cannot be trusted, and a
sentence such as "Sure, here is" would be learned with the rest.
"""

import ast
import re

from data.base.syntax import docstring, is_pair, parse_python

MIN_ASSERTS = 3  # that come with an exercise
MIN_PROSE_CHARS = 400  # around the code of a lesson
BLOCK = re.compile(r"^```python[ \t]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)

TEXTBOOK_PROMPT = """\
Write a section of a textbook on programming in Python.

Topic: {topic}
Audience: {audience}
Work these words into the examples: {words}

Explain the idea in clear prose, then show it in code, then check it. Write Markdown. Put all code \
into fenced blocks that begin with ```python; run one after the other as one program they must end \
without an error. Use only the standard library, no input, no files, no network. Show results by \
assert statements. Reply with the section alone.
"""
EXERCISE_PROMPT = """\
Write one exercise in Python, for a student of basic programming, and its solution.

The function must be called {name}. Find a task that fits this name, needs some thought but not \
more than 15 lines, and has to do with one of these words: {words}

Reply with two fenced blocks that begin with ```python, and nothing else. The first holds the \
function alone (and imports from the standard library where needed): signature, a docstring that \
tells exactly what to do, and the solution. The second holds at least four assert statements that \
test it.
"""

_verbs = """
add append apply average build change check choose clean collect compare compute convert copy
count cut divide double drop encode expand extract fill filter find fix flatten format generate
group insert invert join keep label limit list locate map mark mask match measure merge mix move
multiply normalize order pack pad pair parse pick plan print rank read remove rename repeat
replace report reverse rotate round scale search select shift shorten shuffle sort split squeeze
strip subtract sum swap take total translate trim turn unpack update validate weigh wrap
"""

_nouns = """
accounts angles balances bits blocks boxes cards cells characters coins columns coordinates
dates days digits distances edges events factors fractions grades grid heights hours intervals
items keys letters levels lines matrix messages minutes moves names nodes numbers orders pages
pairs paths points prices products queue ratios records responses roots rows scores seats
seconds sentences sequence shapes sizes stack steps string substrings symbols table teams
temperatures text times tokens tree triangles tuples values vowels weights words years
"""

_tails = """
above after_each as_text at_most before between by_first by_key by_length by_name by_parity
by_sign by_value evenly excluding from_end if_valid in_place in_range in_reverse once only_even
only_odd or_default per_group recursively safely to_list together twice until_zero with_gaps
with_index with_limit without_duplicates without_negatives without_spaces
"""

_words = """
apple arrow average balance basket bicycle bird book bottle bridge bucket button calendar candle
castle chain chess circle clock cloud coin colour compass corner daily desert distance dream
drum early empty engine exactly farm feather festival final fire flag forest frost garden ghost
glass grain hammer harbour heavy honest island journey kettle kingdom ladder lantern largest
leaf legend letter library lucky machine magnet maple market meadow mirror mixed mountain narrow
nearest needle notebook ocean orchard owl paper parade pattern pebble penguin pepper pilot
planet pocket poem pond postcard puzzle quiet rabbit rainbow rarely receipt repeat ribbon river
robot rocket salt school season secret shadow silver simple sleepy slowly smallest snow spare
spider spiral station storm strange sugar sunrise ticket tiger tower treasure tunnel unusual
valley village violin visitor volcano wagon waiting weather whistle window winter wooden zebra
"""

VERBS, NOUNS, TAILS, WORDS = map(str.split, (_verbs, _nouns, _tails, _words))


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
    tests_it = [isinstance(node, ast.Assert) and _names(node, name) for node in asserts]
    if len(asserts) < MIN_ASSERTS or not all(tests_it):
        return {}, "no tests"
    fields = {"prompt": prompt + "\n", "solution": solution, "entry_point": name, "tests": tests}
    return fields, ""


def _names(node: ast.AST, name: str) -> bool:
    return any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(node))
