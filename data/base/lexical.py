"""How far texts lie from a few problems by the words they have in common; it needs no model.

It knows spellings and no meaning: "largest" and "maximum" have nothing in common.
"""

import keyword
import re
from collections import Counter

import numpy as np

WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+")  # parts of snake_case and camelCase


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
        return l2_distances(cosine)

    def _weigh(self, count: Counter) -> tuple[list[int], np.ndarray, float]:
        """Rows and weights of the words that problems have, and the length of the whole vector."""
        tf_idf = {w: (1 + np.log(n)) * self.idf.get(w, self.rarest) for w, n in count.items()}
        known = [w for w in tf_idf if w in self.row]
        length = sum(x * x for x in tf_idf.values()) ** 0.5 or 1.0
        return [self.row[w] for w in known], np.array([tf_idf[w] for w in known]), length


def words(text: str) -> Counter:
    """The words of names and texts, in lower case: is_even and isEven are the same two.

    Python's keywords are not: they say how a text is built, which the syntax tree says better.
    """
    found = (word.lower() for word in WORD.findall(text))
    return Counter(word for word in found if not keyword.iskeyword(word))


def l2_distances(cosine: np.ndarray) -> np.ndarray:
    """Between vectors of length 1 with these cosines."""
    return np.sqrt(np.maximum(2 - 2 * cosine, 0), dtype=np.float32)
