import json

import numpy as np
import pytest
from conftest import save_run

import eval.library as library
from data.base.documents import ShardWriter, document
from eval.library import Config, piece_ends, places, score
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


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_which_attributes_count(end):
    found, code = places(CODE.replace("\n", end)), CODE.replace("\n", end).encode()
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
    assert all(code[p.start : p.end].decode() == p.name for p in found)


@pytest.mark.parametrize("text", ["def (", "", "x = 1\n", "import os\nos = 1\nos.path\n"])
def test_files_with_nothing_to_count(text):
    assert places(text) == []


def test_where_tokens_end(tokens):
    tokenizer = Tokenizer(tokens)
    text = "def f(ü):\n    return '漢😀', \u2581, '  '\n"
    ids = tokenizer.encode(text)
    ends = piece_ends(tokenizer, ids, text)
    whole = {len(text[:i].encode()): text[:i] for i in range(len(text) + 1)}
    for i, end in enumerate(ends.tolist()):
        if end in whole:  # not within a character
            assert tokenizer.decode(ids[: i + 1]) == whole[end]
    assert ends[-1] == len(text.encode())


@pytest.fixture(scope="module")
def run(cli, tokens, tmp_path_factory):
    """A run folder, documents that use os and re, and counts of what they use."""
    folder = tmp_path_factory.mktemp("library")
    shape = ModelConfig(vocab_size=512, seq_len=32, n_layer=1, n_head=2, width=16, mlp_width=32,
                        rotary_dim=8)  # fmt: skip
    save_run(folder / "run", Phi(shape), Tokenizer(tokens))
    (folder / "code").mkdir()
    with ShardWriter(folder / "code") as writer:
        for i in range(6):
            text = f"import os\nimport re\nn = {i}\nos.getcwd()\nos.getcwd()\nos.getpid()\nre.sub\n"
            writer.write(document(text, f"x:{i}"))
    usage = folder / "usage.json"
    done = cli("-m", "eval.library", "--source", folder / "code", "--out", usage)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_baseline_is_what_is_usual_elsewhere(run, cli):
    counted = json.loads((run / "usage.json").read_text())
    assert counted == {"os": {"getcwd": 12, "getpid": 6}, "re": {"sub": 6}}
    out = run / "out.json"
    done = cli("-m", "eval.library", "--checkpoint", run / "run", "--source", run / "code",
               "--usage", run / "usage.json", "--out", out)  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["places"] == 24
    assert result["baseline_frac"] == pytest.approx(18 / 24)
    assert 0 <= result["ci95"][0] <= result["right_frac"] <= result["ci95"][1] <= 1


@pytest.mark.parametrize(
    ("before", "other", "low", "high"),
    [
        ((), "", 1, 1),
        (("re.sub", "getpid"), "s", 12 / 24, 12 / 24),  # these names are made longer
        (("os.getp", "os.ge"), "s", 6 / 24, 23 / 24),  # wrong inside some; re.sub is right
        (("",), None, 0, 0),
    ],
)
def test_right_is_the_whole_name_and_its_end(run, tokens, monkeypatch, before, other, low, high):
    """A model that is right everywhere but behind a text that ends with `before`."""
    tokenizer = Tokenizer(tokens)
    other = tokenizer.encode(other)[-1] if other else tokenizer.end_of_text

    def predict(model, end_of_text, texts):
        for ids in texts:
            likeliest = np.array([*ids, end_of_text])
            for i in range(len(likeliest)):
                if before and tokenizer.decode(ids[:i]).endswith(before):
                    likeliest[i] = other
            yield np.zeros(len(ids), np.float32), likeliest

    monkeypatch.setattr(library, "predict", predict)
    result = score(Config(run / "code", run / "o.json", run / "run", run / "usage.json"))
    assert low <= result["right_frac"] <= high
