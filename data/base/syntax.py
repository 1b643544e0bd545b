"""Measure Python source by its syntax tree: what the filter's rules ask, topics, difficulty."""

import ast
import contextlib
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator

LEADING_COMMENTS = re.compile(r"(?:[ \t]*(?:#.*)?\n)*")
COMMENT_BLOCK = re.compile(r"(?:[ \t]*#.*\n)+")
LICENCE = re.compile(r"copyright|licen[cs]e|spdx", re.IGNORECASE)
COMMENT = re.compile(r"^[ \t]*#.*", re.MULTILINE)  # also lines of strings that look like one: few
FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```", re.MULTILINE | re.DOTALL)
DIGITS = re.compile(r"[0-9]")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPUTES = (ast.For, ast.While, ast.If, ast.IfExp, ast.comprehension, ast.BinOp, ast.BoolOp,
            ast.Compare, ast.AugAssign, ast.Subscript)  # fmt: skip
BRANCHES = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler,
            ast.comprehension, ast.match_case)  # fmt: skip

# What a document is about, by what its syntax tree has: node types, `.attribute`s, `name()`s that
# are called, `import module`s. Ours: the topics of an introduction to programming, and beyond it.
TOPICS = {
    topic: set(marks.split(" | "))
    for topic, marks in {
        "conditions": "If | IfExp | Match",
        "loops": "For | While",
        "functions as values": "Lambda | decorator | import functools | map() | filter()",
        "recursion": "recursion",
        "comprehensions": "ListComp | DictComp | SetComp",
        "generators": "Yield | YieldFrom | GeneratorExp | import itertools",
        "classes": "ClassDef",
        "exceptions": "Try | Raise",
        "context managers": "With",
        "text": "JoinedStr | .split | .join | .strip | .replace | .format | .lower | .upper",
        "regular expressions": "import re",
        "lists": "List | .append | .extend | .pop | .insert",
        "dictionaries": "Dict | DictComp | .items | .keys | .values | .setdefault",
        "sets": "Set | SetComp | set() | frozenset()",
        "sorting and searching": "sorted() | .sort | import bisect | import heapq",
        "arithmetic": "Add | Sub | Mult | Div | FloorDiv | Mod | Pow",
        "mathematics": "import math | import statistics | import fractions | import decimal",
        "bits": "BitAnd | BitXor | LShift | RShift",  # not BitOr, which also joins types
        "chance": "import random | import secrets",
        "dates and times": "import datetime | import time | import calendar",
        "files": "open() | import os | import pathlib | import shutil | import io",
        "data formats": "import json | import csv | import xml | import pickle | import struct",
        "command line": "import argparse | import optparse | import getopt | .argv",
        "processes": "import threading | import subprocess | import multiprocessing",
        "asynchronous code": "AsyncFunctionDef | Await | import asyncio",
        "networks": "import socket | import http | import urllib | import ssl | import requests",
        "databases": "import sqlite3 | import sqlalchemy",
        "tests": "Assert | import unittest | import pytest | import doctest",
        "type hints": "AnnAssign | import typing | annotation",
        "arrays": "import numpy | import torch | import pandas | import scipy",
    }.items()
}


def measures(text: str) -> Iterator[tuple[str, float]]:
    """Yield the filter's rules as (option, measured value), cheap ones first. Raises SyntaxError.

    A new rule is one `yield` here and one field of Config in data/filter.py. Lazy: a document that
    an early rule rejects is never parsed.
    """
    chars = max(len(text), 1)
    yield "min_chars", len(text)
    yield "max_chars", len(text)
    yield "max_line_chars", max(map(len, text.split("\n")))
    yield "max_digit_frac", len(DIGITS.findall(text)) / chars
    yield "min_ascii_frac", 1 if text.isascii() else sum(map(str.isascii, text)) / chars
    c, functions, names, calls = Counter(), [], set(), []
    docs = sum(map(len, COMMENT.findall(text)))
    for node in ast.walk(parse_python(text)):
        c["nodes"] += 1
        c["statements"] += isinstance(node, ast.stmt)
        c["computes"] += isinstance(node, COMPUTES)
        c["assigns"] += isinstance(node, (ast.Assign, ast.AnnAssign))
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            c["imports"] += 1
            names |= foreign_names(node)
        elif isinstance(node, ast.Call):
            calls.append(root_name(node.func))
        elif isinstance(node, (ast.List, ast.Tuple, ast.Set, ast.Dict)):
            values = node.values if isinstance(node, ast.Dict) else node.elts
            c["data"] += sum(isinstance(e, ast.Constant) for e in values)
        elif isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.Module)):
            doc = docstring(node)
            docs += len(doc.value) if doc else 0
            if isinstance(node, FUNCTIONS):
                c["documented"] += doc is not None
                functions.append(node.end_lineno - (doc.end_lineno if doc else node.lineno - 1))
    statements = max(c["statements"], 1)
    yield "min_doc_frac", docs / chars
    yield "max_doc_frac", docs / chars
    yield "min_functions", len(functions)
    yield "min_documented_frac", c["documented"] / len(functions) if functions else 1
    yield "max_import_frac", c["imports"] / statements
    yield "max_assign_frac", c["assigns"] / statements
    yield "min_compute_frac", c["computes"] / statements
    yield "max_data_frac", c["data"] / max(c["nodes"], 1)
    yield "max_function_lines", max(functions, default=0)
    yield "max_foreign_names", len(names)
    yield "max_foreign_frac", sum(name in names for name in calls) / max(len(calls), 1)


def parse_python(text: str) -> ast.Module:
    """Parse `text`. Raises SyntaxError, whatever it is that ast.parse cannot take."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes: other people's
            return ast.parse(text)
    except (RecursionError, MemoryError, ValueError) as e:  # nesting, nesting, NUL or surrogates
        raise SyntaxError(str(e)) from None


def docstring(node) -> ast.Constant | None:
    """Return the constant that is the docstring of a module, class or function."""
    first = node.body[0] if node.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        return first.value if isinstance(first.value.value, str) else None
    return None


def foreign_names(node: ast.Import | ast.ImportFrom) -> set[str]:
    """Return names bound by an import from outside the standard library, relative ones too."""
    if isinstance(node, ast.ImportFrom):
        ours = not node.level and node.module.split(".")[0] in sys.stdlib_module_names
        return set() if ours else {alias.asname or alias.name for alias in node.names}
    packages = [(alias.name.split(".")[0], alias.asname) for alias in node.names]
    return {name or package for package, name in packages
            if package not in sys.stdlib_module_names}  # fmt: skip


def root_name(node: ast.expr) -> str:
    """Return the name that a.b.c starts from, "" if it starts from none."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def strip_licence(text: str) -> str:
    """Remove those of the leading comment blocks that speak of a licence or copyright."""
    head = LEADING_COMMENTS.match(text)[0]
    kept = COMMENT_BLOCK.sub(lambda block: "" if LICENCE.search(block[0]) else block[0], head)
    return text if kept == head else kept.lstrip("\n") + text[len(head) :]


def is_pair(prompt: str, solution: str) -> bool:
    """Return whether `prompt` alone is a function of one statement, to which `solution` adds."""
    try:
        [alone], [whole] = parse_python(prompt).body, parse_python(prompt + solution).body
    except (SyntaxError, ValueError):
        return False
    return len(alone.body) == 1 < len(whole.body)


def facts(text: str) -> dict:
    """Return topics and the complexity of each function of a text's syntax tree.

    A text that is no Python stands for the fenced blocks in it.
    """
    marks, complexity, tree = set(), [], ast.Module([], [])
    for code in (text, "\n".join(FENCE.findall(text))):
        with contextlib.suppress(SyntaxError):
            tree = parse_python(code)
            break
    for node in ast.walk(tree):
        marks.add(type(node).__name__)
        if isinstance(node, ast.Import):
            marks |= {f"import {alias.name.split('.')[0]}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            marks.add(f"import {node.module.split('.')[0]}")
        elif isinstance(node, ast.Attribute):
            marks.add(f".{node.attr}")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            marks.add(f"{node.func.id}()")
        elif isinstance(node, FUNCTIONS):
            inside = list(ast.walk(node))
            branches = sum(isinstance(n, BRANCHES) for n in inside)
            joined = sum(len(n.values) - 1 for n in inside if isinstance(n, ast.BoolOp))
            complexity.append(1 + branches + joined)
            called = [n.func for n in inside if isinstance(n, ast.Call)]
            recursive = any(isinstance(f, ast.Name) and f.id == node.name for f in called)
            annotated = node.returns or any(a.annotation for a in node.args.args)
            marks |= {"recursion"} if recursive else set()
            marks |= {"decorator"} if node.decorator_list else set()
            marks |= {"annotation"} if annotated else set()
    return {
        "topics": [topic for topic, wanted in TOPICS.items() if wanted & marks],
        "complexity": complexity,
    }
