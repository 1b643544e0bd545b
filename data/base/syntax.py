"""Measure Python source by its syntax tree: filter rules, topics, complexity."""

import ast
import contextlib
import re
import sys
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import chain
from operator import attrgetter

LEADING_COMMENTS = re.compile(r"(?:[ \t]*(?:#.*)?\n)*")
COMMENT_BLOCK = re.compile(r"(?:[ \t]*#.*\n)+")
LICENCE = re.compile(r"copyright|licen[cs]e|spdx", re.IGNORECASE)
COMMENT = re.compile(r"^[ \t]*#.*", re.MULTILINE)  # also matches some lines of strings; rare
FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```", re.MULTILINE | re.DOTALL)
CODE_LINE = re.compile(  # code, not prose, in Python 2 or 3
    r"^[ \t]*(?:(?:def|class|import|print|return) ?[\w(\"']|from [\w.]+ import |[\w.]+ ?=)",
    re.MULTILINE,
)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPUTES = (ast.For, ast.While, ast.If, ast.IfExp, ast.comprehension, ast.BinOp, ast.BoolOp,
            ast.Compare, ast.AugAssign, ast.Subscript)  # fmt: skip
BRANCHES = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler,
            ast.comprehension, ast.match_case)  # fmt: skip

STATEMENTS = ast.stmt.__subclasses__()
ENDS = (ast.Constant, ast.MatchSingleton, ast.Global, ast.Nonlocal)  # leaves
NO_NODES = re.compile(  # fields not followed; Syntax.nodes counts contexts and operators
    "ctx|ops?|id|attr|arg|name|asname|module|level|type_comment|simple|conversion|is_async|rest|"
    "kwd_attrs|tag|str"
)
EXAMPLE = 10  # constants allowed per block of a post, as example data


def children(kind: type) -> Callable | None:
    """Return a getter for the child-node fields of a node type, None without any."""
    if kind in ENDS:
        return None
    fields = [f for f in kind._fields if not NO_NODES.fullmatch(f) or kind.__name__ == "TypeAlias"]
    return attrgetter(*fields) if fields else None


CHILDREN = {kind: children(kind) for kind in vars(ast).values()
            if isinstance(kind, type) and issubclass(kind, ast.AST)}  # fmt: skip

# {topic: marks in the syntax tree}: node types, `.attribute`s, called `name()`s, `import module`s.
# The choice is ours: topics of an introduction to programming, and beyond.
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


class NoCode(SyntaxError):
    """The text has no Python, not even broken Python."""


class Syntax:
    """The nodes of a text's syntax tree by type, without contexts and operators.

    If the text is not Python, such as a forum answer, use its fenced Python blocks. Raises
    SyntaxError if no block parses, NoCode if the text has no code.
    """

    def __init__(self, text: str):
        self.code, self.prose, self.blocks = text, 0, 0  # prose in chars; blocks of a post
        try:
            tree = parse_python(text)
        except SyntaxError:
            self.code, self.blocks = join_blocks(text)
            self.prose, tree = len(FENCE.sub("", text)), parse_python(self.code)
        self.by, self.depth = walk(tree)
        self.functions = [*self.by[ast.FunctionDef], *self.by[ast.AsyncFunctionDef]]

    def count(self, *kinds: type) -> int:
        return sum(len(self.by[kind]) for kind in kinds if kind in self.by)

    def nodes(self) -> int:
        """Count all nodes, contexts and operators too."""
        hidden = sum(len(node.ops) for node in self.by[ast.Compare])
        return hidden + sum(
            len(nodes) * (1 + ("ctx" in kind._fields) + ("op" in kind._fields))
            for kind, nodes in self.by.items()
        )


def walk(tree: ast.AST) -> tuple[dict[type, list], int]:
    """Return nodes by type, in ast.walk order, and the tree depth; see Syntax.

    Looks fields up in a table: ast.walk alone takes twice as long.
    """
    by, level, depth = defaultdict(list), [tree], 0
    while level:
        depth, last, level = depth + 1, level, []
        for node in last:
            kind = node.__class__
            by[kind].append(node)
            if get := CHILDREN.get(kind):
                found = get(node)
                for value in found if found.__class__ is tuple else (found,):
                    if value.__class__ is list:
                        level += value
                    elif value is not None:
                        level.append(value)
    by.pop(type(None), None)  # None in lists, such as the keys of {**a}
    return by, depth + any(hasattr(node, "ctx") for node in last)


def join_blocks(text: str) -> tuple[str, int]:
    """Join the fenced Python blocks; return the code and block count. Raises as Syntax."""
    blocks = [textwrap.dedent(found[1]) for found in FENCE.finditer(text)
              if re.match(r"\s*```\W*(py|$)", found[0], re.IGNORECASE | re.MULTILINE)]  # fmt: skip
    good = []
    for block in blocks:
        if block.startswith(">>>"):  # a session: keep the input
            typed = (line for line in block.split("\n") if line.startswith((">>>", "...")))
            block = "".join(f"{line[4:]}\n" for line in typed)
        with contextlib.suppress(SyntaxError):
            parse_python(block)
            good.append(block)
    if not good:
        raise SyntaxError if blocks or CODE_LINE.search(FENCE.sub("", text)) else NoCode
    return "\n".join(good), len(good)


