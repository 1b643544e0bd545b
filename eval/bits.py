"""Measure how well a model predicts code, in bits per byte, which is tokenizer-independent.

    python -m eval.bits --checkpoint out/run --source out/heldout --out out/bits
    python -m eval.bits --checkpoint out/run --problems HumanEval.jsonl.gz --shots 3
    python -m eval.bits --checkpoint out/run --problems humaneval.jsonl       # from eval.mutants

--source measures documents: the summed token losses over ln 2 and the bytes of text. The
end-of-text token has no bytes and is not scored.

--problems measures "gold bits per byte": bits of each reference solution given its prompt, for
problems in HumanEval's format or MBPP's (docstring). Problems from eval.mutants also get
"preferred", the share of wrong variants that are less likely than the reference. A uniform model
gets 50%; knowing which tokens are common explains part of the rest (LOG.md).
"""

import json
import math
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import checkpoint
from common.config import UserError, parse, run
from common.files import write_json
from data.base.readers import read_documents
from eval.gold import Gold, bits_per_byte, token_nats
from eval.mutants import read
from model import Phi, load_model
from tokenizer import Tokenizer

RESAMPLES = 1000  # bootstrap samples per interval
# A mean over seeds or a difference, its 95% interval over problems, and its value per seed.
Cell = namedtuple("Cell", "value low high seeds verdict", defaults=[""])


@dataclass(frozen=True)
class Config:
    """Measure a model's bits per byte on documents, or on reference solutions of problems."""

    checkpoint: Path  # run or checkpoint folder
    source: tuple[Path, ...] = ()  # documents: file or folder; repeatable
    problems: tuple[Path, ...] = ()  # file of problems; repeatable
    shots: int = 0  # solved problems before each prompt; skips problems that no longer fit
    out: Path | None = None  # folder for documents.json and one FILE.json per problems file
    device: str = "auto"  # auto, cpu or cuda

    def __post_init__(self):
        if not (self.source or self.problems):
            raise UserError("got nothing to measure: give --source, --problems, or both")
        if self.shots < 0 or (self.shots and not self.problems):
            raise UserError(f"--shots {self.shots}: want 0 or more, together with --problems")
        if len(set(self.names())) < len(self.names()):
            raise UserError(f"two results would share a name: {self.names()}; rename a file")

    def names(self) -> list[str]:
        """Return the result names: problems files without suffixes, then "documents"."""
        return [p.name.split(".")[0] for p in self.problems] + ["documents"] * bool(self.source)


def interval(above: np.ndarray, below: np.ndarray) -> list[float]:
    """Bootstrap the 95% interval of sum(above) / sum(below), each [n], over documents or problems.

    It is too narrow for documents of one package, which are not independent.
    """
    drawn = np.random.default_rng(0).integers(0, len(above), (RESAMPLES, len(above)))
    ratios = above[drawn].sum(1) / np.maximum(below[drawn].sum(1), 1)
    return [float(q) for q in np.quantile(ratios, [0.025, 0.975])]


def difference(before: list[dict], after: list[dict], of_bits: bool) -> Cell:
    """Return `after` minus `before`; each lists {task: [bits, bytes, preferred]}, one per seed.
    The interval is over problems' seed means. The verdict also heeds an interval over seeds."""
    from scipy.stats import t as student_t  # slow import: 1 s

    tasks = [t for t in after[0] if all(t in told for told in before + after)
             and (of_bits or after[0][t][2] is not None)]
    told = [[[x[t] for t in tasks] for x in side] for side in (before, after)]
    told = np.array(told, float)  # [2, S, n, 3]
    of = told[0, 0, :, 1] if of_bits else np.ones(len(tasks))
    above = (told[1] - told[0])[..., 0] if of_bits else 100 * (told[1] - told[0])[..., 2]  # [S, n]
    seeds, ends = (above.sum(1) / of.sum()).tolist(), interval(above.mean(0), of)
    verdicts = {-1: ["worse", "better"][of_bits], 1: ["better", "worse"][of_bits]}
    n = len(seeds)
    spread = student_t.ppf(0.975, n - 1) * np.std(seeds, ddof=1) / n**0.5 if n > 1 else np.inf
    value = float(np.mean(seeds))
    verdict = verdicts.get(np.sign([*ends, value - spread, value + spread]).mean(), "not resolved")
    return Cell(value, *ends, seeds, verdict)


def measure_documents(source: tuple[Path, ...], model: Phi, tokenizer: Tokenizer) -> dict:
    texts = [record["text"] for record in read_documents(source)]
    if not texts:
        raise UserError(f"--source {source[0]}: no documents found; name a folder that has some")
    ids = [tokenizer.encode(text) for text in texts]
    nats = token_nats(model, tokenizer.end_of_text, ids)
    bits = np.array([loss.sum(dtype=np.float64) for loss in nats]) / math.log(2)
    bytes_ = np.array([len(text.encode()) for text in texts])
    return {
        "bits_per_byte": bits.sum() / bytes_.sum(),
        "ci95": interval(bits, bytes_),
        "bytes": int(bytes_.sum()),
        "documents": len(texts),
        "tokens": sum(map(len, ids)),
    }


def measure_problems(path: Path, shots: int, model: Phi, tokenizer: Tokenizer) -> dict:
    problems, context = read(path), model.c.seq_len
    if shots >= len(problems):
        raise UserError(f"--shots {shots}: {path} has {len(problems)} problems; use fewer shots")
    gold = Gold(problems, tokenizer, shots, context if shots else 0)
    found = gold.measure(model)
    if not found:
        raise UserError(f"--shots {shots}: no problem of {path} fits {context} tokens; use fewer")
    bits, bytes_, preferred = (np.array(x, float) for x in zip(*found.values()))
    ranked = preferred[~np.isnan(preferred)]
    result = {"bits_per_byte": bits_per_byte(found), "ci95": interval(bits, bytes_)}
    if len(ranked):
        ci95 = interval(ranked, np.ones_like(ranked))
        result |= {"preferred": ranked.mean(), "preferred_ci95": ci95, "ranked": len(ranked)}
    cut = sum(len(texts[0]) >= context for texts in gold.texts)  # scored in windows
    more = {"problems": len(found), "too_long": len(problems) - len(found), "cut": cut}
    return result | more | {"tasks": found}


def main() -> None:
    config = parse(Config)
    model, tokenizer, folder = load_model(config.checkpoint, config.device)
    weights = {"weights": checkpoint.checksum(folder)}
    for name, path in zip(config.names(), [*config.problems, None]):
        if path:
            result = measure_problems(path, config.shots, model, tokenizer) | weights
        else:
            result = measure_documents(config.source, model, tokenizer) | weights
        if config.out:
            config.out.mkdir(parents=True, exist_ok=True)
            write_json(config.out / f"{name}.json", result)
        print(json.dumps({"name": name} | {k: v for k, v in result.items() if k != "tasks"}))


if __name__ == "__main__":
    run(main)
