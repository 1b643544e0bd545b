import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_run

from common.config import UserError
from common.files import read_documents, read_jsonl, shard_files
from data.base.ast_match import functions, match_rate
from data.base.benchmarks import read_references
from data.base.documents import document
from data.base.features import Hidden, Lexical
from data.decontaminate import Config, Finder, decontaminate, ngrams
from model import ModelConfig, Phi
from tokenizer import Tokenizer

MPIRUN = Path(sys.executable).with_name("mpirun")
ROOT = Path(__file__).parents[2]

LONG = '''def running_balance(entries, limit):
    """Return the largest balance that is reached before the account is closed because the sum
    of all its entries went over the limit for a second time in a row.
    """
'''
LONG_BODY = """    balance = best = over = 0
    for entry in entries:
        balance += entry
        if balance > limit:
            over += 1
            if over == 2:
                break
        else:
            over = 0
        best = max(best, balance)
    return best
"""
SHORT = 'def vowels_in(text):\n    """Count the vowels of a text."""\n'
SHORT_BODY = '    return sum(c in "aeiou" for c in text)\n'
PROBLEMS = [
    {"task_id": "T/0", "prompt": LONG, "canonical_solution": LONG_BODY,
     "entry_point": "running_balance", "test": ""},
    {"task_id": "T/1", "prompt": SHORT, "canonical_solution": SHORT_BODY,
     "entry_point": "vowels_in", "test": ""},
    {"task_id": "T/2", "prompt": "def helper(x):\n    return x\n\n\ndef last(x):\n",
     "canonical_solution": "    while x and x[-1] is None:\n        x = x[:-1]\n    return x\n",
     "entry_point": "last", "test": ""},
]  # fmt: skip