def measures(text: str, syntax: Syntax | None = None) -> Iterator[tuple[str, float]]:
    """Yield the filter's rules as (option, measured value), cheap ones first. Raises as Syntax.

    To add a rule, add a `yield` here and a field to Config in data/filter.py. Lazy: a document
    rejected by an early rule is never parsed.

    In a post, prose around the blocks counts as documentation, and line length is measured in the
    blocks. Without functions, if the blocks compute, each block counts as one. Each block gets one
    import and EXAMPLE constants for free, as these are a large share of its few statements.
    """
    chars = max(len(text), 1)
    yield "min_chars", len(text)
    yield "max_chars", len(text)
    if "```" in text or not CODE_LINE.search(text):
        syntax = syntax or Syntax(text)
    lines = (syntax.code if syntax else text).split("\n")
    yield "max_line_chars", max(map(len, lines))
    yield "max_digit_frac", sum(map(text.count, "0123456789")) / chars
    yield "min_ascii_frac", 1 if text.isascii() else sum(map(str.isascii, text)) / chars
    s = syntax or Syntax(text)
    by, blocks, functions, documented = s.by, s.blocks, [], 0
    docs = s.prose + sum(map(len, COMMENT.findall(s.code)))
    for node in chain(by[ast.ClassDef], by[ast.Module], s.functions):
        doc = docstring(node)
        docs += len(doc.value) if doc else 0
        if isinstance(node, FUNCTIONS):
            documented += doc is not None
            functions.append(node.end_lineno - (doc.end_lineno if doc else node.lineno - 1))
    displays = [node.elts for kind in (ast.List, ast.Tuple, ast.Set) for node in by[kind]]
    displays += [node.values for node in by[ast.Dict]]
    data = sum(e.__class__ is ast.Constant for display in displays for e in display)
    imports = by[ast.Import] + by[ast.ImportFrom]
    names = set().union(*map(foreign_names, imports))
    calls = [root_name(node.func) for node in by[ast.Call]]
    statements, computes = max(s.count(*STATEMENTS), 1), s.count(*COMPUTES)
    yield "min_doc_frac", docs / chars
    yield "max_doc_frac", docs / chars
    yield "min_functions", len(functions) or blocks * (computes > 0)
    yield "min_documented_frac", documented / len(functions) if functions and not blocks else 1
    yield "max_import_frac", max(len(imports) - blocks, 0) / statements
    yield "max_assign_frac", s.count(ast.Assign, ast.AnnAssign) / statements
    yield "min_compute_frac", computes / statements
    yield "max_data_frac", max(data - EXAMPLE * blocks, 0) / s.nodes()
    yield "max_function_lines", max(functions, default=0)
    yield "max_foreign_names", len(names)
    yield "max_foreign_frac", sum(name in names for name in calls) / max(len(calls), 1)


def parse_python(text: str) -> ast.Module:
    """Parse `text`. Raises SyntaxError for any input that ast.parse rejects."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's code
            return ast.parse(text)
    except (RecursionError, MemoryError, ValueError) as e:  # nesting (first two), NUL or surrogates
        raise SyntaxError(str(e)) from None


def docstring(node) -> ast.Constant | None:
    """Return the docstring constant of a module, class or function."""
    first = node.body[0] if node.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        return first.value if isinstance(first.value.value, str) else None
    return None


def foreign_names(node: ast.Import | ast.ImportFrom) -> set[str]:
    """Return names an import binds from outside the standard library, relative imports too."""
    if isinstance(node, ast.ImportFrom):
        ours = not node.level and node.module.split(".")[0] in sys.stdlib_module_names
        return set() if ours else {alias.asname or alias.name for alias in node.names}
    packages = [(alias.name.split(".")[0], alias.asname) for alias in node.names]
    return {name or package for package, name in packages
            if package not in sys.stdlib_module_names}  # fmt: skip


def root_name(node: ast.expr) -> str:
    """Return the leading name of a.b.c, "" if it does not start with a name."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def strip_licence(text: str) -> str:
    """Remove leading comment blocks about licence or copyright."""
    head = LEADING_COMMENTS.match(text)[0]
    kept = COMMENT_BLOCK.sub(lambda block: "" if LICENCE.search(block[0]) else block[0], head)
    return text if kept == head else kept.lstrip("\n") + text[len(head) :]


def is_pair(prompt: str, solution: str) -> bool:
    """Return whether `prompt` is a one-statement function and `solution` adds statements to it."""
    try:
        [alone], [whole] = parse_python(prompt).body, parse_python(prompt + solution).body
    except (SyntaxError, ValueError):
        return False
    return len(alone.body) == 1 < len(whole.body)


def facts(text: str) -> dict:
    """Return a text's topics and the cyclomatic complexity of each function."""
    try:
        by = Syntax(text).by
    except SyntaxError:
        by = defaultdict(list)
    marks, complexity = {kind.__name__ for kind, nodes in by.items() if nodes}, []
    marks |= {type(node.op).__name__ for node in by[ast.BinOp] + by[ast.AugAssign]}
    marks |= {f".{node.attr}" for node in by[ast.Attribute]}
    marks |= {f"{node.func.id}()" for node in by[ast.Call] if isinstance(node.func, ast.Name)}
    names = [alias.name for node in by[ast.Import] for alias in node.names]
    names += [node.module for node in by[ast.ImportFrom] if not node.level]
    marks |= {f"import {name.split('.')[0]}" for name in names}
    for node in by[ast.FunctionDef] + by[ast.AsyncFunctionDef]:
        inside = walk(node)[0]
        branches = sum(len(inside[kind]) for kind in BRANCHES)
        joined = sum(len(n.values) - 1 for n in inside[ast.BoolOp])
        complexity.append(1 + branches + joined)
        called = [n.func for n in inside[ast.Call]]
        recursive = any(isinstance(f, ast.Name) and f.id == node.name for f in called)
        annotated = node.returns or any(a.annotation for a in node.args.args)
        marks |= {"recursion"} if recursive else set()
        marks |= {"decorator"} if node.decorator_list else set()
        marks |= {"annotation"} if annotated else set()
    return {
        "topics": [topic for topic, wanted in TOPICS.items() if wanted & marks],
        "complexity": complexity,
    }
