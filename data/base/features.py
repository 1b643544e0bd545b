"""Documents as vectors for the random forest of data/classify.py.

With a checkpoint, as in the paper (arXiv 2306.11644, section 2.1; it does not say how it pools):
the mean over up to WINDOWS pieces of a document, evenly spaced, of the mean of the last hidden
states. Without one: counts over the syntax tree.
"""

import ast
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from common import checkpoint
from data.base.embed import Hidden
from data.base.syntax import COMPUTES, FUNCTIONS, docstring, measures, parse_python, strip_licence

WINDOWS = 8  # pieces of a document that the model sees: 6 kB of it at a context of 256 tokens
CHARS_PER_TOKEN = 3  # of code: a piece fills the context (what is longer is cut to it)


def structure(text: str) -> list[float]:
    """STRUCTURE of a text's syntax tree, those of data/filter.py first; -1s where there is none."""
    try:
        known = [value for _, value in measures(text)]
        tree = parse_python(text)
    except SyntaxError:
        return [-1.0] * len(STRUCTURE)
    c, names, arguments, lines, plain = Counter(), Counter(), 0, 0, 0
    depth, stack = 0, [(tree, 1)]
    while stack:
        node, level = stack.pop()
        depth = max(depth, level)
        stack += [(child, level + 1) for child in ast.iter_child_nodes(node)]
        c["nodes"] += 1
        c["statements"] += isinstance(node, ast.stmt)
        c["classes"] += isinstance(node, ast.ClassDef)
        c["loops"] += isinstance(node, (ast.For, ast.While, ast.comprehension))
        c["branches"] += isinstance(node, (ast.If, ast.IfExp, ast.BoolOp))
        c["computes"] += isinstance(node, COMPUTES)
        c["returns"] += isinstance(node, ast.Return) and node.value is not None
        c["raises"] += isinstance(node, (ast.Raise, ast.Try))
        c["calls"] += isinstance(node, ast.Call)
        c["attributes"] += isinstance(node, ast.Attribute)
        c["asserts"] += isinstance(node, ast.Assert)
        if isinstance(node, ast.Name):
            names[node.id] += 1
        if isinstance(node, FUNCTIONS):
            c["functions"] += 1
            given = [a.arg for a in (*node.args.args, *node.args.kwonlyargs)]
            arguments += len(given)
            plain += given[:1] not in (["self"], ["cls"])
            doc = docstring(node)
            lines += node.end_lineno - (doc.end_lineno if doc else node.lineno)
    statements, functions = max(c["statements"], 1), max(c["functions"], 1)
    per_statement = ("functions", "classes", "returns", "raises", "calls", "asserts")
    used = max(names.total(), 1)
    more = [c[name] / statements for name in per_statement]
    more += [c["loops"] / functions, c["branches"] / functions, c["computes"] / functions]
    more += [arguments / functions, plain / functions, lines / functions, depth]
    more += [c["attributes"] / c["nodes"], len(names) / used, text.count(">>>")]
    more += [sum(len(name) * n for name, n in names.items()) / used]
    return [float(v) for v in (*known, *more)]


STRUCTURE = [*(option for option, _ in measures("x = 1")),
             *("functions", "classes", "returns", "raises", "calls", "asserts"),
             *("loops", "branches", "computes", "arguments", "plain", "lines", "depth"),
             *("attributes", "distinct_names", "examples", "name_chars")]  # fmt: skip


def pieces(text: str, chars: int) -> list[str]:
    """Up to WINDOWS pieces of so many characters, evenly spaced from the first to the last one."""
    count = min(WINDOWS, max(1, -(-len(text) // chars)))
    starts = np.linspace(0, max(len(text) - chars, 0), count).astype(int)
    return [text[start : start + chars] for start in starts]


class Features:
    """Documents as vectors, of the syntax tree or of a checkpoint's hidden states."""

    def __init__(self, path: Path | None, device: str, rank: int):
        self.path, self.hidden = path, None
        if path is None:
            self.kind, self.width = {"features": "structure"}, len(STRUCTURE)
            return
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda":
            device = f"cuda:{rank % torch.cuda.device_count()}"
        else:
            # A rank is one core, and sums of one thread do not depend on the machine's other cores.
            torch.set_num_threads(1)
        self.hidden = Hidden(path, [], device)
        self.width = self.hidden.model.c.width
        folder = checkpoint.find(path)
        self.kind = {"features": "hidden", "weights": checkpoint.checksum(folder)}

    def __call__(self, texts: list[str]) -> np.ndarray:
        """float32 [texts, width]."""
        texts = [strip_licence(text) for text in texts]
        if self.hidden is None:
            rows = [structure(text) for text in texts]
            return np.array(rows, np.float32).reshape(-1, self.width)
        cut = [pieces(text, self.hidden.model.c.seq_len * CHARS_PER_TOKEN) for text in texts]
        vectors = self.hidden.vectors([piece for of_text in cut for piece in of_text])
        starts = np.cumsum([0, *map(len, cut[:-1])])
        counts = np.array([len(of_text) for of_text in cut], np.float32)[:, None]
        return np.add.reduceat(vectors, starts) / counts
