import json

import numpy as np
import pytest
from conftest import save_run

import eval.library as library
from data.base.documents import ShardWriter, document
from eval.library import Config, count, piece_bytes, places, score
from model import ModelConfig, Phi
from tokenizer import Tokenizer

CODE = '''\
"""Füße über alles."""
import os.path, re
import numpy as np
from collections import abc as kinds, OrderedDict
from . import own
import sys as hidden

def f(hidden, text="é"):
    x = os.path.join(text, np.pi); ä = np.linalg.norm(x)
    hidden.exit(own.thing)
    return (re
            .compile("a").match, kinds.Mapping, OrderedDict.fromkeys, x.shape)

np.zeros = None
'''


def test_which_attributes_count():
    found, imports = places(CODE)
    assert [(p.module, p.name) for p in found] == [
        ("os", "path"),
        ("os.path", "join"),
        ("numpy", "pi"),
        ("numpy", "linalg"),
        ("numpy.linalg", "norm"),
        ("re", "compile"),
        ("collections.abc", "Mapping"),
        ("collections.OrderedDict", "fromkeys"),
        ("numpy", "zeros"),
    ]
    encoded = CODE.encode()
    assert all(encoded[p.start : p.end].decode() == p.name for p in found)
    assert [encoded[a:b].decode().split("\n")[0] for a, b in imports] == CODE.split("\n")[1:6]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_any_end_of_line(end):
    text = "import os\nx = 'ü', os.sep\n".replace("\n", end)
    (place,), imports = places(text)
    assert text.encode()[place.start : place.end] == b"sep"
    assert imports == [(0, 9)]


@pytest.mark.parametrize("text", ["def (", "", "x = 1\n", "import os\nos = 1\nos.path\n"])
def test_files_with_nothing_to_count(text):
    assert places(text)[0] == []


def test_where_tokens_end(tokens):
    tokenizer = Tokenizer(tokens)
    text = "def f(ü):\n    return '漢😀', \u2581, '  '\n"
    ids = tokenizer.encode(text)
    ends = piece_bytes(tokenizer, ids, text)
    whole = {len(text[:i].encode()): text[:i] for i in range(len(text) + 1)}
    for i, end in enumerate(ends.tolist()):
        if end in whole:  # not within a character
            assert tokenizer.decode(ids[: i + 1]) == whole[end]
    assert ends[-1] == len(text.encode())


@pytest.fixture
def run(tokens, tmp_path):
    """A run folder, and documents that use os and re."""
    shape = ModelConfig(vocab_size=512, seq_len=32, n_layer=1, n_head=2, width=16, mlp_width=32,
                        rotary_dim=8)  # fmt: skip
    save_run(tmp_path / "run", Phi(shape), Tokenizer(tokens))
    (tmp_path / "code").mkdir()
    with ShardWriter(tmp_path / "code") as writer:
        for i in range(6):
            text = f"import os\nimport re\nn = {i}\nos.getcwd()\nos.getcwd()\nos.getpid()\nre.sub\n"
            writer.write(document(text, f"x:{i}"))
    return tmp_path


def answers(wrong):
    """A predict() that is right everywhere but where wrong(text ids, i) gives another token."""

    def predict(model, end_of_text, texts, label):
        for ids in texts:
            likeliest = np.array([*ids, end_of_text])
            for i in range(len(likeliest)):
                other = wrong(ids, i)
                likeliest[i] = likeliest[i] if other is None else other
            yield np.full(len(ids), np.log(2), np.float32), likeliest

    return predict


def test_right_is_the_whole_name_and_its_end(run, tokens, monkeypatch):
    tokenizer = Tokenizer(tokens)
    letter = tokenizer.encode("s")[-1]
    config = Config(run / "code", run / "out.json", run / "run")
    monkeypatch.setattr(library, "predict", answers(lambda ids, i: None))
    result = score(config)
    assert result["right_frac"] == 1
    assert result["places"] == 24
    assert result["documents"] == 6
    assert result["libraries"]["os"]["places"] == 18
    assert result["name_bits_per_byte"]["value"] > 0

    def longer(ids, i):  # every name is made longer: re.subs
        before = tokenizer.decode(ids[:i])
        return letter if before.endswith(("re.sub", "getpid")) else None

    monkeypatch.setattr(library, "predict", answers(longer))
    assert score(config)["libraries"]["re"]["right_frac"] == 0
    assert score(config)["libraries"]["os"]["right_frac"] == pytest.approx(2 / 3)

    def wrong_inside(ids, i):
        before = tokenizer.decode(ids[:i])
        return letter if before.endswith("os.getp") or before.endswith("os.ge") else None

    monkeypatch.setattr(library, "predict", answers(wrong_inside))
    assert score(config)["libraries"]["re"]["right_frac"] == 1
    assert score(config)["libraries"]["os"]["right_frac"] < 1

    end = tokenizer.end_of_text
    monkeypatch.setattr(library, "predict", answers(lambda ids, i: end))
    assert score(config)["right_frac"] == 0


def test_the_baseline_is_what_is_usual_elsewhere(run, monkeypatch, cli):
    usage = run / "usage.json"
    done = cli("-m", "eval.library", "--source", run / "code", "--out", usage)
    assert done.returncode == 0, done.stderr
    counted = json.loads(usage.read_text())
    assert counted == count(Config(run / "code", usage))
    assert counted["modules"] == {"os": {"getcwd": 12, "getpid": 6}, "re": {"sub": 6}}
    out = run / "out.json"
    done = cli("-m", "eval.library", "--checkpoint", run / "run", "--source", run / "code",
               "--usage", usage, "--out", out)  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["baseline_frac"] == pytest.approx(18 / 24)
    assert result["libraries"]["os"]["baseline_frac"] == pytest.approx(2 / 3)
    assert 0 <= result["ci95"][0] <= result["right_frac"] <= result["ci95"][1] <= 1


def test_bits_are_of_the_tokens_of_names_and_imports(run, monkeypatch):
    monkeypatch.setattr(library, "predict", answers(lambda ids, i: None))  # each token is one bit
    result = score(Config(run / "code", run / "out.json", run / "run"))
    tokenizer = Tokenizer(run / "run" / "checkpoints" / "step-00000001")
    text = "import os\nimport re\n"
    per_byte = len(tokenizer.encode(text)) / len(text)
    assert result["import_bits_per_byte"]["value"] == pytest.approx(per_byte, rel=0.3)
