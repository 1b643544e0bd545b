import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_run

import data.filter
from common.config import UserError
from common.files import read_documents, read_jsonl
from data.annotate import Config as AnnotateConfig
from data.annotate import annotate, auc
from data.base import forest as trees
from data.base.documents import ShardWriter, document
from data.base.features import STRUCTURE, WINDOWS, Features, Hidden, pieces, structure
from data.classify import (
    Classifier,
    ScoreConfig,
    TrainConfig,
    folds,
    group,
    interval,
    platt,
    score,
    sigmoid,
    train,
)
from data.filter import filter_documents, share_cut
from model import ModelConfig, Phi
from tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")

WORDS = ["apple", "bread", "candle", "door", "engine", "flower", "garden", "hammer"]


def teaching(i: int) -> str:
    word = WORDS[i % len(WORDS)]
    return (
        f'def {word}_{i}(numbers):\n    """The sum of the {word} numbers above {i}.\n\n'
        f'    >>> {word}_{i}([1])\n    0\n    """\n    total = 0\n    for x in numbers:\n'
        f"        if x > {i}:\n            total += x * {i % 7 + 1}\n    return total\n"
    )


def glue(i: int) -> str:
    word = WORDS[i % len(WORDS)]
    names = ", ".join(f"{word}{j}" for j in range(6))
    return f"from .{word} import {names}\n\nclass C{i}:\n" + "".join(
        f"    def f{j}(self, a, b, c):\n        self.x = {word}{j}(a, b)\n" for j in range(6)
    )


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    """A folder of two shards with labels by the rules: 60 documents of 20 packages, half good."""
    root = tmp_path_factory.mktemp("labelled")
    (root / "raw").mkdir()
    with ShardWriter(root / "raw", shard_bytes=12_000) as writer:
        for i in range(60):
            text = teaching(i) if i % 2 else glue(i)
            writer.write(document(text, f"code:package{i // 3}/file{i}.py"))
    assert writer.shards > 1
    annotate(AnnotateConfig(source=root / "raw", out=root / "labels"))
    return root / "labels"


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokens) -> Path:
    """A checkpoint with random weights."""
    torch.manual_seed(0)
    shape = ModelConfig(vocab_size=512, seq_len=32, n_layer=2, n_head=2, width=32, mlp_width=64,
                        rotary_dim=8)  # fmt: skip
    run = tmp_path_factory.mktemp("model")
    save_run(run, Phi(shape), Tokenizer(tokens.parent / "tok"))
    return run


