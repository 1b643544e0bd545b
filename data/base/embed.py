"""Texts as vectors: the hidden states of a nanophi checkpoint, pooled.

The paper measures the distance of exercises to benchmark problems, and the quality of raw code, on
the output embedding of a code model (arXiv 2306.11644). It does not say how that is pooled; here it
is the mean over all tokens.
"""

from pathlib import Path

import numpy as np
import torch

from data.base.lexical import l2_distances
from model import load_model

BATCH_TOKENS = 1 << 14  # in one forward pass


class Hidden:
    """The mean of a checkpoint's last hidden states, after the final LayerNorm."""

    def __init__(self, path: Path, problems: list[str], device: str = "auto"):
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, self.tokenizer, _ = load_model(path, torch.device(device))
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
        return l2_distances(self.vectors(texts) @ self.problems.T)


def _last(items: list, count: int) -> tuple[list, list]:
    return items[-count:], items[:-count]
