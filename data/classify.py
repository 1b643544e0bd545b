"""A classifier that tells documents which teach from those which do not.

    python -m data.classify train --source out/labels --out out/forest
    python -m data.classify train --source out/raw --labels tests/data/labels.jsonl \\
        --encoder MODEL_FOLDER --out out/forest
    python -m data.classify score --source out/raw --forest out/forest --out out/scored
    python -m data.filter --source out/scored --keep_frac 0.2 --out out/filtered

The paper (section 2.1) trains a random forest on the output embedding of a pretrained codegen model
to predict GPT-4's labels. PAPER: pooling, model size and threshold are undisclosed. Ours: the mean
of a --checkpoint's hidden states, of a Hugging Face --encoder's with the syntax tree, or the tree
alone; see base/features.py. With an encoder the default is a ridge regression: on 241 labels its
AUC is .946, the forest's .904, with intervals that overlap (LOG.md).

`train` learns the labels' scores, which ranks better than learning whether they reach --good
(LOG.md). AUC, precision and the calibration of votes to probabilities are about reaching it, by
cross-validation with no package on both sides: files of one resemble each other. Where the rules of
data/annotate.py made the labels, an AUC shows that the plumbing works, and nothing about quality.

`score` adds `quality`, the probability from 0 to 1 that a document is good, by which data/filter.py
cuts and data/dedup.py chooses; read the filter's samples before you trust a threshold.
"""

import json
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.config import UserError, parse, run
from common.files import write_json
from data.annotate import GOOD, agreement, auc, read_labels
from data.base.documents import batched, source_shards
from data.base.features import Features
from data.base.ranks import Ranks, say
from data.base.stage import Part, Stage, total

BATCH = 64  # documents whose features are made at once
SCALE = 10  # the largest score of a label: votes are from 0 to 1
MIN_LEAF = 2  # documents in a leaf of a tree
RESAMPLES = 500  # of the bootstrap behind the interval of the AUC
KEEP_FRAC = 0.2  # share whose precision is reported; the paper kept 6 of 35 billion tokens
CALIBRATION_C = 100.0  # how little the calibration is regularised
FIELDS = {"feature": "feature", "threshold": "threshold", "left": "children_left",
          "right": "children_right", "value": "value"}  # of the file: of scikit-learn  # fmt: skip

RIDGE = {"coef", "intercept"}
LEAST_STD = 0.1  # of a feature, as a share of the median of its kind
VOTES = (-0.25, 1.25)  # between which a ridge's lie: targets are from 0 to 1
PENALTIES = np.logspace(-4, 3, 15)  # of the ridge, chosen by leaving out one document at a time

# A forest: FIELDS, all [nodes] but roots [trees]; a leaf is its own child. Or RIDGE.
Head = dict[str, np.ndarray]


@dataclass(frozen=True)
class TrainConfig:
    """Train a forest or ridge on labelled documents, calibrate it and tell how good it is."""

    source: tuple[Path, ...]  # documents, files or folders; may be given several times
    out: Path  # folder to write
    labels: Path | None = None  # file of {"sha256", "score"}; without it the documents' own `score`
    # as data.annotate writes it
    checkpoint: Path | None = None  # run whose hidden states are the features, as in the paper;
    # without it the syntax tree's
    encoder: Path | None = None  # folder of a Hugging Face model with safetensors: hidden states
    # of it and the syntax tree's features
    head: str = ""  # forest, as in the paper, or ridge; "": ridge for an encoder, else forest
    good: float = GOOD  # a label from here on is good
    trees: int = 200  # trees of the forest
    folds: int = 5  # of the cross-validation
    seed: int = 0  # of the trees


@dataclass(frozen=True)
class ScoreConfig:
    """Add to each document `quality`, the probability that it is good."""

    source: tuple[Path, ...]  # documents, files or folders; may be given several times
    forest: Path  # folder that `train` wrote
    out: Path  # folder to write
    checkpoint: Path | None = None  # where the forest's model is now, if it was moved
    encoder: Path | None = None  # likewise


COMMANDS = {"train": TrainConfig, "score": ScoreConfig}


# ---- The heads: scikit-learn fits them, plain arrays store them


