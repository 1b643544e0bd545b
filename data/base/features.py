"""Texts as vectors: by their syntax tree, by the words they use, by a model's hidden states.

The paper's classifier takes the output embedding of a code model (arXiv 2306.11644, sections 2.1
and 5) and does not say how it pools: `Features` takes the mean over a text's tokens. torch and the
model are imported where one is named: they take seconds to load.
"""

import ast
import keyword
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np

from common.config import UserError
from data.base.syntax import (
    COMPUTES,
    FUNCTIONS,
    STATEMENTS,
    Syntax,
    docstring,
    measures,
    strip_licence,
)

WINDOWS = 8  # pieces of a document that the model sees: 6 kB of it at a context of 256 tokens
CHARS_PER_TOKEN = 3  # of code: a piece fills the context (what is longer is cut to it)
ENCODER_TOKENS = 256  # of a piece: many encoders saw no longer texts
BATCH_TOKENS = 1 << 14  # in one forward pass
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+")  # parts of snake_case and camelCase
PER_STATEMENT = {
    "functions": FUNCTIONS,
    "classes": (ast.ClassDef,),
    "returns": (ast.Return,),
    "raises": (ast.Raise, ast.Try),
    "calls": (ast.Call,),
    "asserts": (ast.Assert,),
}
PER_FUNCTION = {
    "loops": (ast.For, ast.While, ast.comprehension),
    "branches": (ast.If, ast.IfExp, ast.BoolOp),
    "computes": COMPUTES,
}


def measured(text: str) -> dict[str, float]:
    """Return the filter's measures of a text and more of its syntax tree. Raises SyntaxError."""
    s = Syntax(text)
    m = dict(measures(text, s))
    names, arguments, lines = Counter(node.id for node in s.by[ast.Name]), [], 0
    for node in s.functions:
        arguments.append([a.arg for a in (*node.args.args, *node.args.kwonlyargs)])
        doc = docstring(node)
        lines += node.end_lineno - (doc.end_lineno if doc else node.lineno)
    if not arguments and m["min_functions"]:  # blocks of a post, as functions of no arguments
        arguments, lines = [[]] * s.blocks, s.code.count("\n")
    functions, used = max(len(arguments), 1), max(names.total(), 1)
    c = {name: s.count(*kinds) for name, kinds in (PER_STATEMENT | PER_FUNCTION).items()}
    c["returns"] -= sum(node.value is None for node in s.by[ast.Return])
    m |= {name: c[name] / max(s.count(*STATEMENTS), 1) for name in PER_STATEMENT}
    m |= {name: c[name] / functions for name in PER_FUNCTION}
    plain = sum(given[:1] not in (["self"], ["cls"]) for given in arguments)
    return m | {
        "arguments": sum(map(len, arguments)) / functions,
        "plain": plain / functions,  # functions that are no methods
        "lines": lines / functions,
        "depth": s.depth,
        "attributes": s.count(ast.Attribute) / s.nodes(),
        "distinct_names": len(names) / used,
        "examples": text.count(">>>"),
        "name_chars": sum(len(name) * n for name, n in names.items()) / used,
        "most_arguments": max(map(len, arguments), default=9),
    }


STRUCTURE = list(measured("x = 1"))


def structure(text: str) -> list[float]:
    """Return the values of STRUCTURE for a text, -1s where it does not parse."""
    try:
        return [float(value) for value in measured(text).values()]
    except SyntaxError:
        return [-1.0] * len(STRUCTURE)


