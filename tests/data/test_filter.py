import ast
import dataclasses
import json
from collections import Counter

import pytest

from common.config import UserError
from common.files import read_jsonl
from data.base.documents import ShardWriter, document
from data.base.readers import read_documents
from data.base.syntax import Syntax, measures, parse_python, strip_licence
from data.filter import Config, filter_documents, rejection

CONFIG = Config(source=None, out=None)

GOOD = '''"""Runs of equal items in sequences."""

import itertools


def runs(items):
    """The (item, length) of each run of equal items.

    >>> runs("aab")
    [('a', 2), ('b', 1)]
    """
    found = []
    for item in items:
        if found and found[-1][0] == item:
            found[-1] = (item, found[-1][1] + 1)
        else:
            found.append((item, 1))
    return found


def longest(items):
    """The length of the longest run, 0 for an empty sequence."""
    best = 0
    for _, group in itertools.groupby(items):
        best = max(best, sum(1 for _ in group))
    return best
'''
FOREIGN = "from .core import fetch, store\n"
LETTERS = "abcdefghijklmnopqrst"
UNDOCUMENTED = "".join(f"def f_{a}(x):\n    return x + x * x if x > 1 else -x\n" for a in LETTERS)


def functions(names, body="    return x + 1\n", doc="Adds one to the number it is given."):
    return "".join(f'def {name}(x):\n    """{doc}"""\n{body}\n' for name in names)


# Each fails exactly one rule: without that rule it would be kept.
REJECTED = {
    "min_chars": '"""One."""\n\n\ndef one(x):\n    """Adds one."""\n    return x + 1\n',
    "max_chars": GOOD * 200,
    "max_line_chars": GOOD + f"\n\nPATTERN = '{'a' * 200}'\n",
    "max_digit_frac": GOOD + "".join(f"\n# {i:040}" for i in range(5)),
    "min_ascii_frac": GOOD + "\n# " + "Ω" * 60 + "\n",
    "syntax": GOOD + "\nprint 'hello'\n",
    "min_doc_frac": UNDOCUMENTED + functions("abc", doc="Add."),
    "max_doc_frac": '"""' + "All about it.\n" * 300 + '"""\n' + GOOD,
    "min_functions": "# Adds them up, one after the other.\nif x > 1:\n    y += x\n" * 10,
    "min_documented_frac": UNDOCUMENTED.replace("    return", "    # Doubles it.\n    return"),
    "max_import_frac": "".join(f"import os.path as p_{a}\n" for a in "abcde") + GOOD,
    "max_assign_frac": GOOD + "".join(f"# An alias.\nruns_{a} = runs\n" for a in LETTERS),
    "min_compute_frac": functions(LETTERS, body="    return x\n"),
    "max_data_frac": GOOD + "\nNAMES = [\n" + "    'name',\n" * 30 + "]\n",
    "max_function_lines": functions(["f"], "    # Twice.\n    x += x\n" * 126) + functions("abc"),
    "max_foreign_names": f"import {', '.join(LETTERS[:13])}\n" + GOOD,
    "max_foreign_frac": FOREIGN + functions(LETTERS, body="    return store(x + fetch(x))\n"),
}


# StackExchange posts: a question, with its answers below.
QUESTION = "# How can I count the runs of equal items?\n\n" + "I have a list with repeats. " * 9
FENCED = "\n\n```python\n{}```\n\n## Answer\n\nHere is how it works: " + "it goes on. " * 20
SCRIPT = """import itertools
items = [1, 1, 2, 3, 3]
for item, group in itertools.groupby(items):
    count = sum(1 for _ in group)
    print(item, count if count > 1 else "once")
"""
SESSION = """>>> def repeated(items):
...     counts = {}
...     for x in items:
...         counts[x] = counts.get(x, 0) + 1
...     return {x: n for x, n in counts.items() if n > 1}
...
>>> repeated([1, 1, 2])
{1: 2}
"""
POSTS = {
    "answered": (QUESTION + FENCED.format(GOOD), ""),
    "a script": (QUESTION + FENCED.format(SCRIPT), ""),
    "one block of two": (QUESTION + FENCED.format(SCRIPT + "```\n\n```\nprint 1\n"), ""),
    "a session": (QUESTION + FENCED.format(SESSION).replace("```python", "```"), ""),
    "Python 2": (QUESTION + FENCED.format("print 'hello'\n"), "syntax"),
    "prose": (QUESTION + "\n\n## Answer\n\n" + "Count one by one in a loop. " * 20, "no code"),
    "a shell": (QUESTION + FENCED.format("x = 1\n").replace("```python", "```bash"), "no code"),
    "settings": (QUESTION + FENCED.format("number = number_of_items\n" * 20), "min_functions"),
}


