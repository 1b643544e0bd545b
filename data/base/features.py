"""Texts as vectors: by their syntax tree, by the words they use, by a checkpoint's hidden states.

Features   a row of numbers a document, for the random forest of data/classify.py
Hidden     the mean of a checkpoint's last hidden states over a text's tokens. The paper takes the
           output embedding of a code model (arXiv 2306.11644, sections 2.1 and 5) and does not say
           how it pools
Lexical    TF-IDF: how far texts lie from a few problems by the words they share; needs no model

torch and the model are imported where a checkpoint is named: they take seconds to load.
"""

import ast
import keyword
import re
from collections import Counter
from pathlib import Path

import numpy as np

from data.base.syntax import COMPUTES, FUNCTIONS, docstring, measures, parse_python, strip_licence

WINDOWS = 8  # pieces of a document that the model sees: 6 kB of it at a context of 256 tokens
CHARS_PER_TOKEN = 3  # of code: a piece fills the context (what is longer is cut to it)
BATCH_TOKENS = 1 << 14  # in one forward pass
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+")  # parts of snake_case and camelCase


def structure(text: str) -> list[float]:
    """Return STRUCTURE of a text: the filter's measures, then more; -1s where it does not parse."""
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
    """Cut up to WINDOWS pieces of `chars` characters, evenly spaced over the text."""
    count = min(WINDOWS, max(1, -(-len(text) // chars)))
    starts = np.linspace(0, max(len(text) - chars, 0), count).astype(int)
    return [text[start : start + chars] for start in starts]


class Features:
    """Documents as vectors, of the syntax tree or of a checkpoint's hidden states."""

    def __init__(self, path: Path | None, device: str, rank: int):
        """`path` is a run or checkpoint folder, None for the syntax tree's features."""
        self.path, self.hidden = path, None
        if path is None:
            self.kind, self.width = {"features": "structure"}, len(STRUCTURE)
            return
        import torch

        from common.checkpoint import checksum

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda":
            device = f"cuda:{rank % torch.cuda.device_count()}"
        else:
            # A rank is one core, and sums of one thread do not depend on the machine's other cores.
            torch.set_num_threads(1)
        self.hidden = Hidden(path, [], device)
        self.width = self.hidden.model.c.width
        self.kind = {"features": "hidden", "weights": checksum(self.hidden.folder)}

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Return float32 [texts, width]."""
        texts = [strip_licence(text) for text in texts]
        if self.hidden is None:
            rows = [structure(text) for text in texts]
            return np.array(rows, np.float32).reshape(-1, self.width)
        cut = [pieces(text, self.hidden.model.c.seq_len * CHARS_PER_TOKEN) for text in texts]
        vectors = self.hidden.vectors([piece for of_text in cut for piece in of_text])
        starts = np.cumsum([0, *map(len, cut[:-1])])
        counts = np.array([len(of_text) for of_text in cut], np.float32)[:, None]
        return np.add.reduceat(vectors, starts) / counts


class Hidden:
    """The mean of a checkpoint's last hidden states, after the final LayerNorm."""

    def __init__(self, path: Path, problems: list[str], device: str = "auto"):
        """Load the run or checkpoint folder `path`; `distances` are to `problems`."""
        import torch

        from model import load_model

        self.model, self.tokenizer, self.folder = load_model(path, device)
        self.model.head = torch.nn.Identity()  # so that a forward pass ends at the hidden states
        self.problems = self.vectors(problems)

    def vectors(self, texts: list[str]) -> np.ndarray:
        """Return float32 [texts, width], rows of length 1; a text is cut to the model's context."""
        import torch

        limit, end = self.model.c.seq_len, self.tokenizer.end_of_text
        device = self.model.embed.weight.device
        ids = [[end, *self.tokenizer.encode(text)][:limit] for text in texts]
        out = np.empty((len(texts), self.model.c.width), np.float32)
        by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        while by_length:
            longest = len(ids[by_length[-1]])
            count = max(1, BATCH_TOKENS // longest)
            rows, by_length = by_length[-count:], by_length[:-count]
            lengths = torch.tensor([[len(ids[i])] for i in rows])  # [B, 1]
            padded = torch.tensor([ids[i] + [end] * (longest - len(ids[i])) for i in rows])
            with torch.inference_mode():
                # [B, T, C]; causal: the padding behind a text does not reach it
                hidden = self.model(padded.to(device)).float().cpu()
            inside = (torch.arange(longest) < lengths).float()[:, :, None]
            mean = (hidden * inside).sum(1) / lengths
            out[rows] = torch.nn.functional.normalize(mean, dim=1).numpy()
        return out

    def distances(self, texts: list[str]) -> np.ndarray:
        """Return L2 distances float32 [texts, problems], from 0 to 2."""
        return l2_distances(self.vectors(texts) @ self.problems.T)


class Lexical:
    """TF-IDF of words, the document frequencies counted among the problems alone.

    It knows spellings and no meaning: "largest" and "maximum" have nothing in common.
    A word that no problem has gets the weight of the rarest, so that a text's vector depends on the
    text and the problems, and on nothing else in the corpus.
    """

    def __init__(self, problems: list[str]):
        counts = [words(text) for text in problems]
        frequency = Counter(word for count in counts for word in count)
        self.idf = {w: np.log((1 + len(problems)) / (1 + n)) + 1 for w, n in frequency.items()}
        self.rarest = np.log(1 + len(problems)) + 1
        self.row = {word: i for i, word in enumerate(self.idf)}
        self.problems = np.zeros((len(self.row), len(problems)), np.float32)
        for column, count in enumerate(counts):
            known, weights, length = self._weigh(count)
            self.problems[known, column] = weights / length

    def distances(self, texts: list[str]) -> np.ndarray:
        """Return L2 distances float32 [texts, problems], from 0 to the square root of 2."""
        cosine = np.zeros((len(texts), self.problems.shape[1]), np.float32)
        for i, text in enumerate(texts):
            known, weights, length = self._weigh(words(text))
            cosine[i] = weights @ self.problems[known] / length
        return l2_distances(cosine)

    def _weigh(self, count: Counter) -> tuple[list[int], np.ndarray, float]:
        """Return rows and weights of the words that problems have, and the vector's length."""
        tf_idf = {w: (1 + np.log(n)) * self.idf.get(w, self.rarest) for w, n in count.items()}
        known = [w for w in tf_idf if w in self.row]
        length = sum(x * x for x in tf_idf.values()) ** 0.5 or 1.0
        return [self.row[w] for w in known], np.array([tf_idf[w] for w in known]), length


def words(text: str) -> Counter:
    """Count the words of names and texts, in lower case: is_even and isEven are the same two.

    Python's keywords are left out: the syntax tree says better how a text is built.
    """
    found = (word.lower() for word in WORD.findall(text))
    return Counter(word for word in found if not keyword.iskeyword(word))


def l2_distances(cosine: np.ndarray) -> np.ndarray:
    """Return the L2 distances between vectors of length 1 with these cosines."""
    return np.sqrt(np.maximum(2 - 2 * cosine, 0), dtype=np.float32)
