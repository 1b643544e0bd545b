"""Bits per byte of real code that the model was not trained on.

    python -m eval.bits --checkpoint out/run --source out/heldout --out bits.json

The loss of every token of every document, summed, over ln 2 and the bytes of their text: a number
that does not depend on the tokenizer. A document longer than the context is cut into windows that
overlap by half, so that from the second one on each token is predicted from at least half a context
of what stands before it. The end of a document is not scored, as it has no bytes.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from common import checkpoint
from common.config import UserError, parse, run
from common.files import write_json
from data.base.readers import read_documents
from model import Phi, load_model

BATCH_TOKENS = 1 << 13  # in one forward pass: its logits are 64 MB at a vocabulary of 2,048
RESAMPLES = 1000  # of documents, for an interval


@dataclass(frozen=True)
class Config:
    """Measure the bits per byte that a model gives to documents."""

    checkpoint: Path  # run or checkpoint folder
    source: tuple[Path, ...]  # documents, files or folders; may be given several times
    out: Path | None = None  # JSON file to write
    device: str = "auto"  # auto, cpu or cuda


@torch.inference_mode()
def token_nats(model: Phi, end_of_text: int, texts: list[list[int]]) -> list[np.ndarray]:
    """Return the loss of each token in nats, float32 [n], for the token ids [n] of each text."""
    T, device = model.c.seq_len, model.embed.weight.device
    nats = [np.zeros(len(ids) + 1, np.float32) for ids in texts]
    windows = [(i, at) for i, ids in enumerate(texts) for at in starts(len(ids) + 1, T)]
    windows.sort(key=lambda w: min(T, len(texts[w[0]]) + 1 - w[1]))  # alike in length: less padding
    rows = max(1, BATCH_TOKENS // T)
    for first in tqdm(range(0, len(windows), rows), "predict", unit="batch", disable=None):
        batch = windows[first : first + rows]
        inputs = [torch.tensor([end_of_text, *texts[i]][at : at + T]) for i, at in batch]
        targets = [torch.tensor([*texts[i], end_of_text][at : at + T]) for i, at in batch]
        idx = pad_sequence(inputs, True, end_of_text).to(device)  # [B, T]
        targets = pad_sequence(targets, True, end_of_text).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(idx)  # [B, T, V]
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        loss = loss.view_as(targets).cpu().numpy()
        for row, (i, at) in enumerate(batch):
            new, end = T // 2 if at else 0, len(inputs[row])  # skip what the window before scored
            nats[i][at + new : at + end] = loss[row, new:end]
    return [loss[:-1] for loss in nats]


def starts(tokens: int, context: int) -> list[int]:
    """List the starts of windows of `context` tokens, overlapping by half, that cover `tokens`."""
    step = context - context // 2
    return list(range(0, max(1, tokens - context // 2), step))


def interval(above: np.ndarray, below: np.ndarray) -> list[float]:
    """Bootstrap a 95% interval of sum(above) / sum(below) over documents [n].

    Documents of one package are not independent, so it is too narrow.
    """
    drawn = np.random.default_rng(0).integers(0, len(above), (RESAMPLES, len(above)))
    ratios = above[drawn].sum(1) / np.maximum(below[drawn].sum(1), 1)
    return [float(q) for q in np.quantile(ratios, [0.025, 0.975])]


def main() -> None:
    config = parse(Config)
    texts = [record["text"] for record in read_documents(config.source)]
    if not texts:
        raise UserError(f"--source {config.source[0]}: no document there; name a folder with some")
    model, tokenizer, folder = load_model(config.checkpoint, config.device)
    ids = [tokenizer.encode(text) for text in texts]
    nats = token_nats(model, tokenizer.end_of_text, ids)
    bits = np.array([loss.sum(dtype=np.float64) for loss in nats]) / math.log(2)
    bytes_ = np.array([len(text.encode()) for text in texts])
    result = {
        "bits_per_byte": bits.sum() / bytes_.sum(),
        "ci95": interval(bits, bytes_),
        "bytes": int(bytes_.sum()),
        "documents": len(texts),
        "tokens": sum(map(len, ids)),
        "weights": checkpoint.checksum(folder),
    }
    if config.out:
        write_json(config.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    run(main)
