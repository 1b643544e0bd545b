"""Train and apply a classifier of educational value.

    python -m data.classify train --source out/labels --out out/forest
    python -m data.classify train --source out/raw --labels tests/data/labels.jsonl \\
        --encoder MODEL_FOLDER --out out/forest
    python -m data.classify score --source out/raw --forest out/forest --out out/scored
    python -m data.filter --source out/scored --keep_frac 0.2 --out out/filtered

The paper (section 2.1) trains a random forest on the output embedding of a pretrained codegen model
to predict GPT-4's labels. PAPER: pooling, model size and threshold are undisclosed. Our features
(base/features.py) are the mean hidden states of a --checkpoint, or of a Hugging Face --encoder plus
the syntax tree, or the tree alone. With an encoder the default head is a ridge regression: on 241
labels its AUC is .946, the forest's .904, with overlapping intervals (LOG.md).

`train` regresses on scores, which ranks better than classifying score >= --good. AUC,
precision and calibration use score >= --good. Cross-validation keeps each package on one side,
because files of one package resemble each other. If the rules of data/annotate.py made the labels,
the AUC shows that the plumbing works and says nothing about quality.

`score` adds `quality`, the probability from 0 to 1 that a document is good. data/filter.py cuts by
it and data/dedup.py keeps the best copy by it. Read the filter's samples before you trust a cut.
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

BATCH = 64  # documents per feature batch
SCALE = 10  # maximum score of a label; scales targets to 0 to 1
MIN_LEAF = 2  # minimum documents per tree leaf
RESAMPLES = 500  # bootstrap resamples for the AUC interval
KEEP_FRAC = 0.2  # report the precision of this top share; the paper kept 6 of 35 billion tokens
CALIBRATION_C = 100.0  # inverse regularisation strength of the calibration
FIELDS = {"feature": "feature", "threshold": "threshold", "left": "children_left",
          "right": "children_right", "value": "value"}  # our name: scikit-learn's  # fmt: skip

RIDGE = {"coef", "intercept"}
LEAST_STD = 0.1  # floor of a feature's std, relative to the median of its block
VOTES = (-0.25, 1.25)  # clip range of ridge votes; targets are in [0, 1]
PENALTIES = np.logspace(-4, 3, 15)  # ridge penalties, selected by leave-one-out

# Arrays of a forest (FIELDS [nodes] and roots [trees]; a leaf is its own child) or of a RIDGE.
Head = dict[str, np.ndarray]


@dataclass(frozen=True)
class TrainConfig:
    """Train a forest or ridge on labelled documents, calibrate it and report how good it is."""

    source: tuple[Path, ...]  # files or folders of documents; repeatable
    out: Path  # folder to write
    labels: Path | None = None  # file of {"sha256", "score"} lines, instead of each document's own
    # `score` from data.annotate
    checkpoint: Path | None = None  # run folder: use its hidden states as features, as in the
    # paper, instead of the syntax tree
    encoder: Path | None = None  # Hugging Face model folder with safetensors: use its hidden states
    # plus the syntax tree as features
    head: str = ""  # forest (as in the paper) or ridge; if unset, ridge with --encoder, else forest
    good: float = GOOD  # minimum score of a good document
    trees: int = 200  # trees in the forest
    folds: int = 5  # cross-validation folds
    seed: int = 0  # random seed of the forest


@dataclass(frozen=True)
class ScoreConfig:
    """Add `quality` to each document, the probability that it is good."""

    source: tuple[Path, ...]  # files or folders of documents; repeatable
    forest: Path  # folder written by `train`
    out: Path  # folder to write
    checkpoint: Path | None = None  # new location of the checkpoint, if it was moved
    encoder: Path | None = None  # new location of the encoder, if it was moved


COMMANDS = {"train": TrainConfig, "score": ScoreConfig}


# ---- Heads, fitted by scikit-learn and stored as plain arrays


def grow(x: np.ndarray, target: np.ndarray, trees: int, seed: int) -> Head:
    """Fit a forest to features x float32 [n, F] and targets [n]; leaves hold target means."""
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
    """Fit a ridge to standardised features x float32 [n, F], equal weight per block (`widths`).

    Unweighted, the encoder's many features would drown out the syntax tree's few.
    """
    from sklearn.linear_model import RidgeCV

    x = logs(x)
    std = x.std(0)
    # Floor the std: a column that barely varies here would dominate on data where it does.
    blocks = np.split(std, np.cumsum(widths)[:-1])
    std = np.concatenate([np.maximum(s, LEAST_STD * np.median(s) + 1e-9) for s in blocks])
    scale = std * np.sqrt(np.repeat(widths, widths))
    fitted = RidgeCV(PENALTIES).fit((x - x.mean(0)) / scale, target)
    coef = fitted.coef_ / scale
    return {"coef": coef, "intercept": fitted.intercept_ - x.mean(0) @ coef}


def logs(x: np.ndarray) -> np.ndarray:
    """Return sign(x) log(1 + |x|), float64: compresses counts of characters and lines."""
    return np.sign(x) * np.log1p(np.abs(x, dtype=float))


def predict(forest: Head, x: np.ndarray) -> np.ndarray:
    """Return votes float64 [n] for x float32 [n, F]; a forest's equal scikit-learn's bitwise."""
    if "coef" in forest:
        vote = (logs(x) * forest["coef"]).sum(1) + forest["intercept"]
        return np.clip(vote, *VOTES)
    rows = np.arange(len(x))[:, None]
    node = np.broadcast_to(forest["roots"], (len(x), len(forest["roots"])))  # [n, trees]
    while True:
        below = x[rows, forest["feature"][node]] <= forest["threshold"][node]
        following = np.where(below, forest["left"][node], forest["right"][node])
        if (following == node).all():  # cumsum adds in tree order, like scikit-learn
            return forest["value"].ravel()[node].cumsum(1)[:, -1] / node.shape[1]
        node = following


def sigmoid(vote: np.ndarray, a: float, b: float) -> np.ndarray:
    return 1 / (1 + np.exp(-(a * vote + b)))


def platt(vote: np.ndarray, good: np.ndarray) -> tuple[float, float]:
    """Fit Platt scaling: return (a, b) with P(good) = sigmoid(a vote + b)."""
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(C=CALIBRATION_C).fit(vote[:, None], good)
    return max(float(fitted.coef_[0, 0]), 1e-3), float(fitted.intercept_[0])


# ---- Train


def train(config: TrainConfig) -> dict:
    """Write `config.out` and return its summary. Raises UserError for too few labels."""
    if config.trees < 1 or config.folds < 2:
        raise UserError("--trees must be at least 1 and --folds at least 2")
    if config.head not in ("", "forest", "ridge"):
        raise UserError(f"--head {config.head}: want forest or ridge")
    labels = read_labels(config.labels) if config.labels else None
    reads = [p for p in (config.labels, config.checkpoint, config.encoder) if p]
    with Stage(config, source_shards(*config.source), reads) as stage:
        found = stage.map("labels", stage.shards, lambda part: rows_of(part, labels))
        rows = [row for result in found for row in result["rows"]]
        # A document in two shards could land on both sides of the cross-validation.
        first = sorted({row["sha256"]: i for i, row in reversed([*enumerate(rows)])}.values())
        rows = [rows[i] for i in first]
        good = sum(row["score"] >= config.good for row in rows)
        packages = len({group(row["origin"]) for row in rows})
        if min(good, len(rows) - good, packages) < config.folds:
            raise UserError(
                f"--source: {len(rows)} labelled documents ({good} good) from {packages} packages "
                f"are too few for {config.folds} folds; label more or lower --folds"
            )
        features = Features(stage.ranks.rank, config.checkpoint, config.encoder)
        stage.map("features", stage.shards, lambda part: save_features(part, features, labels))
        (report,) = stage.map("fit", ["all"], lambda part: fit(config, part, rows, first, features))
        summary = stage.finish({**features.kind, **report})
    return summary | {"mb_per_s": features.bytes / 1e6 / max(features.seconds, 1e-9)}


def labelled(part: Part, labels: dict[str, float] | None) -> Iterator[dict]:
    """Yield the fields that training needs from a shard's labelled documents."""
    for record in part.documents():
        given = {"score": labels.get(record["sha256"]), "labeller": "file"} if labels else record
        row = {name: record[name] for name in ("sha256", "origin", "text")}
        row |= {name: given.get(name) for name in ("score", "labeller")}
        if isinstance(row["score"], (int, float)) and row["labeller"] is not None:
            yield row