def write_source(folder, texts):
    folder.mkdir()
    with ShardWriter(folder) as writer:
        for i, text in enumerate(texts):
            writer.write(document(text, f"code:{i}.py"))
    return folder


@pytest.mark.parametrize("reason", REJECTED)
def test_each_rule_rejects(reason):
    assert rejection(GOOD, CONFIG) == ""
    assert {option for option, _ in measures(GOOD)} == set(REJECTED) - {"syntax"}
    text = REJECTED[reason]
    assert rejection(text, CONFIG) == reason
    if reason != "syntax":
        measured = dict(measures(text))[reason]
        assert rejection(text, dataclasses.replace(CONFIG, **{reason: measured})) == ""


@pytest.mark.parametrize("name", POSTS)
def test_a_post_is_judged_by_its_fenced_python(name):
    text, reason = POSTS[name]
    assert max(map(len, text.split("\n"))) > CONFIG.max_line_chars  # paragraphs of prose
    assert rejection(text, CONFIG) == reason


def test_measures_of_a_post_counted_by_hand():
    code = "import re\nx = [1, 2]\nif x:\n    print(x)  # three\n"
    head, tail = "# Title\n\nProse.\n\n", "\n\nMore prose."
    m = dict(measures(f"{head}```py\n{code}```{tail}"))
    assert m["min_doc_frac"] == (len(head) + len(tail)) / (len(head + code + tail) + 9)
    assert (m["min_functions"], m["min_documented_frac"], m["max_import_frac"]) == (1, 1, 0)
    assert m["min_compute_frac"] == m["max_assign_frac"] == 1 / 4
    assert m["max_data_frac"] == 0
    assert m["max_line_chars"] == len("    print(x)  # three")


MATCHED = """
global_ = {**a, "x": [*b, lambda y, /, *z, k=1, **m: -y < z <= k]}
async def f(self, *, a: int, b=2):
    global x; nonlocal_ = f"{a!r:>{b}}"
    async with a as b, c: del a[1:2, ...]
    match x:
        case [1, *rest] | {"k": None, **more} | C(1, z=None) as whole if a: yield (await b)
try: import a.b as c
except* E as e: raise E from e
x: int = 1; x += (y := 2); assert x, "no"
"""


@pytest.mark.parametrize("text", [MATCHED, GOOD, "", "()", "x.y"])
def test_syntax_has_the_nodes_of_ast_walk(text):
    def depth(node):
        return 1 + max(map(depth, ast.iter_child_nodes(node)), default=0)

    tree, syntax = ast.parse(text), Syntax(text)
    left_out = (ast.expr_context, ast.operator, ast.unaryop, ast.boolop, ast.cmpop)
    kept = [node for node in ast.walk(tree) if not isinstance(node, left_out)]
    by_type = {k.__name__: len(v) for k, v in syntax.by.items() if v}
    assert by_type == Counter(type(node).__name__ for node in kept)
    assert syntax.nodes() == len([*ast.walk(tree)])
    assert syntax.depth == depth(tree)


def test_measures_of_a_text_counted_by_hand():
    text = (
        "import os, numpy.linalg, pandas as pd\n"
        "from . import near as n\n"
        "from json import load\n"
        "# four\n"
        "def f(x):\n"
        "    '''Doc'''\n"
        "    y = [1, 2, x]\n"
        "    if y and os.sep:\n"
        "        return numpy.dot(y)\n"
        "    return n(load(pd.x(y)))\n"
    )
    m = dict(measures(text))
    statements = 3 + 1 + 5  # imports, def, docstring, assignment, if, two returns
    assert m["min_chars"] == m["max_chars"] == len(text)
    assert m["max_line_chars"] == 37
    assert m["max_digit_frac"] == 2 / len(text)
    assert m["min_doc_frac"] == m["max_doc_frac"] == (len("Doc") + len("# four")) / len(text)
    assert m["min_functions"] == m["min_documented_frac"] == 1
    assert m["max_import_frac"] == 3 / statements
    assert m["max_assign_frac"] == 1 / statements
    assert m["min_compute_frac"] == 2 / statements  # the if and its `and`
    assert m["max_function_lines"] == 4
    assert m["max_foreign_names"] == 3  # numpy, pd and n; not os, nor json's load
    assert m["max_foreign_frac"] == 3 / 4


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "text", ["(" * 100_000, "x" + "+x" * 100_000, "x\0", "'\ud800'", "print 'x'"],
    ids=["parentheses", "recursion", "NUL", "surrogate", "Python 2"],
)  # fmt: skip
def test_what_does_not_parse_is_a_syntax_error(text):
    with pytest.raises(SyntaxError):
        parse_python(text)
    parse_python("x = '\\d'\ny = 1 is 1\n")  # shows no warnings about third-party code


