"""The data path from a raw file to token shards, with damage planted."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from test_annotate import reply

from common.files import read_documents
from data.annotate import QUESTIONS
from data.base.documents import document
from data.shards import open_shard
from tests.fake_endpoint import FakeEndpoint
from tokenizer import Tokenizer

GOOD = 40

PROBLEM = '''def settle(entries, limit):
    """The highest standing before two entries in a row leave it above the limit."""
'''
SOLUTION = """    best = standing = above = 0
    for entry in entries:
        standing += entry
        if standing > limit:
            above += 1
            if above == 2:
                break
        else:
            above = 0
        best = max(best, standing)
    return best
"""
LEAK = PROBLEM.replace("settle(entries, limit)", "level(xs, top)").replace("highest", "topmost") + (
    SOLUTION.replace("entries", "xs").replace("entry", "x").replace("limit", "top")
)
STEPS = """total += x * {k}; total -= x // {k}; seen.append(x + {k}); total = max(total, x)
total ^= {k}; count += x % {k} == 0; seen.insert(0, total); x = abs(x) + {k}"""
STEPS = STEPS.replace("\n", "; ").split("; ")
NAMES = ["apple", "bread", "candle", "door", "engine", "flower", "garden", "hammer"]


def teaching(i: int) -> str:
    """A documented function like no other: its steps are drawn."""
    draw = random.Random(i)
    body = "".join(
        f"        {draw.choice(STEPS).format(k=draw.randint(2, 99))}\n" for _ in range(9)
    )
    told = " ".join(draw.sample(NAMES, 6))
    return (
        f'def {draw.choice(NAMES)}_{i}(numbers):\n    """Fold the {told} of the numbers.\n\n'
        f'    {" ".join(draw.choices(NAMES, k=9))}\n    """\n    total, count, seen = {i}, 0, []\n'
        f"    for x in numbers:\n{body}    return total + count + len(seen)\n"
    )


def write_raw(path: Path) -> None:
    """40 documents that teach, and what a corpus has besides: see the test for the counts."""
    texts = [teaching(i) for i in range(GOOD)]
    near = [t.replace("return total", "return 1 + total") for t in texts[:6]]
    glue = [f"from .{w} import {w}\n\n{w.upper()} = {w}({i})\n" for i, w in enumerate(NAMES)]
    records = [document(t, f"planted:{i}") for i, t in enumerate([*texts, *near, *glue, LEAK])]
    lines = [json.dumps(r) for r in records] + [json.dumps(r) for r in records[:4]]
    lines += ['{"text": "cut short', '"no object"', "[" * 5000, '{"text": "a\\ud800b"}',
              '{"text": "a\\u0000b"}', '{"id": 3}']  # fmt: skip
    random.Random(0).shuffle(lines)
    path.write_text("\n".join(lines) + "\n")


def commands(root: Path, raw: Path, problems: Path, url: str) -> list[list]:
    """The stages, in order; each reads what the one before wrote."""
    names = "raw labels forest scored kept unique clean tok tokens"
    at = {name: root / name for name in names.split()}
    return [
        ["data.collect", "--source", raw, "--out", at["raw"]],
        ["data.annotate", "--source", at["raw"], "--out", at["labels"], "--labeller", "llm",
         "--model", "m", "--base_url", url, "--budget_tokens", 10**9, "--concurrency", 3,
         "--cache", root / "replies.jsonl", "--backoff_s", 0.001, "--timeout_s", 0.5],
        ["data.classify", "train", "--source", at["labels"], "--out", at["forest"], "--trees", 20],
        ["data.classify", "score", "--source", at["labels"], "--forest", at["forest"],
         "--out", at["scored"]],
        ["data.filter", "--source", at["scored"], "--out", at["kept"], "--rules=false",
         "--min_quality", 0.5],
        ["data.dedup", "--source", at["kept"], "--out", at["unique"]],
        ["data.decontaminate", "--source", at["unique"], "--out", at["clean"],
         "--benchmarks", problems],
        ["tokenizer.train", "--source", at["clean"], "--out", at["tok"], "--vocab_size", 512],
        ["data.pack", "--source", at["clean"], "--tokenizer", at["tok"], "--out", at["tokens"],
         "--val_frac", 0.2],
    ]  # fmt: skip


def finish(command: list) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENAI_API_KEY": "x"}
    command = [sys.executable, "-m", *map(str, command)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def answer(request: dict) -> str:
    """High marks for what has a loop, as the planted good ones have."""
    content = request["messages"][0]["content"]
    return reply([2 if "for x in" in content else 0 for _ in QUESTIONS])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The folder of a run of all stages."""
    root = tmp_path_factory.mktemp("whole")
    raw, problems = root / "code.jsonl", root / "problems.jsonl"
    write_raw(raw)
    row = {"task_id": "T/0", "prompt": PROBLEM, "canonical_solution": SOLUTION,
           "entry_point": "settle", "test": "def check(candidate):\n    assert True\n"}  # fmt: skip
    problems.write_text(json.dumps(row) + "\n")
    with FakeEndpoint(answer, max_faults=2) as endpoint:
        for command in commands(root, raw, problems, endpoint.url):
            finish(command)
        assert endpoint.met.total() > 20, "an endpoint that behaves"
    return root


def test_what_was_planted_is_found_and_the_rest_is_packed(root):
    summaries = {p.parent.name: json.loads(p.read_text()) for p in root.glob("*/summary.json")}
    assert sum(summaries["raw"]["quarantined"].values()) == 6
    assert summaries["raw"]["left_out"]["duplicate"] == 4
    good = {f"planted:{i}" for i in range(GOOD)}
    near = {f"planted:{i}" for i in range(GOOD, GOOD + 6)}
    leak = f"planted:{GOOD + 6 + len(NAMES)}"

    def found(name: str) -> set[str]:
        return {r["origin"] for r in read_documents([root / name])}

    assert found("raw") >= good | near | {leak}
    assert found("kept") == good | near | {leak}, "the glue is gone"
    assert len(found("unique") & (good | near)) == GOOD, "one of each pair"
    assert found("clean") == found("unique") - {leak}
    tokenizer = Tokenizer(root / "tok")
    of = tokenizer.vocab_size, tokenizer.fingerprint
    ids = np.concatenate([open_shard(p, *of) for p in (root / "tokens").glob("*.bin")])
    texts = sorted(t for t in tokenizer.decode(ids.tolist()).split("def ") if t)
    assert len(texts) == GOOD