def grow(x: np.ndarray, target: np.ndarray, trees: int, seed: int) -> Head:
    """Grow a forest on features x float32 [n, F]; its leaves hold the mean of targets [n]."""
    from sklearn.ensemble import RandomForestRegressor

    grower = RandomForestRegressor(
        trees, max_features="sqrt", min_samples_leaf=MIN_LEAF, random_state=seed, n_jobs=-1
    )
    grown = [tree.tree_ for tree in grower.fit(x, target).estimators_]
    sizes = [tree.node_count for tree in grown]
    roots = np.cumsum([0, *sizes[:-1]])
    forest = {name: np.concatenate([getattr(tree, of) for tree in grown])
              for name, of in FIELDS.items()} | {"roots": roots}  # fmt: skip
    leaf, here = forest["left"] < 0, np.arange(sum(sizes))
    for name in ("left", "right"):
        forest[name] = np.where(leaf, here, forest[name] + np.repeat(roots, sizes))
    return forest | {"feature": np.where(leaf, 0, forest["feature"])}


def regress(x: np.ndarray, target: np.ndarray, widths: list[int]) -> Head:
    """Fit a ridge to standardised features x float32 [n, F], each kind (`widths`) of equal weight.

    Unweighted, the few of the syntax tree would be lost among the many of an encoder.
    """
    from sklearn.linear_model import RidgeCV

    x = logs(x)
    std = x.std(0)
    # A column that hardly varies here would weigh heavily where it does elsewhere.
    blocks = np.split(std, np.cumsum(widths)[:-1])
    std = np.concatenate([np.maximum(s, LEAST_STD * np.median(s) + 1e-9) for s in blocks])
    scale = std * np.sqrt(np.repeat(widths, widths))
    fitted = RidgeCV(PENALTIES).fit((x - x.mean(0)) / scale, target)
    coef = fitted.coef_ / scale
    return {"coef": coef, "intercept": fitted.intercept_ - x.mean(0) @ coef}


def logs(x: np.ndarray) -> np.ndarray:
    """Return x float64, its large numbers (of characters, lines) brought near to the others."""
    return np.sign(x) * np.log1p(np.abs(x, dtype=float))


def predict(forest: Head, x: np.ndarray) -> np.ndarray:
    """Return votes float64 [n] for x float32 [n, F]: a forest's mean, scikit-learn's to the bit."""
    if "coef" in forest:
        vote = (logs(x) * forest["coef"]).sum(1) + forest["intercept"]
        return np.clip(vote, *VOTES)
    rows = np.arange(len(x))[:, None]
    node = np.broadcast_to(forest["roots"], (len(x), len(forest["roots"])))  # [n, trees]
    while True:
        below = x[rows, forest["feature"][node]] <= forest["threshold"][node]
        following = np.where(below, forest["left"][node], forest["right"][node])
        if (following == node).all():  # cumsum adds in the trees' order, as scikit-learn does
            return forest["value"].ravel()[node].cumsum(1)[:, -1] / node.shape[1]
        node = following


def sigmoid(vote: np.ndarray, a: float, b: float) -> np.ndarray:
    return 1 / (1 + np.exp(-(a * vote + b)))


def platt(vote: np.ndarray, good: np.ndarray) -> tuple[float, float]:
    """Fit (a, b) of the probability sigmoid(a vote + b) that a document is good."""
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(C=CALIBRATION_C).fit(vote[:, None], good)
    return max(float(fitted.coef_[0, 0]), 1e-3), float(fitted.intercept_[0])


# ---- Train


def train(config: TrainConfig) -> dict:
    """Write `config.out` and return its summary. Raises UserError if the labels are too few."""
    if config.trees < 1 or config.folds < 2:
        raise UserError("want --trees of 1 or more, --folds of 2 or more")
    if config.head not in ("", "forest", "ridge"):
        raise UserError(f"--head {config.head}: want forest or ridge")
    labels = read_labels(config.labels) if config.labels else None
    reads = [p for p in (config.labels, config.checkpoint, config.encoder) if p]
    with Stage(config, source_shards(*config.source), reads) as stage:
        found = stage.map("labels", stage.shards, lambda part: rows_of(part, labels))
        rows = [row for result in found for row in result["rows"]]
        # A document that is in two shards would be on both sides of the cross-validation.
        first = sorted({row["sha256"]: i for i, row in reversed([*enumerate(rows)])}.values())
        rows = [rows[i] for i in first]
        good = sum(row["score"] >= config.good for row in rows)
        packages = len({group(row["origin"]) for row in rows})
        if min(good, len(rows) - good, packages) < config.folds:
            raise UserError(
                f"--source: {len(rows)} labelled documents, {good} of them good, of "
                f"{packages} packages: too few for {config.folds} folds; label more or lower "
                "--folds"
            )
        features = Features(stage.ranks.rank, config.checkpoint, config.encoder)
        stage.map("features", stage.shards, lambda part: save_features(part, features, labels))
        (report,) = stage.map("fit", ["all"], lambda part: fit(config, part, rows, first, features))
        summary = stage.finish({**features.kind, **report})
    return summary | {"mb_per_s": features.bytes / 1e6 / max(features.seconds, 1e-9)}


