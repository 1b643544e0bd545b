"""A ladder in miniature, through its command: interrupted, gone on with, and one bar made again."""

import contextlib
import dataclasses
import io
import json
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from unittest import mock

import pytest
from conftest import ROOT

import tools.ladder_scores
from common.config import UserError, parse
from experiments import ladder

MODEL = """
vocab_size = 512
seq_len = 128
n_layer = 1
n_head = 2
width = 16
mlp_width = 32
rotary_dim = 8
seqs_per_step = 2
micro_batch = 2
warmup_steps = 2
eval_interval = 50
eval_seqs = 4
log_interval = 10
"""
SETTINGS = """
bars = ["raw tiny 0", "filtered tiny 0", "exercises tiny 0 7"]
base_steps = 3
finetune_steps = 297
raw_mb = 0.35
heldout_mb = 0.05
labels = 60
textbooks = 12
exercises = 300
heldout = 4
tokenizer_mb = 0.05
val_frac = 0.1
max_new_tokens = 2
robustness_limit = 1
sandbox = "C"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder of settings, and some small files of the standard library to be the raw code."""
    folder = tmp_path_factory.mktemp("ladder")
    (folder / "tiny.toml").write_text(MODEL)
    (folder / "code").mkdir()
    files = Path(sysconfig.get_path("stdlib")).glob("*.py")
    for file in sorted(p for p in files if 1_000 < p.stat().st_size < 9_000)[:60]:
        shutil.copy(file, folder / "code")
    source = f"source = [{json.dumps(str(folder / 'code'))}]"
    (folder / "ladder.toml").write_text(f"{SETTINGS}\n{source}\n")
    return folder


@pytest.fixture(scope="module")
def start(folder):
    """start(...): the process of a ladder in `folder`."""

    def call(*arguments):
        words = [sys.executable, "-m", "experiments.ladder", str(folder), *map(str, arguments)]
        return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                text=True)  # fmt: skip

    return call


@pytest.fixture(scope="module")
def made(folder, start) -> Path:
    """The folder of two bars, of which the first was stopped while it trained."""
    out = folder / "out"
    bars = ["--only=raw-tiny-s0", "--only=exercises-tiny-s0"]
    process = start("--out", out, "--jobs=2", *bars)
    metrics = out / "runs" / "raw-tiny-s0" / "metrics.jsonl"
    until = time.monotonic() + 300
    while not metrics.exists() or not metrics.read_text():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert not (metrics.parent / "summary.json").exists()
    assert list((metrics.parent / "checkpoints").glob("step-*"))  # it saved
    process = start("--out", out, "--jobs=2", *bars)
    _, said = process.communicate(timeout=500)
    assert process.returncode == 0, said
    log = (out / "logs" / "raw-tiny-s0.log").read_text()
    assert "resuming from step" in log
    return out


def said_by_list(folder, *arguments) -> str:
    """What --list prints, in this process: it imports torch once."""
    said = io.StringIO()
    words = ["experiments.ladder", str(folder), "--list", *map(str, arguments)]
    with mock.patch.object(sys, "argv", words), contextlib.redirect_stdout(said):
        ladder.main()
    return said.getvalue()


def listed(folder, *arguments) -> dict[str, str]:
    """{job: done or to do} of --list."""
    lines = said_by_list(folder, *arguments).splitlines()
    return {line[9:41].strip(): line[:8].strip() for line in lines}


def test_a_rung_says_what_it_is_and_cost(made):
    rungs = {p.parent.name: json.loads(p.read_text()) for p in made.glob("rungs/*/rung.json")}
    assert sorted(rungs) == ["exercises-tiny-s0", "raw-tiny-s0"]
    assert {r["tokens"] for r in rungs.values()} == {300 * 2 * 128}
    assert len({r["flops"] for r in rungs.values()}) == 1
    assert len({r["weights"] for r in rungs.values()}) == 2
    both = rungs["exercises-tiny-s0"]
    assert both["runs"] == ["runs/base-tiny-s0", "runs/exercises-tiny-s0"]
    summaries = [json.loads((made / r / "summary.json").read_text()) for r in both["runs"]]
    assert both["train_s"] == pytest.approx(sum(s["trained_s"] for s in summaries), abs=0.1)
    config = json.loads((made / "runs/exercises-tiny-s0/config.json").read_text())
    assert config["init_from"] == str(made / "runs/base-tiny-s0")
    for name, rung in rungs.items():
        assert rung["scores"].keys() >= {"heldout", "bits", "library"}
        assert rung["scores"]["bits"] > 1
        assert f"--only {name}" in rung["command"]


def test_no_rung_is_trained_on_what_is_held_out(made):
    from common.files import read_documents
    from data.classify import group

    def packages(name: str) -> set[str]:
        return {group(d["origin"]) for d in read_documents([made / "data" / name])}

    heldout = packages("heldout_code")
    assert heldout
    for name in ("raw", "classified"):
        assert not heldout & packages(name), name


def test_then_there_is_nothing_to_do(made, start, folder):
    bars = ["--only=raw-tiny-s0", "--only=exercises-tiny-s0"]
    process = start("--out", made, *bars)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 0
    assert "+ python" not in said
    assert set(listed(folder, "--out", made, *bars).values()) == {"done", "skipped"}