def rows_of(part: Part, labels: dict[str, float] | None) -> dict:
    """Return a shard's labelled rows without text, for cheap checks before computing features."""
    return {"rows": [{k: row[k] for k in row if k != "text"} for row in labelled(part, labels)]}


def save_features(part: Part, features: Features, labels: dict[str, float] | None) -> None:
    made = [np.zeros((0, sum(features.widths)), np.float32)]
    for batch in batched(labelled(part, labels), BATCH):
        made.append(features([row["text"] for row in batch]))
    np.save(part.scratch / f"{part.name}.npy", np.concatenate(made))


def fit(config: TrainConfig, part: Part, rows: list[dict], first: list[int],
        features: Features) -> dict:  # fmt: skip
    """Fit, calibrate and write the head on feature rows `first`; return cross-validated metrics."""
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
    """Return the package named by an origin, e.g. "site-packages:torch"."""
    return origin.split("/")[0]


def interval(groups: np.ndarray, vote: np.ndarray, good: np.ndarray) -> list[float]:
    """Return a 95% bootstrap interval of the AUC, over groups because their files are dependent."""
    members = [np.flatnonzero(groups == name) for name in sorted(set(groups))]
    rng, found = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        drawn = np.concatenate([members[g] for g in rng.integers(0, len(members), len(members))])
        found.append(auc(vote[drawn], good[drawn]))
    return [round(float(q), 3) for q in np.nanquantile(found, [0.025, 0.975])]


