import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_run

import data.filter
from common.config import UserError
from data import classify
from data.annotate import Config as AnnotateConfig
from data.annotate import annotate, auc
from data.base.documents import ShardWriter, document
from data.base.features import STRUCTURE, WINDOWS, Features, pieces, structure
from data.base.readers import read_documents
from data.classify import Classifier, ScoreConfig, TrainConfig, score, train
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
    """Two shards labelled by the rules: 60 documents of 20 packages, half good."""
    root = tmp_path_factory.mktemp("labelled")
    (root / "raw").mkdir()
    with ShardWriter(root / "raw", shard_bytes=12_000) as writer:
        for i in range(60):
            text = teaching(i) if i % 2 else glue(i)
            writer.write(document(text, f"code:package{i // 3}/file{i}.py"))
    assert writer.shards > 1
    annotate(AnnotateConfig(source=(root / "raw",), out=root / "labels"))
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


def test_a_stored_forest_votes_as_scikit_learns_does_to_the_bit(tmp_path):
    from sklearn.ensemble import RandomForestRegressor

    x = np.random.default_rng(3).normal(size=(800, 6)).astype(np.float32)
    y = ((x[:, 1] > 0.3) ^ (x[:, 4] > -0.2)).astype(float)
    (x, held), (y, truth) = np.split(x, 2), np.split(y, 2)
    np.savez(tmp_path / "forest.npz", **classify.grow(x, y, 30, seed=5))
    with np.load(tmp_path / "forest.npz", allow_pickle=False) as forest:
        votes = classify.predict(dict(forest), held)
    theirs = RandomForestRegressor(30, max_features="sqrt", min_samples_leaf=2, random_state=5)
    assert (votes == theirs.fit(x, y).predict(held)).all()
    assert auc(votes, truth) > 0.9


# ---- Features, calibration, interval


def test_structure_of_a_small_text():
    known = dict(zip(STRUCTURE, structure(teaching(3)), strict=True))
    assert structure("print 1") == [-1.0] * len(STRUCTURE)
    assert known["plain"] == known["arguments"] == known["loops"] == known["examples"] == 1
    assert known["returns"] == pytest.approx(1 / 7)  # per statement, including the docstring
    assert known["lines"] == 5
    assert structure("def f():\n    pass\n")  # empty: no division by zero


def test_pieces_reach_from_the_first_to_the_last_character():
    assert pieces("", 10) == [""]
    text = "".join(chr(i) for i in range(1000))
    cut = pieces(text, 100)
    assert len(cut) == WINDOWS
    assert (cut[0], cut[-1]) == (text[:100], text[-100:])
    assert pieces(text[:150], 100) == [text[:100], text[50:150]]


def test_hidden_features_are_the_mean_over_tokens_then_over_pieces(model):
    texts = [teaching(1), teaching(2) * 5, ""]
    features, states = Features(0, model), []
    found = features(texts)
    assert found.shape == (3, 32)
    features.model.ln_f.register_forward_hook(lambda module, args, output: states.append(output))
    for text, row in zip(texts, found):
        means = []
        for piece in pieces(text, 32 * 3):
            ids = [features.tokenizer.end_of_text, *features.tokenizer.encode(piece)][:32]
            with torch.inference_mode():
                features.model(torch.tensor([ids]))
            mean = states.pop()[0].mean(0)
            means.append((mean / mean.norm()).numpy())
        assert row == pytest.approx(np.mean(means, 0), abs=1e-5)
    assert not np.allclose(found[0], found[1], atol=1e-3)


