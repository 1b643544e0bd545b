"""Measure how well a model predicts code: bits per byte, which do not depend on the tokenizer.

    python -m eval.bits --checkpoint out/run --source out/heldout --out out/bits
    python -m eval.bits --checkpoint out/run --problems HumanEval.jsonl.gz --shots 3
    python -m eval.bits --checkpoint out/run --problems humaneval.jsonl       # of eval.mutants

--source measures documents: the loss of every token, summed, over ln 2 and the bytes of their text.
The end of a document is not scored, as it has no bytes.

--problems measures "gold bits per byte": those of each problem's reference solution given its
prompt, in HumanEval's format or MBPP's (docstring). Problems from eval.mutants also get
"preferred", the share of their wrong variants that are less likely than the reference. A uniform
model gets 50%; to know which tokens are common explains part of what is above (LOG.md).
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

RESAMPLES = 1000  # of documents or problems, for an interval
# A mean over seeds, or a difference: its 95% interval over problems, its value for each seed.
Cell = namedtuple("Cell", "value low high seeds verdict", defaults=[""])


@dataclass(frozen=True)
class Config:
    """Measure the bits per byte that a model gives to documents, or to solutions of problems."""

    checkpoint: Path  # run or checkpoint folder
    source: tuple[Path, ...] = ()  # documents, files or folders; may be given several times
    problems: tuple[Path, ...] = ()  # file of problems; may be given several times
    shots: int = 0  # solved problems of the file put before each; what no longer fits is left out
    out: Path | None = None  # folder to write: documents.json, and FILE.json for a FILE of problems
    device: str = "auto"  # auto, cpu or cuda

    def __post_init__(self):
        if not (self.source or self.problems):
            raise UserError("name --source, --problems, or both")
        if self.shots < 0 or (self.shots and not self.problems):
            raise UserError(f"--shots {self.shots}: want 0 or more, and a file of --problems")
        if len(set(self.names())) < len(self.names()):
            raise UserError(f"two results would be called the same: {self.names()}; rename a file")

    def names(self) -> list[str]:
        """Name the results: files of problems without their suffixes, then "documents"."""
        return [p.name.split(".")[0] for p in self.problems] + ["documents"] * bool(self.source)


def interval(above: np.ndarray, below: np.ndarray) -> list[float]:
    """Bootstrap a 95% interval of sum(above) / sum(below) over documents or problems [n].

    Documents of one package are not independent, so it is too narrow.
    """
    drawn = np.random.default_rng(0).integers(0, len(above), (RESAMPLES, len(above)))
    ratios = above[drawn].sum(1) / np.maximum(below[drawn].sum(1), 1)
    return [float(q) for q in np.quantile(ratios, [0.025, 0.975])]


def difference(before: list[dict], after: list[dict], of_bits: bool) -> Cell:
    """Return by how much `after` exceeds `before`, the {task: [bits, bytes, preferred]} of the same
    seeds. The interval is over the problems' means over seeds; the verdict heeds the seeds, too."""
    from scipy.stats import t as student_t  # here, as it takes a second

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
        raise UserError(f"--source {source[0]}: no document there; name a folder with some")
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
        raise UserError(f"--shots {shots}: {path} has {len(problems)} problems; ask for fewer")
    gold = Gold(problems, tokenizer, shots, context if shots else 0)
    found = gold.measure(model)
    if not found:
        raise UserError(f"--shots {shots}: none of {path} fits in {context} tokens; ask for fewer")
    bits, bytes_, preferred = (np.array(x, float) for x in zip(*found.values()))
    ranked = preferred[~np.isnan(preferred)]
    result = {"bits_per_byte": bits_per_byte(found), "ci95": interval(bits, bytes_)}
    if len(ranked):
        ci95 = interval(ranked, np.ones_like(ranked))
        result |= {"preferred": ranked.mean(), "preferred_ci95": ci95, "ranked": len(ranked)}
    cut = sum(len(texts[0]) >= context for texts in gold.texts)  # seen through windows, not whole
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