def test_a_changed_setting_redoes_what_depends_on_it(made, folder):
    bars = ["--only=raw-tiny-s0", "--only=exercises-tiny-s0"]

    def to_do(*changed) -> set[str]:
        jobs = listed(folder, "--out", made, *bars, *changed)
        return {name for name, state in jobs.items() if state == "to do"}

    def of(bar: str) -> set[str]:
        scores = ("heldout", "robustness", "bits", "library", "rung")
        return {bar, *(f"{bar} {score}" for score in scores)}

    raw, both = of("raw-tiny-s0"), of("exercises-tiny-s0")
    assert to_do("--base_steps=2") == {"base-tiny-s0", *raw, *both}
    assert to_do("--keep_frac=0.5") == {
        "classified", "tokens/textbooks", "base-tiny-s0", *both
    }  # fmt: skip
    assert to_do("--finetune_options=--lr=1e-4") == both
    assert {"raw-tiny-s0", "usage", "scored"} <= to_do("--raw_mb=0.3")
    assert to_do("--max_new_tokens=3") == {
        f"{rung}-tiny-s0 {what}"
        for rung in ("raw", "exercises")
        for what in ("heldout", "robustness", "rung")
    }
    assert not to_do("--jobs=1", "--bars=raw tiny 0", "--bars=exercises tiny 0")


def test_one_bar_from_nothing_is_the_same_bit_for_bit(made, start, folder):
    command = json.loads((made / "rungs/raw-tiny-s0/rung.json").read_text())["command"]
    start_of, words = command.split(f" {folder} ", 1)
    assert start_of == "python -m experiments.ladder"
    words = shlex.split(words)
    *_, name, _, _, _, record = words
    process = start(*words, "--out", folder / "again")
    said, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    rows = [line.split() for line in said.splitlines()]
    assert {row[0]: row[-1] for row in rows} == dict.fromkeys(
        ("weights", "heldout", "bits", "library"), "same"
    )
    again = folder / "again" / "data"
    for tokens in ("train_00000.bin", "val_00000.bin"):
        mine = (made / "data/tokens/raw" / tokens).read_bytes()
        assert (again / "tokens/raw" / tokens).read_bytes() == mine

    wrong = json.loads(Path(record).read_text())
    wrong["scores"]["bits"] += 1e-9
    (folder / "wrong.json").write_text(json.dumps(wrong))
    process = start("--only", name, "--out", folder / "again", "--check", folder / "wrong.json")
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "DIFFERS" in said


def test_pruned_rungs_need_benchmarks(folder):
    jobs = listed(folder, "--out", folder / "none", "--bars=pruned80 tiny 0", "--bars=raw tiny 0")
    assert "raw-tiny-s0 rung" in jobs
    said = said_by_list(folder, "--out", folder / "none", "--bars=pruned80 tiny 0")
    assert said.startswith("pruned80-tiny-s0 is skipped: pruned of what?")


def test_little_that_pruning_leaves_is_no_rung(folder, tmp_path):
    benchmark = tmp_path / "HumanEval.jsonl"
    benchmark.write_text("{}")
    c = parse(ladder.Config, [str(folder / "ladder.toml"), f"--out={tmp_path}",
              f"--humaneval={benchmark}", "--bars=pruned80 tiny 0"], toml=True)  # fmt: skip
    plan = ladder.Plan(c, folder, "")
    plan.bar(*ladder.bars_of(c, folder))
    summary = tmp_path / "data" / "decontaminate_80" / "summary.json"
    summary.parent.mkdir(parents=True)
    skip = plan.jobs["tokens/pruned_80"].skip
    for left, skipped in ((ladder.MIN_DOCUMENTS, False), (ladder.MIN_DOCUMENTS - 1, True)):
        summary.write_text(json.dumps({"documents": left}))
        assert bool(skip()) == skipped


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bars=rawr tiny 0"], "no rung 'rawr'"),
        (["--bars=raw huge 0"], "there is no"),
        (["--bars=raw tiny"], "want RUNG SIZE SEED"),
        (["--bars=raw"], "want RUNG SIZE SEED"),
        (["--only=raw-tiny-s9"], "--only raw-tiny-s9: no such bar; want one of raw-tiny-s0"),
        (["--jobs=0"], "jobs is 0"),
    ],
)
def test_mistakes_are_named(folder, flags, message):
    with pytest.raises(UserError, match=message):
        ladder.bars_of(
            parse(ladder.Config, [str(folder / "ladder.toml"), *flags], toml=True), folder
        )


@pytest.mark.parametrize("flag", ["--prune_heldout=false", "--bars=raw tiny 3", "--raw_mb=0.5"])
def test_the_command_of_a_bar_makes_the_same(folder, flag):
    settings = str(folder / "ladder.toml")
    c = parse(ladder.Config, [settings, flag, "--jobs=2"], toml=True)
    *_, changed = ladder.again(c, folder).split(maxsplit=4)
    again = parse(ladder.Config, [settings, *shlex.split(changed)], toml=True)
    assert again == dataclasses.replace(c, jobs=1)


@pytest.mark.parametrize("name", ["ladder_cpu", "ladder_gpu"])
def test_the_ladders_that_come_with_it_are_sound(name, shared_eval):
    """Both sizes exist, and every rung has a bar but one that would be the same as another."""
    folder = ROOT / "experiments" / name
    c = parse(ladder.Config, [str(folder / "ladder.toml"), f"--mbpp={shared_eval}/mbpp.jsonl"],
              toml=True)  # fmt: skip
    bars = ladder.bars_of(c, folder)
    same = {"varied"} if "--forms=varied" in c.exercise_options else set()
    assert {bar.rung for bar in bars} == set(ladder.RUNGS) - same
    assert ladder.RUNGS.keys() == tools.ladder_scores.RUNGS.keys()
    plan = ladder.Plan(c, folder, ladder.again(c, folder))
    for bar in bars:
        plan.bar(bar)
    assert not plan.skipped
    known = set()
    for job in plan.jobs.values():  # each after those that it needs
        assert set(job.needs) <= known, job.name
        known.add(job.name)
    assert f"--mbpp={shared_eval}/mbpp.jsonl" in plan.command