RENAMED = """def f(items, top):
    '''Nothing of the kind.'''
    a = b = c = 0
    for i in items:
        a += i
        if a > top:
            c += 1
            if c == 2:
                break
        else:
            c = 0
        b = max(b, a)
    return b
"""
SHORT_NEAR = """def count_vowels(s):
    '''Count the vowels in s.'''
    return sum(c in "aeiou" for c in s)
"""
SHORT_FAR = """def truths(rows):
    '''How many rows are old.'''
    return sum(r in "abc" for r in rows)
"""
STATEMENT = (
    "# The largest balance that is\n# reached, before the account: IS CLOSED because the_sum\n"
    "def g():\n    return 1\n"
)
OTHER = 'def area(width, height):\n    """Multiply."""\n    return width * height\n'
DOCUMENTS = {
    "renamed": RENAMED,
    "short near": SHORT_NEAR,
    "short far": SHORT_FAR,
    "statement": STATEMENT,
    "method": "class A:\n" + "".join(f"    {line}\n" for line in RENAMED.splitlines()),
    "markdown": f"How it works:\n\n```python\n{RENAMED}```\n\nThat is all, isn't it.\n",
    "one edit": RENAMED.replace("c += 1", "c -= 1"),
    "many edits": RENAMED.replace("c += 1", "c -= i * 3").replace("max(b, a)", "b or a[0]"),
    "other": OTHER,
    "no python": "Plain text, and nothing else.",
}


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    path.write_text("".join(json.dumps(p) + "\n" for p in PROBLEMS))
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The documents, five to a shard."""
    folder = tmp_path_factory.mktemp("documents")
    lines = [json.dumps(document(text, name)) + "\n" for name, text in DOCUMENTS.items()]
    for i in range(2):
        (folder / f"part-{i}.jsonl").write_text("".join(lines[5 * i : 5 * i + 5]))
    return folder


@pytest.fixture(scope="module")
def out(source, problems, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "clean"
    decontaminate(Config(source=(source,), benchmarks=(problems,), out=out, near_frac=0.0))
    return out


def kept(folder):
    return {d["origin"] for d in read_documents([folder])}


def removed(folder):
    return {d["origin"]: d for f in shard_files(folder / "removed") for d in read_jsonl(f)}


def test_what_is_removed_and_why(out):
    gone = removed(out)
    assert gone.keys() == {"renamed", "short near", "statement", "method", "markdown", "one edit"}
    assert kept(out) == DOCUMENTS.keys() - gone.keys()
    assert {name: d["task_id"] for name, d in gone.items()} == {
        name: "T/1" if name == "short near" else "T/0" for name in gone
    }
    assert gone["renamed"]["match_rate"] == gone["method"]["match_rate"] == 1
    assert 0.95 <= gone["one edit"]["match_rate"] < 1
    words = "the largest balance that is reached before the account is closed because the"
    assert gone["statement"]["words"] == words
    assert gone["statement"]["match_rate"] == 0
    assert gone["renamed"]["words"] == ""
    for record in read_documents([out]):
        assert record == document(DOCUMENTS[record["origin"]], record["origin"])


def test_the_table(out):
    s = json.loads((out / "summary.json").read_text())
    assert s["tau"]["0.95"] == {"removed": 5, "syntax_alone": 6, "problems_similar": 2}
    assert s["tau"]["0.8"]["removed"] == 6  # many edits
    assert (s["documents_in"], s["documents"], s["removed"], s["by_ngram"]) == (10, 4, 6, 1)
    assert (s["problems"], s["problems_without_ngram"], s["no_python"]) == (3, 2, 1)
    lines = list(read_jsonl(out / "report" / "problems.jsonl"))
    assert [p["task_id"] for p in lines] == ["T/0", "T/1", "T/2"]
    assert [p["close"]["0.95"] for p in lines] == [4, 1, 0]
    assert lines[0]["nearest"]["words"]
    assert lines[1]["nearest"]["origin"] == "short near"
    assert lines[2]["nearest"] is None
    pairs = (out / "report" / "pairs.txt").read_text()
    assert "def vowels_in(text):" in pairs
    assert "| def count_vowels(s):" in pairs
    assert "| # reached, before the account: IS CLOSED because the_sum" in pairs


@pytest.mark.parametrize(
    ("options", "more", "less"),
    [
        ({"tau": 0.8}, {"many edits"}, set()),
        ({"tau": 1.0}, set(), {"one edit"}),
        ({"ngram": 0}, set(), {"statement"}),
        ({"sure_nodes": 1}, {"short far"}, set()),
        ({"sure_nodes": 1000}, set(), {"renamed", "method", "markdown", "one edit"}),
    ],
)
def test_options(out, source, problems, tmp_path, options, more, less):
    options = {"near_frac": 0.0, **options}
    decontaminate(Config(source=(source,), benchmarks=(problems,), out=tmp_path / "o", **options))
    assert removed(tmp_path / "o").keys() == removed(out).keys() - less | more


def test_a_rate_of_tau_is_too_close(out, source, problems, tmp_path):
    (a,), (b,) = functions(LONG + LONG_BODY), functions(DOCUMENTS["one edit"])
    rate = match_rate(a.nodes, b.nodes)
    config = Config(source=(source,), benchmarks=(problems,), out=tmp_path / "o", tau=rate)
    summary = decontaminate(config)
    assert "one edit" in removed(tmp_path / "o")
    assert summary["tau"][f"{rate:g}"]["removed"] == 5


def test_near_is_measured_on_the_problems(source, problems, tmp_path):
    config = Config(source=(source,), benchmarks=(problems,), out=tmp_path, near_frac=0.0)
    unrelated = Finder(config, read_references(problems))
    assert unrelated.near == 1.2
    alike = read_references(problems)[1]
    text = alike.function.text.replace("vowels", "consonants")
    others = [alike, replace(alike, function=replace(alike.function, text=text))]
    finder = Finder(config, [*read_references(problems), *others])
    assert finder.near == pytest.approx(0, abs=1e-3)
    assert Finder(replace(config, near_frac=1.0), others).near == pytest.approx(
        Lexical([o.function.text for o in others]).distances([text])[0, 0]
    )
    assert Finder(config, others[:1]).near == 1.2


def files(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in ("timing.json", "lineage.json")  # inputs' paths
    }


@pytest.mark.skipif(not MPIRUN.exists(), reason="needs mpirun beside python")
def test_ranks_write_the_same_bytes(out, source, problems, tmp_path):
    done = subprocess.run(
        [MPIRUN, "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "-m",
         "mpi4py", "-m", "data.decontaminate", "--source", source, "--out", tmp_path / "two",
         "--benchmarks", problems, "--near_frac", "0"],
        cwd=ROOT, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert " 0.95         5  50.00%                 6        2 / 1\n" in done.stdout
    assert done.stdout.count("4 of 10 documents") == 1
    assert files(tmp_path / "two") == files(out)


def test_distance_by_a_checkpoint(source, problems, tokens, tmp_path):
    torch.manual_seed(0)
    model = Phi(ModelConfig(vocab_size=512, seq_len=64, n_layer=1, n_head=2, width=32,
                            mlp_width=64, rotary_dim=8))  # fmt: skip
    folder = save_run(tmp_path / "run", model, Tokenizer(tokens))
    texts = [RENAMED, OTHER, RENAMED, OTHER * 20]
    hidden = Hidden(folder, [OTHER], "cpu")
    vectors = hidden.vectors(texts)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(4))
    assert vectors[0] == pytest.approx(vectors[2], abs=1e-6)
    # By hand: the mean over all tokens of what the final LayerNorm gives.
    ids = [hidden.tokenizer.end_of_text, *hidden.tokenizer.encode(OTHER)]
    states = []
    model.eval().ln_f.register_forward_hook(lambda module, args, output: states.append(output))
    model(torch.tensor([ids]))
    mean = states[0][0].mean(0)
    assert vectors[1] == pytest.approx((mean / mean.norm()).detach().numpy(), abs=1e-5)
    distances = hidden.distances(texts)
    assert distances[1, 0] == pytest.approx(0, abs=1e-3)
    assert distances[0, 0] == pytest.approx(np.linalg.norm(vectors[0] - vectors[1]), abs=1e-3)
    summary = decontaminate(
        Config(source=(source,), benchmarks=(problems,), out=tmp_path / "o", near_frac=1.0,
               checkpoint=str(tmp_path / "run"), device="cpu")
    )  # fmt: skip
    assert summary["distance"] == "hidden states"
    assert summary["tau"]["0.95"]["removed"] >= 4


def test_lexical_distance():
    texts = ["def is_even(n): return n", "def isEven(n): return n", "class Tree: pass", ""]
    lexical = Lexical([texts[0], texts[2]])
    distances = lexical.distances(texts)
    assert distances[[0, 1], 0] == pytest.approx([0, 0], abs=1e-3)
    assert distances[[2, 3], 0] == pytest.approx([2**0.5] * 2, abs=1e-3)
    near, far = lexical.distances(["def is_even(n): return n, elephant", "def even(k): elephant"])[
        :, 0
    ]
    assert 0 < near < far < 2**0.5


def test_ngrams_are_of_words():
    assert list(ngrams("One, two_THREE: 4", 3)) == [("one", "two", "three"), ("two", "three", "4")]
    assert list(ngrams("one two", 3)) == []


def test_problem_files(tmp_path, shared_eval):
    for name, count in (("HumanEval.jsonl.gz", 164), ("mbpp.jsonl", 974),
                        ("sanitized-mbpp.json", 427)):  # fmt: skip
        found = read_references(shared_eval / name)
        assert len({p.task_id for p in found}) == len(found) == count
        assert all(len(p.docstring) > 15 and p.function.nodes for p in found)
    (first, *_) = read_references(shared_eval / "mbpp.jsonl")
    assert (first.task_id, first.function.name) == ("MBPP/1", "min_cost")
    assert first.function.nodes == functions(first.function.text)[0].nodes


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"task_id": 1}'),
        ("a.jsonl", '{"task_id": 1, "entry_point": "f", "prompt": "f(", "canonical_solution": ""}'),
        ("a.jsonl", '{"task_id": 1, "entry_point": "f", "prompt": "", "canonical_solution": ""}'),
        ("a.jsonl", "no json"),
        ("a.json", "[1]"),
        ("a.json", "{"),
    ],
)
def test_what_is_no_problem_file(source, tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match=name):
        decontaminate(Config(source=(source,), benchmarks=(path,), out=tmp_path / "o"))


def test_errors(source, problems, tmp_path):
    config = {"source": (source,), "benchmarks": (problems,), "out": tmp_path / "o"}
    for bad, match in (
        ({"tau": 0.2}, "tau"),
        ({"ngram": -1}, "ngram"),
        ({"benchmarks": (tmp_path / "none.jsonl",)}, "none.jsonl"),
        ({"benchmarks": (tmp_path / "none.json",)}, "none.json"),
        ({"checkpoint": str(tmp_path / "none")}, "none"),
        ({"source": (tmp_path / "none",)}, "none"),
    ):
        with pytest.raises(UserError, match=match):
            decontaminate(Config(**{**config, **bad}))
    assert not (tmp_path / "o").exists()