# ---- Score


class Classifier:
    """A stored head and its feature extractor."""

    def __init__(self, folder: Path, rank: int, **moved: Path | None):
        """Load `folder`; `moved` holds the new checkpoint or encoder path, if any."""
        try:
            about = json.loads((folder / "forest.json").read_text())
            self.calibration = tuple(map(float, about["calibration"]))
            names = ("checkpoint", "encoder")
            paths = moved if any(moved.values()) else {k: Path(about[k]) for k in names if about[k]}
            with np.load(folder / "forest.npz", allow_pickle=False) as arrays:
                self.forest = {name: arrays[name] for name in arrays}
            if self.forest.keys() not in (RIDGE, {*FIELDS, "roots"}):
                raise ValueError("unexpected arrays")
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as e:
            raise UserError(f"--forest {folder} is not from data.classify train ({e})") from None
        kind = {k: about[k] for k in ("features", "weights") if k in about}
        self.features = Features(rank, **paths)
        if self.features.kind != kind:
            raise UserError(
                f"--forest {folder} was trained on {kind}, but {self.features.path or 'no model'} "
                f"gives {self.features.kind}; pass the right --checkpoint or --encoder"
            )

    def quality(self, texts: list[str]) -> np.ndarray:
        """Return P(good) of each text, float64 [texts]."""
        return sigmoid(predict(self.forest, self.features(texts)), *self.calibration)


def score(config: ScoreConfig) -> dict:
    """Write `config.out` and return its summary. Raises UserError if there is nothing to score."""
    where = {"checkpoint": config.checkpoint, "encoder": config.encoder}
    classifier = Classifier(config.forest, Ranks().rank, **where)
    reads = [config.forest, *([classifier.features.path] if classifier.features.path else [])]
    with Stage(config, source_shards(*config.source), reads) as stage:
        count = total(stage.map("score", stage.shards, lambda part: score_shard(part, classifier)))
        if not count.get("documents"):
            raise UserError(f"--source {config.source[0]}: no documents found")
        return stage.finish(count)


def score_shard(part: Part, classifier: Classifier) -> dict:
    """Write a shard with qualities; return their histogram in tenths."""
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
        raise UserError(f"want {' or '.join(COMMANDS)} first, then options or --help")
    config = parse(COMMANDS[name], sys.argv[2:])
    if name == "score":
        s = score(config)
        for quality in sorted(s["from_quality"]):
            say(f"{s['from_quality'][quality]:9,} of quality {quality}")
        return say(f"{config.out}: {s['documents']:,} documents")
    s = train(config)
    say(f"{config.out}: AUC {s['auc']} ({s['auc_ci95'][0]} - {s['auc_ci95'][1]}) on "
        f"{s['documents']:,} held-out labels ({s['good']:,} good); precision in the top "
        f"{KEEP_FRAC:.0%}: {s['precision_at_kept']:.0%}, base rate {s['share_of_good']:.0%}, "
        f"F1 {s['f1_at_kept']}, Spearman {s['spearman']}; {s['mb_per_s']:.3g} MB/s of features"
    )  # fmt: skip
    if not s["auc_ci95"][0] > 0.5:
        say("the AUC is not clearly above chance (0.5): do not filter by this quality")
    if s["labellers"].keys() == {"rules"}:
        say("data.annotate's rules made the labels: this AUC only shows that the plumbing works")


if __name__ == "__main__":
    run(main)
