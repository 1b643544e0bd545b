import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from test_similarity import evaluation

from eval import compare
from eval.compare import TABLE_1


@pytest.fixture
def command(in_process):
    return lambda *arguments: in_process(compare.main, *arguments)


@pytest.fixture
def folder(tmp_path):
    """Benchmarks of one checkpoint, MBPP in two protocols; another model; other problems."""
    run_ = tmp_path / "run"
    run_.mkdir()
    (run_ / "summary.json").write_text(json.dumps({"parameters": 1234567}))
    top = tmp_path / "eval"
    half = {"a": [True], "b": [False]}
    evaluation(top / "1", half, str(run_))
    evaluation(top / "2", half, str(run_), "MBPP")
    evaluation(top / "3", {"a": [True], "b": [True]}, str(run_), "MBPP sanitized")
    evaluation(top / "4", half, "<b>peer</b>")
    evaluation(top / "5", {"a": [True]}, str(run_), "judge")
    return top


def test_rows(command, folder):
    status, stdout, stderr = command(folder, "--json")
    assert status == 0, stderr
    rows = json.loads(stdout)
    ours = [r for r in rows if r["source"] == "ours"]
    assert len(rows) == len(ours) + len(TABLE_1)
    assert [{"HumanEval", "MBPP"} & r.keys() for r in ours] == [
        {"HumanEval", "MBPP"},
        {"MBPP"},
        {"HumanEval"},
    ]
    assert ours[1]["MBPP"]["percent"] == 100
    assert ours[1]["MBPP"]["how"] == "MBPP sanitized, function body, 2 problems"
    assert ours[0]["HumanEval"]["low"] < 50 < ours[0]["HumanEval"]["high"]


def test_text(command, folder):
    stdout = command(folder / "1", folder / "5")[1]
    ours, paper = stdout.split("the paper, Table 1")
    assert "50.0 (" in ours
    assert "phi-1" not in ours
    assert re.search(r"^phi-1 +50\.6 +55\.5$", paper, re.MULTILINE)
    assert "judge" in paper.split("compare with nothing above")[1]


def test_page(command, folder, tmp_path):
    out = tmp_path / "deep" / "compare.html"
    assert command(folder, "--out", out)[0] == 0
    html = out.read_text()
    assert "<b>peer" not in html  # a name is text
    assert "1,234,567" in html
    assert not re.search(r"<script|<link|\bsrc=|href=.?http|url\(http", html)  # it stands alone
    drawings = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(drawings) == 2
    for svg, benchmark in zip(drawings, compare.BENCHMARKS):
        text = "".join(ElementTree.fromstring(svg).itertext())
        assert benchmark in text
        assert "(ours)" in text
        assert "StarCoder-Prompted" in text
    assert "CodeGen2-7B" in drawings[0]
    assert "CodeGen2-7B" not in drawings[1]  # the paper has no MBPP of it


def test_the_papers_numbers(shared_eval):
    page = shared_eval.parent / "docs" / "phi-1.md"
    if not page.exists():
        pytest.skip("no page with the paper's numbers")
    text = " ".join(page.read_text().split())
    peers = text[text.index("Peers in Table 1:") : text.index("Unconventional problems")]
    found = re.findall(r"[ ]([A-Z][\w.+ -]*?) ([\d.]+)/([\d.]+|-)", peers.split(":")[1])
    assert len(found) == 20
    for name, *scores in found:
        assert TABLE_1[name] == tuple(None if s in "-" else float(s.rstrip(".")) for s in scores)


def test_errors(command, tmp_path):
    assert "at least one" in command()[2]
    assert "no results.json" in command(tmp_path)[2]
    assert "no results.json" in command(Path("nowhere"))[2]
