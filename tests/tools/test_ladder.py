"""Make a tiny ladder: kill it, resume it and report it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from conftest import ROOT

from tools.report import LABELS

MODEL = """vocab_size=512 seq_len=128 n_layer=1 n_head=2 width=16 mlp_width=32 rotary_dim=8
seqs_per_step=2 micro_batch=2 warmup_steps=2 eval_interval=50 eval_seqs=4 log_interval=10"""
SETTINGS = """base_steps=3 finetune_steps=297 raw_mb=0.35 heldout_mb=0.05 labels=60 textbooks=12
exercises=300 heldout=4 unseen=3 vocab_size=512 tokenizer_mb=0.05 val_frac=0.1 max_new_tokens=2
ranked=3 ranked_heldout=2 asked=heldout asked_limit=3 SANDBOX=C"""


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """make(target, setting, ...) starts make on a private ladder at make.out."""
    folder = tmp_path_factory.mktemp("ladder")
    (folder / "tiny.toml").write_text("\n".join(MODEL.split()))
    (folder / "code").mkdir()
    files = Path(sysconfig.get_path("stdlib")).glob("*.py")
    for file in sorted(p for p in files if 1_000 < p.stat().st_size < 9_000)[:60]:
        shutil.copy(file, folder / "code")
    bars = "bars := raw-tiny-s0 exercises-tiny-s0\n"
    (folder / "ladder.mk").write_text(f"include experiments/ladder_cpu/ladder.mk\n{bars}")
    words = ["make", f"PYTHON={sys.executable}", f"sources={folder}/code", f"LADDER_SET={folder}",
             f"LADDER={folder}/out", f"FIGURES={folder}/png", *SETTINGS.split()]  # fmt: skip

    def call(*more: str):
        return subprocess.Popen([*words, *more], cwd=ROOT, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True)  # fmt: skip

    call.out, call.png = folder / "out", folder / "png"
    return call


def left(make, *words: str) -> set[str]:
    """Return "MODULE FOLDER" of each command that make would run."""
    said, _ = make("-n", "ladder", *words).communicate(timeout=300)
    found = re.findall(r"-m (\S+) .*--out (\S+)", said)
    return {f"{module} {Path(out).relative_to(make.out)}" for module, out in found}


@pytest.fixture(scope="module")
def made(make) -> Path:
    """The folder of a ladder that was killed in training and resumed."""
    process = make("-j2", "ladder")
    run = make.out / "runs" / "raw-tiny-s0"
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    assert process.returncode
    assert not (run / "summary.json").exists()
    assert list((run / "checkpoints").glob("step-*"))  # it saved a checkpoint
    process = make("-j2", "ladder")
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said
    assert "resuming from step" in said
    assert "data.collect " not in said
    return make.out


def test_each_bar_is_trained_on_its_data(made):
    runs = {p.parent.name: json.loads(p.read_text()) for p in made.glob("runs/*/config.json")}
    assert sorted(runs) == ["base-tiny-s0", "exercises-tiny-s0", "raw-tiny-s0"]
    data = {name: Path(c["data"]).relative_to(made / "data/tokens") for name, c in runs.items()}
    assert [str(p) for _, p in sorted(data.items())] == ["textbooks", "exercises", "raw"]
    assert [c["max_steps"] for _, c in sorted(runs.items())] == [3, 297, 300]
    assert runs["exercises-tiny-s0"]["init_from"] == str(made / "runs" / "base-tiny-s0")
    for bar in ("raw-tiny-s0", "exercises-tiny-s0"):
        folder = made / "rungs" / bar
        found = [str(p.relative_to(folder)) for p in folder.glob("*/*.json")]
        gold = [f"gold/{x}.json" for x in ("documents", "heldout", "judge", "unseen")]
        assert sorted(found) == [*gold, "heldout/results.json"]
    lines = (made / "data/mutants/heldout.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert all("mutants" in json.loads(line) for line in lines)


def test_only_what_changed_is_made_again(made, make):
    assert left(make) == set()
    asked = {f"eval.humaneval rungs/{bar}-tiny-s0/heldout" for bar in ("raw", "exercises")}
    assert left(make, "max_new_tokens=3") == asked
    relabelled = left(make, "labels=50")
    assert {"data.filter data/classified", "train runs/base-tiny-s0"} <= relabelled
    assert not any("raw-tiny-s0" in command for command in relabelled)
    newer = left(make, "-W", str(made / "data/heldout_code/summary.json"))
    assert {command.split()[0] for command in newer} == {"eval.bits"}


def test_the_report_has_its_numbers(made, make):
    page = (made / "report.html").read_text()
    told = json.loads((make.png / "ladder.json").read_text())
    assert [m["name"] for m in told["rungs"]] == ["raw-tiny-s0", "exercises-tiny-s0"]
    for m in told["rungs"]:
        assert LABELS[m["rung"]] in page
        for name, file in (("bits", "documents"), ("gold_heldout", "heldout")):
            gold = json.loads((made / "rungs" / m["name"] / f"gold/{file}.json").read_text())
            assert m["scores"][name][0] == pytest.approx(gold["bits_per_byte"], rel=1e-4)
        assert sum(n for _, n in m["tokens"]) == 300 * 2 * 128
        summary = json.loads((made / "runs" / m["name"] / "summary.json").read_text())
        assert m["weights"] == summary["weights"]
    assert {p.stem for p in make.png.glob("*.png")} == {"exercises", "gold", "mutants"}


@pytest.mark.parametrize("bar", ["rawr-tiny-s0", "raw-huge-s0", "raw-tiny"])
def test_a_bar_that_cannot_be_is_named(make, bar):
    process = make("-n", "ladder", f"BAR={bar}")
    said, _ = process.communicate()
    assert process.returncode
    assert f"{bar} is no bar: want RUNG-SIZE-sSEED" in said


@pytest.mark.parametrize("name", ["ladder_cpu", "ladder_gpu"])
def test_the_ladders_that_come_with_it_are_sound(name, tmp_path):
    """Every rung has a bar and a label; without a benchmark the pruned rungs are skipped."""
    (tmp_path / "mbpp.jsonl").touch()
    words = ["make", "ladder-list", f"LADDER_SET=experiments/{name}", f"LADDER={tmp_path}"]
    rungs = []
    for more in ([f"MBPP={tmp_path}/mbpp.jsonl"], ["MBPP="]):
        said = subprocess.run([*words, *more], cwd=ROOT, env={**os.environ, "HUMANEVAL": ""},
                              capture_output=True, text=True, check=True).stdout  # fmt: skip
        runs = [Path(out).name for out in re.findall(r"^train .*--out (\S+)", said, re.MULTILINE)]
        rungs.append({run.split("-")[0] for run in runs})
    demo = {"shuffled", "raw_exercises"}
    assert rungs[0] == LABELS.keys() - demo
    assert rungs[1] == {r for r in rungs[0] if not r.startswith("pruned")}
