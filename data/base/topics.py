"""What a document is about and how hard it is, as its syntax tree tells."""

import ast

from data.base.ast_match import FENCE
from data.base.syntax import FUNCTIONS, parse_python

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


def facts(text: str) -> dict:
    """What the syntax tree of a text tells: of the text itself, or of the fenced blocks in it."""
    try:
        tree = parse_python(text)
    except SyntaxError:
        try:
            tree = parse_python("\n".join(FENCE.findall(text)))
        except SyntaxError:
            tree = None
        if tree is None or not tree.body:
            return {"topics": [], "modules": [], "complexity": [], "depth": None}
    marks, complexity, depth, stack = set(), [], 0, [(tree, 1)]
    while stack:
        node, level = stack.pop()
        depth = max(depth, level)
        stack += [(child, level + 1) for child in ast.iter_child_nodes(node)]
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
            complexity.append(
                1 + branches + sum(len(n.values) - 1 for n in inside if isinstance(n, ast.BoolOp))
            )
            called = [n.func for n in inside if isinstance(n, ast.Call)]
            if any(isinstance(f, ast.Name) and f.id == node.name for f in called):
                marks.add("recursion")
            if node.decorator_list:
                marks.add("decorator")
            if node.returns or any(a.annotation for a in node.args.args):
                marks.add("annotation")
    return {
        "topics": [topic for topic, wanted in TOPICS.items() if wanted & marks],
        "modules": sorted(mark[7:] for mark in marks if mark.startswith("import ")),
        "complexity": complexity,
        "depth": depth,
    }
