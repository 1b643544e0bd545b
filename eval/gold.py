"""Measure how well a model predicts reference solutions given their prompts.

Gold bits per byte, and ranking references against wrong variants, separate models even at pass@1 0.
train.py logs the bits (--eval_problems); `python -m eval.bits` measures both.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from common.config import UserError
from common.files import read_jsonl
from model import Phi
from tokenizer import Tokenizer

LOGITS = {"cpu": 1 << 22, "cuda": 1 << 28}  # per forward pass: 16 MB fits CPU caches; 1 GB


@torch.no_grad()
def token_nats(model: Phi, end_of_text: int, texts: list[list[int]], quiet=False) -> list:
    """Return each token's loss in nats, float32 [n], for each text of token ids [n].

    Cut texts longer than the context into windows that overlap by half: every token after the first
    window is predicted from at least half a context.
    """
    T, device, training = model.c.seq_len, model.embed.weight.device, model.training
    model.eval()
    nats = [np.zeros(len(ids) + 1, np.float32) for ids in texts]
    windows = [(i, at) for i, ids in enumerate(texts) for at in starts(len(ids) + 1, T)]
    windows.sort(key=lambda w: min(T, len(texts[w[0]]) + 1 - w[1]))  # similar lengths: less padding
    cut = [*batches(windows, texts, T, LOGITS[device.type] // model.c.vocab_size)]
    for batch in tqdm(cut, "predict", disable=quiet or None):
        inputs = [torch.tensor([end_of_text, *texts[i]][at : at + T]) for i, at in batch]
        targets = [torch.tensor([*texts[i], end_of_text][at : at + T]) for i, at in batch]
        idx = pad_sequence(inputs, True, end_of_text).to(device)  # [B, T]
        targets = pad_sequence(targets, True, end_of_text).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(idx)  # [B, T, V]
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        loss = loss.view_as(targets).cpu().numpy()
        for row, (i, at) in enumerate(batch):
            new, end = T // 2 if at else 0, len(inputs[row])  # skip tokens already scored
            nats[i][at + new : at + end] = loss[row, new:end]
    model.train(training)
    return [loss[:-1] for loss in nats]


def batches(windows: list[tuple], texts: list, context: int, most: int) -> Iterator[list[tuple]]:
    """Group length-sorted windows into batches of at most `most` tokens, padding included."""
    batch = []
    for i, at in windows:
        length = min(context, len(texts[i]) + 1 - at)
        if batch and (len(batch) + 1) * length > most:
            yield batch
            batch = []
        batch.append((i, at))
    if batch:
        yield batch


def starts(tokens: int, context: int) -> list[int]:
    """Return start offsets of half-overlapping windows of `context` tokens that cover `tokens`."""
    step = context - context // 2
    return list(range(0, max(1, tokens - context // 2), step))


class Gold:
    """Problems in HumanEval's format, tokenized for scoring models."""

    def __init__(self, problems: list[dict], tokenizer: Tokenizer, shots=0, context=0):
        """Prepend `shots` other solved problems to each. Drop problems of `context` tokens or more
        (0 = keep all)."""
        solved = [f"{p['prompt']}{p['canonical_solution'].rstrip()}\n\n\n" for p in problems]
        self.end_of_text, self.tasks, self.texts = tokenizer.end_of_text, [], []
        for number, p in enumerate(problems):
            others = [solved[(number + i) % len(problems)] for i in range(1, shots + 1)]
            prompt = tokenizer.encode("".join(others) + p.get("context", "") + p["prompt"])
            answers = [p["canonical_solution"], *p.get("mutants", ())]
            answers = [answer.rstrip() + "\n" for answer in answers]
            ids = [tokenizer.encode(answer) for answer in answers]
            if not context or len(prompt) + max(map(len, ids)) < context:
                self.tasks.append((p["task_id"], len(prompt), len(answers[0].encode())))
                self.texts.append([prompt + i for i in ids])

    def measure(self, model: Phi, mutants: bool = True) -> dict[str, tuple]:
        """Return {task_id: (bits of the reference given its prompt, its bytes, the share of its
        mutants that are less likely, or None)}. Shows no progress bar without `mutants`."""
        texts = [texts if mutants else texts[:1] for texts in self.texts]
        flat = [ids for each in texts for ids in each]
        nats = iter(token_nats(model, self.end_of_text, flat, quiet=not mutants))
        found = {}
        for (task_id, start, bytes_), each in zip(self.tasks, texts):
            gold, *wrong = [float(next(nats)[start:].sum(dtype=np.float64)) for _ in each]
            # A tie, as under a uniform model, counts half.
            better = np.mean([(gold < w) + (gold == w) / 2 for w in wrong]) if wrong else None
            found[task_id] = (gold / math.log(2), bytes_, better)
        return found


def read_gold(path: Path, tokenizer: Tokenizer) -> Gold:
    """Read a file in HumanEval's format; needs no tests. Raises UserError on another format."""
    try:
        if (gold := Gold([*read_jsonl(path)], tokenizer)).tasks:
            return gold
        raise UserError(f"{path}: no problems in it; want HumanEval's format")
    except KeyError as e:
        told = "want HumanEval's format; python -m eval.mutants converts MBPP"
        raise UserError(f"{path}: a problem has no {e}: {told}") from None


def bits_per_byte(found: dict[str, tuple]) -> float:
    """Return total bits over total bytes of the references in a Gold.measure result."""
    return sum(bits for bits, _, _ in found.values()) / sum(n for _, n, _ in found.values())
