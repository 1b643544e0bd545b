"""Texts as vectors of length 1, and how far they lie from those of a few problems.

`Hidden` pools the hidden states of a nanophi checkpoint, as the paper does with a code model
(arXiv 2306.11644, section 5; it does not say how it pools: here the mean over all tokens).
`Lexical` needs no model: TF-IDF of the words in names and texts. It knows spellings and no meaning;
"largest" and "maximum" have nothing in common for it.
"""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch

import checkpoint

BATCH_TOKENS = 1 << 14  # in one forward pass
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+")  # parts of snake_case and camelCase


class Hidden:
    """The mean of a checkpoint's last hidden states, after the final LayerNorm."""

    def __init__(self, path: Path, problems: list[str], device: str = "auto"):
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, self.tokenizer, _ = checkpoint.load_model(path, torch.device(device))
        self.model.head = torch.nn.Identity()  # so that a forward pass ends at the hidden states
        self.problems = self.vectors(problems)

    @torch.inference_mode()
    def vectors(self, texts: list[str]) -> np.ndarray:
        """float32 [texts, width], each of length 1; a text is cut to the model's context."""
        limit, end = self.model.c.seq_len, self.tokenizer.end_of_text
        ids = [[end, *self.tokenizer.encode(text)][:limit] for text in texts]
        out = np.empty((len(texts), self.model.c.width), np.float32)
        by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        while by_length:
            longest = len(ids[by_length[-1]])
            rows, by_length = _last(by_length, max(1, BATCH_TOKENS // longest))
            lengths = torch.tensor([[len(ids[i])] for i in rows])  # [B, 1]
            padded = torch.tensor([ids[i] + [end] * (longest - len(ids[i])) for i in rows])
            device = self.model.embed.weight.device
            hidden = self.model(padded.to(device)).float().cpu()  # [B, T, C]; causal: what is
            # behind a text does not reach it
            inside = (torch.arange(longest) < lengths).float()[:, :, None]
            mean = (hidden * inside).sum(1) / lengths
            out[rows] = torch.nn.functional.normalize(mean, dim=1).numpy()
        return out

    def distances(self, texts: list[str]) -> np.ndarray:
        """L2 distances float32 [texts, problems], from 0 to 2."""
        return _distances(self.vectors(texts) @ self.problems.T)


class Lexical:
    """TF-IDF of words, the document frequencies counted among the problems alone.

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
        """L2 distances float32 [texts, problems], from 0 to the square root of 2."""
        cosine = np.zeros((len(texts), self.problems.shape[1]), np.float32)
        for i, text in enumerate(texts):
            known, weights, length = self._weigh(words(text))
            cosine[i] = weights @ self.problems[known] / length
        return _distances(cosine)

    def _weigh(self, count: Counter) -> tuple[list[int], np.ndarray, float]:
        """Rows and weights of the words that problems have, and the length of the whole vector."""
        tf_idf = {w: (1 + np.log(n)) * self.idf.get(w, self.rarest) for w, n in count.items()}
        known = [w for w in tf_idf if w in self.row]
        length = sum(x * x for x in tf_idf.values()) ** 0.5 or 1.0
        return [self.row[w] for w in known], np.array([tf_idf[w] for w in known]), length


def words(text: str) -> Counter:
    """The words of names and texts, in lower case: is_even and isEven are the same two."""
    return Counter(word.lower() for word in WORD.findall(text))


def _last(items: list, count: int) -> tuple[list, list]:
    return items[-count:], items[:-count]


def _distances(cosine: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(2 - 2 * cosine, 0), dtype=np.float32)
