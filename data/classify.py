"""A random forest that tells documents which teach from those which do not.

    python -m data.classify train --source out/labels --out out/forest
    python -m data.classify train --source out/raw --labels tests/data/labels.jsonl \\
        --checkpoint out/runs/raw --out out/forest
    python -m data.classify score --source out/raw --forest out/forest --out out/scored
    python -m data.filter --source out/scored --keep_frac 0.2 --out out/filtered

The paper (section 2.1) trains a random forest on the output embedding of a pretrained codegen model
to predict GPT-4's labels. PAPER: pooling, model size and threshold are undisclosed. Ours: the mean
of a checkpoint's hidden states or, without --checkpoint, the syntax tree; see base/features.py.

`train` learns the labels' scores, which ranks better than learning whether they reach --good
(LOG.md); its AUC, its precision and the calibration (Platt 1999) from a vote to a probability are
about reaching it. All of these come from cross-validation in which no package is on both sides:
files of one resemble each other. What an AUC means depends on the labels: where the rules of
data/annotate.py made them it shows that the plumbing works, and nothing about quality.

`score` adds `quality`, the calibrated probability from 0 to 1, to each document, and data/filter.py
cuts by it. Scoring costs a pass of the model, a threshold nothing: so they are two commands.
Read samples.html in the output before you trust a threshold.
"""

import hashlib
import html
import json
import sys
from bisect import insort
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np

from common.config import UserError, parse, run
from common.files import write_json, write_jsonl
from data.annotate import GOOD, auc, by_rules, read_labels
from data.base import forest as trees
from data.base.documents import batched, source_shards
from data.base.features import Features
from data.base.ranks import Ranks, say
from data.base.stage import Part, Stage, total
from data.base.syntax import strip_licence
from data.filter import share_cut

BATCH = 64  # documents whose features are made at once
TREES_PER_ITEM = 20
SCALE = 10  # the largest score of a label: votes are from 0 to 1
RESAMPLES = 500  # of the bootstrap behind the interval of the AUC
SAMPLES, SAMPLE_CHARS = 20, 3000  # kept and rejected documents for a person to read


@dataclass(frozen=True)
class TrainConfig:
    """Train the forest on labelled documents, calibrate it and tell how good it is."""

    source: tuple[Path, ...]  # documents, files or folders; may be given several times
    out: Path  # folder to write
    labels: Path | None = None  # file of {"sha256", "score"}; without it the documents' own `score`
    # as data.annotate writes it
    checkpoint: Path | None = None  # run whose hidden states are the features, as in the paper;
    # without it the syntax tree's
    good: float = GOOD  # a label from here on is good
    trees: int = 200  # trees of the forest
    folds: int = 5  # of the cross-validation
    keep_frac: float = 0.2  # share at which the precision is reported; the paper kept 6 of 35
    # billion tokens
    seed: int = 0  # of the trees and the folds
    device: str = "auto"  # of the model: auto, cpu or cuda


@dataclass(frozen=True)
class ScoreConfig:
    """Add to each document `quality`, the probability that it is good."""

    source: tuple[Path, ...]  # documents, files or folders; may be given several times
    forest: Path  # folder that `train` wrote
    out: Path  # folder to write
    checkpoint: Path | None = None  # where the forest's model is now, if it was moved
    keep_frac: float = 0.2  # share that samples.html shows as kept
    device: str = "auto"  # of the model: auto, cpu or cuda


COMMANDS = {"train": TrainConfig, "score": ScoreConfig}


# ---- Train