def labelled(part: Part, labels: dict[str, float] | None) -> Iterator[dict]:
    """Yield what training needs of a shard's labelled documents."""
    for record in part.documents():
        given = {"score": labels.get(record["sha256"]), "labeller": "file"} if labels else record
        row = {name: record[name] for name in ("sha256", "origin", "text")}
        row |= {name: given.get(name) for name in ("score", "labeller")}
        if isinstance(row["score"], (int, float)) and row["labeller"] is not None:
            yield row


def rows_of(part: Part, labels: dict[str, float] | None) -> dict:
    """Return the labelled documents without their texts: cheap, before features are made."""
    return {"rows": [{k: row[k] for k in row if k != "text"} for row in labelled(part, labels)]}


def save_features(part: Part, features: Features, labels: dict[str, float] | None) -> None:
    made = [np.zeros((0, sum(features.widths)), np.float32)]
    for batch in batched(labelled(part, labels), BATCH):
        made.append(features([row["text"] for row in batch]))
    np.save(part.scratch / f"{part.name}.npy", np.concatenate(made))


def fit(config: TrainConfig, part: Part, rows: list[dict], first: list[int],
        features: Features) -> dict:  # fmt: skip
    """Fit and calibrate the head on features `first`, write it, report its cross-validation."""
    from sklearn.model_selection import StratifiedGroupKFold

    x = np.concatenate([np.load(f) for f in sorted(part.stage.scratch.glob("shard-*.npy"))])[first]
    score = np.array([row["score"] for row in rows], float)
    target, good = score / SCALE, score >= config.good
    groups = np.array([group(row["origin"]) for row in rows])
    ridge = config.head == "ridge" or (not config.head and config.encoder is not None)

    def fitted(of) -> Head:
        if ridge:
            return regress(x[of], target[of], features.widths)
        return grow(x[of], target[of], config.trees, config.seed)

    vote, quality = np.empty(len(rows)), np.empty(len(rows))
    folds = list(StratifiedGroupKFold(config.folds).split(x, good, groups))
    for others, held in tqdm(folds, "folds", disable=None):
        vote[held] = predict(fitted(others), x[held])
    for others, held in folds:
        quality[held] = sigmoid(vote[held], *platt(vote[others], good[others]))
    about = {**features.kind, "checkpoint": str(config.checkpoint or ""), "good": config.good,
             "encoder": str(config.encoder or ""), "calibration": platt(vote, good)}  # fmt: skip
    np.savez(part.result / "forest.npz", **fitted(slice(None)))
    write_json(part.result / "forest.json", about)
    kept = np.argsort(-vote, kind="stable")[: max(1, round(KEEP_FRAC * len(rows)))]
    return {
        "head": "ridge" if ridge else "forest",
        "documents": len(rows),
        "good": int(good.sum()),
        "groups": len(set(groups)),
        "labellers": dict(sorted(Counter(row["labeller"] for row in rows).items())),
        "auc": round(auc(vote, good), 3),
        "auc_ci95": interval(groups, vote, good),
        "precision_at_kept": round(float(good[kept].mean()), 3),
        "f1_at_kept": round(2 * float(good[kept].sum() / (len(kept) + good.sum())), 3),
        "spearman": agreement(np.stack([vote, score], axis=1))["spearman"],
        "share_of_good": round(float(good.mean()), 3),
        "brier": round(float(np.mean((quality - good) ** 2)), 4),
    }


def group(origin: str) -> str:
    """Return the package of a file, as far as its origin tells: "site-packages:torch"."""
    return origin.split("/")[0]


