"""The whole job through make, at a size that takes a minute."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

SMALL = ["RAW_MB=2", "EXERCISES=1500", "HELDOUT=40", "BASE_STEPS=2", "FINETUNE_STEPS=3"]


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "demo"

    def call(*args):
        command = ["make", "--no-print-directory"]
        command += [f"OUT={out}", f"PYTHON={sys.executable}", *SMALL, *args]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MAKEFLAGS": "", "MAKELEVEL": "0"}
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)

    call.out = out
    return call


def test_train_makes_a_report_and_then_has_nothing_to_do(make):
    first = make("train")
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    lines = first.stdout.strip().splitlines()
    assert lines[-1] == f"report: {make.out}/report.html"
    page = (make.out / "report.html").read_text()
    assert "filtered code, then exercises" in page
    assert page.count("<svg") == 2
    for outside in ('src="http', 'href="http', "@import", "url(http"):
        assert outside not in page.replace('xmlns:xlink="http', "")
    for arm in ("exercises", "pairs"):
        result = json.loads((make.out / "eval" / arm / "results.json").read_text())
        assert result["problems"] == 40
        assert 0 <= result["pass@1"] <= 0.2  # five steps teach nothing

    again = make("train")
    assert again.returncode == 0
    assert "python" not in again.stdout.lower(), again.stdout


def test_only_what_changed_is_made_again(make):
    # What make would run if a setting, the report, an evaluator, or the filter had changed.
    would = make("-n", "FINETUNE_STEPS=4", "train").stdout
    assert "--max_steps 4" in would
    assert "--max_steps 2" not in would
    assert "data.collect" in make("-n", "RAW_MB=1", "train").stdout
    for touched, runs, rests in [
        ("report.py", ["-m report"], ["train.py", "-m eval"]),
        ("eval/harness.py", ["-m eval.exercises", "-m report"], ["train.py"]),
        ("data/filter.py", ["-m data.filter", "-m tokenizer", "train.py"], ["-m data.collect"]),
    ]:
        would = make("-n", "-W", touched, "train").stdout
        assert all(word in would for word in runs), (touched, would)
        assert not any(word in would for word in rests), (touched, would)


def test_help_lists_every_target():
    text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    makefile = (ROOT / "Makefile").read_text()
    phony = makefile.split(".PHONY:")[1].split(".DELETE")[0].replace("\\", " ").split()
    for target in phony:
        assert f"\n{target} " in f"\n{text}", target


@pytest.mark.parametrize("command", [
    "data.collect", "data.filter", "data.pairs", "data.exercises", "data.pack", "tokenizer.train",
    "eval.exercises", "eval.humaneval", "eval.mbpp", "train", "sample", "report"])  # fmt: skip
def test_every_command_has_help_and_names_typos(cli, command):
    done = cli("-m", command, "--help")
    assert done.returncode == 0
    assert "default: " in done.stdout
    done = cli("-m", command, "--outt=x")
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown argument '--outt'")