@pytest.fixture(scope="module")
def trained(labelled, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("trained") / "forest"
    return out, train(TrainConfig(source=(labelled,), out=out, trees=10))


# ---- The forest


def noisy(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of which two matter, together only (an exclusive or), and a noisy target."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 6)).astype(np.float32)
    y = ((x[:, 1] > 0.3) ^ (x[:, 4] > -0.2) ^ (rng.random(n) < 0.1)).astype(float)
    return x, y


def grown(x, y, count: int) -> trees.Forest:
    edges = trees.cuts(x)
    codes = trees.binned(x, edges)
    return trees.join(
        [trees.grow(codes, edges, y, np.random.default_rng([0, t])) for t in range(count)]
    )


def walk(forest: trees.Forest, x: np.ndarray) -> float:
    """A forest's vote on one row, one node at a time."""
    votes = []
    for node in forest["roots"].tolist():
        while forest["left"][node] != node:
            below = x[forest["feature"][node]] <= forest["threshold"][node]
            node = int(forest["left" if below else "right"][node])
        votes.append(float(forest["value"][node]))
    return sum(votes) / len(votes)


def test_a_forest_learns_what_no_single_feature_tells():
    forest = grown(*noisy(1500, seed=1), count=40)
    x, y = noisy(600, seed=2)
    vote = trees.predict(forest, x)
    assert max(auc(s * column, y) for column in x.T for s in (1, -1)) < 0.62
    assert auc(vote, y) > 0.85  # 0.9 is what the noise leaves
    assert [walk(forest, row) for row in x[:50]] == pytest.approx(vote[:50].tolist(), abs=1e-6)


def test_it_is_as_good_as_scikit_learns():
    ensemble = pytest.importorskip("sklearn.ensemble")
    x, y = noisy(800, seed=3)
    theirs = ensemble.RandomForestClassifier(60, min_samples_leaf=3, random_state=0).fit(x, y)
    held, truth = noisy(800, seed=4)
    ours = auc(trees.predict(grown(x, y, 60), held), truth)
    assert ours > auc(theirs.predict_proba(held)[:, 1], truth) - 0.02


def test_leaves_are_large_and_hold_the_mean_of_what_fell_into_them():
    x, y = noisy(400, seed=5)
    edges = trees.cuts(x)
    codes = trees.binned(x, edges)
    tree = trees.grow(codes, edges, y, np.random.default_rng(7))
    drawn = np.random.default_rng(7).integers(0, 400, 400)  # its bootstrap sample
    leaves: dict[float, list] = {}
    for row in drawn:
        node = 0
        while tree["left"][node] != node:
            below = x[row, tree["feature"][node]] <= tree["threshold"][node]
            node = int(tree["left" if below else "right"][node])
        leaves.setdefault(node, []).append(y[row])
    assert len(leaves) == (tree["left"] == np.arange(len(tree["left"]))).sum() > 10
    for node, targets in leaves.items():
        assert len(targets) >= trees.MIN_LEAF
        assert tree["value"][node] == pytest.approx(np.mean(targets))


def test_codes_say_on_which_side_of_a_cut_a_value_is():
    x = np.random.default_rng(0).integers(0, 9, (200, 3)).astype(np.float32)  # many equal
    edges = trees.cuts(x)
    codes = trees.binned(x, edges)
    for feature in range(3):
        for cut in range(trees.BINS - 1):
            below = x[:, feature] <= edges[feature, cut]
            assert ((codes[:, feature] <= cut) == below).all()


def test_a_forest_is_read_back_and_anything_else_refused(tmp_path):
    x, y = noisy(200, seed=6)
    forest = grown(x, y, 3)
    trees.save(tmp_path / "forest.npz", forest)
    again = trees.load(tmp_path / "forest.npz", 6)
    assert (trees.predict(again, x) == trees.predict(forest, x)).all()

    def refused(content: dict | bytes, features: int = 6) -> None:
        path = tmp_path / "other.npz"
        path.write_bytes(content) if isinstance(content, bytes) else np.savez(path, **content)
        with pytest.raises(UserError, match=r"other\.npz"):
            trees.load(path, features)

    refused(forest, features=int(forest["feature"].max()))
    refused((tmp_path / "forest.npz").read_bytes()[:-40])
    refused({k: v for k, v in forest.items() if k != "roots"})
    refused(forest | {"value": np.array([object()] * len(forest["value"]))})  # a pickle
    refused(forest | {"roots": forest["roots"] + len(forest["value"])})
    refused(forest | {"left": np.zeros_like(forest["left"])})  # a walk without end
    refused(forest | {"threshold": forest["threshold"][1:]})


# ---- Features, folds, calibration


def test_structure_of_a_small_text():
    known = dict(zip(STRUCTURE[16:], structure(teaching(3))[16:]))
    assert len(structure(teaching(3))) == len(STRUCTURE) == len(structure("print 1"))
    assert set(structure("print 1")) == {-1.0}
    assert known["plain"] == known["arguments"] == known["loops"] == known["examples"] == 1
    assert known["returns"] == pytest.approx(1 / 7)  # of the statements, the docstring too
    assert known["lines"] == 5
    assert structure("def f():\n    pass\n")  # nothing in it, no division by zero


def test_pieces_reach_from_the_first_to_the_last_character():
    assert pieces("abc", 10) == ["abc"]
    assert pieces("", 10) == [""]
    text = "".join(chr(i) for i in range(1000))
    cut = pieces(text, 100)
    assert len(cut) == WINDOWS
    assert all(len(piece) == 100 for piece in cut)
    assert cut[0] == text[:100]
    assert cut[-1] == text[-100:]
    assert pieces(text[:150], 100) == [text[:100], text[50:150]]


def test_hidden_features_are_the_mean_over_pieces(model):
    texts = [teaching(1), teaching(2) * 5, ""]
    found = Features(model, "cpu", 0)(texts)
    assert found.shape == (3, 32)
    hidden = Hidden(model, [], "cpu")
    for text, row in zip(texts, found):
        alone = hidden.vectors(pieces(text, 32 * 3)).mean(0)
        assert row == pytest.approx(alone, abs=1e-5)
    assert not np.allclose(found[0], found[1], atol=1e-3)


def test_folds_never_split_a_package_and_are_of_like_size():
    origins = [f"code:p{i % 13}/f{i}.py" for i in range(200)]
    fold = folds(origins, 4)
    sides = {(group(o), f) for o, f in zip(origins, fold)}
    assert len(sides) == 13
    assert np.bincount(fold).tolist() == pytest.approx([50] * 4, abs=16)
    assert (fold == folds(origins, 4)).all()


def test_platt_finds_the_probabilities_behind_the_votes():
    rng = np.random.default_rng(0)
    vote = rng.random(20_000)
    truth = sigmoid(vote, 6.0, -4.0)
    a, b = platt(vote, (rng.random(20_000) < truth).astype(float))
    assert abs(sigmoid(vote, a, b) - truth).max() < 0.03


def test_the_interval_counts_packages_not_files():
    rng = np.random.default_rng(1)
    y = np.arange(400) % 2
    vote = y + rng.normal(size=400) * 1.5
    alone = interval([{"origin": f"code:{i}"} for i in range(400)], vote, y, 0)
    copies = np.repeat(np.arange(40), 10)  # 40 files, 10 times each
    rows = [{"origin": f"code:p{i}/f"} for i in copies]
    grouped = interval(rows, vote[copies], y[copies], 0)
    assert alone[0] < auc(vote, y) < alone[1]
    assert grouped[1] - grouped[0] > 2 * (alone[1] - alone[0])


# ---- Train and score


def test_labels_by_rules_are_learned_and_said_to_be_the_rules_own(trained, labelled, cli, tmp_path):
    out, summary = trained
    assert summary["documents"] == 60
    assert summary["good"] == 30
    assert summary["labellers"] == {"rules": 60}
    assert summary["auc"] > 0.95
    assert summary["brier"] < summary["brier_of_share"] / 2
    held = list(read_jsonl(out / "heldout.jsonl"))
    good = [h["quality"] for h in held if h["score"] >= 6]
    assert min(good) > max(h["quality"] for h in held if h["score"] < 6)
    done = cli("-m", "data.classify", "train", "--source", labelled, "--out", tmp_path / "f",
               "--trees=2")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "plumbing" in done.stdout
    assert cli("-m", "data.classify", "tarin").returncode == 2


def test_labels_of_a_file_decide_where_it_is_given(labelled, tmp_path):
    records = list(read_documents([labelled]))
    lines = [json.dumps({"sha256": r["sha256"], "score": 10 - r["score"]}) for r in records]
    (tmp_path / "labels.jsonl").write_text("\n".join(lines[:50]))
    config = TrainConfig(source=(labelled,), out=tmp_path / "f", trees=10,
                         labels=tmp_path / "labels.jsonl")  # fmt: skip
    summary = train(config)
    assert summary["documents"] == 50
    assert summary["labellers"] == {"file": 50}
    assert summary["auc_of_rules"] < 0.2  # what the rules find good is called bad here
    assert Classifier(config.out, None, "cpu", 0).quality([glue(1)]) > 0.5


def test_noise_is_not_learned(labelled, model, tmp_path):
    rng = np.random.default_rng(0)
    lines = [
        json.dumps({"sha256": r["sha256"], "score": int(rng.integers(0, 11))})
        for r in read_documents([labelled])
    ]
    (tmp_path / "labels.jsonl").write_text("\n".join(lines))
    config = TrainConfig(source=(labelled,), out=tmp_path / "f", trees=20, checkpoint=model,
                         labels=tmp_path / "labels.jsonl")  # fmt: skip
    assert 0.25 < train(config)["auc"] < 0.7  # held out; of its own documents a forest knows all
    records = list(read_documents([labelled]))
    quality = Classifier(config.out, None, "cpu", 0).quality([r["text"] for r in records])
    assert auc(quality, [json.loads(line)["score"] >= 6 for line in lines]) > 0.8


def test_scores_then_the_filters_cut(trained, labelled, tmp_path):
    summary = score(ScoreConfig(source=(labelled.parent / "raw",), forest=trained[0],
                                out=tmp_path / "scored", keep_frac=0.5))  # fmt: skip
    records = list(read_documents([tmp_path / "scored"]))
    assert summary["documents"] == len(records) == 60
    good = [r["quality"] for r in records if r["text"].startswith("def")]
    bad = [r["quality"] for r in records if not r["text"].startswith("def")]
    assert min(good) > 0.5 > max(bad)
    page = (tmp_path / "scored" / "samples" / "samples.html").read_text()
    assert page.count("<pre>") == 40
    kept = list(read_jsonl(tmp_path / "scored" / "samples" / "kept.jsonl"))
    assert {s["text"][:3] for s in kept} == {"def"}
    config = data.filter.Config(
        source=tmp_path / "scored", out=tmp_path / "kept", keep_frac=0.5, rules=False
    )
    filtered = filter_documents(config)
    assert filtered["documents"] == 30
    assert filtered["rejected"] == {"min_quality": 30}
    assert filtered["options"]["min_quality"] == min(good)
    assert all(r["text"].startswith("def") for r in read_documents([tmp_path / "kept"]))


def test_the_filter_wants_qualities_where_it_cuts_by_them(labelled, tmp_path):
    config = data.filter.Config(source=labelled, out=tmp_path / "kept", min_quality=0.5)
    with pytest.raises(UserError, match="60 documents without `quality`"):
        filter_documents(config)


def test_equals_stay_together_at_a_cut():
    assert share_cut(np.array([0.1, 0.5, 0.5, 0.9]), 0.25) == 0.9
    assert share_cut(np.array([0.1, 0.5, 0.5, 0.9]), 0.5) == 0.5
    assert share_cut(np.array([0.3]), 0.01) == 0.3


def test_too_few_labels_and_wrong_models_are_refused(trained, model, labelled, tmp_path):
    with pytest.raises(UserError, match="too few for 31 folds"):
        train(TrainConfig(source=(labelled,), out=tmp_path / "f", folds=31))
    scores = ScoreConfig(source=(labelled,), forest=trained[0], out=tmp_path / "s",
                         checkpoint=model)  # fmt: skip
    with pytest.raises(UserError, match="was trained on"):
        score(scores)
    with pytest.raises(UserError, match="no forest of"):
        score(ScoreConfig(source=(labelled,), forest=labelled, out=tmp_path / "s"))


def outputs(folder: Path) -> dict[str, bytes]:
    """All files of a stage but those that tell of one run."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in ("timing.json", "lineage.json")
    }


@pytest.mark.skipif(not MPIRUN, reason="no mpirun")
def test_any_number_of_ranks_gives_the_same_bytes(labelled, model, cli, tmp_path):
    many = [MPIRUN, "--oversubscribe", "-n", "3"]
    many += ["--allow-run-as-root"] if os.geteuid() == 0 else []
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for command in (
        ["train", "--source", labelled, "--checkpoint", model, "--trees=30", "--out"],
        ["score", "--source", labelled, "--forest", tmp_path / "train1", "--out"],
    ):
        one, three = tmp_path / f"{command[0]}1", tmp_path / f"{command[0]}3"
        done = cli("-m", "data.classify", *command, one)
        assert done.returncode == 0, done.stderr
        module = [sys.executable, "-m", "mpi4py", "-m", "data.classify", *map(str, command)]
        done = subprocess.run([*many, *module, str(three)], cwd=ROOT, env=env, capture_output=True,
                              text=True, timeout=300)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert outputs(one) == outputs(three)