def interval(groups: np.ndarray, vote: np.ndarray, good: np.ndarray) -> list[float]:
    """Return a 95% interval of the AUC: a bootstrap over groups, whose files are dependent."""
    members = [np.flatnonzero(groups == name) for name in sorted(set(groups))]
    rng, found = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        drawn = np.concatenate([members[g] for g in rng.integers(0, len(members), len(members))])
        found.append(auc(vote[drawn], good[drawn]))
    return [round(float(q), 3) for q in np.nanquantile(found, [0.025, 0.975])]


# ---- Score


class Classifier:
    """A stored forest with what makes its features."""

    def __init__(self, folder: Path, rank: int, **moved: Path | None):
        """Take where the checkpoint or encoder is now, if not where it was."""
        try:
            about = json.loads((folder / "forest.json").read_text())
            self.calibration = tuple(map(float, about["calibration"]))
            names = ("checkpoint", "encoder")
            paths = moved if any(moved.values()) else {k: Path(about[k]) for k in names if about[k]}
            with np.load(folder / "forest.npz", allow_pickle=False) as arrays:
                self.forest = {name: arrays[name] for name in arrays}
            if self.forest.keys() not in (RIDGE, {*FIELDS, "roots"}):
                raise ValueError("other arrays")
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as e:
            raise UserError(f"--forest {folder}: no forest of data.classify train ({e})") from None
        kind = {k: about[k] for k in ("features", "weights") if k in about}
        self.features = Features(rank, **paths)
        if self.features.kind != kind:
            raise UserError(
                f"--forest {folder} was trained on {kind}, {self.features.path or 'no model'} "
                f"gives {self.features.kind}; name the right --checkpoint or --encoder"
            )

    def quality(self, texts: list[str]) -> np.ndarray:
        """Return the probability float64 [texts] that each is good."""
        return sigmoid(predict(self.forest, self.features(texts)), *self.calibration)


def score(config: ScoreConfig) -> dict:
    """Write `config.out` and return its summary. Raises UserError if there is nothing to score."""
    where = {"checkpoint": config.checkpoint, "encoder": config.encoder}
    classifier = Classifier(config.forest, Ranks().rank, **where)
    reads = [config.forest, *([classifier.features.path] if classifier.features.path else [])]
    with Stage(config, source_shards(*config.source), reads) as stage:
        count = total(stage.map("score", stage.shards, lambda part: score_shard(part, classifier)))
        if not count.get("documents"):
            raise UserError(f"--source {config.source[0]}: no document there")
        return stage.finish(count)


def score_shard(part: Part, classifier: Classifier) -> dict:
    """Write a shard with qualities; count them by tenths."""
    tenths = Counter()
    with part.writer() as out:
        for batch in batched(part.documents(), BATCH):
            for record, q in zip(batch, classifier.quality([r["text"] for r in batch])):
                quality = round(float(q), 6)
                out.write(record | {"quality": quality})
                tenths[str(int(10 * quality) / 10)] += 1
    return {"documents": out.documents, "bytes": out.bytes, "from_quality": tenths}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        raise UserError(f"say what to do: {' or '.join(COMMANDS)}, then the options or --help")
    config = parse(COMMANDS[name], sys.argv[2:])
    if name == "score":
        s = score(config)
        for quality in sorted(s["from_quality"]):
            say(f"{s['from_quality'][quality]:9,} of quality {quality}")
        return say(f"{config.out}: {s['documents']:,} documents")
    s = train(config)
    say(f"{config.out}: AUC {s['auc']} ({s['auc_ci95'][0]} - {s['auc_ci95'][1]}) on "
        f"{s['documents']:,} held-out labels, {s['good']:,} of them good; of the best "
        f"{KEEP_FRAC:.0%}, {s['precision_at_kept']:.0%} are good, of all {s['share_of_good']:.0%}, "
        f"F1 {s['f1_at_kept']}, Spearman {s['spearman']}; {s['mb_per_s']:.3g} MB/s of features"
    )  # fmt: skip
    if not s["auc_ci95"][0] > 0.5:
        say("it ranks these labels no better than chance may: do not cut by its quality")
    if s["labellers"].keys() == {"rules"}:
        say("the labels are the rules' own: this AUC shows that the plumbing works, nothing more")


if __name__ == "__main__":
    run(main)