def test_an_encoders_states_are_a_mean_over_what_is_no_padding(encoder):
    import transformers

    theirs = transformers.AutoModel.from_pretrained(encoder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    texts = [teaching(1), "x = 1\n", teaching(2) * 3]
    found = Features(0, encoder=encoder)(texts)
    assert np.isfinite(Features(0, encoder=encoder)([""])).all()  # no token at all
    assert found.shape == (3, 16 + len(STRUCTURE))
    for text, row in zip(texts, found):
        means = []
        for piece in pieces(text, 64 * 3):
            ids = torch.tensor([tokenizer(piece).input_ids[:64]])
            with torch.inference_mode():
                mean = theirs(ids).last_hidden_state[0].mean(0)
            means.append((mean / mean.norm()).numpy())
        assert row[:16] == pytest.approx(np.mean(means, 0), abs=1e-5)
        assert row[16:] == pytest.approx(structure(text))


def test_a_ridge_finds_the_few_features_that_tell(tmp_path):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(400, 200)).astype(np.float32)  # 190 columns are noise
    y = x[:, 190:].sum(1) * 0.1 + rng.normal(size=400)
    (x, held), (y, truth) = np.split(x, 2), np.split(y, 2)
    np.savez(tmp_path / "forest.npz", **classify.regress(x, y, [190, 10]))
    with np.load(tmp_path / "forest.npz", allow_pickle=False) as ridge:
        votes = classify.predict(dict(ridge), held)
    unweighted = classify.predict(classify.regress(x, y, [200]), held)
    assert np.corrcoef(votes, truth)[0, 1] > np.corrcoef(unweighted, truth)[0, 1] + 0.02


def test_a_ridge_is_not_led_by_what_hardly_varied(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 9)).astype(np.float32)
    x[:, 8] *= 1e-6  # like a dead encoder dimension, or a share that is nearly always 1
    y = 0.5 + 0.1 * x[:, 0] + 1e5 * x[:, 8]
    ridge = classify.regress(x, y, [9])
    x[:, 8] += 0.01
    assert np.abs(classify.predict(ridge, x) - y).max() < 0.5
    x[0, 0] = 1e9  # an outlier
    assert classify.predict(ridge, x)[0] == 1.25


def test_the_interval_counts_packages_not_files():
    rng = np.random.default_rng(1)
    y = np.arange(200) % 2 == 1
    vote = y + rng.normal(size=200) * 1.5
    alone = classify.interval(np.arange(200), vote, y)
    copies = np.repeat(np.arange(20), 10)  # 20 files, 10 times each
    grouped = classify.interval(copies, vote[copies], y[copies])
    assert alone[0] < auc(vote, y) < alone[1]
    assert grouped[1] - grouped[0] > 2 * (alone[1] - alone[0])


# ---- Train and score


def test_labels_by_rules_are_learned_and_said_to_be_the_rules_own(
    trained, labelled, in_process, tmp_path
):
    summary = trained[1]
    assert summary["documents"] == 60
    assert summary["good"] == 30
    assert summary["labellers"] == {"rules": 60}
    assert summary["auc"] > 0.95
    assert summary["brier"] < 0.125  # always predicting the base rate gives 0.25
    command = ("train", "--source", labelled, "--out", tmp_path / "f", "--trees=2")
    assert "plumbing" in in_process(classify.main, *command)[1]


def test_an_encoder_trains_a_ridge_that_scores(labelled, encoder, tmp_path):
    summary = train(TrainConfig(source=(labelled,), out=tmp_path / "f", encoder=encoder))
    assert (summary["head"], summary["features"]) == ("ridge", "encoder")
    assert summary["auc"] > 0.9
    assert summary["f1_at_kept"] == pytest.approx(2 * 12 / (12 + 30), abs=1e-3)  # of 60, 30 good
    config = ScoreConfig(source=(labelled,), forest=tmp_path / "f", out=tmp_path / "s")
    score(config)
    good = [r["quality"] for r in read_documents([tmp_path / "s"]) if r["score"] >= 6]
    assert min(good) > 0.4
    with pytest.raises(UserError, match="not both"):
        score(replace(config, checkpoint=encoder, encoder=encoder))