def pieces(text: str, chars: int) -> list[str]:
    """Cut up to WINDOWS pieces of `chars` characters, evenly spaced over the text."""
    count = min(WINDOWS, max(1, -(-len(text) // chars)))
    starts = np.linspace(0, max(len(text) - chars, 0), count).astype(int)
    return [text[start : start + chars] for start in starts]


class Features:
    """Map documents to rows: the syntax tree's, a checkpoint's hidden states, or an encoder's.

    An encoder knows what a text is about and little of how it is built, so the tree's come along.
    """

    def __init__(self, rank: int, checkpoint: Path | None = None, encoder: Path | None = None):
        """Take a run or checkpoint folder, a Hugging Face model's, or neither. Raises UserError."""
        if checkpoint and encoder:
            raise UserError("--checkpoint or --encoder, not both")
        self.path, self.kind, self.widths = checkpoint or encoder, {"features": "structure"}, []
        self.bytes = self.seconds = 0  # of the texts, and what they took
        if self.path:
            self.load(rank, checkpoint, encoder)
        if not checkpoint:
            self.widths.append(len(STRUCTURE))

    def load(self, rank: int, checkpoint: Path | None, encoder: Path | None) -> None:
        import torch

        from common.checkpoint import checksum

        device = f"cuda:{rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
        if device == "cpu":  # a rank is one core, and one thread's sums depend on no other core
            torch.set_num_threads(1)
        if encoder:
            model, tokens, self.limit = load_encoder(encoder)
            self.model, width, folder = model.to(device), model.config.hidden_size, encoder
            self.encode = lambda text: tokens.encode(text, truncation=True, max_length=self.limit)
            self.states = lambda ids, inside: self.model(ids, inside).last_hidden_state
        else:
            from model import load_model

            self.model, self.tokenizer, folder = load_model(checkpoint, device)
            self.model.head = torch.nn.Identity()  # so that a forward pass ends at hidden states
            self.limit, width = self.model.c.seq_len, self.model.c.width
            end = self.tokenizer.end_of_text
            self.encode = lambda text: [end, *self.tokenizer.encode(text)][: self.limit]
            self.states = lambda ids, inside: self.model(ids)  # causal: no padding reaches a token
        self.kind = {"features": "encoder" if encoder else "hidden", "weights": checksum(folder)}
        self.widths, self.device = [width], device

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Return float32 [texts, sum of widths]."""
        start = time.perf_counter()
        texts = [strip_licence(text) for text in texts]
        rows = [self.pooled(texts)] if self.path else []
        if self.kind["features"] != "hidden":
            rows.append(np.array([structure(text) for text in texts], np.float32))
        self.bytes += sum(len(text.encode()) for text in texts)
        self.seconds += time.perf_counter() - start
        return np.concatenate(rows, axis=1)

    def pooled(self, texts: list[str]) -> np.ndarray:
        """Return the mean of the hidden states of each text's pieces, float32 [texts, width]."""
        cut = [pieces(text, self.limit * CHARS_PER_TOKEN) for text in texts]
        vectors = self.hidden([piece for of_text in cut for piece in of_text])
        counts = np.array([len(of_text) for of_text in cut])
        return np.add.reduceat(vectors, np.cumsum(counts) - counts) / counts[:, None]

    def hidden(self, texts: list[str]) -> np.ndarray:
        """Return the mean of the last hidden states, after the final LayerNorm, of each text.

        float32 [texts, width], rows of length 1; a text is cut to the model's context.
        """
        import torch

        ids = [self.encode(text) or [0] for text in texts]
        out = np.empty((len(texts), self.widths[0]), np.float32)
        by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        while by_length:
            longest = len(ids[by_length[-1]])
            count = max(1, BATCH_TOKENS // longest)
            rows, by_length = by_length[-count:], by_length[:-count]
            lengths = torch.tensor([[len(ids[i])] for i in rows])  # [B, 1]
            padded = torch.tensor([ids[i] + [0] * (longest - len(ids[i])) for i in rows])
            inside = (torch.arange(longest) < lengths).float()
            with torch.inference_mode():
                hidden = self.states(padded.to(self.device), inside.to(self.device))  # [B, T, C]
            mean = (hidden.float().cpu() * inside[:, :, None]).sum(1) / lengths
            out[rows] = torch.nn.functional.normalize(mean, dim=1).numpy()
        return out


def load_encoder(path: Path) -> tuple:
    """Return model, tokenizer and tokens of a piece of a Hugging Face folder.

    Nothing is fetched, nothing unpickled, and no code of the folder runs. Raises UserError.
    """
    if not (path / "model.safetensors").is_file():
        raise UserError(f"--encoder {path}: want a Hugging Face folder with model.safetensors")
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError:
        raise UserError("--encoder needs transformers; pip install 'nanophi[hf]'") from None
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **local)
        model = AutoModel.from_pretrained(path, use_safetensors=True, **local).eval()
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"--encoder {path}: no Hugging Face model ({e})") from None
    context = getattr(model.config, "max_position_embeddings", ENCODER_TOKENS)
    return model, tokenizer, min(ENCODER_TOKENS, context, tokenizer.model_max_length)


class Lexical:
    """TF-IDF of words, the document frequencies counted among the problems alone.

    It knows spellings and no meaning: "largest" and "maximum" have nothing in common. A word that
    no problem has weighs as much as the rarest; scikit-learn would leave it out, and a long text
    that shares one word with a problem would be close to it.
    """

    def __init__(self, problems: list[str]):
        frequency = Counter(word for text in problems for word in words(text))
        self.idf = {w: np.log((1 + len(problems)) / (1 + n)) + 1 for w, n in frequency.items()}
        self.rarest = np.log(1 + len(problems)) + 1
        self.row = {word: i for i, word in enumerate(self.idf)}
        self.problems = np.zeros((len(self.row), len(problems)), np.float32)
        for column, text in enumerate(problems):
            known, weights, length = self._weigh(text)
            self.problems[known, column] = weights / length

    def distances(self, texts: list[str]) -> np.ndarray:
        """Return L2 distances float32 [texts, problems], from 0 to the square root of 2."""
        cosine = np.zeros((len(texts), self.problems.shape[1]), np.float32)
        for i, text in enumerate(texts):
            known, weights, length = self._weigh(text)
            cosine[i] = weights @ self.problems[known] / length
        return np.sqrt(np.maximum(2 - 2 * cosine, 0), dtype=np.float32)

    def _weigh(self, text: str) -> tuple[list[int], np.ndarray, float]:
        """Return rows and weights of the words that problems have, and the vector's length."""
        tf_idf = {w: (1 + np.log(n)) * self.idf.get(w, self.rarest) for w, n in words(text).items()}
        known = [w for w in tf_idf if w in self.row]
        length = sum(x * x for x in tf_idf.values()) ** 0.5 or 1.0
        return [self.row[w] for w in known], np.array([tf_idf[w] for w in known]), length


def words(text: str) -> Counter:
    """Count the words of names and texts, in lower case: is_even and isEven are the same two.

    Python's keywords are left out: the syntax tree says better how a text is built.
    """
    found = (word.lower() for word in WORD.findall(text))
    return Counter(word for word in found if not keyword.iskeyword(word))
