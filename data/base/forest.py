"""A random forest in numpy: grown on binned features, stored as plain arrays, read without pickle.

Breiman (2001): each tree sees a bootstrap sample, and at each node the square root of the number of
features, cut where the variance of the target drops most (for a target of 0 and 1 that is Gini's
impurity). A forest is five arrays, the nodes of all trees end to end, and the trees' roots. A leaf
is its own child, so that a walk may go on after its end.
"""

import zipfile
from pathlib import Path

import numpy as np

from common.config import UserError

BINS = 64  # cuts considered of a feature: its quantiles; finer ones changed no AUC (LOG.md)
MIN_LEAF = 3  # documents in a leaf, counted as often as they were drawn
FIELDS = {"feature": np.int32, "threshold": np.float32, "left": np.int32, "right": np.int32,
          "value": np.float32, "roots": np.int32}  # fmt: skip

Forest = dict[str, np.ndarray]  # FIELDS, all [nodes] but roots [trees]


def cuts(x: np.ndarray) -> np.ndarray:
    """Return the cuts to try of features x [n, F]: quantiles, float32 [F, BINS - 1], ascending."""
    inner = np.linspace(0, 1, BINS + 1)[1:-1]
    return np.quantile(x, inner, axis=0, method="lower").T.astype(np.float32)


def binned(x: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Count the edges below x, uint8 [n, F]; x <= edges[c] if and only if this is <= c."""
    columns = [np.searchsorted(e, column) for e, column in zip(edges, x.T)]
    return np.stack(columns, axis=1).astype(np.uint8)


def grow(codes: np.ndarray, edges: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> Forest:
    """Grow a tree on a bootstrap sample of codes uint8 [n, F] (of `binned`) and targets y [n]."""
    n, features = codes.shape
    tried = max(1, round(features**0.5))
    nodes: list[list] = [[0, 0.0, 0, 0, 0.0]]  # feature, threshold, left, right, value
    stack = [(0, rng.integers(0, n, n))]
    while stack:
        node, rows = stack.pop()
        target = y[rows]
        nodes[node] = [0, 0.0, node, node, float(target.mean())]
        if len(rows) < 2 * MIN_LEAF or target.min() == target.max():
            continue
        chosen = rng.choice(features, tried, replace=False)
        at = (codes[rows[:, None], chosen] + np.arange(tried) * BINS).ravel()  # [rows * tried]
        count = np.bincount(at, minlength=tried * BINS).reshape(tried, BINS)
        total = np.bincount(at, np.repeat(target, tried), tried * BINS).reshape(tried, BINS)
        n_left, y_left = count.cumsum(1)[:, :-1], total.cumsum(1)[:, :-1]
        n_right, y_right = len(rows) - n_left, target.sum() - y_left
        gain = y_left**2 / np.maximum(n_left, 1) + y_right**2 / np.maximum(n_right, 1)
        gain = np.where((n_left < MIN_LEAF) | (n_right < MIN_LEAF), -1.0, gain)
        best, cut = divmod(int(gain.argmax()), BINS - 1)
        if gain[best, cut] <= target.sum() ** 2 / len(rows) + 1e-9:  # no cut, or none that helps
            continue
        left = len(nodes)
        nodes += [[], []]
        nodes[node][:4] = [int(chosen[best]), float(edges[chosen[best], cut]), left, left + 1]
        below = codes[rows, chosen[best]] <= cut
        stack += [(left, rows[below]), (left + 1, rows[~below])]
    columns = dict(zip(FIELDS, [*zip(*nodes), [0]]))
    return {name: np.array(columns[name], dtype) for name, dtype in FIELDS.items()}


def join(trees: list[Forest]) -> Forest:
    """Return the forest of all the trees in `trees`."""
    before = np.cumsum([0, *(len(t["feature"]) for t in trees[:-1])], dtype=np.int32)
    forest = {name: np.concatenate([t[name] for t in trees]) for name in FIELDS}
    for name in ("left", "right", "roots"):
        forest[name] += np.repeat(before, [len(t[name]) for t in trees])
    return forest


def predict(forest: Forest, x: np.ndarray) -> np.ndarray:
    """Return the mean of the trees' leaves, float32 [n], for features x float32 [n, F]."""
    rows = np.arange(len(x))[:, None]
    node = np.broadcast_to(forest["roots"], (len(x), len(forest["roots"])))  # [n, trees]
    while True:
        below = x[rows, forest["feature"][node]] <= forest["threshold"][node]
        following = np.where(below, forest["left"][node], forest["right"][node])
        if (following == node).all():
            return forest["value"][node].mean(1)
        node = following


def save(path: Path, forest: Forest) -> None:
    np.savez(path, **forest)


def load(path: Path, features: int) -> Forest:
    """Return the forest in `path`, for so many features. Raises UserError for anything else."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            forest = {name: arrays[name] for name in FIELDS}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
        raise UserError(f"{path}: no forest of ours ({e})") from None
    nodes, trees = len(forest["feature"]), len(forest["roots"])
    shapes = {name: (trees if name == "roots" else nodes,) for name in FIELDS}
    inside = [forest[name] for name in ("left", "right", "roots")]
    if (
        any(forest[n].shape != shapes[n] or forest[n].dtype != FIELDS[n] for n in FIELDS)
        or not trees
        or any(a.min() < 0 or a.max() >= nodes for a in inside)
        or not (0 <= forest["feature"].min() <= forest["feature"].max() < features)
        or not loop_free(forest)
    ):
        raise UserError(f"{path}: its arrays are no forest over {features} features")
    return forest


def loop_free(forest: Forest) -> bool:
    """Return whether every walk ends: a node's children are itself, or come after it."""
    node = np.arange(len(forest["feature"]))
    left, right = forest["left"], forest["right"]
    return bool((((left > node) & (right > node)) | ((left == node) & (right == node))).all())
