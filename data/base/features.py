"""Turn texts into vectors: syntax-tree measures, TF-IDF of words, or a model's hidden states.

The paper's classifier uses a code model's output embedding (arXiv 2306.11644, sections 2.1 and 5)
and does not say how it pools; `Features` averages over a text's tokens. torch and the model load
only on request, as that takes seconds.
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

WINDOWS = 8  # pieces of a document shown to the model: 6 kB at a context of 256 tokens
CHARS_PER_TOKEN = 3  # of code, so a piece fills the context; the rest is truncated
ENCODER_TOKENS = 256  # per piece: many encoders were not trained on longer texts
BATCH_TOKENS = 1 << 14  # per forward pass
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
    """Return the filter's measures plus more syntax-tree statistics. Raises SyntaxError."""
    s = Syntax(text)
    m = dict(measures(text, s))
    names, arguments, lines = Counter(node.id for node in s.by[ast.Name]), [], 0
    for node in s.functions:
        arguments.append([a.arg for a in (*node.args.args, *node.args.kwonlyargs)])
        doc = docstring(node)
        lines += node.end_lineno - (doc.end_lineno if doc else node.lineno)
    if not arguments and m["min_functions"]:  # count a post's blocks as functions
        arguments, lines = [[]] * s.blocks, s.code.count("\n")
    functions, used = max(len(arguments), 1), max(names.total(), 1)
    c = {name: s.count(*kinds) for name, kinds in (PER_STATEMENT | PER_FUNCTION).items()}
    c["returns"] -= sum(node.value is None for node in s.by[ast.Return])
    m |= {name: c[name] / max(s.count(*STATEMENTS), 1) for name in PER_STATEMENT}
    m |= {name: c[name] / functions for name in PER_FUNCTION}
    plain = sum(given[:1] not in (["self"], ["cls"]) for given in arguments)
    return m | {
        "arguments": sum(map(len, arguments)) / functions,
        "plain": plain / functions,  # functions, not methods
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
    """Return the values of STRUCTURE for a text; all -1 if it does not parse."""
    try:
        return [float(value) for value in measured(text).values()]
    except SyntaxError:
        return [-1.0] * len(STRUCTURE)


def pieces(text: str, chars: int) -> list[str]:
    """Cut up to WINDOWS evenly spaced pieces of `chars` characters."""
    count = min(WINDOWS, max(1, -(-len(text) // chars)))
    starts = np.linspace(0, max(len(text) - chars, 0), count).astype(int)
    return [text[start : start + chars] for start in starts]


class Features:
    """Map documents to feature rows: syntax tree, checkpoint hidden states, or encoder states.

    Encoder states capture topic but little structure, so syntax-tree features are appended.
    """

    def __init__(self, rank: int, checkpoint: Path | None = None, encoder: Path | None = None):
        """Take a run or checkpoint folder, a Hugging Face folder, or neither. Raises UserError."""
        if checkpoint and encoder:
            raise UserError("--checkpoint or --encoder, not both")
        self.path, self.kind, self.widths = checkpoint or encoder, {"features": "structure"}, []
        self.bytes = self.seconds = 0  # processed so far
        if self.path:
            self.load(rank, checkpoint, encoder)
        if not checkpoint:
            self.widths.append(len(STRUCTURE))

    def load(self, rank: int, checkpoint: Path | None, encoder: Path | None) -> None:
        import torch

        from common.checkpoint import checksum

        device = f"cuda:{rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
        if device == "cpu":  # one core per rank; fixes the summation order
            torch.set_num_threads(1)
        if encoder:
            model, tokens, self.limit = load_encoder(encoder)
            self.model, width, folder = model.to(device), model.config.hidden_size, encoder
            self.encode = lambda text: tokens.encode(text, truncation=True, max_length=self.limit)
            self.states = lambda ids, inside: self.model(ids, inside).last_hidden_state
        else:
            from model import load_model

            self.model, self.tokenizer, folder = load_model(checkpoint, device)
            self.model.head = torch.nn.Identity()  # make forward return hidden states
            self.limit, width = self.model.c.seq_len, self.model.c.width
            end = self.tokenizer.end_of_text
            self.encode = lambda text: [end, *self.tokenizer.encode(text)][: self.limit]
            self.states = lambda ids, inside: self.model(ids)  # causal, so padding has no effect
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
        """Return each text's `hidden` averaged over its pieces, float32 [texts, width]."""
        cut = [pieces(text, self.limit * CHARS_PER_TOKEN) for text in texts]
        vectors = self.hidden([piece for of_text in cut for piece in of_text])
        counts = np.array([len(of_text) for of_text in cut])
        return np.add.reduceat(vectors, np.cumsum(counts) - counts) / counts[:, None]

    def hidden(self, texts: list[str]) -> np.ndarray:
        """Return each text's mean last hidden state (after the final LayerNorm).

        float32 [texts, width], rows L2-normalised; texts are truncated to the model's context.
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
    """Load a Hugging Face folder; return model, tokenizer and tokens per piece. Raises UserError.

    Downloads nothing, unpickles nothing, and runs no code from the folder.
    """
    if not (path / "model.safetensors").is_file():
        raise UserError(f"--encoder {path}: want a Hugging Face folder with model.safetensors")
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError:
        to_do = "pip install transformers tokenizers"
        raise UserError(f"--encoder needs transformers: {to_do}") from None
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **local)
        model = AutoModel.from_pretrained(path, use_safetensors=True, **local).eval()
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"--encoder {path}: not a Hugging Face model ({e})") from None
    context = getattr(model.config, "max_position_embeddings", ENCODER_TOKENS)
    return model, tokenizer, min(ENCODER_TOKENS, context, tokenizer.model_max_length)


class Lexical:
    """TF-IDF over words, with document frequencies from the problems alone.

    It matches spelling, not meaning: "largest" and "maximum" have nothing in common. A word absent
    from all problems weighs as much as the rarest. scikit-learn would drop such words and put a
    long text that shares one word with a problem close to it.
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
        """Return L2 distances, float32 [texts, problems], from 0 to sqrt(2)."""
        cosine = np.zeros((len(texts), self.problems.shape[1]), np.float32)
        for i, text in enumerate(texts):
            known, weights, length = self._weigh(text)
            cosine[i] = weights @ self.problems[known] / length
        return np.sqrt(np.maximum(2 - 2 * cosine, 0), dtype=np.float32)

    def _weigh(self, text: str) -> tuple[list[int], np.ndarray, float]:
        """Return rows and weights of the words known from problems, and the full vector's norm."""
        tf_idf = {w: (1 + np.log(n)) * self.idf.get(w, self.rarest) for w, n in words(text).items()}
        known = [w for w in tf_idf if w in self.row]
        length = sum(x * x for x in tf_idf.values()) ** 0.5 or 1.0
        return [self.row[w] for w in known], np.array([tf_idf[w] for w in known]), length


def words(text: str) -> Counter:
    """Count lower-case words, splitting names: is_even and isEven both give "is" and "even".

    Skip Python keywords: the syntax tree covers structure better.
    """
    found = (word.lower() for word in WORD.findall(text))
    return Counter(word for word in found if not keyword.iskeyword(word))