def test_a_package_is_never_on_both_sides(tmp_path):
    """Files of a package look alike but its label is random: only a leak could predict it."""
    good = np.random.default_rng(0).permutation(40) % 2
    with ShardWriter(tmp_path) as writer:
        for i in range(160):
            text = "def f(x):\n" + f"    x = {i}\n" * (i // 4 + 1)
            label = {"score": int(good[i // 4]) * 10, "labeller": "chance"}
            writer.write(document(text, f"code:package{i // 4}/{i}.py", **label))
    assert 0.2 < train(TrainConfig(source=(tmp_path,), out=tmp_path / "f", trees=20))["auc"] < 0.7


def test_labels_of_a_file_decide_where_it_is_given(labelled, tmp_path):
    records = list(read_documents([labelled]))
    lines = [json.dumps({"sha256": r["sha256"], "score": 10 - r["score"]}) for r in records]
    (tmp_path / "labels.jsonl").write_text("\n".join(lines[:50]))
    config = TrainConfig(source=(labelled,), out=tmp_path / "f", trees=10,
                         labels=tmp_path / "labels.jsonl")  # fmt: skip
    summary = train(config)
    assert summary["documents"] == 50
    assert summary["labellers"] == {"file": 50}
    assert Classifier(config.out, 0).quality([glue(1)]) > 0.5


def test_scores_then_the_filters_cut(trained, labelled, tmp_path):
    summary = score(ScoreConfig(source=(labelled.parent / "raw",), forest=trained[0],
                                out=tmp_path / "scored"))  # fmt: skip
    records = list(read_documents([tmp_path / "scored"]))
    assert summary["documents"] == len(records) == 60
    good = [r["quality"] for r in records if r["text"].startswith("def")]
    bad = [r["quality"] for r in records if not r["text"].startswith("def")]
    assert min(good) > 0.5 > max(bad)
    assert sum(summary["from_quality"].values()) == 60
    config = data.filter.Config(
        source=(tmp_path / "scored",), out=tmp_path / "kept", keep_frac=0.5, rules=False
    )
    filtered = filter_documents(config)
    assert filtered["documents"] == 30
    assert filtered["rejected"] == {"min_quality": 30}
    assert filtered["options"]["min_quality"] == min(good)


def test_the_filter_wants_qualities_where_it_cuts_by_them(labelled, tmp_path):
    config = data.filter.Config(source=(labelled,), out=tmp_path / "kept", min_quality=0.5)
    with pytest.raises(UserError, match="60 documents lack `quality`"):
        filter_documents(config)


def test_equals_stay_together_at_a_cut():
    assert share_cut(np.array([0.1, 0.5, 0.5, 0.9]), 0.5) == 0.5
    assert share_cut(np.array([0.3]), 0.01) == 0.3


def test_too_few_labels_and_wrong_models_are_refused(
    trained, model, labelled, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.delattr(classify, "Features")  # raises before computing features
        with pytest.raises(UserError, match="too few for 31 folds"):
            train(TrainConfig(source=(labelled,), out=tmp_path / "f", folds=31))
    scores = ScoreConfig(source=(labelled,), forest=trained[0], out=tmp_path / "s",
                         checkpoint=model)  # fmt: skip
    with pytest.raises(UserError, match="was trained on"):
        score(scores)
    with pytest.raises(UserError, match=r"with model\.safetensors"):
        Features(0, encoder=labelled)
    with pytest.raises(UserError, match="is not from data"):
        score(ScoreConfig(source=(labelled,), forest=labelled, out=tmp_path / "s"))


def outputs(folder: Path) -> dict[str, bytes]:
    """Return the output files that must not depend on the run."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "lineage.json")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


@pytest.mark.skipif(not MPIRUN, reason="no mpirun")
def test_any_number_of_ranks_gives_the_same_bytes(trained, labelled, tmp_path):
    score(ScoreConfig(source=(labelled,), forest=trained[0], out=tmp_path / "score1"))
    command = [MPIRUN, "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "-m",
               "mpi4py", "-m", "data.classify"]  # fmt: skip
    for one, options in (
        (trained[0], ["train", "--source", labelled, "--trees=10"]),
        (tmp_path / "score1", ["score", "--source", labelled, "--forest", trained[0]]),
    ):
        done = subprocess.run([*command, *options, "--out", tmp_path / options[0]], cwd=ROOT,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
                              text=True, timeout=300)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert outputs(one) == outputs(tmp_path / options[0])