@pytest.mark.parametrize(
    ("text", "stripped"),
    [
        ("#!/usr/bin/python\n# SPDX-License-Identifier: MIT\nimport os\n", "import os\n"),
        ("# Copyright A\n\n# How this works.\nimport os\n", "# How this works.\nimport os\n"),
        ("# How this works.\n\n# (c) Copyright A\nimport os\n", "# How this works.\n\nimport os\n"),
        ("import os\n# Copyright A\n", "import os\n# Copyright A\n"),
        ("# Copyright A\n", ""),
    ],
)
def test_a_leading_licence_is_cut(text, stripped):
    assert strip_licence(text) == stripped


def test_a_run_counts_samples_and_keeps(tmp_path):
    licensed = "# Copyright 2020 A\n\n" + GOOD.replace("longest", "most")
    bad = [text for reason, text in REJECTED.items() if reason != "min_chars"]
    short = [f"x = {i}\n" for i in range(9)]
    source = write_source(tmp_path / "raw", [GOOD, licensed, *bad, *short])
    (source / "x.jsonl").write_text("{\n")
    summary = filter_documents(Config(source=(source,), out=tmp_path / "out"))
    expected = dict.fromkeys(REJECTED, 1) | {"min_chars": 9}
    assert summary["rejected"] == expected
    assert summary["documents"] == 2
    assert summary["documents_in"] == 2 + sum(expected.values())
    assert summary["licences_cut"] == 1
    assert summary["quarantined"] == {"not JSON": 1}
    # The output holds the kept documents in order, with the hash of the text without its licence.
    kept = list(read_documents([tmp_path / "out"]))
    assert kept == [document(GOOD, "code:0.py"), document(licensed[20:], "code:1.py")]
    assert summary["bytes"] == sum(len(d["text"].encode()) for d in kept)
    samples = list(read_jsonl(tmp_path / "out" / "samples" / "rejected.jsonl"))
    assert [s["reason"] for s in samples].count("min_chars") == 5
    assert {s["reason"] for s in samples} == set(REJECTED)
    assert max(len(s["text"]) for s in samples) == 2000
    assert len(list(read_jsonl(tmp_path / "out" / "samples" / "kept.jsonl"))) == 2


def test_quality_cuts_before_the_rules(tmp_path):
    source = tmp_path / "raw.jsonl"
    scored = [document(f"{GOOD}# {i}\n", f"{i}", quality=i / 10) for i in range(10)]
    source.write_text("".join(json.dumps(d) + "\n" for d in scored))
    for options, kept in [({"keep_frac": 0.3}, 3), ({"min_quality": 0.5}, 5)]:
        summary = filter_documents(Config((source,), tmp_path / "out", **options))
        assert summary["documents"] == kept
        assert summary["rejected"] == {"min_quality": 10 - kept}
        assert [d["quality"] for d in read_documents([tmp_path / "out"])] == [
            i / 10 for i in range(10 - kept, 10)
        ]  # for data.dedup
    source.write_text(json.dumps(document(GOOD, "unscored")) + "\n")
    with pytest.raises(UserError, match="1 documents lack `quality`"):
        filter_documents(Config((source,), tmp_path / "out", keep_frac=0.3))


def test_where_nothing_is_left_the_error_says_why(tmp_path):
    texts = [UNDOCUMENTED, UNDOCUMENTED + "\n", "x = 1\n", "print 'x'" * 60]
    source = write_source(tmp_path / "bad", texts)
    with pytest.raises(UserError, match="2 min_doc_frac, 1 min_chars, 1 max_line_chars"):
        filter_documents(Config((source,), tmp_path / "out"))