def train(config: TrainConfig) -> dict:
    """Write `config.out` and return its summary. Raises UserError if the labels are too few."""
    if config.trees < 1 or config.folds < 2 or not 0 < config.keep_frac < 1:
        raise UserError("want --trees of 1 or more, --folds of 2 or more, 0 < --keep_frac < 1")
    labels = read_labels(config.labels) if config.labels else None
    reads = [p for p in (config.labels, config.checkpoint) if p]
    with Stage(config, source_shards(*config.source), reads) as stage:
        features = Features(config.checkpoint, config.device, stage.ranks.rank)
        found = stage.map("features", stage.shards, lambda part: labelled(part, features, labels))
        x, rows = gathered(stage, found)
        score = np.array([row["score"] for row in rows], float)
        y = (score >= config.good).astype(float)
        fold = folds([row["origin"] for row in rows], config.folds)
        if min(y.sum(), len(y) - y.sum()) < config.folds or fold.max(initial=0) < config.folds - 1:
            raise UserError(
                f"--source: {len(y)} labelled documents, {int(y.sum())} of them good, of "
                f"{len({group(row['origin']) for row in rows})} packages: too few for "
                f"{config.folds} folds"
            )
        forests = forests_without(stage, config, x, score / SCALE, fold)
        vote, calibrated = np.empty(len(y)), np.empty(len(y))
        for side in range(config.folds):
            vote[fold == side] = trees.predict(forests[side], x[fold == side])
        for side in range(config.folds):  # each fold by the calibration on the others
            here = fold == side
            calibrated[here] = sigmoid(vote[here], *platt(vote[~here], y[~here]))
        report = evaluate(config, rows, vote, calibrated, y)
        if stage.ranks.rank == 0:
            about = {**features.kind, "checkpoint": str(config.checkpoint or ""),
                     "good": config.good, "calibration": platt(vote, y)}  # fmt: skip
            trees.save(stage.result / "forest.npz", forests[-1])
            write_json(stage.result / "forest.json", about)
            keys = ("sha256", "origin", "score")
            lines = ({**{k: row[k] for k in keys}, "quality": round(float(p), 4)}
                     for row, p in zip(rows, calibrated))  # fmt: skip
            write_jsonl(stage.result / "heldout.jsonl", lines, ensure_ascii=True)
        return stage.finish({**features.kind, **report})


def gathered(stage: Stage, found: list[dict]) -> tuple[np.ndarray, list[dict]]:
    """Return the features float32 [n, width] and the rows of all shards, each document once."""
    x = np.concatenate([np.load(f) for f in sorted(stage.scratch.glob("shard-*.npy"))])
    rows = [row for result in found for row in result["rows"]]
    # A document that is in two shards would be on both sides of the cross-validation.
    first = sorted({row["sha256"]: i for i, row in reversed([*enumerate(rows)])}.values())
    return x[first], [rows[i] for i in first]


def forests_without(
    stage: Stage, config: TrainConfig, x: np.ndarray, target: np.ndarray, fold: np.ndarray
) -> list[trees.Forest]:
    """Grow for each fold the forest of the documents not in it, and the forest of all."""
    sides = range(config.folds + 1)
    edges = [trees.cuts(x[fold != side]) for side in sides]
    codes = [trees.binned(x, e) for e in edges]

    def grow(part: Part) -> None:
        side, first = part.item
        here = fold != side
        seeds = [[config.seed, side, t] for t in range(first, config.trees)][:TREES_PER_ITEM]
        made = [
            trees.grow(codes[side][here], edges[side], target[here], np.random.default_rng(seed))
            for seed in seeds
        ]
        trees.save(part.scratch / f"{side:03d}-{first:06d}.npz", trees.join(made))

    items = [[side, first] for side in sides for first in range(0, config.trees, TREES_PER_ITEM)]
    stage.map("grow", items, grow)
    width = x.shape[1]
    return [
        trees.join([trees.load(f, width) for f in sorted(stage.scratch.glob(f"{side:03d}-*.npz"))])
        for side in sides
    ]


def labelled(part: Part, features: Features, labels: dict[str, float] | None) -> dict:
    """Leave the features of a shard's labelled documents; what else training needs of them."""
    rows, made = [], [np.zeros((0, features.width), np.float32)]
    for batch in batched(with_label(part, labels), BATCH):
        made.append(features([record["text"] for record in batch]))
        for record in batch:
            score = labels[record["sha256"]] if labels else record["score"]
            row = {"sha256": record["sha256"], "origin": record["origin"], "score": score}
            row["rules"] = by_rules(record["text"])["score"]
            row["labeller"] = "file" if labels else record["labeller"]
            rows.append(row)
    np.save(part.scratch / f"{part.name}.npy", np.concatenate(made))
    return {"rows": rows}


def with_label(part: Part, labels: dict[str, float] | None) -> Iterator[dict]:
    """Yield the documents of a shard that have a label."""
    for record in part.documents():
        if record["sha256"] in labels if labels else is_label(record):
            yield record


def is_label(record: dict) -> bool:
    score, labeller = record.get("score"), record.get("labeller")
    return type(score) in (int, float) and abs(score) < 1e9 and isinstance(labeller, str)


def group(origin: str) -> str:
    """Return what files come from, as far as an origin tells: "site-packages:torch"."""
    return origin.split("/")[0]


def folds(origins: list[str], count: int) -> np.ndarray:
    """Deal origins into folds int64 [n], groups as a whole, the large ones first."""
    sizes = Counter(map(group, origins))
    filled, of = [0] * count, {}
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], digest(item[0]))):
        of[name] = filled.index(min(filled))
        filled[of[name]] += size
    return np.array([of[group(origin)] for origin in origins], np.int64)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def platt(vote: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Fit (a, b) of the probability sigmoid(a vote + b): Newton's method, Platt's targets."""
    good = y.sum()
    target = np.where(y > 0, (good + 1) / (good + 2), 1 / (len(y) - good + 2))
    design = np.stack([vote, np.ones(len(vote))], 1)
    ab = np.zeros(2)
    for _ in range(50):
        p = sigmoid(vote, *ab)
        slope = design.T @ (p - target) + 1e-6 * ab
        curve = (design * (p * (1 - p))[:, None]).T @ design + 1e-6 * np.eye(2)
        ab = ab - np.linalg.solve(curve, slope)
    return float(max(ab[0], 1e-3)), float(ab[1])  # a forest that ranks backwards is not turned


def sigmoid(vote: np.ndarray, a: float, b: float) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(a * vote + b, -30, 30)))


def evaluate(config, rows: list[dict], vote, calibrated, y) -> dict:
    """Return what the held-out documents say of the forest, and of the rules beside it."""
    keep = max(1, round(config.keep_frac * len(y)))
    kept = np.argsort(-vote, kind="stable")[:keep]
    sources = np.array([row["origin"].partition(":")[0] for row in rows])
    within = {}
    for source in sorted(set(sources)):
        here = sources == source
        if 0 < y[here].sum() < here.sum():
            within[source] = round(auc(vote[here], y[here]), 3)
    labellers = Counter(row["labeller"] for row in rows)
    rules = np.array([row["rules"] for row in rows])
    return {
        "documents": len(y),
        "good": int(y.sum()),
        "groups": len({group(row["origin"]) for row in rows}),
        "labellers": dict(sorted(labellers.items())),
        "auc": round(auc(vote, y), 3),
        "auc_ci95": interval(rows, vote, y, config.seed),
        "auc_within": within,
        "auc_of_rules": round(auc(rules, y), 3),
        "precision_at_kept": {
            "keep_frac": config.keep_frac,
            "precision": round(float(y[kept].mean()), 3),
            "share_of_good": round(float(y.mean()), 3),
        },
        "brier": round(float(np.mean((calibrated - y) ** 2)), 4),
        "brier_of_share": round(float(y.mean() * (1 - y.mean())), 4),
    }


def interval(rows: list[dict], vote, y, seed: int) -> list[float]:
    """Return a 95% interval of the AUC: a bootstrap over groups, whose files are dependent."""
    members: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        members.setdefault(group(row["origin"]), []).append(i)
    groups, rng, found = [np.array(m) for m in members.values()], np.random.default_rng(seed), []
    for _ in range(RESAMPLES):
        drawn = np.concatenate([groups[g] for g in rng.integers(0, len(groups), len(groups))])
        found.append(auc(vote[drawn], y[drawn]))
    return [round(float(q), 3) for q in np.nanquantile(found, [0.025, 0.975])]


# ---- Score


class Classifier:
    """A stored forest with what makes its features."""

    def __init__(self, folder: Path, moved: Path | None, device: str, rank: int):
        try:
            about = json.loads((folder / "forest.json").read_text())
            self.calibration = tuple(map(float, about["calibration"]))
            path = moved or (Path(about["checkpoint"]) if about["checkpoint"] else None)
            kind = {k: about[k] for k in ("features", "weights") if k in about}
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(f"--forest {folder}: no forest of data.classify train ({e})") from None
        self.features = Features(path, device, rank)
        if self.features.kind != kind:
            raise UserError(
                f"--forest {folder} was trained on {kind}, {path or 'no checkpoint'} gives "
                f"{self.features.kind}; name the right --checkpoint"
            )
        self.forest = trees.load(folder / "forest.npz", self.features.width)

    def quality(self, texts: list[str]) -> np.ndarray:
        """Return the probability float64 [texts] that each is good."""
        vote = trees.predict(self.forest, self.features(texts)).astype(float)
        return sigmoid(vote, *self.calibration)


def score(config: ScoreConfig) -> dict:
    """Write `config.out` and return its summary. Raises UserError if there is nothing to score."""
    if not 0 < config.keep_frac < 1:
        raise UserError(f"--keep_frac {config.keep_frac:g}: want above 0 and below 1")
    rank = Ranks().rank
    classifier = Classifier(config.forest, config.checkpoint, config.device, rank)
    reads = [config.forest, *([classifier.features.path] if classifier.features.path else [])]
    with Stage(config, source_shards(*config.source), reads) as stage:
        count = total(stage.map("score", stage.shards, lambda part: score_shard(part, classifier)))
        if not count.get("documents"):
            raise UserError(f"--source {config.source[0]}: no document there")
        quality = np.concatenate([np.load(f) for f in sorted(stage.scratch.glob("shard-*.npy"))])
        cut = share_cut(quality, config.keep_frac)
        if stage.ranks.rank == 0:
            write_samples(stage, cut)
        deciles = [round(float(q), 4) for q in np.quantile(quality, np.linspace(0, 1, 11))]
        kept = {"keep_frac": config.keep_frac, "min_quality": cut}
        return stage.finish({**count, "deciles": deciles, "threshold": kept})


def score_shard(part: Part, classifier: Classifier) -> dict:
    """Write a shard with qualities; leave them and a sample."""
    scores, sample = [], []
    with part.writer() as out:
        for batch in batched(part.documents(), BATCH):
            for record, q in zip(batch, classifier.quality([r["text"] for r in batch])):
                scores.append(round(float(q), 4))
                out.write(record | {"quality": scores[-1]})
                insort(sample, [record["sha256"], scores[-1], record["origin"],
                                strip_licence(record["text"])[:SAMPLE_CHARS]])  # fmt: skip
                del sample[SAMPLES * 20 :]
    np.save(part.scratch / f"{part.name}.npy", np.array(scores))
    write_json(part.scratch / f"{part.name}.sample.json", sample)
    return {"documents": out.documents, "bytes": out.bytes}


def write_samples(stage: Stage, cut: float) -> None:
    """Write samples.html: some documents that the threshold keeps beside some it rejects."""
    samples = stage.scratch.glob("*.sample.json")
    sample = sorted(row for path in samples for row in json.loads(path.read_text()))
    sample = sample[: SAMPLES * 20]
    kept = [row for row in sample if row[1] >= cut][:SAMPLES]
    rejected = [row for row in sample if row[1] < cut][:SAMPLES]
    folder = stage.result / "samples"  # a folder of its own: the next stage reads *.jsonl beside
    folder.mkdir(exist_ok=True)
    cells = "".join(f"<tr>{_cell(a)}{_cell(b)}</tr>" for a, b in zip_longest(kept, rejected))
    (folder / "samples.html").write_text(
        "<!doctype html><meta charset=utf-8><title>Kept and rejected</title><style>"
        "body{font:15px system-ui;margin:1rem} td{vertical-align:top;width:50%}"
        "table{width:100%;table-layout:fixed} pre{font-size:12px;overflow:auto;max-height:26rem;"
        "background:#f6f8fa;padding:.6rem}</style><h1>Which of these would you teach from?</h1>"
        f"<p>A sample by chance (the smallest hashes) of both sides of a quality of {cut:g}.</p>"
        f"<table><tr><th>kept<th>rejected</tr>{cells}</table>\n",
        encoding="utf-8",
    )
    for name, rows in (("kept", kept), ("rejected", rejected)):
        lines = ({"quality": q, "origin": origin, "text": text} for _, q, origin, text in rows)
        write_jsonl(folder / f"{name}.jsonl", lines)


def _cell(row: list | None) -> str:
    if row is None:
        return "<td></td>"
    _, q, origin, text = row
    return f"<td><b>{q:.3f}</b> {html.escape(origin)}<pre>{html.escape(text)}</pre></td>"


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        raise UserError(f"say what to do: {' or '.join(COMMANDS)}, then the options or --help")
    config = parse(COMMANDS[name], sys.argv[2:])
    if name == "score":
        s = score(config)
        say(f"{config.out}: {s['documents']:,} documents; a quality from "
            f"{s['threshold']['min_quality']:g} keeps {config.keep_frac:g} of them")  # fmt: skip
        return
    s = train(config)
    at = s["precision_at_kept"]
    say(f"{config.out}: AUC {s['auc']} ({s['auc_ci95'][0]} - {s['auc_ci95'][1]}) on "
        f"{s['documents']:,} held-out labels, {s['good']:,} of them good; the rules have "
        f"{s['auc_of_rules']}; of the best {at['keep_frac']:g}, {at['precision']:.0%} are good, of "
        f"all {at['share_of_good']:.0%}")  # fmt: skip
    if s["labellers"].keys() == {"rules"}:
        say("the labels are the rules' own: this AUC shows that the plumbing works, nothing more")


if __name__ == "__main__":
    run(main)
